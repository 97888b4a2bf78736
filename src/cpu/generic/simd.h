/* SPDX-License-Identifier: MIT */
/* Vector operations of level generic: what any CPU has, through the compiler's vector types. */
#ifndef KDA_CPU_SIMD_H
#define KDA_CPU_SIMD_H

#include "api/dtype.h"

typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));

enum {
    LANES = 4,
    PRODUCT_ROWS = 4, /* accumulators of a matrix product: rows x vectors */
    PRODUCT_VECTORS = 2,
};

static inline vf vf_set1(float x) { return (vf){x, x, x, x}; }
static inline vf vf_load(const float *p) { return *(const vf *)(const void *)p; }
static inline void vf_store(float *p, vf x) { *(vf *)(void *)p = x; }
static inline vf vf_loadu(const float *p) {
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline void vf_storeu(float *p, vf x) { memcpy(p, &x, sizeof x); }

static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_div(vf a, vf b) { return a / b; }
/* 1 / x to 11 bits or more; 0 if that is denormal. */
static inline vf vf_about_inverse(vf x) { return vf_div(vf_set1(1), x); }
static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vf_fnma(vf a, vf b, vf c) { return c - a * b; }
/* What the rounded product of a and b has lost, exactly. */
static inline vf vf_lost(vf a, vf b, vf product) {
    vf lost = vf_set1(0);
    for (int i = 0; i < LANES; i++)
        lost[i] = (float)((double)a[i] * (double)b[i] - (double)product[i]);
    return lost;
}
/* Of two operands of which one is NaN, the second. */
static inline vf vf_max(vf a, vf b) {
    vu greater = (vu)(a > b);
    return (vf)((greater & (vu)a) | (~greater & (vu)b));
}
static inline vf vf_min(vf a, vf b) {
    vu less = (vu)(a < b);
    return (vf)((less & (vu)a) | (~less & (vu)b));
}

/* 2^n for t = n + 1.5 * 2^23, n an integer in [-127, 127]; 0 for n = -127. */
static inline vf vf_pow2(vf t) {
    const vu one = {0x3f800000u, 0x3f800000u, 0x3f800000u, 0x3f800000u};
    return (vf)(((vu)t << 23) + one);
}

static inline vf vf_load_bf16(const uint16_t *p) {
    vf x = vf_set1(0);
    for (int i = 0; i < LANES; i++)
        x[i] = kda_from_bf16(p[i]);
    return x;
}
static inline vf vf_load_f16(const uint16_t *p) {
    vf x = vf_set1(0);
    for (int i = 0; i < LANES; i++)
        x[i] = kda_from_f16(p[i]);
    return x;
}
static inline void vf_store_bf16(uint16_t *p, vf x) {
    for (int i = 0; i < LANES; i++)
        p[i] = kda_to_bf16(x[i]);
}
static inline void vf_store_f16(uint16_t *p, vf x) {
    for (int i = 0; i < LANES; i++)
        p[i] = kda_to_f16(x[i]);
}

/* sums[i]: sum of the lanes of x[i]. */
static inline void vf_sums(const vf x[16], float sums[16]) {
    for (int i = 0; i < 16; i++)
        sums[i] = (x[i][0] + x[i][1]) + (x[i][2] + x[i][3]);
}

/* x [LANES][LANES] becomes its transpose. */
static inline void vf_transpose(vf x[LANES]) {
    vf y[LANES];
    memcpy(y, x, sizeof y);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++)
            x[i][j] = y[j][i];
}

#endif
