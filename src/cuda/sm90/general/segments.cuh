/* SPDX-License-Identifier: MIT */
/*
 * Which part of a chain a CTA of kernel general works.
 *
 * Where there are few chains, sequences are split into segments, and the kernel passes over them twice. The
 * first pass finds each segment's (A, B); A is what becomes of the identity without values. The second starts
 * from the true states.
 */
#ifndef KDA_CUDA_SM90_GENERAL_SEGMENTS_CUH
#define KDA_CUDA_SM90_GENERAL_SEGMENTS_CUH

#include "cuda/sm90/general/summaries.cuh"
#include "cuda/sm90/mainloop/warpgroup.cuh"

namespace kda {

enum Pass { WHOLE, LOCAL, RESUME };

/* What a CTA works on. */
struct WorkTile {
    Chain chain;
    int segment;
    int64_t begin, end; /* chunks */
    bool identity;      /* columns of A instead of V */
    bool last;          /* the chain ends with it */
};

/* log2 of what a segment's A may grow a state by. Errors of A grow likewise, whatever becomes of the state
 * itself. */
constexpr float MOST_GROWTH = 4;

/* A segment's growth, found by the first pass. */
inline __device__ float &growth_of(const kda_sm90_general_memory &segments, const kda_prefill &p,
                                   const Chain &chain, int segment) {
    return segments.growth[(chain.n * p.value_heads + chain.head) * segments.count + segment];
}

/* Does the chain have a segment whose A may not be used? Then it is worked whole, as a first segment. All
 * threads of a CTA ask. */
inline __device__ bool grows(const kda_sm90_general_memory &segments, const kda_prefill &p,
                             const Chain &chain) {
    int segment = (int)threadIdx.x; /* the first needs no A, the last none either */
    bool has_A = segment > 0 && segment + 1 < segments.count;
    return __syncthreads_or(has_A && growth_of(segments, p, chain, segment) > MOST_GROWTH);
}

template <int COLUMNS, Pass pass>
__device__ WorkTile find_work(const kda_prefill &p, int64_t chunks, const kda_sm90_general_memory &segments) {
    WorkTile work;
    work.chain = find_chain<COLUMNS>(p, blockIdx.x / segments.count, chunks);
    work.segment = blockIdx.x % segments.count;
    int64_t all = INT64_MAX; /* to the end: spans are empty there */
    if (pass != WHOLE)
        all = (kda_chunks_of(work.chain.sequence.length) + segments.count - 1) / segments.count;
    work.begin = work.segment * all, work.end = work.begin + all;
    work.last = work.segment + 1 == segments.count;
    if (pass == RESUME && grows(segments, p, work.chain)) {
        work.last = work.segment == 0;
        work.end = work.last ? INT64_MAX : work.begin;
    }
    work.identity = pass == LOCAL && work.chain.column >= p.value_dim;
    if (work.identity) {
        work.chain.column -= (int)p.value_dim;
        int64_t left = p.key_dim - work.chain.column;
        work.chain.columns = (int)(left < COLUMNS ? left : COLUMNS);
    }
    return work;
}

/* Does the first pass skip this work? Nothing follows a last segment, and a first one has its true state. */
inline __device__ bool left_out(const WorkTile &work) {
    return work.last || (work.identity && work.segment == 0);
}

/* The state in a summary of this work's chain. */
inline __device__ struct kda_state summary_state(const kda_prefill &p, const kda_sm90_general_memory &segments,
                                                 const WorkTile &work, int segment) {
    int64_t chain = work.chain.n * p.value_heads + work.chain.head;
    float *rows = summary(p, segments, chain, segment, work.identity);
    return {reinterpret_cast<char *>(rows), KDA_F32, p.key_dim * (int64_t)sizeof(float), true};
}

/* The state that a work starts from in a pass; not for the identity. */
template <Pass pass>
__device__ struct kda_state state_before(const kda_prefill &p, const WorkTile &work,
                                         const kda_sm90_general_memory &segments) {
    struct kda_state from = kda_state_before(&p, work.chain.n, work.chain.sequence.slot, work.chain.head);
    if (pass == RESUME) /* also of a first segment: another CTA may write its slot */
        from = summary_state(p, segments, work, work.segment == 0 ? segments.count - 1 : work.segment - 1);
    if (pass == LOCAL && work.segment > 0)
        from.data = nullptr;
    return from;
}

/* Where the state after it goes; without data: nowhere. */
template <Pass pass>
__device__ struct kda_state state_after(const kda_prefill &p, const WorkTile &work,
                                        const kda_sm90_general_memory &segments) {
    struct kda_state to = kda_state_at(&p, &p.final_state, work.chain.sequence.slot, work.chain.head);
    if (pass == LOCAL)
        to = summary_state(p, segments, work, work.segment);
    else if (!work.last)
        to.data = nullptr;
    return to;
}

} // namespace kda

#endif
