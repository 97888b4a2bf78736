/* SPDX-License-Identifier: MIT */
/*
 * What producers do otherwise where a gate has no bound (produce.cuh).
 *
 * Factors from the chunk's middle to its ends would be too large. So each half has a middle of its own, from
 * which no token is more than 8 away. Within a chunk each token's log2 decay is clamped to DEEPEST: of what
 * comes before a token, up to 2^DEEPEST is seen after it that should not be, an error below 5e-5. The state
 * gets all of the decay. With D from the first middle to the second, the state is taken, from the first middle
 * to the second, through
 *     keys     RK, of the second half times D       (queries likewise)
 *     gates    CK, of the first half times D
 * L0 and M0 are made in between: their diagonal blocks before anything is multiplied by D, the block below when
 * CK is.
 */
#ifndef KDA_CUDA_SM90_UNBOUNDED_CUH
#define KDA_CUDA_SM90_UNBOUNDED_CUH

#include "cuda/sm90/mainloop/produce.cuh"

namespace kda {

constexpr float DEEPEST = -14.4f;
constexpr int QUARTER = HALF / 2;

/* log2 decays of two channels over half a chunk: as they count within the chunk, before and after the half's
 * middle; and what these are short of the whole decay. */
struct HalfDecay {
    float2 before, after, rest;
};

/* Turns k, q and g of the thread's two channels and half of the chunk into RK, RQ and CK around the half's own
 * middle. Works outwards from there, first to the half's start. */
inline __device__ HalfDecay make_half(const Panel &panel, bool later, const Gate &gate) {
    constexpr int TOGETHER = 4, QUERIES = sizeof panel.keys, GATES = 2 * QUERIES;
    uint32_t lane = thread() % 32;
    uint32_t middle = shared_address(panel.keys) + (later ? HALF + QUARTER : QUARTER) * ROW;
    float2 sum = make_float2(0, 0), all = sum, before = sum;
#pragma unroll 1
    for (int n = 0; n < HALF / TOGETHER; n++) {
        bool after = n >= QUARTER / TOGETHER;
        if (n == QUARTER / TOGETHER)
            before = sum, sum = make_float2(0, 0);
        /* A token's 16-byte pieces are permuted by token % 8. */
        int step = after ? ROW : -ROW, further = n * TOGETHER % QUARTER;
        uint32_t first =
            (middle + (lane * 4 ^ (after ? 0 : 7 << 4)) - (after ? 0 : ROW) + further * step) ^ further << 4;
        uint32_t k[TOGETHER], q[TOGETHER], g[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            uint32_t at = (first ^ j << 4) + j * step;
            g[j] = load_shared(at + GATES), k[j] = load_shared(at), q[j] = load_shared(at + QUERIES);
        }
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            uint32_t at = (first ^ j << 4) + j * step;
            float2 raw = unpack_bf16(g[j]), last = sum;
            float2 decay = make_float2(log2_decay<false>(gate, raw.x, gate.offset.x),
                                       log2_decay<false>(gate, raw.y, gate.offset.y));
            all.x += decay.x, all.y += decay.y;
            sum.x += max_or_nan(decay.x, DEEPEST), sum.y += max_or_nan(decay.y, DEEPEST);
            float2 x = after ? sum : make_float2(-last.x, -last.y);
            float2 decayed = make_float2(exp2_approximate(x.x), exp2_approximate(x.y));
            float2 grown = make_float2(exp2_approximate(-x.x), exp2_approximate(-x.y));
            float2 k_pair = unpack_bf16(k[j]), q_pair = unpack_bf16(q[j]);
            store_shared(at, pack_bf16(k_pair.x * decayed.x, k_pair.y * decayed.y));
            store_shared(at + QUERIES, pack_bf16(q_pair.x * decayed.x, q_pair.y * decayed.y));
            store_shared(at + GATES, pack_bf16(k_pair.x * grown.x, k_pair.y * grown.y));
        }
    }
    return {before, sum, make_float2(all.x - before.x - sum.x, all.y - before.y - sum.y)};
}

/* Multiplies the thread's two channels of `count` tokens by a factor that is given by its root. Between two
 * middles a channel may decay by more than a float's exponent holds; a token's own factor gives some of it
 * back. */
inline __device__ void multiply_rows(const __nv_bfloat16 *tile, int first, int count, float2 root) {
    uint32_t lane = thread() % 32, rows = shared_address(tile) + first * ROW;
#pragma unroll 4
    for (int i = 0; i < count; i++) {
        uint32_t at = rows + i * ROW + (lane * 4 ^ i % 8 << 4);
        float2 x = unpack_bf16(load_shared(at));
        store_shared(at, pack_bf16(x.x * root.x * root.x, x.y * root.y * root.y));
    }
}

/* Makes tiles, decays and [L0; M0]. The warpgroup then goes on as after multiply_pairs(). */
template <int DIM>
__device__ void make_unbounded(Tiles<DIM> &tiles, Factors<DIM> &factors, Blocks &blocks, int barrier,
                               const Gate &gate, float (&d)[CHUNK / 8][4]) {
    static_assert(!IN_ONE_WARP<DIM>, "a thread's other half is another warp's");
    int t = (int)thread() % GROUP, panel = t / 32 % 2;
    bool later = t >= GROUP / 2;
    HalfDecay own = make_half(tiles.panels[panel], later, gate);
    float2 outer = later ? own.after : own.before, inner = later ? own.before : own.after;
    int channel = channel_index(panel * PANEL + t % 32 * 2);
    *reinterpret_cast<float2 *>(&(later ? factors.to_end : factors.to_middle)[channel]) =
        make_float2(exp2_approximate(outer.x), exp2_approximate(outer.y));
    blocks.halves[t] = make_float4(inner.x, inner.y, own.rest.x, own.rest.y);
    fence_shared();
    barrier_wait(barrier, GROUP);
    multiply_pairs(tiles.panels, d);
    float4 other = blocks.halves[t ^ GROUP / 2];
    float2 between = make_float2(inner.x + other.x, inner.y + other.y);
    float2 root = make_float2(exp2_approximate(between.x / 2), exp2_approximate(between.y / 2));
    if (!later)
        *reinterpret_cast<float2 *>(&factors.across[channel]) =
            make_float2(exp2_approximate(between.x + own.rest.x + other.z),
                        exp2_approximate(between.y + own.rest.y + other.w));
    barrier_wait(barrier, GROUP); /* all products have read the tiles */
    multiply_rows(tiles.panels[panel].gates, later ? QUARTER : 0, QUARTER, root);
    fence_shared();
    barrier_wait(barrier, GROUP);
    float below[HALF / 8][4];
    multiply_pairs(tiles.panels, below);
    if (t / 32 % 2)
#pragma unroll
        for (int j = 0; j < HALF / 8; j++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                d[j][n] = below[j][n];
    barrier_wait(barrier, GROUP);
    multiply_rows(later ? tiles.panels[panel].queries : tiles.panels[panel].keys, HALF, HALF, root);
}

/* Makes the operands of one chunk, whose norms are found. The warpgroup has a named barrier of its own, and its
 * first two warps another. */
template <bool bounded, int DIM>
__device__ void make_operands(Tiles<DIM> &tiles, Factors<DIM> &factors, Blocks &blocks, int slot, int barrier,
                              int inverse_barrier, const Gate &gate) {
    float d[CHUNK / 8][4];
    if constexpr (bounded) {
        make_decays(tiles, factors, gate);
        fence_shared();
        barrier_wait(barrier, GROUP);
        multiply_pairs(tiles.panels, d);
    } else {
        make_unbounded(tiles, factors, blocks, barrier, gate, d);
    }
    finish_operands(d, tiles, factors, blocks, slot, inverse_barrier);
}

} // namespace kda

#endif
