/* SPDX-License-Identifier: MIT */
/* The persistent schedule: its configurations, and what lies in shared memory. */
#ifndef KDA_CUDA_SM90_PERSISTENT_CONFIG_CUH
#define KDA_CUDA_SM90_PERSISTENT_CONFIG_CUH

#include "cuda/sm90/mainloop/consume.cuh"
#include "cuda/sm90/mainloop/unbounded.cuh"
#include "cuda/sm90/stream_k/ranges.cuh"

namespace kda {
namespace {

/* K = V = dim, with `ctas` CTAs on a multiprocessor. With K = V = 64 there are two, as one chain leaves room
 * for another. Where every chain has a multiprocessor to itself, there is one CTA with twice the producers
 * instead (FEW). */
template <int dim, int ctas> struct ConfigOf {
    static constexpr int DIM = dim, CTAS = ctas;
    static constexpr bool FEW = DIM == 64 && CTAS == 1;
    /* Warpgroups of a CTA. */
    static constexpr int PRODUCERS = FEW ? 4 : 2, CONSUMERS = DIM / GROUP_COLUMNS;
    static constexpr int THREADS = (CONSUMERS + PRODUCERS) * GROUP;
    static constexpr int WARPS = GROUP / 32 * CONSUMERS; /* of consumers */
    static constexpr int STAGES = DIM == 128 ? 5 : FEW ? 8 : 4;
    /* A thread's registers at the start: all that a multiprocessor has. Consumers then take some of the
     * producers'. */
    static constexpr int REGISTERS = DIM == 128 ? 128 : FEW ? 96 : 80;
    static constexpr int CONSUMER_REGISTERS = DIM == 128 ? 168 : FEW ? 128 : 112;
    static constexpr int PRODUCER_REGISTERS = DIM == 128 || FEW ? 88 : 64;
    static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCERS * PRODUCER_REGISTERS <=
                          (CONSUMERS + PRODUCERS) * REGISTERS &&
                      CTAS * THREADS * REGISTERS <= 65536,
                  "or a consumer waits for registers for ever");
    /* By how many of its group's chunks a scout is ahead of the one that is received. If its warp makes no
     * tiles, it goes on while others make them. Else it goes on when the operands are made, which is too late
     * for the next chunk. */
    static constexpr int AHEAD = IN_ONE_WARP<DIM> ? 1 : 2;
    static constexpr int BETA = IN_ONE_WARP<DIM> ? SCOUT<DIM> : 1; /* the warp that loads beta */
    /* Named barriers: from each number on, one for every producer warpgroup. 0 is __syncthreads. */
    static constexpr int BARRIER_GROUP = 1, BARRIER_INVERSE = BARRIER_GROUP + PRODUCERS;
};
using Config128 = ConfigOf<128, 1>; /* ranges use it, too */
using Config64 = ConfigOf<64, 2>;
using FewConfig64 = ConfigOf<64, 1>;

constexpr int SORTED = 256; /* at most so many sequences are sorted; more are worked in their own order */

/* Where a scout is: at a chunk of a chain of the CTA. It has entered `round` chains so far. */
struct Scout {
    int round, chunk, chunks;
    int n, head, key_head, batch, first, length, slot;
    int count; /* tokens of the chunk; -1 after the last one */
    Checkpoints checkpoints;
    kda_slice slice; /* stream-K: the part of the chain that is in the CTA's range */
};

/* A producer warpgroup's own memory. */
struct Scratch {
    Blocks blocks;
    Scout scout;
};

template <class Config> struct alignas(1024) Shared {
    Tiles<Config::DIM> tiles[Config::STAGES]; /* k, q and g at first */
    __nv_bfloat16 values[Config::STAGES][CHUNK * Config::DIM];
    __nv_bfloat16 outputs[1][Config::WARPS][CHUNK * 16]; /* of each consumer warp, swizzled by 32 bytes */
    Factors<Config::DIM> factors[Config::STAGES];
    uint8_t order[SORTED]; /* sequences, the longest first */
    Scratch scratch[Config::PRODUCERS];
    ChunkInfo infos[2 * Config::STAGES];
    bool identity[Config::WARPS];     /* does a consumer warp take the identity through a range's first chunk */
    int16_t kept[Config::WARPS];      /* the size of its local state after that chunk */
    uint64_t arrived[Config::STAGES]; /* q, k, v, g and the info: by the scout and the bytes */
    uint64_t full[Config::STAGES];    /* the operands: by a producer warpgroup */
    uint64_t empty[Config::STAGES];   /* the consumers are done */
};

static_assert(sizeof(Shared<Config128>) == 216 * 1024, "docs/hopper.md says what lies where");
static_assert(sizeof(Shared<Config64>) == 105 * 1024,
              "likewise; two leave room for what the hardware keeps of 228 KiB");
static_assert(sizeof(Shared<FewConfig64>) <= 227 * 1024, "all that a CTA can have");

} // namespace
} // namespace kda

#endif
