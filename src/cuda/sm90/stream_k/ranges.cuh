/* SPDX-License-Identifier: MIT */
/* What stream-K's kernels (kernels.h) tell each other and the schedule's kernels. */
#ifndef KDA_CUDA_SM90_RANGES_CUH
#define KDA_CUDA_SM90_RANGES_CUH

#include "cuda/sm90/kernels.h"
#include "cuda/sm90/mainloop/tiles.cuh"

namespace kda {

/* What the probe saw of a range's first chunk. */
enum Seen { SLOW, FAST, UNSPLIT /* no chain is split in front of it */ };

/* What is left for the schedule's kernels to do. */
enum Outcome { NOTHING, SPLIT_CHAINS, ALL_CHAINS };

constexpr int DIM = KDA_SM90_DIM;

/* In a proof: below the sum of any other sizes; above all, where a size may never pass for small. */
constexpr int16_t EXACT_ZERO = -20000, NEVER_SMALL = 20000;

/* After the fixup: is no chain pending? Kernels ask this first, as code that is never reached need not be
 * fetched. */
inline __device__ bool nothing_pending(const kda_sm90_stream_k &stream_k) {
    return stream_k.split.ranges && __ldcg(stream_k.outcome) == NOTHING;
}

/* Is this chain pending? */
inline __device__ bool is_pending(const kda_prefill &p, const kda_sm90_stream_k &stream_k, int n, int head) {
    if (!stream_k.split.ranges)
        return true;
    int outcome = __ldcg(stream_k.outcome);
    return outcome == ALL_CHAINS ||
           (outcome == SPLIT_CHAINS && __ldcg(&stream_k.pending[n * p.value_heads + head]));
}

/*
 * States that go from consumers to the fixup lie as threads have them, 16 bytes of each thread at a time: its
 * share of 16 channels of two columns of V in bf16, of 8 channels in fp32.
 */
constexpr int STATE_THREADS = 2 * GROUP;

inline __device__ uint4 *state_pieces(const kda_sm90_stream_k &stream_k, int range, uint32_t thread) {
    return reinterpret_cast<uint4 *>(stream_k.states + (int64_t)range * DIM * DIM) + thread;
}
inline __device__ float4 *final_pieces(const kda_prefill &p, const kda_sm90_stream_k &stream_k, int n, int head,
                                       uint32_t thread) {
    int chain = n * (int)p.value_heads + head;
    int64_t index = kda_states_by_chain(&p, stream_k.split.ranges) ? chain : blockIdx.x;
    return reinterpret_cast<float4 *>(stream_k.finals + index * DIM * DIM) + thread;
}

} // namespace kda

#endif
