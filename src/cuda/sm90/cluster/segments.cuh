/* SPDX-License-Identifier: MIT */
/* Where the states lie that scan.cu leaves to the kernels after it. */
#ifndef KDA_CUDA_SM90_CLUSTER_SEGMENTS_CUH
#define KDA_CUDA_SM90_CLUSTER_SEGMENTS_CUH

#include "cuda/sm90/kernels.h"

#include <cstdint>

namespace kda {

/* The true state before a segment that is not a sequence's first, numbered over all chains: a column of V in
 * scaled fp16. It lies in place of the B of the segment before, which is used by then: in the first half of
 * each row. */
inline __device__ uint16_t *state_before(const kda_sm90_cluster_memory &memory, int64_t segment, int column) {
    return reinterpret_cast<uint16_t *>(memory.local_states +
                                        ((segment - 1) * KDA_SM90_DIM + column) * KDA_SM90_DIM);
}
constexpr int STATE_ROW = KDA_SM90_DIM * sizeof(float); /* bytes from column to column */

/* Does the state before sequence n come from another call? */
inline __device__ bool comes_in(const kda_prefill &p, int64_t n) {
    return p.border.phase != FLASH_KDA_PHASE_WHOLE && kda_place_of(&p.border.awaiting_rows, n) >= 0;
}

/* The first chunk of a segment of a sequence of so many chunks. Where its first state comes from another call the first
 * segment is empty, for the others alone find what they do to any state. That state then lies where the first segment's
 * last one would. */
inline __device__ int begin_of_segment(bool incoming, int chunks, int segments, int segment) {
    if (!incoming)
        return kda_begin_of_segment(chunks, segments, segment);
    return segment == 0 ? 0 : kda_begin_of_segment(chunks, segments - 1, segment - 1);
}

/* May a segment's A grow a state? Then the chain is worked whole, as errors of A would grow likewise. All lanes
 * of a warp ask. */
inline __device__ bool grows(const kda_sm90_cluster_memory &memory, int64_t chain) {
    bool found = false;
    if (memory.grown)
#pragma unroll 1
        for (int s = 1 + threadIdx.x % 32; s < memory.segments; s += 32)
            found |= __ldcg(&memory.grown[chain * memory.segments + s]) != 0;
    return __any_sync(~0u, found);
}

/* Where a chain's transitions begin, less one: its first segment has none. */
inline __device__ int64_t before_matrices(const kda_sm90_cluster_memory &memory, int64_t chain) {
    return chain * (memory.segments - 1) - 1;
}

} // namespace kda

#endif
