/* SPDX-License-Identifier: MIT */
/* What kernels that take chains through chunks on 64 columns of V share: values in shared memory, and the product with
 * an inverse. A warp works 16 columns, transposed (chain.cuh). */
#ifndef KDA_CUDA_SM80_COLUMNS_CUH
#define KDA_CUDA_SM80_COLUMNS_CUH

#include "cuda/chain.cuh"

namespace kda {

/* Starts to copy a chunk's rows of v or dO, [CHUNK][COLUMNS] in their own dtype, 2-byte elements swizzled; zeros where
 * there are none. */
template <int THREADS, int COLUMNS>
__device__ void fetch_values(const kda_tensor &v, const Chain &chain, struct kda_span span, char *to) {
    int size = v.dtype == KDA_F32 ? 4 : 2;
    const char *rows =
        kda_row(&v, chain.sequence.batch, chain.sequence.first + span.first, chain.head) + chain.column * size;
    int64_t left = span.count;
    if (size == 2 && chain.columns == COLUMNS && (reinterpret_cast<uintptr_t>(rows) | v.stride[1]) % 16 == 0) {
        uint16_t *values = reinterpret_cast<uint16_t *>(to);
        for (int i = threadIdx.x; i < CHUNK * COLUMNS / 8; i += THREADS) {
            int t = i / (COLUMNS / 8), c = i % (COLUMNS / 8) * 8;
            copy_async(values + swizzled<CHUNK, COLUMNS>(t, c),
                       t < left ? rows + t * v.stride[1] + c * 2 : rows, t < left);
        }
        return;
    }
    for (int i = threadIdx.x; i < CHUNK * COLUMNS; i += THREADS) {
        int t = i / COLUMNS, c = i % COLUMNS;
        bool real = t < left && c < chain.columns;
        const char *row = rows + t * v.stride[1];
        if (size == 4)
            reinterpret_cast<float *>(to)[t * COLUMNS + c] =
                real ? reinterpret_cast<const float *>(row)[c] : 0.f;
        else
            reinterpret_cast<uint16_t *>(to)[swizzled<CHUNK, COLUMNS>(t, c)] =
                real ? reinterpret_cast<const uint16_t *>(row)[c] : 0;
    }
}

/* u^T [16][CHUNK] = x^T [16][CHUNK] matrix^T; the matrix, in tf32, is 0 above its diagonal or, if `upper`, below it. */
template <bool upper>
__device__ void multiply_inverse(float (&u)[CHUNK / 8][4], const float (&x)[CHUNK / 8][4],
                                 const float *matrix) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++) /* rows of the matrix, 8 at a time */
#pragma unroll
        for (int j = upper ? i / 2 * 2 : 0; upper ? j < CHUNK / 8 : j <= i;
             j += 2) { /* its columns, 16 at a time */
            uint32_t a[4], b[4],
                row = (uint32_t)__cvta_generic_to_shared(
                    &matrix[tf32_index(i * 8 + lane % 8, j * 8 + lane / 16 * 8 + lane / 8 % 2)]);
            ldmatrix(b, row);
            tf32_operand(x[j], a);
            mma_tf32(u[i], a, b[0], b[1]);
            tf32_operand(x[j + 1], a);
            mma_tf32(u[i], a, b[2], b[3]);
        }
}

/* x^T [16 columns of V from `column` on][16 tokens from t on], as two accumulator tiles, from values as fetched. */
template <int COLUMNS>
__device__ void load_values(kda_dtype dtype, const char *values, int column, int t, float (&x)[2][4]) {
    int lane = threadIdx.x % 32;
    if (dtype == KDA_F32) {
        for (int i = 0; i < 8; i++)
            x[i / 4][i % 4] = reinterpret_cast<const float *>(
                values)[(t + i / 4 * 8 + lane % 4 * 2 + i % 2) * COLUMNS + column + lane / 4 + i % 4 / 2 * 8];
        return;
    }
    uint32_t r[4];
    ldmatrix_transposed(r, MatrixRow<CHUNK, COLUMNS>(values, false).at(t, column));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair =
            dtype == KDA_BF16 ? unpack_bf16(r[i]) : __half22float2(*reinterpret_cast<__half2 *>(&r[i]));
        x[i / 2][i % 2 * 2] = pair.x, x[i / 2][i % 2 * 2 + 1] = pair.y;
    }
}

} // namespace kda

#endif
