/* SPDX-License-Identifier: MIT */
/* The cluster schedule: its configurations, and what lies in shared memory of each CTA. */
#ifndef KDA_CUDA_SM90_CLUSTER_CONFIG_CUH
#define KDA_CUDA_SM90_CLUSTER_CONFIG_CUH

#include "cuda/sm90/cluster/kept.cuh"
#include "cuda/sm90/cluster/segments.cuh"
#include "cuda/sm90/mainloop/consume.cuh"
#include "cuda/sm90/mainloop/unbounded.cuh"
#include "cuda/sm90/stream_k/ranges.cuh"

namespace kda {
namespace {

constexpr int CTAS = 2, PRODUCERS = 2;             /* CTAs of a cluster; producer warpgroups of each */
constexpr int CHUNKS_PER_ROUND = CTAS * PRODUCERS; /* chunks from one that a group makes to its next */
/* Warps of a producer warpgroup: PUSH passes operands on to the other CTA, HOST opens stages for those that the
 * other CTA makes. */
constexpr int PUSH = 1, HOST = 2;

template <bool split> constexpr int STAGES = split ? 5 : 6;
constexpr int INFOS = 8; /* there is no room for two of each stage */
static_assert(CTAS * PRODUCERS == sizeof *kda_sm90_cluster_memory::grown, "each has a byte");
static_assert(INFOS > STAGES<true> && INFOS > STAGES<false>,
              "a chunk's info is read until the next chunk is done");
template <bool split> constexpr int CONSUMERS = split ? 2 : 1;
template <bool split> constexpr int THREADS = (CONSUMERS<split> + PRODUCERS) * GROUP;
/* Registers of a thread at the start, then of consumers and producers. */
template <bool split> constexpr int REGISTERS = split ? 128 : 168;
template <bool split> constexpr int CONSUMER_REGISTERS = split ? 168 : 200;
template <bool split> constexpr int PRODUCER_REGISTERS = split ? 88 : 152;

/* Named barriers; 0 is __syncthreads. */
enum {
    BARRIER_GROUP = 1 /* and the next: for every producer warpgroup */,
    BARRIER_INVERSE = BARRIER_GROUP + PRODUCERS,
    BARRIER_MADE = BARRIER_INVERSE + PRODUCERS
};

/* What a cluster works on. */
struct WorkTile {
    int n, head, key_head;
    int batch, first, length, slot; /* of the sequence; -1: there is nothing to do */
    int segment, begin, chunks;     /* chunks: at least 1, the first of which may be empty */
    int index;                      /* chain * segments + segment */
    int16_t *exponents;             /* of outputs, from the sequence's first chunk on */
};

template <bool split> struct alignas(1024) Shared {
    Tiles<DIM> tiles[STAGES<split>]; /* k, q and g at first, where the CTA makes them */
    __nv_bfloat16 values[STAGES<split>][CHUNK * GROUP_COLUMNS * CONSUMERS<split>];
    /* One for each consumer warp, swizzled by 32 bytes. Where there is room, a second one while the first leaves. */
    __nv_bfloat16 outputs[split ? 2 : 1][CONSUMERS<split> * GROUP / 32][CHUNK * 16];
    Factors<DIM> factors[STAGES<split>];
    Blocks blocks[PRODUCERS];
    ChunkInfo infos[INFOS];
    WorkTile work;
    uint64_t arrived[PRODUCERS];     /* q, k, v and g for a producer warpgroup: by the scout and the bytes */
    uint64_t full[STAGES<split>];    /* the operands: by a producer warpgroup, or the host and the bytes */
    uint64_t empty[STAGES<split>];   /* all consumers are done, and the operands are passed on */
    uint64_t granted[STAGES<split>]; /* the other CTA has room for the chunk made here */
};
static_assert(sizeof(Shared<true>) <= 227 * 1024 && sizeof(Shared<false>) <= 227 * 1024,
              "all that a CTA can have");

} // namespace
} // namespace kda

#endif
