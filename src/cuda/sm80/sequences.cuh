/* SPDX-License-Identifier: MIT */
/* For the kernels around a prefill, whose CTAs share out all tokens of a batch: which sequences have tokens of a range. */
#ifndef KDA_CUDA_SM80_SEQUENCES_CUH
#define KDA_CUDA_SM80_SEQUENCES_CUH

#include "api/problem.h"
#include "cuda/ptx/sm80.cuh"

namespace kda {

/* In five instructions, where expf and a division have fifteen, which is more than memory leaves time for. */
inline __device__ float fast_sigmoid(float x) {
    return reciprocal_approximate(1.f + exp2_approximate(x * -1.44269504f));
}

/* The last sequence of a packed batch that begins at `token` or before it: the one that has it, if one has. All lanes of
 * a warp call this, and each step narrows the search to a 32nd. */
inline __device__ int find_sequence_of(const kda_prefill &p, int64_t token) {
    int low = 0, high = (int)p.sequences; /* it is in low .. high - 1, or 0 */
    while (high - low > 1) {
        int step = (high - low + 31) / 32, n = low + (int)(threadIdx.x % 32) * step;
        bool begins = n < high && kda_index(&p.cu_seqlens, n, 0) <= token;
        uint32_t votes = __ballot_sync(~0u, begins);
        int last = votes ? 31 - __clz((int)votes) : 0;
        low += last * step;
        high = min(high, low + step);
    }
    return low;
}

} // namespace kda

#endif
