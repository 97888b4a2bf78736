/* SPDX-License-Identifier: MIT */
/* What the kernels of parts (kernels.h) tell each other, and those behind them. */
#ifndef KDA_CUDA_SM90_SPREAD_CUH
#define KDA_CUDA_SM90_SPREAD_CUH

#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tiles.cuh"

namespace kda {

/* What was seen of a part's first chunk. */
enum Look { SLOW, FAST, UNCUT /* in front of it */ };

/* What the kernels behind have to do. */
enum Verdict { NOTHING, CUT_CHAINS, ALL_CHAINS };

constexpr int DIM = KDA_SM90_CUT_DIM;

/* In a proof: below the sum of any others; and above, where it may never pass for small. */
constexpr int16_t EXACT_ZERO = -20000, NEVER_SMALL = 20000;

/* Behind kernel join: is there no chain still to be worked? To be asked first: code that is never reached need not be fetched. */
inline __device__ bool nothing_is_left(const kda_sm90_spread &spread) {
    return spread.all.parts && __ldcg(spread.verdict) == NOTHING;
}

/* And is this one? */
inline __device__ bool is_left(const kda_prefill &p, const kda_sm90_spread &spread, int n, int head) {
    if (!spread.all.parts)
        return true;
    int verdict = __ldcg(spread.verdict);
    return verdict == ALL_CHAINS || (verdict == CUT_CHAINS && __ldcg(&spread.left[n * p.value_heads + head]));
}

/*
 * States that go from consumers to kernel join lie as threads have them, 16 bytes of each at a time: 16 channels of two columns
 * of V in bf16, 8 in fp32.
 */
constexpr int STATE_THREADS = 2 * GROUP;

inline __device__ uint4 *state_pieces(const kda_sm90_spread &spread, int part, uint32_t thread) {
    return reinterpret_cast<uint4 *>(spread.states + (int64_t)part * DIM * DIM) + thread;
}
inline __device__ float4 *final_pieces(const kda_prefill &p, const kda_sm90_spread &spread, int n, int head,
                                       uint32_t thread) {
    int chain = n * (int)p.value_heads + head;
    int64_t place = kda_states_by_chain(&p, spread.all.parts) ? chain : blockIdx.x;
    return reinterpret_cast<float4 *>(spread.finals + place * DIM * DIM) + thread;
}

} // namespace kda

#endif
