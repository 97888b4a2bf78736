/* SPDX-License-Identifier: MIT */
/* Elements of tensors of any dtype, as floats. */
#ifndef KDA_CUDA_FLOATS_CUH
#define KDA_CUDA_FLOATS_CUH

#include "api/problem.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace kda {

inline __device__ float load_float(const char *row, kda_dtype dtype, int64_t i) {
    if (dtype == KDA_F32)
        return reinterpret_cast<const float *>(row)[i];
    uint16_t x = reinterpret_cast<const uint16_t *>(row)[i];
    return dtype == KDA_BF16 ? kda_from_bf16(x) : __half2float(__ushort_as_half(x));
}

inline __device__ void store_float(char *row, kda_dtype dtype, int64_t i, float x) {
    if (dtype == KDA_F32)
        reinterpret_cast<float *>(row)[i] = x;
    else if (dtype == KDA_BF16)
        reinterpret_cast<__nv_bfloat16 *>(row)[i] = __float2bfloat16_rn(x);
    else
        reinterpret_cast<__half *>(row)[i] = __float2half_rn(x);
}

} // namespace kda

#endif
