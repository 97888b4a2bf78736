/* SPDX-License-Identifier: MIT */
/* Vector operations of level avx2: AVX2, FMA and F16C. */
#ifndef KDA_CPU_SIMD_H
#define KDA_CPU_SIMD_H

#include "api/dtype.h"

#include <immintrin.h>

typedef __m256 vf;

enum {
    LANES = 8,
    PRODUCT_ROWS = 4, /* accumulators of a matrix product: rows x vectors */
    PRODUCT_VECTORS = 2,
};

static inline vf vf_set1(float x) { return _mm256_set1_ps(x); }
static inline vf vf_load(const float *p) { return _mm256_load_ps(p); }
static inline void vf_store(float *p, vf x) { _mm256_store_ps(p, x); }
static inline vf vf_loadu(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_storeu(float *p, vf x) { _mm256_storeu_ps(p, x); }

static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
/* 1 / x to 11 bits or more; 0 if that is denormal. */
static inline vf vf_about_inverse(vf x) { return _mm256_rcp_ps(x); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
/* What the rounded product of a and b has lost, exactly. */
static inline vf vf_lost(vf a, vf b, vf product) { return vf_fma(a, b, vf_sub(vf_set1(0), product)); }
/* Of two operands of which one is NaN, the second. */
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }

/* 2^n for t = n + 1.5 * 2^23, n an integer in [-127, 127]; 0 for n = -127. */
static inline vf vf_pow2(vf t) {
    __m256i n = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(0x3f800000)));
}

static inline vf vf_load_bf16(const uint16_t *p) {
    __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
static inline vf vf_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
static inline void vf_store_bf16(uint16_t *p, vf x) {
    __m256i bits = _mm256_castps_si256(x),
            odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_castsi256_si128(packed));
}
static inline void vf_store_f16(uint16_t *p, vf x) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

/* [a c; b d] of four vectors: per 128 bits, the sum of each. */
static inline vf vf_sums_of_4(vf a, vf b, vf c, vf d) {
    vf ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    vf cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}

/* sums[i]: sum of the lanes of x[i]. */
static inline void vf_sums(const vf x[16], float sums[16]) {
    for (int i = 0; i < 16; i += 8) {
        vf low = vf_sums_of_4(x[i], x[i + 1], x[i + 2], x[i + 3]);
        vf high = vf_sums_of_4(x[i + 4], x[i + 5], x[i + 6], x[i + 7]);
        _mm256_storeu_ps(sums + i, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                                 _mm256_permute2f128_ps(low, high, 0x31)));
    }
}

/* x [LANES][LANES] becomes its transpose. */
static inline void vf_transpose(vf x[LANES]) {
    vf pairs[8], fours[8]; /* of each 128 bits, rows 0 1, then 0 1 2 3, of a column */
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}

#endif
