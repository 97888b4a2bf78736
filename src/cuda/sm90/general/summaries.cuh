/* SPDX-License-Identifier: MIT */
/* What the first pass leaves for every chain and segment: B^T [V][K], then A^T [K][K]. A segment takes a state
 * S to A S + B. The last one needs none: its B^T holds the state that the chain starts from. */
#ifndef KDA_CUDA_SM90_SUMMARIES_CUH
#define KDA_CUDA_SM90_SUMMARIES_CUH

#include "cuda/sm90/kernels.h"

namespace kda {

inline __device__ float *summary(const kda_prefill &p, const kda_sm90_general_memory &segments, int64_t chain,
                                 int segment, bool of_A) {
    int64_t rows = p.value_dim + p.key_dim;
    return segments.summaries +
           ((chain * segments.count + segment) * rows + (of_A ? p.value_dim : 0)) * p.key_dim;
}

} // namespace kda

#endif
