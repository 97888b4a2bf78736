/* SPDX-License-Identifier: MIT */
/*
 * The kernel of decode, written once for all levels. A level's decode.c includes its simd.h and then this file.
 *
 * The state is read and written once, however many tokens there are: a few of its rows or columns stay in the core's own
 * cache while all tokens pass. With D = diag(exp(a)), u = beta (v - S^T D k) and o = S^T D q + u (k . q), so that both sums over S
 * come from one pass. The next one makes it S + ((D - 1) S + k u^T): rounded once a token, as that of a slow decay goes the same
 * way for thousands of tokens. A state that comes in 16 bits, whose own rounding is larger, is decayed in the first pass.
 */
#include "api/convolution.h"
#include "cpu/decode.h"
#include "cpu/fused_tmpl.h"
#include "cpu/rows_tmpl.h"
#include "cpu/unroll.h"

#include <string.h>

enum {
    TOKENS = FLASH_KDA_MAX_DECODE_TOKENS,
    ROWS = 8,                             /* V first: values worked together */
    VALUES = ROWS > LANES ? ROWS : LANES, /* these padded to whole vectors */
    COLUMN_VECTORS = 4,                   /* K first: vectors of values worked together */
    COLUMNS = COLUMN_VECTORS * LANES,
};

/* The tokens of one head. Kp is K padded with zeros to whole vectors. */
struct tokens {
    int64_t Kp;
    float *k;       /* normalised */
    float *decay;   /* exp(a) - 1, which keeps its digits where decay is slow */
    float *dk, *dq; /* k, and q normalised and times scale, decayed */
    float beta[TOKENS] ALIGNED;
    float kq[TOKENS]; /* k . q */
};

/* ---- Scratch ------------------------------------------------------------------------------------- */

/* What a part needs besides its tokens. */
struct scratch {
    int64_t Kp, Vp;                       /* padded to whole vectors */
    int64_t width;                        /* of a row of values */
    int64_t channels;                     /* of a row of a convolution's inputs */
    float *k, *dk, *dq, *decay, *dt_bias; /* [tokens][Kp] each, and [Kp] */
    float *S;                             /* a block of the state */
    float *values;                        /* [tokens][width] */
    float *inputs, *taps; /* with a convolution: [KDA_CONV_PAST + tokens] and [KDA_CONV_WIDTH + 1][channels] */
    float *outputs, *weight; /* with a norm: [tokens][Vp], and one [Vp] */
    size_t used;
};

/* The next `count` floats of memory, or only counts if that is NULL. */
static float *take(struct scratch *scratch, char *memory, int64_t count) {
    float *taken = memory ? (float *)(void *)(memory + scratch->used) : NULL;
    scratch->used += ((size_t)count * sizeof(float) + 63) / 64 * 64;
    return taken;
}

static int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* The one place where the layout of scratch is written. */
static struct scratch lay_out(const struct kda_decode *d, char *memory) {
    const struct kda_tokens *p = &d->tokens;
    bool v_first = p->state_layout == FLASH_KDA_STATE_V_FIRST;
    int64_t T = d->max_tokens;
    struct scratch s = {.Kp = whole_vectors(p->key_dim),
                        .Vp = whole_vectors(p->value_dim),
                        .width = v_first ? (int64_t)VALUES : (int64_t)COLUMNS};
    s.channels = s.Kp > s.width ? s.Kp : s.width;
    s.k = take(&s, memory, T * s.Kp);
    s.dk = take(&s, memory, T * s.Kp);
    s.dq = take(&s, memory, T * s.Kp);
    s.decay = take(&s, memory, T * s.Kp);
    s.dt_bias = take(&s, memory, s.Kp);
    s.S = take(&s, memory, v_first ? ROWS * s.Kp : p->key_dim * COLUMNS);
    s.values = take(&s, memory, T * s.width);
    if (kda_has_convolution(&d->fused)) {
        s.inputs = take(&s, memory, (KDA_CONV_PAST + T) * s.channels);
        s.taps = take(&s, memory, (KDA_CONV_WIDTH + 1) * s.channels);
    }
    if (d->norm_weight.data) {
        s.outputs = take(&s, memory, T * s.Vp);
        s.weight = take(&s, memory, s.Vp);
    }
    return s;
}

static size_t scratch_size(const struct kda_decode *d) { return lay_out(d, NULL).used; }

/* ---- Before: convolutions ------------------------------------------------------------------------ */

/* rows [length][padded] = elements first .. first + count - 1 of a head of q, k or v, through the convolution and SiLU. */
static void convolve(const struct kda_tensor *x, const struct kda_convolution *conv,
                     const struct kda_part *part, int64_t head, int64_t first, int64_t count, int64_t padded,
                     const struct scratch *scratch, float *rows) {
    const struct kda_sequence *s = &part->tokens;
    float *inputs = scratch->inputs, *taps = scratch->taps;
    memset(taps, 0, (size_t)((KDA_CONV_WIDTH + 1) * padded) * sizeof *taps);
    for (int64_t c = 0; c < count; c++)
        kda_conv_taps(conv, head * x->shape[3] + first + c, padded, taps + c);
    for (int64_t i = 0; i < KDA_CONV_PAST; i++)
        for (int64_t c = 0; c < padded; c++)
            inputs[i * padded + c] =
                c < count ? kda_conv_input(x, conv, s, i - KDA_CONV_PAST, head, first + c) : 0;
    for (int64_t t = 0; t < s->length; t++)
        load_row(inputs + (KDA_CONV_PAST + t) * padded,
                 kda_row(x, s->batch, s->first + t, head) + first * (int64_t)kda_dtype_size(x->dtype), x->dtype,
                 count, padded);
    convolve_rows(inputs, taps, padded, s->length, padded, rows);
}

/* The same rows, convolved if they have a convolution. */
static inline void load_inputs(const struct kda_tensor *x, const struct kda_convolution *conv,
                               const struct kda_part *part, int64_t head, int64_t first, int64_t count,
                               int64_t padded, const struct scratch *scratch, float *rows) {
    const struct kda_sequence *s = &part->tokens;
    if (conv->weight.data) {
        convolve(x, conv, part, head, first, count, padded, scratch, rows);
        return;
    }
    for (int64_t t = 0; t < s->length; t++)
        load_row(rows + t * padded,
                 kda_row(x, s->batch, s->first + t, head) + first * (int64_t)kda_dtype_size(x->dtype), x->dtype,
                 count, padded);
}

/* ---- What does not depend on the state ---------------------------------------------------------- */

/* Rows of q or k, normalised if asked for, times factor. */
static inline void load_keys(const struct kda_tokens *p, const struct kda_tensor *t,
                             const struct kda_convolution *conv, const struct kda_part *part, float factor,
                             const struct scratch *scratch, float *rows) {
    int64_t Kp = scratch->Kp;
    load_inputs(t, conv, part, part->head / (p->value_heads / p->heads), 0, p->key_dim, Kp, scratch, rows);
    for (int64_t token = 0; token < part->tokens.length; token++) {
        float *row = rows + token * Kp, scale = p->qk_norm ? factor * inverse_norm(row, Kp) : factor;
        if (scale != 1)
            scale_row(row, Kp, scale);
    }
}

/* decay [count][Kp] from g in place. */
static inline void apply_gate(flash_kda_gate gate, const float *dt_bias, float A, float lower_bound, int64_t Kp,
                              int64_t count, float *decay) {
    for (int64_t c = 0; c < Kp; c += LANES)
        for (int64_t t = 0; t < count; t++)
            vf_store(decay + t * Kp + c, vf_expm1(log_decay(gate, vf_load(decay + t * Kp + c),
                                                            vf_load(dt_bias + c), A, lower_bound)));
}

static inline void load_decay(const struct kda_tokens *p, const struct kda_part *part,
                              const struct scratch *scratch) {
    int64_t Kp = scratch->Kp;
    float *decay = scratch->decay, *dt_bias = scratch->dt_bias, A = gate_factor(p, part->head);
    const struct kda_sequence *s = &part->tokens;
    memset(dt_bias, 0, (size_t)Kp * sizeof *dt_bias);
    for (int64_t t = 0; t < s->length; t++)
        load_row(decay + t * Kp, kda_row(&p->g, s->batch, s->first + t, part->head), p->g.dtype, p->key_dim,
                 Kp);
    if (p->dt_bias.data)
        load_row(dt_bias, p->dt_bias.data + part->head * p->dt_bias.stride[0], p->dt_bias.dtype, p->key_dim,
                 Kp);
    /* One loop a gate: the choice is constant inside. */
    if (p->gate == FLASH_KDA_GATE_SOFTPLUS)
        apply_gate(FLASH_KDA_GATE_SOFTPLUS, dt_bias, A, 0, Kp, s->length, decay);
    else if (p->gate == FLASH_KDA_GATE_SIGMOID)
        apply_gate(FLASH_KDA_GATE_SIGMOID, dt_bias, A, p->lower_bound, Kp, s->length, decay);
    else
        apply_gate(FLASH_KDA_GATE_NONE, dt_bias, A, 0, Kp, s->length, decay);
}

static inline void load_tokens(const struct kda_decode *d, const struct kda_part *part,
                               const struct scratch *scratch, struct tokens *x) {
    const struct kda_tokens *p = &d->tokens;
    const struct kda_sequence *s = &part->tokens;
    int64_t Kp = x->Kp = scratch->Kp;
    x->k = scratch->k;
    x->dk = scratch->dk;
    x->dq = scratch->dq;
    x->decay = scratch->decay;
    load_decay(p, part, scratch);
    load_keys(p, &p->k, &d->k_conv, part, 1, scratch, x->k);
    load_keys(p, &p->q, &d->q_conv, part, p->scale, scratch, x->dq);
    for (int64_t t = 0; t < s->length; t++)
        x->kq[t] = dot(x->k + t * Kp, x->dq + t * Kp, Kp);
    for (int64_t i = 0; i < s->length * Kp; i += LANES) {
        vf decay = vf_load(x->decay + i), k = vf_load(x->k + i), q = vf_load(x->dq + i);
        vf_store(x->dk + i, vf_fma(k, decay, k));
        vf_store(x->dq + i, vf_fma(q, decay, q));
    }
    for (int64_t t = 0; t < TOKENS; t++)
        x->beta[t] = t < s->length
                         ? kda_load(kda_row(&p->beta, s->batch, s->first + t, part->head), p->beta.dtype, 0)
                         : 0;
    apply_beta(p->beta_mode, TOKENS, x->beta);
}

/* ---- Outputs, and the norm behind them ----------------------------------------------------------- */

/* With a norm, which needs whole rows, they wait in the scratch. */
static inline void store_outputs(const struct kda_decode *d, const struct kda_part *part, int64_t token,
                                 int64_t first, int64_t count, const float *o, const struct scratch *scratch) {
    const struct kda_tokens *p = &d->tokens;
    const struct kda_sequence *s = &part->tokens;
    if (d->norm_weight.data)
        memcpy(scratch->outputs + token * scratch->Vp + first, o, (size_t)count * sizeof *o);
    else if (p->out.data)
        store_row(kda_row(&p->out, s->batch, s->first + token, part->head) +
                      first * (int64_t)kda_dtype_size(p->out.dtype),
                  p->out.dtype, o, count);
}

static void store_normed(const struct kda_decode *d, const struct kda_part *part,
                         const struct scratch *scratch) {
    const struct kda_tokens *p = &d->tokens;
    const struct kda_sequence *s = &part->tokens;
    int64_t V = p->value_dim, Vp = scratch->Vp;
    const struct norm norm = {.weight = scratch->weight, .fused = &d->fused, .dim = V, .padded = Vp};
    load_row(scratch->weight, d->norm_weight.data, d->norm_weight.dtype, V, Vp);
    for (int64_t t = 0; t < s->length; t++) {
        float *row = scratch->outputs + t * Vp;
        norm_row(&norm, d->norm_gate.data ? kda_row(&d->norm_gate, s->batch, s->first + t, part->head) : NULL,
                 row);
        store_row(kda_row(&p->out, s->batch, s->first + t, part->head), p->out.dtype, row, V);
    }
}

/* ---- Rows of a state, in memory or in S ----------------------------------------------------------- */

#define INLINE __attribute__((always_inline)) static inline

/* LANES elements of a row that may lie anywhere. */
INLINE vf load_lanes(const char *row, enum kda_dtype dtype, int64_t c) {
    const uint16_t *halves = (const uint16_t *)(const void *)row + c;
    return dtype == KDA_F32    ? vf_loadu((const float *)(const void *)row + c)
           : dtype == KDA_BF16 ? vf_load_bf16(halves)
                               : vf_load_f16(halves);
}

INLINE void store_lanes(char *row, enum kda_dtype dtype, int64_t c, vf x) {
    uint16_t *halves = (uint16_t *)(void *)row + c;
    if (dtype == KDA_F32)
        vf_storeu((float *)(void *)row + c, x);
    else if (dtype == KDA_BF16)
        vf_store_bf16(halves, x);
    else
        vf_store_f16(halves, x);
}

/* Rows that follow each other: a block of a state, or of S. */
struct rows {
    char *data;
    int64_t stride; /* bytes */
    enum kda_dtype dtype;
};

static inline struct rows rows_of(float *S, int64_t row) {
    return (struct rows){(char *)S, row * (int64_t)sizeof *S, KDA_F32};
}

static inline struct rows rows_at(struct kda_state state, int64_t row, int64_t column) {
    return (struct rows){state.data + row * state.stride + column * (int64_t)kda_dtype_size(state.dtype),
                         state.stride, state.dtype};
}

static inline void copy_in(float *S, int64_t row, struct rows from, int64_t rows, int64_t count) {
    for (int64_t r = 0; r < rows; r++)
        load_row(S + r * row, from.data + r * from.stride, from.dtype, count, row);
}

static inline void copy_out(const float *S, int64_t row, struct rows to, int64_t rows, int64_t count) {
    for (int64_t r = 0; r < rows; r++)
        store_row(to.data + r * to.stride, to.dtype, S + r * row, count);
}

/* The same function for each dtype, which is constant inside. */
#define BY_DTYPE(function, which, ...)       \
    do {                                     \
        if ((which) == KDA_F32)              \
            function(__VA_ARGS__, KDA_F32);  \
        else if ((which) == KDA_BF16)        \
            function(__VA_ARGS__, KDA_BF16); \
        else                                 \
            function(__VA_ARGS__, KDA_F16);  \
    } while (0)

/* ---- V first: a row of S^T [V][K] a value --------------------------------------------------------- */

/* sums[2 r] = from_r . D k, sums[2 r + 1] = from_r . D q; from 16 bits, S_r = D from_r. Row after row, as they lie in memory: read
 * side by side they took nearly twice the time where states are in no cache. */
INLINE void sum_rows(const struct tokens *x, int64_t t, struct rows from, float *S, float *sums,
                     enum kda_dtype dtype) {
    const int64_t Kp = x->Kp; /* which the stores might change otherwise */
    const float *dk = x->dk + t * Kp, *dq = x->dq + t * Kp, *decay = x->decay + t * Kp;
    vf all[2 * ROWS];
    for (int r = 0; r < ROWS; r++) {
        vf Sk = vf_set1(0), Sq = vf_set1(0);
        for (int64_t c = 0; c < Kp; c += LANES) {
            vf s = load_lanes(from.data + r * from.stride, dtype, c);
            if (dtype != KDA_F32)
                vf_store(S + r * Kp + c, vf_fma(s, vf_load(decay + c), s));
            Sk = vf_fma(s, vf_load(dk + c), Sk);
            Sq = vf_fma(s, vf_load(dq + c), Sq);
        }
        all[2 * r] = Sk;
        all[2 * r + 1] = Sq;
    }
    vf_sums(all, sums);
}

/* to_r = S_r + ((D - 1) S_r + u_r k), S in fp32; without D if it is decayed. */
INLINE void write_rows(const struct tokens *x, int64_t t, const float *u, struct rows S, struct rows to,
                       bool decayed, enum kda_dtype dtype) {
    const int64_t Kp = x->Kp; /* which the stores might change otherwise */
    const float *k = x->k + t * Kp, *decay = x->decay + t * Kp;
    for (int r = 0; r < ROWS; r++) {
        vf ur = vf_set1(u[r]);
        for (int64_t c = 0; c < Kp; c += LANES) {
            vf s = load_lanes(S.data + r * S.stride, KDA_F32, c);
            s = decayed ? vf_fma(ur, vf_load(k + c), s)
                        : vf_add(s, vf_fma(ur, vf_load(k + c), vf_mul(s, vf_load(decay + c))));
            store_lanes(to.data + r * to.stride, dtype, c, s);
        }
    }
}

/* Values first .. first + count - 1, at most ROWS. */
static void run_rows(const struct kda_decode *d, const struct kda_part *part, const struct tokens *x,
                     int64_t first, int64_t count, const struct scratch *scratch) {
    const struct kda_tokens *p = &d->tokens;
    float *S = scratch->S, *values = scratch->values, u[ROWS], o[VALUES] ALIGNED, sums[2 * ROWS];
    const struct rows in_S = rows_of(S, x->Kp);
    bool whole = count == ROWS && x->Kp == p->key_dim; /* whole vectors pass between memory and registers */
    const struct kda_state state = kda_state_in(p, &d->state, part->tokens.slot, part->head);
    struct rows from = rows_at(state, first, 0);
    if (!whole || part->tokens.from_zero) {
        memset(S, 0, (size_t)(ROWS * x->Kp) * sizeof *S);
        if (!part->tokens.from_zero)
            copy_in(S, x->Kp, from, count, p->key_dim);
        from = in_S;
    }
    load_inputs(&p->v, &d->v_conv, part, part->head, first, count, VALUES, scratch, values);
    for (int64_t t = 0; t < part->tokens.length; t++, from = in_S) {
        BY_DTYPE(sum_rows, from.dtype, x, t, from, S, sums);
        bool decayed = from.dtype != KDA_F32;
        if (decayed)
            from = in_S;
        for (int r = 0; r < ROWS; r++) {
            u[r] = x->beta[t] * (values[t * VALUES + r] - sums[2 * r]);
            o[r] = sums[2 * r + 1] + u[r] * x->kq[t];
        }
        store_outputs(d, part, t, first, count, o, scratch);
        bool last = t + 1 == part->tokens.length;
        int64_t slot = kda_decode_written_slot(d, part->sequence, &part->tokens, t);
        struct rows to = in_S;
        if (slot >= 0)
            to = rows_at(kda_state_in(p, &d->state, slot, part->head), first, 0);
        struct rows next = last && whole ? to : in_S;
        if (decayed)
            BY_DTYPE(write_rows, next.dtype, x, t, u, from, next, true);
        else
            BY_DTYPE(write_rows, next.dtype, x, t, u, from, next, false);
        if (last && whole)
            continue;
        if (slot >= 0)
            copy_out(S, x->Kp, to, count, p->key_dim);
    }
}

/* ---- K first: a column of S [K][V] a value -------------------------------------------------------- */

/* u = beta (v - from^T D k), o = from^T D q + u (k . q); from 16 bits, S = D from. */
INLINE void sum_columns(const struct kda_tokens *p, const struct tokens *x, int64_t t, struct rows from,
                        const float *v, float *S, vf *u, float *o, enum kda_dtype dtype) {
    const int64_t K = p->key_dim;
    const float *dk = x->dk + t * x->Kp, *dq = x->dq + t * x->Kp, *decay = x->decay + t * x->Kp;
    vf Sk[COLUMN_VECTORS], Sq[COLUMN_VECTORS];
    UNROLL for (int j = 0; j < COLUMN_VECTORS; j++) Sk[j] = Sq[j] = vf_set1(0);
    for (int64_t c = 0; c < K; c++) {
        vf kc = vf_set1(dk[c]), qc = vf_set1(dq[c]);
        UNROLL for (int j = 0; j < COLUMN_VECTORS; j++) {
            vf s = load_lanes(from.data + c * from.stride, dtype, j * LANES);
            if (dtype != KDA_F32)
                vf_store(S + c * COLUMNS + j * LANES, vf_fma(s, vf_set1(decay[c]), s));
            Sk[j] = vf_fma(s, kc, Sk[j]);
            Sq[j] = vf_fma(s, qc, Sq[j]);
        }
    }
    UNROLL for (int j = 0; j < COLUMN_VECTORS; j++) {
        u[j] = vf_mul(vf_set1(x->beta[t]), vf_sub(vf_load(v + j * LANES), Sk[j]));
        vf_store(o + j * LANES, vf_fma(u[j], vf_set1(x->kq[t]), Sq[j]));
    }
}

/* to = S + ((D - 1) S + k u^T), S in fp32; without D if it is decayed. */
INLINE void write_columns(const struct kda_tokens *p, const struct tokens *x, int64_t t, const vf *u,
                          struct rows S, struct rows to, bool decayed, enum kda_dtype dtype) {
    const int64_t K = p->key_dim;
    const float *k = x->k + t * x->Kp, *decay = x->decay + t * x->Kp;
    for (int64_t c = 0; c < K; c++) {
        vf kc = vf_set1(k[c]), dc = vf_set1(decay[c]);
        UNROLL for (int j = 0; j < COLUMN_VECTORS; j++) {
            vf s = load_lanes(S.data + c * S.stride, KDA_F32, j * LANES);
            s = decayed ? vf_fma(kc, u[j], s) : vf_add(s, vf_fma(kc, u[j], vf_mul(s, dc)));
            store_lanes(to.data + c * to.stride, dtype, j * LANES, s);
        }
    }
}

/* Values first .. first + count - 1, at most COLUMNS. */
static void run_columns(const struct kda_decode *d, const struct kda_part *part, const struct tokens *x,
                        int64_t first, int64_t count, const struct scratch *scratch) {
    const struct kda_tokens *p = &d->tokens;
    float *S = scratch->S, *values = scratch->values, o[COLUMNS] ALIGNED;
    const struct rows in_S = rows_of(S, COLUMNS);
    vf u[COLUMN_VECTORS];
    bool whole = count == COLUMNS;
    struct rows from = rows_at(kda_state_in(p, &d->state, part->tokens.slot, part->head), 0, first);
    if (!whole || part->tokens.from_zero) {
        if (part->tokens.from_zero)
            memset(S, 0, (size_t)(p->key_dim * COLUMNS) * sizeof *S);
        else
            copy_in(S, COLUMNS, from, p->key_dim, count);
        from = in_S;
    }
    load_inputs(&p->v, &d->v_conv, part, part->head, first, count, COLUMNS, scratch, values);
    for (int64_t t = 0; t < part->tokens.length; t++, from = in_S) {
        BY_DTYPE(sum_columns, from.dtype, p, x, t, from, values + t * COLUMNS, S, u, o);
        bool decayed = from.dtype != KDA_F32;
        if (decayed)
            from = in_S;
        store_outputs(d, part, t, first, count, o, scratch);
        bool last = t + 1 == part->tokens.length;
        int64_t slot = kda_decode_written_slot(d, part->sequence, &part->tokens, t);
        struct rows to = in_S;
        if (slot >= 0)
            to = rows_at(kda_state_in(p, &d->state, slot, part->head), 0, first);
        struct rows next = last && whole ? to : in_S;
        if (decayed)
            BY_DTYPE(write_columns, next.dtype, p, x, t, u, from, next, true);
        else
            BY_DTYPE(write_columns, next.dtype, p, x, t, u, from, next, false);
        if (last && whole)
            continue;
        if (slot >= 0)
            copy_out(S, COLUMNS, to, p->key_dim, count);
    }
}

/* ---- A part ------------------------------------------------------------------------------------- */

static void run_part(const struct kda_decode *d, const struct kda_part *part, const struct tokens *x,
                     const struct scratch *scratch) {
    bool v_first = d->tokens.state_layout == FLASH_KDA_STATE_V_FIRST;
    int64_t step = v_first ? ROWS : COLUMNS, end = part->first + part->count;
    for (int64_t first = part->first; first < end; first += step)
        (v_first ? run_rows : run_columns)(d, part, x, first, kda_min64(step, end - first), scratch);
}

static void decode_part(const struct kda_decode *d, const struct kda_part *part, void *memory) {
    const struct scratch scratch = lay_out(d, memory);
    struct tokens x;
    load_tokens(d, part, &scratch, &x);
    run_part(d, part, &x, &scratch);
    if (d->norm_weight.data && d->tokens.out.data)
        store_normed(d, part, &scratch);
}

/* The table of a level's decode.c. */
#define KDA_DECODE_KERNELS \
    { .scratch = scratch_size, .run = decode_part }
