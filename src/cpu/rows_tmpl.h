/* SPDX-License-Identifier: MIT */
/*
 * What the kernels of prefill and decode do with rows of numbers, written once for all levels: included by their templates
 * after a level's simd.h.
 */
#ifndef KDA_CPU_ROWS_TMPL_H
#define KDA_CPU_ROWS_TMPL_H

#include "api/tokens.h"
#include "cpu/unroll.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define ALIGNED __attribute__((aligned(64)))

/* ---- Rows in memory ---------------------------------------------------------------------------- */

/* to [padded] = row of count floats, then zeros. */
static inline void load_row(float *to, const char *row, enum kda_dtype dtype, int64_t count, int64_t padded) {
    const uint16_t *halves = (const uint16_t *)(const void *)row;
    int64_t i = 0;
    if (dtype == KDA_F32)
        for (; i + LANES <= count; i += LANES)
            vf_store(to + i, vf_loadu((const float *)(const void *)row + i));
    else if (dtype == KDA_BF16)
        for (; i + LANES <= count; i += LANES)
            vf_store(to + i, vf_load_bf16(halves + i));
    else
        for (; i + LANES <= count; i += LANES)
            vf_store(to + i, vf_load_f16(halves + i));
    for (; i < count; i++)
        to[i] = kda_load(row, dtype, i);
    for (; i < padded; i++)
        to[i] = 0;
}

static inline void store_row(char *row, enum kda_dtype dtype, const float *from, int64_t count) {
    uint16_t *halves = (uint16_t *)(void *)row;
    int64_t i = 0;
    if (dtype == KDA_F32)
        for (; i + LANES <= count; i += LANES)
            vf_storeu((float *)(void *)row + i, vf_load(from + i));
    else if (dtype == KDA_BF16)
        for (; i + LANES <= count; i += LANES)
            vf_store_bf16(halves + i, vf_load(from + i));
    else
        for (; i + LANES <= count; i += LANES)
            vf_store_f16(halves + i, vf_load(from + i));
    for (; i < count; i++)
        kda_store(row, dtype, i, from[i]);
}

/* ---- Elementary functions ---------------------------------------------------------------------- */

/* exp(x) = (q + 1) 2^n with q = exp(r) - 1 returned, |r| <= ln 2 / 2, and 2^n in *scale. Below -87.7 the scale is 0, well above
 * 88.2 it is infinite. */
static inline vf exp_parts(vf x, vf *scale) {
    const vf magic = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vf above = vf_max(vf_set1(-88.03f), x);
    x = vf_min(vf_set1(88.2f), above);
    vf t = vf_fma(x, vf_set1(1.44269504f), magic), n = vf_sub(t, magic);
    /* ln 2 in two parts, the first exact in products with n */
    vf r = vf_fnma(n, vf_set1(-2.12194440e-4f), vf_fnma(n, vf_set1(0.693359375f), x));
    /* (exp(r) - 1 - r) / r^2: minimax of degree 4, error 7.5e-9 */
    vf p = vf_fma(r, vf_set1(1.394111873e-3f), vf_set1(8.363181235e-3f));
    p = vf_fma(r, p, vf_set1(4.166637520e-2f));
    p = vf_fma(r, p, vf_set1(1.666657697e-1f));
    p = vf_fma(r, p, vf_set1(5.000000027e-1f));
    *scale = vf_fma(vf_sub(above, x), vf_set1(FLT_MAX), vf_pow2(t));
    return vf_fma(vf_mul(r, r), p, r);
}

static inline vf vf_exp(vf x) {
    vf scale, q = exp_parts(x, &scale);
    return vf_fma(q, scale, scale);
}

static inline vf vf_expm1(vf x) {
    vf scale, q = exp_parts(x, &scale);
    return vf_fma(q, scale, vf_sub(scale, vf_set1(1)));
}

/* log(1 + exp(x)) */
static inline vf vf_softplus(vf x) {
    vf negative = vf_min(x, vf_sub(vf_set1(0), x)), y = vf_exp(negative);
    /* log1p(y) / y on [0, 1]: minimax of degree 9, error 4e-9 */
    static const float coefficients[] = {2.027770723e-02f,  -5.775902758e-02f, 1.068452557e-01f,
                                         -1.535327112e-01f, 1.969245257e-01f,  -2.495734671e-01f,
                                         3.333027563e-01f,  -4.999991418e-01f, 9.999999960e-01f};
    vf p = vf_set1(-3.338716686e-03f);
    UNROLL for (int i = 0; i < 9; i++) p = vf_fma(y, p, vf_set1(coefficients[i]));
    return vf_fma(y, p, vf_max(vf_set1(0), x));
}

static inline vf vf_sigmoid(vf x) {
    return vf_div(vf_set1(1), vf_add(vf_set1(1), vf_exp(vf_sub(vf_set1(0), x))));
}

/* ---- Norm, gate, step --------------------------------------------------------------------------- */

static inline void scale_row(float *row, int64_t Kp, float factor) {
    for (int64_t c = 0; c < Kp; c += LANES)
        vf_store(row + c, vf_mul(vf_load(row + c), vf_set1(factor)));
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

/* 1 / sqrt(weight |row|^2 + epsilon). A row whose square could leave fp32 is made smaller by a power of two before. */
static inline float inverse_root(float *row, int64_t Kp, float weight, float epsilon) {
    const float large = 0x1p100f, smaller = 0x1p-96f;
    float squares = dot(row, row, Kp);
    if (!(squares < large)) { /* or it is NaN, and stays so */
        scale_row(row, Kp, smaller);
        squares = dot(row, row, Kp);
        epsilon = epsilon * smaller * smaller;
    }
    return 1 / sqrtf(weight * squares + epsilon);
}

static inline float inverse_norm(float *row, int64_t Kp) { return inverse_root(row, Kp, 1, 1e-6f); }

/* Log decay of LANES channels. A is exp(A_log). */
static inline vf log_decay(flash_kda_gate gate, vf g, vf dt_bias, float A, float lower_bound) {
    switch (gate) {
    case FLASH_KDA_GATE_SOFTPLUS:
        return vf_mul(vf_set1(-A), vf_softplus(vf_add(g, dt_bias)));
    case FLASH_KDA_GATE_SIGMOID:
        return vf_mul(vf_set1(lower_bound), vf_sigmoid(vf_mul(vf_set1(A), vf_add(g, dt_bias))));
    default:
        return g;
    }
}

/* exp(A_log) of a head, kept finite, so that a gate of 0 times it stays 0. */
static inline float gate_factor(const struct kda_tokens *p, int64_t head) {
    if (!p->A_log.data)
        return 1;
    float A = expf(kda_load(p->A_log.data + head * p->A_log.stride[0], p->A_log.dtype, 0));
    return A > FLT_MAX ? FLT_MAX : A; /* and not fminf, which loses a NaN */
}

/* The step from beta, for `count` tokens, a multiple of LANES. */
static inline void apply_beta(flash_kda_beta mode, int count, float *beta) {
    if (mode == FLASH_KDA_BETA_GIVEN)
        return;
    vf factor = vf_set1(mode == FLASH_KDA_BETA_TWICE_SIGMOID ? 2 : 1);
    for (int t = 0; t < count; t += LANES)
        vf_store(beta + t, vf_mul(factor, vf_sigmoid(vf_load(beta + t))));
}

#endif
