/* SPDX-License-Identifier: MIT */
/* What kernel prepare leaves for kernel general: operands of one chunk of one value head, as they lie in shared
 * memory. */
#ifndef KDA_CUDA_OPERANDS_CUH
#define KDA_CUDA_OPERANDS_CUH

#include "cuda/chunks.h"

#include <cuda_bf16.h>

namespace kda {

constexpr int CHUNK = KDA_CUDA_CHUNK; /* tokens */
constexpr int PANEL = 64;             /* elements of 2 bytes in the longest row of a tile */

/* A tile [rows][width] of 2-byte elements lies in panels of 64 columns, each [rows][64]. A row's 16-byte pieces
 * are permuted by its number, so that the eight rows of an ldmatrix never meet in a bank. This is wgmma's
 * 128-byte swizzle, and for tiles 32 wide its 64-byte one. */
template <int rows, int width> __host__ __device__ constexpr int swizzled(int row, int column) {
    constexpr int length = width < PANEL ? width : PANEL;
    int permutation = length == PANEL ? row & 7 : row >> 1 & 3;
    return (column / length * rows + row) * length + (column % length / 8 ^ permutation) * 8 + column % 8;
}

template <int KP> struct alignas(16) Operands {
    __nv_bfloat16 queries_keys[2 * CHUNK * KP]; /* rows of KT = k exp(G), then of QT = scale q exp(G) */
    __nv_bfloat16 keys_to_end[CHUNK * KP];      /* KR = k exp(G_C - G) */
    float inverse[CHUNK * CHUNK];               /* (I + L)^-1 diag(beta), tf32, by tf32_index */
    __nv_bfloat16 M[CHUNK * CHUNK];
    float carry[KP]; /* exp(G_C) - 1 */
    float growth;    /* log2 of a bound on what the chunk grows a state by */

    __device__ __nv_bfloat16 *key(int row, int c) { return &queries_keys[swizzled<2 * CHUNK, KP>(row, c)]; }
    __device__ __nv_bfloat16 *query(int row, int c) { return key(row, c) + CHUNK * PANEL; }
};

/* The index of element (row, token) of the inverse [CHUNK][CHUNK]. An accumulator holds tokens 2 t and 2 t + 1
 * where a tf32 operand wants columns t and t + 4, so each group of 8 tokens is stored even ones first. Swizzled
 * as above. */
__host__ __device__ constexpr int tf32_index(int row, int token) {
    int piece = token / 8 * 2 + token % 2;
    return row * CHUNK + (piece ^ (row & 7)) * 4 + token % 8 / 2;
}

/* The lane's row in an ldmatrix of four neighbouring 8x8 matrices of a swizzled tile. The second matrix lies
 * below the first or, if !below, beside it. Tile rows and columns are constants, so that an address costs one
 * instruction. */
template <int rows, int width> struct MatrixRow {
    static constexpr int LENGTH = width < PANEL ? width : PANEL;
    uint32_t row, piece; /* in bytes */

    __device__ MatrixRow(const void *tile, bool below, uint32_t thread = threadIdx.x) {
        int lane = (int)thread % 32, matrix = lane / 8;
        int down = below ? matrix & 1 : matrix >> 1, right = below ? matrix >> 1 : matrix & 1;
        int r = down * 8 + lane % 8;
        row = (uint32_t)__cvta_generic_to_shared(tile) + r * LENGTH * 2;
        piece = (uint32_t)((swizzled<rows, width>(r, right * 8) - r * LENGTH) * 2);
    }
    /* both multiples of 16 */
    __device__ uint32_t at(int down, int column) const {
        return row + (column / LENGTH * rows + down) * LENGTH * 2 + (piece ^ (uint32_t)(column % LENGTH * 2));
    }
};

} // namespace kda

#endif
