/* SPDX-License-Identifier: MIT */
/*
 * The kernel of decode, written once for all levels. A level's decode.c includes its simd.h and then this file.
 *
 * The state is read and written once, however many tokens there are: a few of its rows or columns stay in the core's own
 * cache while all tokens pass. With S decayed, u = beta (v - S^T k) and o = S^T q + u (k . q), so that both sums over S come
 * from one pass.
 */
#include "api/convolution.h"
#include "cpu/decode.h"
#include "cpu/rows_tmpl.h"
#include "cpu/unroll.h"

#include <string.h>

enum {
    TOKENS = FLASH_KDA_MAX_DECODE_TOKENS,
    MAX_K = 256,
    ROWS = 8,                                          /* V first: values worked together */
    VALUES = ROWS > LANES ? ROWS : LANES,              /* these padded to whole vectors */
    ROWS_AT_ONCE = PRODUCT_ROWS * PRODUCT_VECTORS / 2, /* of these, two sums each in registers */
    COLUMN_VECTORS = 4,                                /* K first: vectors of values worked together */
    COLUMNS = COLUMN_VECTORS * LANES,
};

/* The tokens of one head. Kp is K padded with zeros to whole vectors. */
struct tokens {
    int64_t Kp;
    float k[TOKENS * MAX_K] ALIGNED;     /* normalised */
    float q[TOKENS * MAX_K] ALIGNED;     /* normalised, times scale */
    float decay[TOKENS * MAX_K] ALIGNED; /* exp(a) */
    float beta[TOKENS] ALIGNED;
    float kq[TOKENS]; /* k . q */
};

/* ---- Before: convolutions ------------------------------------------------------------------------ */

/* rows [length][padded] = elements first .. first + count - 1, at most MAX_K, of a head of q, k or v, through the convolution
 * and SiLU. */
static void convolve(const struct kda_tensor *x, const struct kda_convolution *conv,
                     const struct kda_part *part, int64_t head, int64_t first, int64_t count, int64_t padded,
                     float *rows) {
    const struct kda_sequence *s = &part->tokens;
    float inputs[(KDA_CONV_PAST + TOKENS) * MAX_K] ALIGNED,
        weights[KDA_CONV_WIDTH * MAX_K] ALIGNED = {0}, bias[MAX_K] ALIGNED = {0};
    for (int64_t c = 0; c < count; c++) {
        int64_t channel = head * x->shape[3] + first + c;
        const char *weight = conv->weight.data + channel * conv->weight.stride[0];
        for (int64_t i = 0; i < KDA_CONV_WIDTH; i++)
            weights[i * MAX_K + c] = kda_load(weight, conv->weight.dtype, i);
        if (conv->bias.data)
            bias[c] = kda_load(conv->bias.data, conv->bias.dtype, channel);
    }
    for (int64_t i = 0; i < KDA_CONV_PAST; i++)
        for (int64_t c = 0; c < padded; c++)
            inputs[i * MAX_K + c] =
                c < count ? kda_conv_input(x, conv, s, i - KDA_CONV_PAST, head, first + c) : 0;
    for (int64_t t = 0; t < s->length; t++)
        load_row(inputs + (KDA_CONV_PAST + t) * MAX_K,
                 kda_row(x, s->batch, s->first + t, head) + first * (int64_t)kda_dtype_size(x->dtype), x->dtype,
                 count, padded);
    for (int64_t t = 0; t < s->length; t++)
        for (int64_t c = 0; c < padded; c += LANES) {
            vf sum = vf_load(bias + c);
            UNROLL for (int i = 0; i < KDA_CONV_WIDTH; i++) sum =
                vf_fma(vf_load(weights + i * MAX_K + c), vf_load(inputs + (t + i) * MAX_K + c), sum);
            vf_store(rows + t * padded + c, vf_mul(sum, vf_sigmoid(sum)));
        }
}

/* The same rows, convolved if they have a convolution. */
static inline void load_inputs(const struct kda_tensor *x, const struct kda_convolution *conv,
                               const struct kda_part *part, int64_t head, int64_t first, int64_t count,
                               int64_t padded, float *rows) {
    const struct kda_sequence *s = &part->tokens;
    if (conv->weight.data) {
        convolve(x, conv, part, head, first, count, padded, rows);
        return;
    }
    for (int64_t t = 0; t < s->length; t++)
        load_row(rows + t * padded,
                 kda_row(x, s->batch, s->first + t, head) + first * (int64_t)kda_dtype_size(x->dtype), x->dtype,
                 count, padded);
}

/* ---- What does not depend on the state ---------------------------------------------------------- */

/* Rows of q or k, normalised if asked for, times factor. */
static inline void load_keys(const struct kda_prefill *p, const struct kda_tensor *t,
                             const struct kda_convolution *conv, const struct kda_part *part, float factor,
                             int64_t Kp, float *rows) {
    load_inputs(t, conv, part, part->head / (p->value_heads / p->heads), 0, p->key_dim, Kp, rows);
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
            vf_store(decay + t * Kp + c, vf_exp(log_decay(gate, vf_load(decay + t * Kp + c),
                                                          vf_load(dt_bias + c), A, lower_bound)));
}

static inline void load_decay(const struct kda_prefill *p, const struct kda_part *part, int64_t Kp,
                              float *decay) {
    float dt_bias[MAX_K] ALIGNED = {0}, A = gate_factor(p, part->head);
    const struct kda_sequence *s = &part->tokens;
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

static inline float dot(const float *a, const float *b, int64_t Kp) {
    vf sum = vf_set1(0);
    float lanes[LANES] ALIGNED, total = 0;
    for (int64_t c = 0; c < Kp; c += LANES)
        sum = vf_fma(vf_load(a + c), vf_load(b + c), sum);
    vf_store(lanes, sum);
    for (int i = 0; i < LANES; i++)
        total += lanes[i];
    return total;
}

static inline void load_tokens(const struct kda_decode *d, const struct kda_part *part, struct tokens *x) {
    const struct kda_prefill *p = &d->tokens;
    const struct kda_sequence *s = &part->tokens;
    int64_t Kp = x->Kp = (p->key_dim + LANES - 1) / LANES * LANES;
    load_decay(p, part, Kp, x->decay);
    load_keys(p, &p->k, &d->k_conv, part, 1, Kp, x->k);
    load_keys(p, &p->q, &d->q_conv, part, p->scale, Kp, x->q);
    for (int64_t t = 0; t < s->length; t++)
        x->kq[t] = dot(x->k + t * Kp, x->q + t * Kp, Kp);
    for (int64_t t = 0; t < TOKENS; t++)
        x->beta[t] = t < s->length
                         ? kda_load(kda_row(&p->beta, s->batch, s->first + t, part->head), p->beta.dtype, 0)
                         : 0;
    apply_beta(p->beta_mode, TOKENS, x->beta);
}

/* ---- Outputs, and the norm behind them ----------------------------------------------------------- */

/* With a norm, which needs whole rows, they wait in rows [TOKENS][KDA_MAX_NORM_DIM]. */
static inline void store_outputs(const struct kda_decode *d, const struct kda_part *part, int64_t token,
                                 int64_t first, int64_t count, const float *o, float *rows) {
    const struct kda_prefill *p = &d->tokens;
    const struct kda_sequence *s = &part->tokens;
    if (d->norm_weight.data)
        memcpy(rows + token * KDA_MAX_NORM_DIM + first, o, (size_t)count * sizeof *o);
    else if (p->out.data)
        store_row(kda_row(&p->out, s->batch, s->first + token, part->head) +
                      first * (int64_t)kda_dtype_size(p->out.dtype),
                  p->out.dtype, o, count);
}

/* row [Vp] of one token, zeros behind V. */
static inline void norm_row(const struct kda_decode *d, const struct kda_part *part, int64_t token,
                            const float *weight, int64_t Vp, float *row) {
    const struct kda_sequence *s = &part->tokens;
    float factor = 1 / sqrtf(dot(row, row, Vp) / (float)d->tokens.value_dim + d->norm_eps);
    float gate[KDA_MAX_NORM_DIM] ALIGNED;
    if (d->norm_gate.data)
        load_row(gate, kda_row(&d->norm_gate, s->batch, s->first + token, part->head), d->norm_gate.dtype,
                 d->tokens.value_dim, Vp);
    for (int64_t j = 0; j < Vp; j += LANES) {
        vf y = vf_mul(vf_mul(vf_load(row + j), vf_set1(factor)), vf_load(weight + j));
        if (d->norm_gate.data) {
            vf z = vf_load(gate + j);
            y = vf_mul(y, vf_sigmoid(z));
            if (d->norm_activation == FLASH_KDA_NORM_SILU)
                y = vf_mul(y, z);
        }
        vf_store(row + j, y);
    }
}

static void store_normed(const struct kda_decode *d, const struct kda_part *part, float *rows) {
    const struct kda_prefill *p = &d->tokens;
    const struct kda_sequence *s = &part->tokens;
    int64_t V = p->value_dim, Vp = (V + LANES - 1) / LANES * LANES;
    float weight[KDA_MAX_NORM_DIM] ALIGNED;
    load_row(weight, d->norm_weight.data, d->norm_weight.dtype, V, Vp);
    for (int64_t t = 0; t < s->length; t++) {
        float *row = rows + t * KDA_MAX_NORM_DIM;
        memset(row + V, 0, (size_t)(Vp - V) * sizeof *row);
        norm_row(d, part, t, weight, Vp, row);
        store_row(kda_row(&p->out, s->batch, s->first + t, part->head), p->out.dtype, row, V);
    }
}

/* ---- V first: a row of S^T [V][K] a value --------------------------------------------------------- */

/* S <- S decay; sums[2 r] = S_r . k, sums[2 r + 1] = S_r . q */
static inline void decay_and_sum(const struct tokens *x, int64_t t, float *S, float *sums) {
    const float *k = x->k + t * x->Kp, *q = x->q + t * x->Kp, *decay = x->decay + t * x->Kp;
    vf all[2 * ROWS];
    for (int first = 0; first < ROWS; first += ROWS_AT_ONCE) {
        vf sum[2 * ROWS_AT_ONCE];
        UNROLL for (int i = 0; i < 2 * ROWS_AT_ONCE; i++) sum[i] = vf_set1(0);
        for (int64_t c = 0; c < x->Kp; c += LANES) {
            vf kc = vf_load(k + c), qc = vf_load(q + c), dc = vf_load(decay + c);
            UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++) {
                float *at = S + (first + r) * x->Kp + c;
                vf s = vf_mul(vf_load(at), dc);
                vf_store(at, s);
                sum[2 * r] = vf_fma(s, kc, sum[2 * r]);
                sum[2 * r + 1] = vf_fma(s, qc, sum[2 * r + 1]);
            }
        }
        UNROLL for (int i = 0; i < 2 * ROWS_AT_ONCE; i++) all[2 * first + i] = sum[i];
    }
    vf_sums(all, sums);
}

/* S_r <- S_r + u_r k */
static inline void correct_rows(const struct tokens *x, int64_t t, const float *u, float *S) {
    const float *k = x->k + t * x->Kp;
    for (int64_t c = 0; c < x->Kp; c += LANES) {
        vf kc = vf_load(k + c);
        UNROLL for (int r = 0; r < ROWS; r++) {
            float *at = S + r * x->Kp + c;
            vf_store(at, vf_fma(vf_set1(u[r]), kc, vf_load(at)));
        }
    }
}

/* Values first .. first + count - 1, at most ROWS. */
static void run_rows(const struct kda_decode *d, const struct kda_part *part, const struct tokens *x,
                     int64_t first, int64_t count, float *rows) {
    const struct kda_prefill *p = &d->tokens;
    const struct kda_state from = kda_state_at(p, &d->state, part->tokens.slot, part->head);
    float S[ROWS * MAX_K] ALIGNED, values[TOKENS * VALUES] ALIGNED, u[ROWS], o[VALUES] ALIGNED, sums[2 * ROWS];
    for (int64_t r = 0; r < ROWS; r++)
        load_row(S + r * x->Kp, from.data + (first + r) * from.stride, from.dtype, r < count ? p->key_dim : 0,
                 x->Kp);
    load_inputs(&p->v, &d->v_conv, part, part->head, first, count, VALUES, values);
    for (int64_t t = 0; t < part->tokens.length; t++) {
        const float *v = values + t * VALUES;
        decay_and_sum(x, t, S, sums);
        for (int r = 0; r < ROWS; r++) {
            u[r] = x->beta[t] * (v[r] - sums[2 * r]);
            o[r] = sums[2 * r + 1] + u[r] * x->kq[t];
        }
        correct_rows(x, t, u, S);
        store_outputs(d, part, t, first, count, o, rows);
        int64_t slot = kda_decode_written_slot(d, part->sequence, &part->tokens, t);
        if (slot < 0)
            continue;
        const struct kda_state to = kda_state_at(p, &d->state, slot, part->head);
        for (int64_t r = 0; r < count; r++)
            store_row(to.data + (first + r) * to.stride, to.dtype, S + r * x->Kp, p->key_dim);
    }
}

/* ---- K first: a column of S [K][V] a value -------------------------------------------------------- */

/* S <- S decay; u = beta (v - S^T k); o = S^T q + u (k . q); S <- S + k u^T */
static inline void run_token(const struct kda_prefill *p, const struct tokens *x, int64_t t, const float *v,
                             float *S, float *o) {
    const float *k = x->k + t * x->Kp, *q = x->q + t * x->Kp, *decay = x->decay + t * x->Kp;
    vf Sk[COLUMN_VECTORS], Sq[COLUMN_VECTORS];
    UNROLL for (int j = 0; j < COLUMN_VECTORS; j++) Sk[j] = Sq[j] = vf_set1(0);
    for (int64_t c = 0; c < p->key_dim; c++) {
        vf kc = vf_set1(k[c]), qc = vf_set1(q[c]), dc = vf_set1(decay[c]);
        UNROLL for (int j = 0; j < COLUMN_VECTORS; j++) {
            vf s = vf_mul(vf_load(S + c * COLUMNS + j * LANES), dc);
            vf_store(S + c * COLUMNS + j * LANES, s);
            Sk[j] = vf_fma(s, kc, Sk[j]);
            Sq[j] = vf_fma(s, qc, Sq[j]);
        }
    }
    vf u[COLUMN_VECTORS];
    UNROLL for (int j = 0; j < COLUMN_VECTORS; j++) {
        u[j] = vf_mul(vf_set1(x->beta[t]), vf_sub(vf_load(v + j * LANES), Sk[j]));
        vf_store(o + j * LANES, vf_fma(u[j], vf_set1(x->kq[t]), Sq[j]));
    }
    for (int64_t c = 0; c < p->key_dim; c++) {
        vf kc = vf_set1(k[c]);
        UNROLL for (int j = 0; j < COLUMN_VECTORS; j++) {
            float *at = S + c * COLUMNS + j * LANES;
            vf_store(at, vf_fma(kc, u[j], vf_load(at)));
        }
    }
}

/* Values first .. first + count - 1, at most COLUMNS. */
static void run_columns(const struct kda_decode *d, const struct kda_part *part, const struct tokens *x,
                        int64_t first, int64_t count, float *rows) {
    const struct kda_prefill *p = &d->tokens;
    const struct kda_state from = kda_state_at(p, &d->state, part->tokens.slot, part->head);
    int64_t offset = first * (int64_t)kda_dtype_size(from.dtype);
    float S[MAX_K * COLUMNS] ALIGNED, values[TOKENS * COLUMNS] ALIGNED, o[COLUMNS] ALIGNED;
    for (int64_t c = 0; c < p->key_dim; c++)
        load_row(S + c * COLUMNS, from.data + c * from.stride + offset, from.dtype, count, COLUMNS);
    load_inputs(&p->v, &d->v_conv, part, part->head, first, count, COLUMNS, values);
    for (int64_t t = 0; t < part->tokens.length; t++) {
        run_token(p, x, t, values + t * COLUMNS, S, o);
        store_outputs(d, part, t, first, count, o, rows);
        int64_t slot = kda_decode_written_slot(d, part->sequence, &part->tokens, t);
        if (slot < 0)
            continue;
        const struct kda_state to = kda_state_at(p, &d->state, slot, part->head);
        for (int64_t c = 0; c < p->key_dim; c++)
            store_row(to.data + c * to.stride + offset, to.dtype, S + c * COLUMNS, count);
    }
}

/* ---- A part ------------------------------------------------------------------------------------- */

static void run_part(const struct kda_decode *d, const struct kda_part *part, const struct tokens *x,
                     float *rows) {
    bool v_first = d->tokens.state_layout == FLASH_KDA_STATE_V_FIRST;
    int64_t step = v_first ? ROWS : COLUMNS, end = part->first + part->count;
    for (int64_t first = part->first; first < end; first += step)
        (v_first ? run_rows : run_columns)(d, part, x, first, kda_min64(step, end - first), rows);
}

static void decode_part(const struct kda_decode *d, const struct kda_part *part) {
    float rows[TOKENS * KDA_MAX_NORM_DIM] ALIGNED;
    struct tokens x;
    load_tokens(d, part, &x);
    run_part(d, part, &x, rows);
    if (d->norm_weight.data && d->tokens.out.data)
        store_normed(d, part, rows);
}
