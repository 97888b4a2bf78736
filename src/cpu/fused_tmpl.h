/* SPDX-License-Identifier: MIT */
/* The convolution before the recurrence and the norm after it, on rows of fp32, written once for all levels: included by
 * the templates of prefill and decode after a level's simd.h. */
#ifndef KDA_CPU_FUSED_TMPL_H
#define KDA_CPU_FUSED_TMPL_H

#include "api/fused.h"
#include "cpu/rows_tmpl.h"

/* sigmoid(x) in two thirds of the time, off by 6e-8 |x| and 2e-7, as parts. Below -88 it is 0. */
static inline vf logistic(vf x) {
    const vf magic = vf_set1(12582912.0f); /* as in exp_parts */
    x = vf_min(vf_set1(88), vf_max(vf_set1(-88), x));
    vf t = vf_fma(x, vf_set1(-1.44269504f), magic);
    vf r = vf_fma(vf_sub(t, magic), vf_set1(0.693147181f), x); /* exp(-x) = exp(-r) 2^n */
    vf p = vf_fma(r, vf_set1(1.394111873e-3f), vf_set1(-8.363181235e-3f));
    p = vf_fma(r, p, vf_set1(4.166637520e-2f));
    p = vf_fma(r, p, vf_set1(-1.666657697e-1f));
    p = vf_fma(r, p, vf_set1(5.000000027e-1f));
    p = vf_mul(r, vf_fma(r, p, vf_set1(-1)));
    vf scale = vf_pow2(t), x1 = vf_fma(p, scale, vf_add(scale, vf_set1(1)));
    vf about = vf_about_inverse(x1);
    return vf_fma(about, vf_fnma(x1, about, vf_set1(1)), about);
}

static inline vf vf_silu(vf x) { return vf_mul(x, logistic(x)); }

/* rows [count][padded] from inputs [KDA_CONV_PAST + count][padded]: the convolution and SiLU. taps
 * [KDA_CONV_WIDTH + 1], `stride_of_taps` apart: the weights, then the bias. */
static inline void convolve_rows(const float *inputs, const float *taps, int64_t stride_of_taps, int64_t count,
                                 int64_t padded, float *rows) {
    for (int64_t c = 0; c < padded; c += LANES) {
        vf weights[KDA_CONV_WIDTH], past[KDA_CONV_PAST];
        UNROLL for (int i = 0; i < KDA_CONV_WIDTH; i++) weights[i] = vf_load(taps + i * stride_of_taps + c);
        vf bias = vf_load(taps + KDA_CONV_WIDTH * stride_of_taps + c);
        UNROLL for (int i = 0; i < KDA_CONV_PAST; i++) past[i] = vf_load(inputs + i * padded + c);
        for (int64_t t = 0; t < count; t++) {
            vf now = vf_load(inputs + (KDA_CONV_PAST + t) * padded + c);
            vf sum = vf_fma(weights[0], past[0], bias);
            sum = vf_fma(weights[1], past[1], sum);
            sum = vf_fma(weights[2], past[2], sum);
            sum = vf_fma(weights[3], now, sum);
            vf_store(rows + t * padded + c, vf_silu(sum));
            past[0] = past[1];
            past[1] = past[2];
            past[2] = now;
        }
    }
}

/* Of a norm: weight [padded] in fp32, and what belongs to its gate. */
struct norm {
    const float *weight;
    const struct kda_fused *fused;
    int64_t dim, padded; /* V, and V padded to whole vectors */
};

/* row [padded] becomes the norm of it. gate: its row of norm_gate, or NULL. What is after V counts as 0. */
static inline void norm_row(const struct norm *norm, const char *gate, float *row) {
    int64_t V = norm->dim, padded = norm->padded;
    float gates[KDA_MAX_NORM_DIM + LANES] ALIGNED;
    memset(row + V, 0, (size_t)(padded - V) * sizeof *row);
    float factor = inverse_root(row, padded, 1 / (float)V, norm->fused->norm_eps);
    bool silu = norm->fused->norm_activation == FLASH_KDA_NORM_SILU;
    if (gate)
        load_row(gates, gate, norm->fused->norm_gate.dtype, V, padded);
    for (int64_t j = 0; j < padded; j += LANES) {
        vf y = vf_mul(vf_mul(vf_load(row + j), vf_set1(factor)), vf_load(norm->weight + j));
        if (gate && silu)
            y = vf_mul(y, vf_silu(vf_load(gates + j)));
        else if (gate)
            y = vf_mul(y, logistic(vf_load(gates + j)));
        vf_store(row + j, y);
    }
}

#endif
