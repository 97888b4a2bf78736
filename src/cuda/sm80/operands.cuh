/* SPDX-License-Identifier: MIT */
/* What prepare.cu leaves for chain.cu: the operands of one chunk of one value head, as they will lie in shared
 * memory. Rows are cut in 16-byte pieces whose order is permuted by the row's number, so that the eight rows
 * of an ldmatrix never meet in a bank. */
#ifndef KDA_CUDA_SM80_OPERANDS_CUH
#define KDA_CUDA_SM80_OPERANDS_CUH

#include "cuda/chunks.h"

#include <cuda_bf16.h>

namespace kda {

constexpr int CHUNK = KDA_CUDA_CHUNK; /* tokens */

template <int KP> struct Operands {
    __nv_bfloat16 queries_keys[2 * CHUNK * KP]; /* rows of KT = k exp(G), then of QT = scale q exp(G) */
    __nv_bfloat16 keys_to_end[CHUNK * KP];      /* KR = k exp(G_C - G) */
    __nv_bfloat16 inverse[2][CHUNK * CHUNK];    /* (I + L)^-1 diag(beta), and what rounding it left */
    __nv_bfloat16 M[CHUNK * CHUNK];
    float carry[KP]; /* exp(G_C) - 1 */
};

/* Index of element (row, column) of a tile with rows of `width` elements of 2 bytes; column a multiple of 8 plus the
 * place in its piece. */
template <int width> __host__ __device__ constexpr int swizzled(int row, int column) {
    constexpr int pieces = width / 8;
    int permutation = pieces >= 8 ? row & 7 : row >> 1 & (pieces - 1);
    return row * width + ((column / 8) ^ permutation) * 8 + column % 8;
}

} // namespace kda

#endif
