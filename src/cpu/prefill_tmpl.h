/* SPDX-License-Identifier: MIT */
/*
 * The kernels of prefill, written once for all levels. A level's prefill.c includes its simd.h, one of the
 * products headers, and then this file, which defines the static functions that its table of kernels names.
 */
#include "api/convolution.h"
#include "cpu/chunk_tmpl.h"
#include "cpu/fused_tmpl.h"

/* ---- Before: convolutions ------------------------------------------------------------------------ */

/* rows [KDA_CHUNK][padded] = `count` elements, from `first` on, of a head's tokens of the chunk, convolved. inputs:
 * scratch for KDA_CONV_PAST rows more. */
static inline void convolve(const struct kda_chain *chain, int i, const struct kda_tensor *x, int64_t head,
                            const struct kda_chunk *chunk, int64_t first, int64_t count, int64_t padded,
                            float *inputs, float *rows) {
    const struct kda_convolution *conv = kda_convolution_of(chain->fused->args, i);
    const struct kda_sequence *s = &chain->tokens;
    int64_t size = (int64_t)kda_dtype_size(x->dtype), stride = chain->fused->padded[i];
    for (int64_t t = -KDA_CONV_PAST; t < chunk->count; t++) {
        float *row = inputs + (KDA_CONV_PAST + t) * padded;
        if (chunk->first + t >= 0)
            load_row(row, kda_row(x, s->batch, s->first + chunk->first + t, head) + first * size, x->dtype,
                     count, padded);
        else
            for (int64_t c = 0; c < padded; c++)
                row[c] = c < count ? kda_conv_input(x, conv, s, chunk->first + t, head, first + c) : 0;
    }
    convolve_rows(inputs, chain->fused->taps[i] + head * (KDA_CONV_WIDTH + 1) * stride + first, stride,
                  chunk->count, padded, rows);
}

/* The same for rows of q or k, as load_key leaves them. */
static inline void convolve_keys(const struct kda_prefill *p, const struct kda_chain *chain, int i,
                                 const struct kda_chunk *chunk, float factor, int64_t Kp, float *inputs,
                                 float *rows) {
    convolve(chain, i, i == 0 ? &p->q : &p->k, chain->head / (p->value_heads / p->heads), chunk, 0, p->key_dim,
             Kp, inputs, rows);
    for (int64_t t = 0; t < chunk->count; t++) {
        float *row = rows + t * Kp, scale = p->qk_norm ? factor * inverse_norm(row, Kp) : factor;
        if (scale != 1)
            scale_row(row, Kp, scale);
    }
}

static inline bool is_convolved(const struct kda_chain *chain, int i) {
    return chain->fused && chain->fused->taps[i];
}

/* ---- Prepare ----------------------------------------------------------------------------------- */

/* A token's decay makes a state larger by its largest factor above 1, its delta rule, I - beta k k^T, by |1 - beta |k|^2|
 * where that is above 1. NaN in any of them gives NaN. */
static float log_growth(const struct rows *rows, int64_t Kp, int64_t count) {
    float growth = 0;
    for (int64_t t = 0; t < count; t++) {
        const float *k = rows->k + t * Kp, *decay = rows->decay + t * Kp;
        float squares = 0, excess = 0;
        for (int64_t c = 0; c < Kp; c++) {
            squares += k[c] * k[c];
            excess = decay[c] <= 1 + excess ? excess : decay[c] - 1;
        }
        float factor = fabsf(1 - rows->beta[t] * squares);
        growth += (factor <= 1 ? 0 : logf(factor)) + log1pf(excess);
    }
    return growth;
}

static void prepare(const struct kda_prefill *p, const struct kda_chain *chain, struct kda_chunk *chunk,
                    void *scratch) {
    int64_t Kp = kda_padded_key_dim(p), missing = (KDA_CHUNK - chunk->count) * Kp, all = KDA_CHUNK * Kp;
    float *memory = scratch;
    struct rows rows = {.k = memory, .q = memory + all, .decay = memory + 2 * all, .to_here = memory + 3 * all};
    for (int64_t t = 0; t < chunk->count; t++) {
        if (!chain->prepares_next) /* where threads take turns, this one's next chunk is about two on */
            prefetch_keys(p, chain, chunk->first + 2 * KDA_CHUNK + t, 1);
        if (!is_convolved(chain, 1))
            load_key(p, &p->k, chain, chunk->first + t, 1, Kp, rows.k + t * Kp);
        if (!is_convolved(chain, 0))
            load_key(p, &p->q, chain, chunk->first + t, p->scale, Kp, rows.q + t * Kp);
    }
    if (is_convolved(chain, 1))
        convolve_keys(p, chain, 1, chunk, 1, Kp, memory + 4 * all, rows.k);
    if (is_convolved(chain, 0))
        convolve_keys(p, chain, 0, chunk, p->scale, Kp, memory + 4 * all, rows.q);
    memset(rows.k + chunk->count * Kp, 0, (size_t)missing * sizeof *rows.k);
    memset(rows.q + chunk->count * Kp, 0, (size_t)missing * sizeof *rows.q);
    load_decay(p, chain, Kp, chunk, rows.decay);
    load_beta(p, chain, chunk, rows.beta);
    memcpy(chunk->beta, rows.beta, sizeof rows.beta);
    if (chain->bounds_growth)
        chunk->growth = log_growth(&rows, Kp, chunk->count);
    store_operands(&rows, Kp, chunk);
    find_pairs(&rows, Kp, chunk);
}

/* ---- Apply: one chunk on one tile of the state -------------------------------------------------- */

/* U by forward substitution, in place of KT S in the first half of `product`; O in the second half, from QT S. */
static inline void solve(const struct kda_chunk *chunk, const float *values, bool outputs, float *product) {
    for (int column = 0; column < KDA_TILE; column += LANES) {
        vf u[KDA_CHUNK];
        UNROLL for (int i = 0; i < KDA_CHUNK; i++) {
            float *row = product + i * KDA_TILE + column;
            vf x =
                vf_mul(vf_set1(chunk->beta[i]), vf_sub(vf_load(values + i * KDA_TILE + column), vf_load(row)));
            UNROLL for (int j = 0; j < i; j++) x = vf_fnma(vf_set1(chunk->L[i * KDA_CHUNK + j]), u[j], x);
            u[i] = x;
            vf_store(row, x);
        }
        if (!outputs)
            continue;
        UNROLL for (int i = 0; i < KDA_CHUNK; i++) {
            float *row = product + (KDA_CHUNK + i) * KDA_TILE + column;
            vf o = vf_load(row);
            UNROLL for (int j = 0; j <= i; j++) o = vf_fma(vf_set1(chunk->M[i * KDA_CHUNK + j]), u[j], o);
            vf_store(row, o);
        }
    }
}

/* Asks for this tile's values of the next chunk and for its share of the tokens that will be prepared next: the rows
 * of one head lie apart, where the hardware does not foresee them. Always inlined, or gcc drops a call that only
 * prefetches. */
__attribute__((always_inline)) static inline void prefetch_next(const struct kda_prefill *p,
                                                                const struct kda_chain *chain,
                                                                const struct kda_chunk *chunk,
                                                                const struct kda_tile_io *io) {
    int64_t tiles = kda_tiles(p->value_dim), tile = io->column / KDA_TILE, batch = chain->tokens.batch;
    int64_t head = chain->head, first = chunk->first + chunk->count;
    for (int64_t t = first; io->has_values && t < first + KDA_CHUNK && t < chain->end; t++)
        PREFETCH_ROW(p->v, batch, chain->tokens.first + t, head, io->column, io->columns);
    int64_t share = tile * KDA_CHUNK / tiles, end = (tile + 1) * KDA_CHUNK / tiles;
    if (chain->prepares_next)
        prefetch_keys(p, chain, first + share, end - share);
}

static __attribute__((noinline)) void load_convolved(const struct kda_prefill *p, const struct kda_chain *chain,
                                                     const struct kda_chunk *chunk,
                                                     const struct kda_tile_io *io, float *values) {
    float inputs[(KDA_CONV_PAST + KDA_CHUNK) * KDA_TILE] ALIGNED;
    convolve(chain, 2, &p->v, chain->head, chunk, io->column, io->columns, KDA_TILE, inputs, values);
}

static void apply(const struct kda_prefill *p, const struct kda_chain *chain, const struct kda_chunk *chunk,
                  const struct kda_tile_io *io, struct kda_tile *tile) {
    int64_t Kp = kda_padded_key_dim(p), first = chain->tokens.first + chunk->first, batch = chain->tokens.batch;
    float values[KDA_CHUNK * KDA_TILE] ALIGNED, product[2 * KDA_CHUNK * KDA_TILE] ALIGNED;
    int64_t given = io->has_values ? chunk->count : 0;
    if (given && is_convolved(chain, 2))
        load_convolved(p, chain, chunk, io, values);
    for (int64_t t = 0; t < given && !is_convolved(chain, 2); t++)
        load_row(values + t * KDA_TILE,
                 kda_row(&p->v, batch, first + t, chain->head) +
                     io->column * (int64_t)kda_dtype_size(p->v.dtype),
                 p->v.dtype, io->columns, KDA_TILE);
    memset(values + given * KDA_TILE, 0, (size_t)(KDA_CHUNK - given) * KDA_TILE * sizeof *values);

    prefetch_next(p, chain, chunk, io);
    multiply_state(chunk->queries_keys, tile, Kp, io->has_outputs ? 2 * KDA_CHUNK : KDA_CHUNK, product);
    solve(chunk, values, io->has_outputs, product);
    for (int64_t t = 0; io->outputs && t < chunk->count; t++)
        memcpy(io->outputs + t * chain->fused->padded[2] + io->column, product + (KDA_CHUNK + t) * KDA_TILE,
               KDA_TILE * sizeof(float));
    for (int64_t t = 0; io->has_outputs && !io->outputs && t < chunk->count; t++)
        store_row(kda_row(&p->out, batch, first + t, chain->head) +
                      io->column * (int64_t)kda_dtype_size(p->out.dtype),
                  p->out.dtype, product + (KDA_CHUNK + t) * KDA_TILE, io->columns);
    update_state(chunk, product, Kp, tile);
}

/* ---- After: the norm ----------------------------------------------------------------------------- */

static void norm(const struct kda_prefill *p, const struct kda_chain *chain, const struct kda_chunk *chunk,
                 float *outputs) {
    const struct kda_fused *fused = chain->fused->args;
    const struct norm norm = {.weight = chain->fused->norm_weight,
                              .fused = fused,
                              .dim = p->value_dim,
                              .padded = chain->fused->padded[2]};
    int64_t first = chain->tokens.first + chunk->first, batch = chain->tokens.batch, head = chain->head;
    for (int64_t t = 0; t < chunk->count; t++) {
        float *row = outputs + t * norm.padded;
        if (fused->norm_gate.data && chunk->first + t + KDA_CHUNK < chain->end) /* of the next chunk */
            PREFETCH_ROW(fused->norm_gate, batch, first + t + KDA_CHUNK, head, 0, p->value_dim);
        norm_row(&norm, fused->norm_gate.data ? kda_row(&fused->norm_gate, batch, first + t, head) : NULL, row);
        store_row(kda_row(&p->out, batch, first + t, head), p->out.dtype, row, p->value_dim);
    }
}

/* ---- States in memory -------------------------------------------------------------------------- */

static void refresh(const struct kda_prefill *p, struct kda_tile *tile) {
    refresh_products(tile, kda_padded_key_dim(p));
}

static void load_state(const struct kda_prefill *p, struct kda_state state, const struct kda_tile_io *io,
                       struct kda_tile *tile) {
    load_tile(p, state, io, tile->S);
    refresh(p, tile);
}

static void store_state(const struct kda_prefill *p, struct kda_state state, const struct kda_tile_io *io,
                        const struct kda_tile *tile) {
    store_tile(p, state, io, tile->S);
}

static void compose(int64_t key_dim, const struct kda_tile *A, const struct kda_tile *from,
                    struct kda_tile *to) {
    for (int64_t row = 0; row < key_dim; row++)
        for (int64_t c = 0; c < key_dim; c++) {
            vf a = vf_set1(A[c / KDA_TILE].S[row * KDA_TILE + c % KDA_TILE]);
            for (int j = 0; j < KDA_TILE; j += LANES) {
                float *S = to->S + row * KDA_TILE + j;
                vf_store(S, vf_fma(a, vf_load(from->S + c * KDA_TILE + j), vf_load(S)));
            }
        }
    refresh_products(to, kda_pad_key_dim(key_dim));
}

/* The table of a level's prefill.c. */
#define KDA_KERNELS                                                                                          \
    {                                                                                                        \
        .operand_size = sizeof(operand), .products_size = PRODUCTS_SIZE, .prepare = prepare, .apply = apply, \
        .norm = norm, .load_state = load_state, .refresh = refresh, .store_state = store_state,              \
        .compose = compose,                                                                                  \
    }
