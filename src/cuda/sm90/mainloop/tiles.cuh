/* SPDX-License-Identifier: MIT */
/* A chunk's operands as three tiles around its middle (docs/maths.md), as they lie in shared memory: producers
 * make them, and consumers take the state through them. K = V = DIM, a multiple of 64. */
#ifndef KDA_CUDA_SM90_TILES_CUH
#define KDA_CUDA_SM90_TILES_CUH

#include "cuda/operands.cuh"

namespace kda {

constexpr int HALF = CHUNK / 2;
constexpr int ROW = PANEL * 2; /* bytes of a panel's row */

/* 64 channels of a chunk, swizzled by 128 bytes. */
struct Panel {
    __nv_bfloat16 keys[CHUNK * PANEL];    /* k, then RK */
    __nv_bfloat16 queries[CHUNK * PANEL]; /* q, then RQ */
    __nv_bfloat16 gates[CHUNK * PANEL];   /* g, then CK */
};

template <int DIM> struct alignas(1024) Tiles {
    Panel panels[DIM / PANEL];
    float inverse[CHUNK * CHUNK]; /* F, by tf32_index */
    __half M[CHUNK * CHUNK];      /* M0 diag(rq), swizzled by 64 bytes */
};

template <int DIM> struct alignas(16) Factors {
    float to_middle[DIM]; /* decay of the state from the chunk's start, by channel_index */
    float to_end[DIM];    /* and from there to its end */
    float key_scale[CHUNK], query_scale[CHUNK]; /* rk, rq by token_index */
    float across[DIM]; /* decay between two middles, where there are two (unbounded.cuh) */
};

/* A consumer's thread needs channels c * 8 + lane % 4 * 2 + {0, 1} of every c, four at a time. */
inline __device__ int channel_index(int channel) {
    return channel / 16 * 16 + channel % 8 / 2 * 4 + channel / 8 % 2 * 2 + channel % 2;
}
/* It also needs tokens i * 8 + lane % 4 * 2 + {0, 1}. */
inline __device__ int token_index(int token) { return token % 8 / 2 * 8 + token / 8 * 2 + token % 2; }

} // namespace kda

#endif
