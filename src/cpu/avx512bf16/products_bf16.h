/* SPDX-License-Identifier: MIT */
/* The two large matrix products of a chunk by AVX512-BF16 dot products of pairs: bf16 operands, fp32 sums. */
#ifndef KDA_CPU_PRODUCTS_H
#define KDA_CPU_PRODUCTS_H

#include "cpu/prefill.h"
#include "cpu/unroll.h"

/* queries_keys: [2 KDA_CHUNK][Kp]; keys_to_end: [KDA_CHUNK / 2][Kp][2], pairs of tokens;
 * kda_tile.products: [Kp / 2][KDA_TILE][2], pairs of channels. */
typedef uint16_t operand;

enum { PRODUCTS_SIZE = sizeof(uint16_t) };

static inline void store_query_key(operand *row, int64_t c, vf x) {
    _mm256_store_si256((__m256i *)(void *)(row + c), (__m256i)_mm512_cvtneps_pbh(x));
}

/* [first 0, second 0, first 1, second 1, ...] rounded to bf16. */
static inline __m512i interleave(vf first, vf second) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

static inline __m512bh load_pairs(const operand *p) { return (__m512bh)_mm512_load_si512(p); }

/* One pair in every lane. */
static inline __m512bh set1_pair(const operand *p) {
    int pair;
    memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* Rows t and t + 1 of KR, t even. */
static inline void store_keys_to_end(operand *keys, int64_t Kp, int t, int64_t c, vf even, vf odd) {
    _mm512_store_si512(keys + t * Kp + 2 * c, interleave(even, odd));
}

static inline void refresh_products(struct kda_tile *tile, int64_t Kp) {
    operand *products = tile->products;
    for (int64_t c = 0; c < Kp; c += 2)
        for (int j = 0; j < KDA_TILE; j += LANES)
            _mm512_store_si512(
                products + c * KDA_TILE + 2 * j,
                interleave(vf_load(tile->S + c * KDA_TILE + j), vf_load(tile->S + (c + 1) * KDA_TILE + j)));
}

enum { VECTORS = KDA_TILE / LANES };

/* product [rows][KDA_TILE] = queries_keys [rows][Kp] S [Kp][KDA_TILE] */
static inline void multiply_state(const operand *queries_keys, const struct kda_tile *tile, int64_t Kp,
                                  int rows, float *product) {
    const operand *S = tile->products;
    for (int row = 0; row < rows; row += PRODUCT_ROWS) {
        const operand *a = queries_keys + row * Kp;
        vf sum[PRODUCT_ROWS][VECTORS];
        UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) UNROLL for (int j = 0; j < VECTORS; j++) sum[r][j] =
            vf_set1(0);
        for (int64_t c = 0; c < Kp; c += 2) {
            __m512bh s[VECTORS];
            UNROLL for (int j = 0; j < VECTORS; j++) s[j] = load_pairs(S + c * KDA_TILE + 2 * j * LANES);
            UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) {
                __m512bh x = set1_pair(a + r * Kp + c);
                UNROLL for (int j = 0; j < VECTORS; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], x, s[j]);
            }
        }
        UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) UNROLL for (int j = 0; j < VECTORS; j++)
            vf_store(product + (row + r) * KDA_TILE + j * LANES, sum[r][j]);
    }
}

/* S <- S + diag(carry) S + KR^T U, U [KDA_CHUNK][KDA_TILE]; writes both forms of S. */
static inline void update_state(const struct kda_chunk *chunk, const float *U, int64_t Kp,
                                struct kda_tile *tile) {
    const operand *keys = chunk->keys_to_end;
    operand *products = tile->products;
    __m512i u[KDA_CHUNK / 2][VECTORS];
    for (int t = 0; t < KDA_CHUNK; t += 2)
        for (int j = 0; j < VECTORS; j++)
            u[t / 2][j] =
                interleave(vf_load(U + t * KDA_TILE + j * LANES), vf_load(U + (t + 1) * KDA_TILE + j * LANES));
    for (int64_t row = 0; row < Kp; row += PRODUCT_ROWS) {
        float *S = tile->S + row * KDA_TILE;
        vf sum[PRODUCT_ROWS][VECTORS];
        UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) {
            vf carry = vf_set1(chunk->carry[row + r]);
            UNROLL for (int j = 0; j < VECTORS; j++) {
                vf s = vf_load(S + r * KDA_TILE + j * LANES);
                sum[r][j] = vf_fma(carry, s, s);
            }
        }
        for (int t = 0; t < KDA_CHUNK; t += 2) {
            UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) {
                __m512bh k = set1_pair(keys + t * Kp + 2 * (row + r));
                UNROLL for (int j = 0; j < VECTORS; j++) sum[r][j] =
                    _mm512_dpbf16_ps(sum[r][j], k, (__m512bh)u[t / 2][j]);
            }
        }
        UNROLL for (int r = 0; r < PRODUCT_ROWS; r++) UNROLL for (int j = 0; j < VECTORS; j++)
            vf_store(S + r * KDA_TILE + j * LANES, sum[r][j]);
        UNROLL for (int r = 0; r < PRODUCT_ROWS; r += 2) UNROLL for (int j = 0; j < VECTORS; j++)
            _mm512_store_si512(products + (row + r) * KDA_TILE + 2 * j * LANES,
                               interleave(sum[r][j], sum[r + 1][j]));
    }
}

#endif
