/* SPDX-License-Identifier: MIT */
/* The two large matrix products of a chunk on fp32 operands. Included by a level after its simd.h. */
#ifndef KDA_CPU_PRODUCTS_H
#define KDA_CPU_PRODUCTS_H

#include "cpu/prefill.h"
#include "cpu/unroll.h"

typedef float operand; /* queries_keys: [2 KDA_CHUNK][Kp]; keys_to_end: [KDA_CHUNK][Kp] */

enum { PRODUCTS_SIZE = 0 };

static inline void store_query_key(operand *row, int64_t c, vf x) { vf_store(row + c, x); }

/* Rows t and t + 1 of KR, t even. */
static inline void store_keys_to_end(operand *keys, int64_t Kp, int t, int64_t c, vf even, vf odd) {
    vf_store(keys + t * Kp + c, even);
    vf_store(keys + (t + 1) * Kp + c, odd);
}

static inline void refresh_products(struct kda_tile *tile, int64_t Kp) {
    (void)tile;
    (void)Kp;
}

/* product [rows][KDA_TILE] = queries_keys [rows][Kp] S [Kp][KDA_TILE] */
static inline void multiply_state(const operand *queries_keys, const struct kda_tile *tile, int64_t Kp,
                                  int rows, float *product) {
    for (int column = 0; column < KDA_TILE; column += PRODUCT_VECTORS * LANES)
        for (int row = 0; row < rows; row += PRODUCT_ROWS) {
            const float *a = queries_keys + row * Kp, *S = tile->S + column;
            vf sum[PRODUCT_ROWS][PRODUCT_VECTORS];
            UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) UNROLL for (int j = 0; j < PRODUCT_VECTORS; j++)
                sum[r][j] = vf_set1(0);
            for (int64_t c = 0; c < Kp; c++) {
                vf s[PRODUCT_VECTORS];
                UNROLL for (int j = 0; j < PRODUCT_VECTORS; j++) s[j] = vf_load(S + c * KDA_TILE + j * LANES);
                UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) {
                    vf x = vf_set1(a[r * Kp + c]);
                    UNROLL for (int j = 0; j < PRODUCT_VECTORS; j++) sum[r][j] = vf_fma(x, s[j], sum[r][j]);
                }
            }
            UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) UNROLL for (int j = 0; j < PRODUCT_VECTORS; j++)
                vf_store(product + (row + r) * KDA_TILE + column + j * LANES, sum[r][j]);
        }
}

/* to = diag(keep + carry) from + keys^T U, keys [rows][Kp], U [rows][KDA_TILE]; keeps NULL: 1. to may be from. */
static inline void carry_and_add(const float *carries, const float *keeps, const operand *keys, const float *U,
                                 int rows, int64_t Kp, const float *from, float *to) {
    for (int column = 0; column < KDA_TILE; column += PRODUCT_VECTORS * LANES)
        for (int64_t row = 0; row < Kp; row += PRODUCT_ROWS) {
            int64_t at = row * KDA_TILE + column;
            vf sum[PRODUCT_ROWS][PRODUCT_VECTORS];
            UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) {
                vf carry = vf_set1(carries[row + r]);
                UNROLL for (int j = 0; j < PRODUCT_VECTORS; j++) {
                    vf s = vf_load(from + at + r * KDA_TILE + j * LANES);
                    sum[r][j] = vf_fma(carry, s, keeps ? vf_mul(vf_set1(keeps[row + r]), s) : s);
                }
            }
            for (int t = 0; t < rows; t++) {
                vf u[PRODUCT_VECTORS];
                UNROLL for (int j = 0; j < PRODUCT_VECTORS; j++) u[j] =
                    vf_load(U + t * KDA_TILE + column + j * LANES);
                UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) {
                    vf k = vf_set1(keys[t * Kp + row + r]);
                    UNROLL for (int j = 0; j < PRODUCT_VECTORS; j++) sum[r][j] = vf_fma(k, u[j], sum[r][j]);
                }
            }
            UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) UNROLL for (int j = 0; j < PRODUCT_VECTORS; j++)
                vf_store(to + at + r * KDA_TILE + j * LANES, sum[r][j]);
        }
}

/* S <- S + diag(carry) S + KR^T U, U [KDA_CHUNK][KDA_TILE] */
static inline void update_state(const struct kda_chunk *chunk, const float *U, int64_t Kp,
                                struct kda_tile *tile) {
    carry_and_add(chunk->carry, NULL, chunk->keys_to_end, U, KDA_CHUNK, Kp, tile->S, tile->S);
}

#endif
