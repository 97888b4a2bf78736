/* SPDX-License-Identifier: MIT */
/* How A of a segment lies in memory, so that it goes from accumulators to memory and from there to products without
 * passing through shared memory: in blocks of 16 columns j by 16 channels i, a block as a warp's registers. */
#ifndef KDA_CUDA_SM90_CUT_CUH
#define KDA_CUDA_SM90_CUT_CUH

#include "cuda/ptx/sm80.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tiles.cuh"

namespace kda {

constexpr int BLOCKS = DIM / 16; /* of a segment's columns j, and of its channels i */

/* The lane's part of a block. `part`: chain * segments + segment. */
inline __device__ uint4 *part_of_A(const kda_sm90_cut &cut, int64_t part, int columns, int channels) {
    return reinterpret_cast<uint4 *>(cut.A) + ((part * BLOCKS + columns) * BLOCKS + channels) * 32 +
           threadIdx.x % 32;
}

/* A block from A^T [16 columns][16 channels] in two accumulator tiles: x, y become mma's second operand of the first 8
 * channels, z, w that of the others. */
inline __device__ uint4 pack_block(const float (&left)[4], const float (&right)[4]) {
    return make_uint4(transpose(pack_half(left[0], left[1])), transpose(pack_half(left[2], left[3])),
                      transpose(pack_half(right[0], right[1])), transpose(pack_half(right[2], right[3])));
}

} // namespace kda

#endif
