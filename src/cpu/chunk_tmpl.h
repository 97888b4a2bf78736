/* SPDX-License-Identifier: MIT */
/*
 * A chunk without its state, written once for all levels: the part of prefill and backward that they share. Included by their
 * templates after a level's simd.h and one of the products headers.
 *
 * No exponent in here is ever positive: inside a chunk, decays between two tokens are products of the tokens'
 * own exp(a) <= 1, so nothing overflows whatever the gate, and a hard reset (a = -inf) is exactly 0. Only the
 * carry of the state uses the exponential of a sum, kept as exp(sum) - 1 so that slow decay loses no digits.
 */
#ifndef KDA_CPU_CHUNK_TMPL_H
#define KDA_CPU_CHUNK_TMPL_H

#include "cpu/prefill.h"
#include "cpu/rows_tmpl.h"
#include "cpu/unroll.h"

#include <string.h>

/* ---- Prepare: what does not depend on the state ------------------------------------------------- */

/* Fp32 rows of one chunk, [KDA_CHUNK][Kp] each. */
struct rows {
    float *k;       /* normalised */
    float *q;       /* normalised, times scale */
    float *decay;   /* exp(a) */
    float *to_here; /* k decayed to the end of the block at hand */
    float beta[KDA_CHUNK] ALIGNED;
};

#define PREFETCH_ROW(tensor, batch, token, head, first, count)                                   \
    for (int64_t byte = 0; byte < (count) * (int64_t)kda_dtype_size((tensor).dtype); byte += 64) \
    __builtin_prefetch(kda_row(&(tensor), batch, token, head) +                                  \
                       (first) * (int64_t)kda_dtype_size((tensor).dtype) + byte)

/* Asks for the rows of q, k and g of `count` tokens. Always inlined, or gcc drops a call that only prefetches. */
__attribute__((always_inline)) static inline void
prefetch_keys(const struct kda_prefill *p, const struct kda_chain *chain, int64_t first, int64_t count) {
    int64_t batch = chain->tokens.batch, head = chain->head, key_head = head / (p->value_heads / p->heads);
    for (int64_t t = first; t < first + count && t < chain->end; t++) {
        int64_t token = chain->tokens.first + t;
        PREFETCH_ROW(p->q, batch, token, key_head, 0, p->key_dim);
        PREFETCH_ROW(p->k, batch, token, key_head, 0, p->key_dim);
        PREFETCH_ROW(p->g, batch, token, head, 0, p->key_dim);
    }
}

/* One row of q or k, normalised if asked for, times factor. */
static inline void load_key(const struct kda_prefill *p, const struct kda_tensor *t,
                            const struct kda_chain *chain, int64_t token, float factor, int64_t Kp,
                            float *row) {
    int64_t head = chain->head / (p->value_heads / p->heads);
    load_row(row, kda_row(t, chain->tokens.batch, chain->tokens.first + token, head), t->dtype, p->key_dim, Kp);
    if (p->qk_norm)
        factor *= inverse_norm(row, Kp);
    if (factor != 1)
        scale_row(row, Kp, factor);
}

/* decay [KDA_CHUNK][Kp] from g in place, and the chunk's carry. */
static inline void apply_gate(flash_kda_gate gate, const float *dt_bias, float A, float lower_bound, int64_t Kp,
                              int64_t count, float *decay, float *carry) {
    for (int64_t c = 0; c < Kp; c += LANES) {
        vf bias = vf_load(dt_bias + c), sum = vf_set1(0);
        for (int64_t t = 0; t < count; t++) {
            vf a = log_decay(gate, vf_load(decay + t * Kp + c), bias, A, lower_bound);
            sum = vf_add(sum, a);
            vf_store(decay + t * Kp + c, vf_exp(a));
        }
        for (int64_t t = count; t < KDA_CHUNK; t++)
            vf_store(decay + t * Kp + c, vf_set1(1));
        vf_store(carry + c, vf_expm1(sum));
    }
}

static inline void load_decay(const struct kda_prefill *p, const struct kda_chain *chain, int64_t Kp,
                              struct kda_chunk *chunk, float *decay) {
    float dt_bias[KDA_MAX_PADDED_K] ALIGNED = {0}, A = gate_factor(&p->base, chain->head);
    int64_t head = chain->head, first = chain->tokens.first + chunk->first;
    for (int64_t t = 0; t < chunk->count; t++)
        load_row(decay + t * Kp, kda_row(&p->g, chain->tokens.batch, first + t, head), p->g.dtype, p->key_dim,
                 Kp);
    if (p->dt_bias.data)
        load_row(dt_bias, p->dt_bias.data + head * p->dt_bias.stride[0], p->dt_bias.dtype, p->key_dim, Kp);
    /* One loop a gate: the choice is constant inside. */
    if (p->gate == FLASH_KDA_GATE_SOFTPLUS)
        apply_gate(FLASH_KDA_GATE_SOFTPLUS, dt_bias, A, 0, Kp, chunk->count, decay, chunk->carry);
    else if (p->gate == FLASH_KDA_GATE_SIGMOID)
        apply_gate(FLASH_KDA_GATE_SIGMOID, dt_bias, A, p->lower_bound, Kp, chunk->count, decay, chunk->carry);
    else
        apply_gate(FLASH_KDA_GATE_NONE, dt_bias, A, 0, Kp, chunk->count, decay, chunk->carry);
}

static inline void load_beta(const struct kda_prefill *p, const struct kda_chain *chain,
                             const struct kda_chunk *chunk, float *beta) {
    int64_t first = chain->tokens.first + chunk->first;
    for (int64_t t = 0; t < KDA_CHUNK; t++)
        beta[t] = t < chunk->count ? kda_load(kda_row(&p->beta, chain->tokens.batch, first + t, chain->head),
                                              p->beta.dtype, 0)
                                   : 0;
    apply_beta(p->beta_mode, KDA_CHUNK, beta);
}

/* KT and QT: every token's row decayed from the start of the chunk; KR: to its end. */
static inline void store_operands(const struct rows *rows, int64_t Kp, struct kda_chunk *chunk) {
    operand *queries_keys = chunk->queries_keys;
    for (int64_t c = 0; c < Kp; c += LANES) {
        vf from_start = vf_set1(1), to_end = vf_set1(1);
        for (int t = 0; t < KDA_CHUNK; t++) {
            int64_t i = t * Kp + c;
            from_start = vf_mul(from_start, vf_load(rows->decay + i));
            store_query_key(queries_keys + t * Kp, c, vf_mul(from_start, vf_load(rows->k + i)));
            store_query_key(queries_keys + (KDA_CHUNK + t) * Kp, c, vf_mul(from_start, vf_load(rows->q + i)));
        }
        for (int t = KDA_CHUNK - 2; t >= 0; t -= 2) {
            int64_t i = t * Kp + c;
            vf odd = vf_mul(to_end, vf_load(rows->k + i + Kp));
            to_end = vf_mul(to_end, vf_load(rows->decay + i + Kp));
            vf even = vf_mul(to_end, vf_load(rows->k + i));
            to_end = vf_mul(to_end, vf_load(rows->decay + i));
            store_keys_to_end(chunk->keys_to_end, Kp, t, c, even, odd);
        }
    }
}

enum { BLOCK = 4 }; /* tokens whose pairs take their decay one token at a time; pairs across blocks share it */

/* L and M between the tokens of one block; leaves its keys decayed to the block's end in to_here. The 16 sums
 * are, for each token j: M_jj, then L_ij and M_ij of each later token i. */
static inline void block_pairs(struct rows *rows, int64_t Kp, int block, struct kda_chunk *chunk) {
    const float *k = rows->k + block * Kp, *q = rows->q + block * Kp, *decay = rows->decay + block * Kp;
    vf sum[16];
    UNROLL for (int n = 0; n < 16; n++) sum[n] = vf_set1(0);
    for (int64_t c = 0; c < Kp; c += LANES) {
        int n = 0;
        UNROLL for (int j = 0; j < BLOCK; j++) {
            vf x = vf_load(k + j * Kp + c);
            sum[n] = vf_fma(vf_load(q + j * Kp + c), x, sum[n]);
            n++;
            UNROLL for (int i = j + 1; i < BLOCK; i++) {
                x = vf_mul(x, vf_load(decay + i * Kp + c));
                sum[n] = vf_fma(vf_load(k + i * Kp + c), x, sum[n]);
                sum[n + 1] = vf_fma(vf_load(q + i * Kp + c), x, sum[n + 1]);
                n += 2;
            }
            vf_store(rows->to_here + (block + j) * Kp + c, x);
        }
    }
    float sums[16];
    vf_sums(sum, sums);
    for (int j = 0, n = 0; j < BLOCK; j++) {
        chunk->M[(block + j) * KDA_CHUNK + block + j] = sums[n++];
        for (int i = j + 1; i < BLOCK; i++, n += 2) {
            chunk->L[(block + i) * KDA_CHUNK + block + j] = sums[n] * rows->beta[block + i];
            chunk->M[(block + i) * KDA_CHUNK + block + j] = sums[n + 1];
        }
    }
}

/* L and M of the tokens of one block against all tokens before it, whose keys end up decayed to its end. */
static inline void earlier_pairs(struct rows *rows, int64_t Kp, int block, struct kda_chunk *chunk) {
    float later[2 * BLOCK * KDA_MAX_PADDED_K] ALIGNED, through[KDA_MAX_PADDED_K] ALIGNED;
    for (int64_t c = 0; c < Kp; c += LANES) {
        vf decay = vf_set1(1);
        UNROLL for (int i = 0; i < BLOCK; i++) {
            int64_t at = (block + i) * Kp + c;
            decay = vf_mul(decay, vf_load(rows->decay + at));
            vf_store(later + i * Kp + c, vf_mul(decay, vf_load(rows->k + at)));
            vf_store(later + (BLOCK + i) * Kp + c, vf_mul(decay, vf_load(rows->q + at)));
        }
        vf_store(through + c, decay);
    }
    for (int j = 0; j < block; j += 2) {
        vf sum[16];
        UNROLL for (int n = 0; n < 16; n++) sum[n] = vf_set1(0);
        float *x = rows->to_here + j * Kp;
        for (int64_t c = 0; c < Kp; c += LANES) {
            vf x0 = vf_load(x + c), x1 = vf_load(x + Kp + c), decay = vf_load(through + c);
            UNROLL for (int i = 0; i < 2 * BLOCK; i++) {
                vf row = vf_load(later + i * Kp + c);
                sum[2 * i] = vf_fma(row, x0, sum[2 * i]);
                sum[2 * i + 1] = vf_fma(row, x1, sum[2 * i + 1]);
            }
            vf_store(x + c, vf_mul(decay, x0));
            vf_store(x + Kp + c, vf_mul(decay, x1));
        }
        float sums[16];
        vf_sums(sum, sums);
        for (int i = 0; i < BLOCK; i++)
            for (int n = 0; n < 2; n++) {
                chunk->L[(block + i) * KDA_CHUNK + j + n] = sums[2 * i + n] * rows->beta[block + i];
                chunk->M[(block + i) * KDA_CHUNK + j + n] = sums[2 * (BLOCK + i) + n];
            }
    }
}

/* L and M of all pairs of tokens. L is times rows->beta. */
static inline void find_pairs(struct rows *rows, int64_t Kp, struct kda_chunk *chunk) {
    for (int block = 0; block < KDA_CHUNK; block += BLOCK) {
        earlier_pairs(rows, Kp, block, chunk);
        block_pairs(rows, Kp, block, chunk);
    }
}

/* ---- States in memory -------------------------------------------------------------------------- */

/* S [Kp][KDA_TILE] from columns of a state in memory; zero if there is none. */
static inline void load_tile(const struct kda_prefill *p, struct kda_state state, const struct kda_tile_io *io,
                             float *S) {
    int64_t Kp = kda_padded_key_dim(p);
    float row[KDA_MAX_PADDED_K] ALIGNED;
    memset(S, 0, (size_t)(Kp * KDA_TILE) * sizeof *S);
    if (state.data && state.v_first)
        for (int64_t j = 0; j < io->columns; j++) {
            load_row(row, state.data + (io->column + j) * state.stride, state.dtype, p->key_dim, Kp);
            for (int64_t c = 0; c < Kp; c++)
                S[c * KDA_TILE + j] = row[c];
        }
    else if (state.data)
        for (int64_t c = 0; c < p->key_dim; c++)
            load_row(S + c * KDA_TILE,
                     state.data + c * state.stride + io->column * (int64_t)kda_dtype_size(state.dtype),
                     state.dtype, io->columns, KDA_TILE);
}

static inline void store_tile(const struct kda_prefill *p, struct kda_state state, const struct kda_tile_io *io,
                              const float *S) {
    float row[KDA_MAX_PADDED_K] ALIGNED;
    if (state.v_first)
        for (int64_t j = 0; j < io->columns; j++) {
            for (int64_t c = 0; c < p->key_dim; c++)
                row[c] = S[c * KDA_TILE + j];
            store_row(state.data + (io->column + j) * state.stride, state.dtype, row, p->key_dim);
        }
    else
        for (int64_t c = 0; c < p->key_dim; c++)
            store_row(state.data + c * state.stride + io->column * (int64_t)kda_dtype_size(state.dtype),
                      state.dtype, S + c * KDA_TILE, io->columns);
}

#endif
