/* SPDX-License-Identifier: MIT */
/* The element types of a tensor, and how one of floats becomes fp32 and comes back. */
#ifndef KDA_API_DTYPE_H
#define KDA_API_DTYPE_H

#include <stdint.h>
#include <string.h>

/* Small functions that device code shares. */
#ifdef __CUDACC__
#define KDA_INLINE static __host__ __device__ inline
#else
#define KDA_INLINE static inline
#endif

enum kda_dtype { KDA_F32, KDA_F16, KDA_BF16, KDA_I32, KDA_I64, KDA_BOOL, KDA_I8 };

KDA_INLINE uint32_t kda_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

KDA_INLINE float kda_bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

KDA_INLINE float kda_from_bf16(uint16_t x) { return kda_bits_float((uint32_t)x << 16); }

/* Rounds to nearest even; NaN stays NaN. */
static inline uint16_t kda_to_bf16(float x) {
    uint32_t bits = kda_float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float kda_from_f16(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    if (magnitude >= 0x7c00u)
        return kda_bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x400u)
        return kda_bits_float(sign | ((magnitude << 13) + (112u << 23)));
    float subnormal = (float)magnitude * 0x1p-24f;
    return kda_bits_float(sign | kda_float_bits(subnormal));
}

/* Rounds to nearest even; overflows to infinity; NaN stays NaN. */
static inline uint16_t kda_to_f16(float x) {
    uint32_t bits = kda_float_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) /* 65520, halfway past the largest fp16 */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) /* below 2^-14: adding 1/2 leaves the fp16 subnormal in the low bits */
        return (uint16_t)(sign | (kda_float_bits(kda_bits_float(magnitude) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

static inline size_t kda_dtype_size(enum kda_dtype dtype) {
    return dtype == KDA_I64                        ? 8
           : dtype == KDA_F16 || dtype == KDA_BF16 ? 2
           : dtype == KDA_BOOL || dtype == KDA_I8  ? 1
                                                   : 4;
}

/* Element i of a row of floats. */
static inline float kda_load(const char *row, enum kda_dtype dtype, int64_t i) {
    if (dtype == KDA_F32)
        return ((const float *)(const void *)row)[i];
    uint16_t x = ((const uint16_t *)(const void *)row)[i];
    return dtype == KDA_BF16 ? kda_from_bf16(x) : kda_from_f16(x);
}

static inline void kda_store(char *row, enum kda_dtype dtype, int64_t i, float x) {
    if (dtype == KDA_F32)
        ((float *)(void *)row)[i] = x;
    else
        ((uint16_t *)(void *)row)[i] = dtype == KDA_BF16 ? kda_to_bf16(x) : kda_to_f16(x);
}

#endif
