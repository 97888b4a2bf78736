/* SPDX-License-Identifier: MIT */
/* The general schedule: its configurations, and what lies in shared memory. */
#ifndef KDA_CUDA_SM90_GENERAL_CONFIG_CUH
#define KDA_CUDA_SM90_GENERAL_CONFIG_CUH

#include "cuda/sm90/general/segments.cuh"

namespace kda {
namespace {

/* As many as leave room for two CTAs with one consumer warpgroup each, or one CTA with two. */
template <int GROUPS> constexpr int STAGES = GROUPS == 1 ? 3 : 4;

template <int KP, int GROUPS> struct alignas(1024) Stage {
    Operands<KP> operands;
    alignas(1024) __nv_bfloat16 values[CHUNK * GROUP_COLUMNS * GROUPS]; /* v, swizzled */
};

template <int KP, int GROUPS> struct Shared {
    Stage<KP, GROUPS> stages[STAGES<GROUPS>];
    __nv_bfloat16 rows[GROUPS * GROUP / 32][CHUNK * 16]; /* each consumer warp's own, for store_pieces */
    uint64_t full[STAGES<GROUPS>];  /* a chunk has arrived: the loader's lanes and the bytes of its operands */
    uint64_t empty[STAGES<GROUPS>]; /* every consumer is done with it */
};

} // namespace
} // namespace kda

#endif
