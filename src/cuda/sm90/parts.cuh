/* SPDX-License-Identifier: MIT */
/*
 * Which part of a chain a CTA of kernel chain works.
 *
 * Where there are few chains, sequences are cut into segments, and the kernel passes over them twice: to find each
 * one's (A, B), A as the state that comes of the identity and no values, and again from their true states.
 */
#ifndef KDA_CUDA_SM90_PARTS_CUH
#define KDA_CUDA_SM90_PARTS_CUH

#include "cuda/sm90/summaries.cuh"
#include "cuda/sm90/warpgroup.cuh"

namespace kda {

enum Pass { WHOLE, SUMMARISE, RESUME };

/* What a CTA works on. */
struct Part {
    Chain chain;
    int segment;
    int64_t begin, end; /* chunks */
    bool identity;      /* columns of A instead of V */
    bool last;          /* the chain ends with it */
};

/* log2 of what a segment's A may grow a state by. What is lost in A grows likewise, whatever becomes of the state itself. */
constexpr float MOST_GROWTH = 4;

/* Of a segment, by the first pass. */
inline __device__ float &growth_of(const kda_sm90_segments &segments, const kda_prefill &p, const Chain &chain,
                                   int segment) {
    return segments.growth[(chain.n * p.value_heads + chain.head) * segments.count + segment];
}

/* Has the chain a segment whose A is not to be used? Then it is worked whole, as a first segment. Asked by a whole CTA. */
inline __device__ bool grows(const kda_sm90_segments &segments, const kda_prefill &p, const Chain &chain) {
    int segment = (int)threadIdx.x; /* the first needs no A, the last none either */
    bool has_A = segment > 0 && segment + 1 < segments.count;
    return __syncthreads_or(has_A && growth_of(segments, p, chain, segment) > MOST_GROWTH);
}

template <int COLUMNS, Pass pass>
__device__ Part find_part(const kda_prefill &p, int64_t chunks, const kda_sm90_segments &segments) {
    Part part;
    part.chain = find_chain<COLUMNS>(p, blockIdx.x / segments.count, chunks);
    part.segment = blockIdx.x % segments.count;
    int64_t all = INT64_MAX; /* up to where spans are empty */
    if (pass != WHOLE)
        all = (kda_chunks_of(part.chain.sequence.length) + segments.count - 1) / segments.count;
    part.begin = part.segment * all, part.end = part.begin + all;
    part.last = part.segment + 1 == segments.count;
    if (pass == RESUME && grows(segments, p, part.chain)) {
        part.last = part.segment == 0;
        part.end = part.last ? INT64_MAX : part.begin;
    }
    part.identity = pass == SUMMARISE && part.chain.column >= p.value_dim;
    if (part.identity) {
        part.chain.column -= (int)p.value_dim;
        int64_t left = p.key_dim - part.chain.column;
        part.chain.columns = (int)(left < COLUMNS ? left : COLUMNS);
    }
    return part;
}

/* Does the first pass leave this part out? The last segment acts on nothing; the first has its state. */
inline __device__ bool left_out(const Part &part) { return part.last || (part.identity && part.segment == 0); }

/* The state in a summary of this part's chain. */
inline __device__ struct kda_state summary_state(const kda_prefill &p, const kda_sm90_segments &segments,
                                                 const Part &part, int segment) {
    int64_t chain = part.chain.n * p.value_heads + part.chain.head;
    float *rows = summary(p, segments, chain, segment, part.identity);
    return {reinterpret_cast<char *>(rows), KDA_F32, p.key_dim * (int64_t)sizeof(float), true};
}

/* Where a part's state comes from in a pass; not in the identity's. */
template <Pass pass>
__device__ struct kda_state state_before(const kda_prefill &p, const Part &part,
                                         const kda_sm90_segments &segments) {
    struct kda_state from = kda_state_at(&p, &p.initial_state, part.chain.sequence.slot, part.chain.head);
    if (pass == RESUME) /* also the first one's: its slot may be another CTA's to write */
        from = summary_state(p, segments, part, part.segment == 0 ? segments.count - 1 : part.segment - 1);
    if (pass == SUMMARISE && part.segment > 0)
        from.data = nullptr;
    return from;
}

/* And where it goes; without data: nowhere. */
template <Pass pass>
__device__ struct kda_state state_after(const kda_prefill &p, const Part &part,
                                        const kda_sm90_segments &segments) {
    struct kda_state to = kda_state_at(&p, &p.final_state, part.chain.sequence.slot, part.chain.head);
    if (pass == SUMMARISE)
        to = summary_state(p, segments, part, part.segment);
    else if (!part.last)
        to.data = nullptr;
    return to;
}

} // namespace kda

#endif
