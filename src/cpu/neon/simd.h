/* SPDX-License-Identifier: MIT */
/* Vector operations of level neon: AArch64's Advanced SIMD. */
#ifndef KDA_CPU_SIMD_H
#define KDA_CPU_SIMD_H

#include "api/dtype.h"

#include <arm_neon.h>

typedef float32x4_t vf;

enum {
    LANES = 4,
    PRODUCT_ROWS = 8, /* accumulators of a matrix product: rows x vectors */
    PRODUCT_VECTORS = 2,
};

static inline vf vf_set1(float x) { return vdupq_n_f32(x); }
static inline vf vf_load(const float *p) { return vld1q_f32(p); }
static inline void vf_store(float *p, vf x) { vst1q_f32(p, x); }
static inline vf vf_loadu(const float *p) { return vld1q_f32(p); }
static inline void vf_storeu(float *p, vf x) { vst1q_f32(p, x); }

static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
/* 1 / x to 11 bits or more; 0 if that is denormal. */
static inline vf vf_about_inverse(vf x) {
    vf about = vrecpeq_f32(x); /* 8 bits */
    return vmulq_f32(about, vrecpsq_f32(x, about));
}
static inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf vf_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
/* What the rounded product of a and b has lost, exactly. */
static inline vf vf_lost(vf a, vf b, vf product) { return vf_fma(a, b, vf_sub(vf_set1(0), product)); }
/* Of two operands of which one is NaN: NaN. */
static inline vf vf_max(vf a, vf b) { return vmaxq_f32(a, b); }
static inline vf vf_min(vf a, vf b) { return vminq_f32(a, b); }

/* 2^n for t = n + 1.5 * 2^23, n an integer in [-127, 127]; 0 for n = -127. */
static inline vf vf_pow2(vf t) {
    uint32x4_t n = vshlq_n_u32(vreinterpretq_u32_f32(t), 23);
    return vreinterpretq_f32_u32(vaddq_u32(n, vdupq_n_u32(0x3f800000u)));
}

static inline vf vf_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline vf vf_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void vf_store_bf16(uint16_t *p, vf x) {
    uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fffu)));
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000u));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16));
}
static inline void vf_store_f16(uint16_t *p, vf x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }

/* sums[i]: sum of the lanes of x[i]. */
static inline void vf_sums(const vf x[16], float sums[16]) {
    for (int i = 0; i < 16; i += 4)
        vst1q_f32(sums + i, vpaddq_f32(vpaddq_f32(x[i], x[i + 1]), vpaddq_f32(x[i + 2], x[i + 3])));
}

/* x [LANES][LANES] becomes its transpose. */
static inline void vf_transpose(vf x[LANES]) {
    float32x4x2_t low = vtrnq_f32(x[0], x[1]), high = vtrnq_f32(x[2], x[3]);
    for (int i = 0; i < 2; i++) {
        x[i] = vcombine_f32(vget_low_f32(low.val[i]), vget_low_f32(high.val[i]));
        x[i + 2] = vcombine_f32(vget_high_f32(low.val[i]), vget_high_f32(high.val[i]));
    }
}

#endif
