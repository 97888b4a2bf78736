/* SPDX-License-Identifier: MIT */
/* What Hopper's kernels share: the state of a pipeline of stages, and how a consumer warpgroup's outputs
 * leave. */
#ifndef KDA_CUDA_SM90_WARPGROUP_CUH
#define KDA_CUDA_SM90_WARPGROUP_CUH

#include "cuda/chain.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/sm90/plan.h"

#include <cuda/ptx>

namespace kda {

namespace ptx = cuda::ptx;

constexpr int GROUP = 128;                              /* threads of a warpgroup */
constexpr int GROUP_COLUMNS = KDA_SM90_GENERAL_COLUMNS; /* of V, of one warpgroup */

/* The stage that a chunk uses, and the parity of the barriers' phase in which it does. */
template <int STAGES> struct PipelineState {
    int stage = 0;
    uint32_t parity = 0;
    /* The chunk's index in a ring twice as long: what lies there is kept while the stage is used again. */
    __device__ int info_index() const { return stage + (int)parity * STAGES; }
    __device__ void next(int chunks = 1) {
        stage += chunks;
        if (stage >= STAGES)
            stage -= STAGES, parity ^= 1;
    }
};

/* The step before the first chunk: a wait for it returns at once. */
template <int STAGES> __device__ PipelineState<STAGES> before_first() {
    PipelineState<STAGES> pipe;
    pipe.stage = STAGES - 1, pipe.parity = 1;
    return pipe;
}

inline __device__ void wait(uint64_t &barrier, uint32_t parity) {
    while (!ptx::mbarrier_try_wait_parity(&barrier, parity))
        ;
}

/* A warp's outputs of a chunk, rounded, on their way to memory: [CHUNK][16 columns] as fragments of 8x8
 * matrices. */
struct Outputs {
    uint32_t pairs[CHUNK / 8][2] = {};
    char *to = nullptr; /* the lane's token, the warp's columns; NULL: nothing to store */
};

/* Can outputs leave in pieces of 16 bytes? */
inline __device__ __host__ bool in_pieces(const kda_tensor &out) {
    uintptr_t bits = reinterpret_cast<uintptr_t>(out.data);
    for (int i = 0; i < 3; i++)
        bits |= out.shape[i] > 1 ? out.stride[i] : 0;
    return out.dtype != KDA_F32 && bits % 16 == 0;
}

/* Where the lane's token of a chunk goes: columns of V from `column` on. */
inline __device__ char *output_pointer(const kda_prefill &p, int64_t batch, int64_t token, int64_t count,
                                       int64_t head, int column) {
    int lane = threadIdx.x % 32;
    return lane < count ? kda_row(&p.out, batch, token + lane, head) + column * 2 : nullptr;
}

/* Where 8 columns of a token lie in a warp's `rows` [CHUNK][16]: swizzled by 32 bytes. */
inline __device__ int output_piece(int token, int half) { return token * 16 + (half ^ (token >> 2 & 1)) * 8; }

/* Transposes a chunk's rounded outputs in the warp's own `rows`, so that a token's columns are neighbours. */
inline __device__ void transpose_outputs(const uint32_t (&pairs)[CHUNK / 8][2], __nv_bfloat16 *rows) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i += 2)
        stmatrix_transposed(&rows[output_piece((i + lane / 16) * 8 + lane % 8, lane / 8 % 2)], pairs[i],
                            pairs[i + 1]);
}

/* Copies the lane's token from `rows` to memory. */
inline __device__ void store_row(const __nv_bfloat16 *rows, char *to) {
    int lane = threadIdx.x % 32;
    reinterpret_cast<uint4 *>(to)[0] = *reinterpret_cast<const uint4 *>(&rows[output_piece(lane, 0)]);
    reinterpret_cast<uint4 *>(to)[1] = *reinterpret_cast<const uint4 *>(&rows[output_piece(lane, 1)]);
}

inline __device__ void store_pieces(const Outputs &outputs, __nv_bfloat16 *rows) {
    __syncwarp();
    transpose_outputs(outputs.pairs, rows);
    __syncwarp();
    if (outputs.to)
        store_row(rows, outputs.to);
}

} // namespace kda

#endif
