/* SPDX-License-Identifier: MIT */
/* Vector operations of levels avx512 and avx512bf16: AVX-512 F, BW, DQ and VL. */
#ifndef KDA_CPU_SIMD_H
#define KDA_CPU_SIMD_H

#include "api/dtype.h"

#include <immintrin.h>

typedef __m512 vf;

enum {
    LANES = 16,
    PRODUCT_ROWS = 8, /* accumulators of a matrix product: rows x vectors */
    PRODUCT_VECTORS = 2,
};

static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_load(const float *p) { return _mm512_load_ps(p); }
static inline void vf_store(float *p, vf x) { _mm512_store_ps(p, x); }
static inline vf vf_loadu(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_storeu(float *p, vf x) { _mm512_storeu_ps(p, x); }

static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
/* 1 / x to 11 bits or more; 0 if that is denormal. */
static inline vf vf_about_inverse(vf x) { return _mm512_rcp14_ps(x); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
/* What the rounded product of a and b has lost, exactly. */
static inline vf vf_lost(vf a, vf b, vf product) { return vf_fma(a, b, vf_sub(vf_set1(0), product)); }
/* Of two operands of which one is NaN, the second. */
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }

/* 2^n for t = n + 1.5 * 2^23, n an integer in [-127, 127]; 0 for n = -127. */
static inline vf vf_pow2(vf t) {
    __m512i n = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3f800000)));
}

static inline vf vf_load_bf16(const uint16_t *p) {
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
static inline vf vf_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static inline void vf_store_bf16(uint16_t *p, vf x) {
    __m512i bits = _mm512_castps_si512(x),
            odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
static inline void vf_store_f16(uint16_t *p, vf x) {
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

/* Per 128 bits, the sums of a, b, c and d over that part. */
static inline vf vf_sums_of_4(vf a, vf b, vf c, vf d) {
    vf ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    vf cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

/* Adds neighbouring 128-bit parts: [a0+a1, a2+a3, b0+b1, b2+b3]. */
static inline vf vf_add_parts(vf a, vf b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* sums[i]: sum of the lanes of x[i]. */
static inline void vf_sums(const vf x[16], float sums[16]) {
    vf first = vf_add_parts(vf_sums_of_4(x[0], x[1], x[2], x[3]), vf_sums_of_4(x[4], x[5], x[6], x[7]));
    vf second = vf_add_parts(vf_sums_of_4(x[8], x[9], x[10], x[11]), vf_sums_of_4(x[12], x[13], x[14], x[15]));
    _mm512_storeu_ps(sums, vf_add_parts(first, second));
}

/* x [LANES][LANES] becomes its transpose. */
static inline void vf_transpose(vf x[LANES]) {
    vf pairs[16], fours[16]; /* of each 128 bits, rows 0 1, then 0 1 2 3, of a column */
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
            fours[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        vf low = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0x88);
        vf low_odd = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0xdd);
        vf high = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0x88);
        vf high_odd = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0xdd);
        x[i] = _mm512_shuffle_f32x4(low, high, 0x88);
        x[i + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(low, high, 0xdd);
        x[i + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
    }
}

#endif
