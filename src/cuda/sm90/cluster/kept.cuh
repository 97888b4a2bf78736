/* SPDX-License-Identifier: MIT */
/*
 * Checkpoints of segments that start from zero. Each is A S + B, where the local pass knows A and B up to there, and
 * the scan finds S, the state before the segment. The local pass keeps A and B, and add_history makes checkpoints of
 * them.
 *
 * Both lie as consumer threads have them, 16 bytes of each thread at a time: the pieces of 16 channels are neighbours.
 */
#ifndef KDA_CUDA_SM90_CLUSTER_KEPT_CUH
#define KDA_CUDA_SM90_CLUSTER_KEPT_CUH

#include "cuda/sm90/kernels.h"
#include "cuda/sm90/mainloop/consume.cuh"
#include "cuda/sm90/stream_k/ranges.cuh"

namespace kda {

/* The number of row 0 of a sequence's checkpoints in kda_sm90_cluster_memory::kept. Rows in a first segment that all
 * sequences have in common are not there. */
inline __device__ int64_t first_kept(const kda_prefill &p, const kda_sm90_cluster_memory &memory, int64_t first,
                                     int64_t n, int64_t head) {
    int64_t of_head = kda_first_checkpoint(&p, memory.skipped, p.tokens, p.sequences);
    int64_t absent = memory.skipped / p.checkpoint_every;
    return head * of_head + kda_first_checkpoint(&p, memory.skipped, first, n) - absent;
}

/* Pieces of 16 bytes of both. */
constexpr uint32_t KEPT_PIECES = 2 * DIM * DIM / 8;

/* The place of A if `transition`, else of B, in pieces. From it on each thread has one of the first 16 channels; those of
 * the next 16 are STATE_THREADS further. */
inline __device__ uint32_t place_of_kept(int64_t number, bool transition) {
    return (uint32_t)number * KEPT_PIECES + transition * (KEPT_PIECES / 2);
}
inline __device__ uint4 *kept_pieces(const kda_sm90_cluster_memory &memory, uint32_t place, uint32_t thread) {
    return reinterpret_cast<uint4 *>(memory.kept) + place + thread;
}

/* Its exponents: one for a warp's columns of V, or of A. */
inline __device__ int16_t *kept_exponents(const kda_sm90_cluster_memory &memory, uint32_t place) {
    return memory.kept_exponents + place / (KEPT_PIECES / 2) * KDA_SM90_EXPONENTS;
}

/* Stores a thread's share in fp16, times `factor`; returns its largest element. */
inline __device__ float store_halves(uint4 *to, const float (&S)[DIM / 8][4], float factor) {
    __half2 largest[2] = {};
#pragma unroll
    for (int c = 0; c < DIM / 8; c += 2, to += STATE_THREADS) {
        uint32_t halves[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *pair = &S[c + i / 2][i % 2 * 2];
            halves[i] = pack_half(pair[0] * factor, pair[1] * factor);
            largest[i % 2] = __hmax2(largest[i % 2], __habs2(*reinterpret_cast<__half2 *>(&halves[i])));
        }
        *to = make_uint4(halves[0], halves[1], halves[2], halves[3]);
    }
    float2 pair = __half22float2(__hmax2(largest[0], largest[1]));
    return fmaxf(pair.x, pair.y);
}

/* Keeps A or B at its place. */
inline __device__ void keep_state(const kda_sm90_cluster_memory &memory, uint32_t place,
                                  const float (&S)[DIM / 8][4], int exponent) {
    uint4 *to = kept_pieces(memory, place, thread());
    if (__builtin_expect(!fits_half(store_halves(to, S, 1)), 0)) {
        int further = exponent_of(largest_that_counts(largest_of_tiles(S)));
        store_halves(to, S, power_of_two(-further));
        exponent += further;
    }
    if (thread() % 32 == 0)
        kept_exponents(memory, place)[thread() / 32] = (int16_t)exponent;
}

} // namespace kda

#endif
