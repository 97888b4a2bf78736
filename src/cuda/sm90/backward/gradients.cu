/* SPDX-License-Identifier: MIT */
/*
 * Makes the gradients of a segment's q, k, g and beta, from S at its start, R at its end and dX (config.cuh).
 *
 * The states' warpgroups take S through the chunks: X = V - KT S, U = N diag(beta) X, and, f being the decay's
 * fraction, S <- exp2(f) (exp2(e) S + KR^T U). Then all warpgroups go from the last chunk to the first:
 *
 *     states                                    gradients
 *                                               RQ RK CK, exponents                 barrier TILES
 *     T3 = R2 U^T, R2 = exp2(f) R               [T1 T2] = S [dO; dX]^T
 *     R <- exp2(e) R2 + QT^T dO - KT^T dX       dM = dO U^T, dL = dX U^T            barrier PAIRS
 *     T3 += RQ^T dM - RK^T dL                   [T1 T2] += CK^T [dM; dL]^T
 *     h = sum of R S over V                                                         barrier SUMS
 *                                               what enters and leaves decays       barrier DECAYS
 *     the gradient of g                         those of q and k                    barrier GATES
 *
 * dL and T2 have the other sign here, as dX is positive. A product that passes from one block of 16 tokens to the other
 * is taken from the one middle to the other in between.
 */
#include "cuda/sm90/backward/tiles.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tensor_maps.h"

namespace kda {
namespace {

constexpr int TEAM = 2 * GROUP, GRADIENT_THREADS = 2 * TEAM; /* the states' warpgroups, and the gradients' */
constexpr int STATES = CHUNKS - 1;                           /* that are kept at a time */

/* A thread's registers: all that a multiprocessor has, then shared out. */
constexpr int REGISTERS = 128, STATES_REGISTERS = 152, GRADIENTS_REGISTERS = 2 * REGISTERS - STATES_REGISTERS;

template <int count> __device__ void set_registers() {
    if constexpr (count > REGISTERS)
        take_registers<count>();
    else
        give_registers<count>();
}

enum Barrier {
    BARRIER_STATES = 1,
    BARRIER_GRADIENTS,
    BARRIER_TILES,
    BARRIER_PAIRS,
    BARRIER_SUMS,
    BARRIER_DECAYS,
    BARRIER_GATES
};

/* What comes from memory for a chunk: first for S, then for gradients, into which k, q and g turn. */
struct StateInputs {
    StateOperands operands;
    __nv_bfloat16 v[TILE];
};
struct RawInputs {
    __nv_bfloat16 q[TILE], k[TILE], g[TILE];
};
union alignas(1024) Inputs {
    StateInputs state;
    RawInputs raw;
};

/* Powers of two that take a channel's state or sums from one reference to another, but for the first one. */
struct ChannelFactors {
    float fraction[DIM], whole[DIM]; /* the decay of a state, as StateOperands have it */
    float from_start[DIM];           /* from the chunk's start to the first middle */
    float across[2][DIM]; /* from there to the second middle, in two steps where a gate has no bound */
    float to_end[DIM];    /* from there to the chunk's end */
};

struct alignas(1024) GradientsShared {
    Inputs inputs[2];
    __nv_bfloat16 states[STATES][DIM * DIM]; /* S, rows of V, in two panels of 64 channels */
    __nv_bfloat16 values[2][2 * TOKENS];     /* rows of dO, then of dX, in two panels of 64 columns of V */
    __nv_bfloat16 U[TILE];
    __nv_bfloat16 RQ[TILE], RK[TILE], CK[TILE];
    union {
        __nv_bfloat16 decayed[2][2][TOKENS]; /* in each panel of 64 channels QT, then KT */
        float4 T3[2][CHUNK / 8]
                 [GROUP]; /* then T3 of each, as threads have it, and what a decay gets of a token */
        __nv_bfloat16 d_out[2][TILE]; /* before both: dO of chunks, for their U */
    };
    __nv_bfloat16 pairs[2 * CHUNK * CHUNK]; /* rows of dM, then of dL, swizzled by 64 bytes */
    ChannelFactors factors;
    float scales[2][2 * CHUNK];  /* of one chunk and the next one: rk, then rq */
    float steps[2 * CHUNK];      /* beta, then beta_rest */
    float with_U[CHUNKS][CHUNK]; /* of each chunk the diagonal of dO U^T, from U before it is rounded */
    float diagonals[CHUNK];      /* of dX U^T */
    float more[2 * CHUNK];       /* of q's tokens, then of k's: how much of the other M's diagonal adds */
    float partial[TEAM / 32][2 * CHUNK]; /* a warp's sums over channels: q . dq and k . dk by token */
    float along[2 * CHUNK]; /* of all warps and of M's diagonal; then what the norm takes of q and k */
    bool cut[TEAM / 32];    /* is a decay of a warp's channels cut off (tiles.cuh) */
    uint64_t states_in[2], raw_in[2], values_in;
};
static_assert(sizeof(GradientsShared) <= 227 * 1024, "all that a CTA can have");

/* Where S of a chunk is kept: that of chunk 0 comes last, in the place of chunk 3's. */
inline __device__ int place_of_state(int chunk) { return (chunk + STATES - 1) % STATES; }

/* Two neighbouring channels of a state, rounded. */
inline __device__ uint32_t load_state_pair(const kda_state &state, int column, int channel) {
    if (!state.data)
        return 0;
    if (as_pairs(state)) {
        const char *at = element(state, column, channel);
        if (state.dtype == KDA_BF16)
            return *reinterpret_cast<const uint32_t *>(at);
        float2 x = *reinterpret_cast<const float2 *>(at);
        return pack_bf16(x.x, x.y);
    }
    return pack_bf16(load_one(state, column, channel), load_one(state, column, channel + 1));
}

/* What roles know. */
struct Context {
    const kda_backward &b;
    const kda_sm90_backward_maps &maps;
    GradientsShared &shared;
    const ChunkOperands *operands; /* of the segment's first chunk */
    uint16_t *updates;             /* likewise */
    Place segment;
    int chunks;
};

/* ---- Loads, each by one thread -------------------------------------------------------------------- */

inline __device__ void load_state_inputs(const Context &c, int chunk) {
    StateInputs &to = c.shared.inputs[chunk % 2].state;
    uint64_t &barrier = c.shared.states_in[chunk % 2];
    expect_bytes(barrier, sizeof(StateOperands) + 2 * TILE * 2);
    bring_bytes(&to.operands, &c.operands[chunk].state, sizeof(StateOperands), barrier);
    bring_tile(to.v, c.maps.v, chunk_of(c.segment, chunk), c.segment.head, barrier, read_once());
    bring_tile(c.shared.d_out[chunk % 2], c.maps.d_out, chunk_of(c.segment, chunk), c.segment.head, barrier,
               read_again());
}

/* Those of the last chunk lie where its S's did not. */
inline __device__ int raw_place(int chunk) { return (chunk + 1) % 2; }

inline __device__ void load_raw_inputs(const Context &c, int chunk) {
    RawInputs &to = c.shared.inputs[raw_place(chunk)].raw;
    uint64_t &barrier = c.shared.raw_in[raw_place(chunk)];
    Place at = chunk_of(c.segment, chunk);
    expect_bytes(barrier, 3 * TILE * 2);
    bring_tile(to.q, c.maps.q, at, at.key_head, barrier, read_again());
    bring_tile(to.k, c.maps.k, at, at.key_head, barrier, read_again());
    bring_tile(to.g, c.maps.g, at, at.head, barrier, read_once());
}

/* dO, dX and, unless it is there already, U. */
inline __device__ void load_value_inputs(const Context &c, int chunk, bool with_U) {
    uint64_t &barrier = c.shared.values_in;
    Place at = chunk_of(c.segment, chunk);
    expect_bytes(barrier, (with_U ? 3 : 2) * TILE * 2);
    bring_tile(c.shared.values[0], c.maps.d_out, at, at.head, barrier, read_once(), 2 * TOKENS);
    bring_tile(c.shared.values[0] + TOKENS, c.maps.dv, at, at.head, barrier, read_once(), 2 * TOKENS);
    if (with_U)
        bring_bytes(c.shared.U, c.updates + chunk * TILE, TILE * 2, barrier);
}

/* QT, KT and the decay of a state. They come with the values. */
inline __device__ void load_decayed(const Context &c, int chunk) {
    uint64_t &barrier = c.shared.values_in;
    const ChunkOperands &from = c.operands[chunk];
    expect_bytes(barrier, 2 * TILE * 2 + 2 * DIM * 4);
#pragma unroll
    for (int panel = 0; panel < 2; panel++) {
        bring_bytes(c.shared.decayed[panel][0], from.QT + panel * TOKENS, TOKENS * 2, barrier);
        bring_bytes(c.shared.decayed[panel][1], from.state.KT + panel * TOKENS, TOKENS * 2, barrier);
    }
    bring_bytes(c.shared.factors.fraction, from.state.fraction, 2 * DIM * 4, barrier);
}

/* ---- The states' warpgroups ----------------------------------------------------------------------- */

/* What multiply_state does with a packed operand besides. A lambda as a default argument would be a function of the
 * host: the compiler leaves out what comes after a call of it. */
struct Nothing {
    __device__ void operator()(int, const uint32_t (&)[4]) const {}
};

/* Begins d [64][CHUNK] = S tile, for the warpgroup's 64 rows of a state; the tile's rows are tokens. S is packed in
 * halves, so that the products begin early. */
template <class F = Nothing>
__device__ void multiply_state(float (&d)[CHUNK / 8][4], const float (&S)[DIM / 8][4], uint64_t tile,
                               F each = {}) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t a[DIM / 32][4];
#pragma unroll
        for (int i = 0; i < DIM / 32; i++) {
            int at = half * (DIM / 32) + i;
            pack_operand(S[2 * at], S[2 * at + 1], a[i]);
            each(at, a[i]);
        }
        pin(d);
        wgmma_fence();
        if (half == 0)
            wgmma<false, false>(d, a[0], tile);
        else
            wgmma<false, true>(d, a[0], advanced(tile, TOKENS * 2));
#pragma unroll
        for (int i = 1; i < DIM / 32; i++)
            wgmma<false, true>(d, a[i], advanced(tile, half * TOKENS * 2 + i * 32));
        wgmma_commit();
    }
}

/* The lanes with the same tokens share 2 N values each: a lane ends with two sums, those of index lane / 4 % N * 2
 * over as many as N lanes. */
template <int N> __device__ void sum_over_channels(float *x) {
    constexpr int BIT = 2 * N; /* of the lane's number: 16, 8, 4 */
    bool high = thread() & BIT;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float keep = high ? x[i + N] : x[i], give = high ? x[i] : x[i + N];
        x[i] = keep + __shfl_xor_sync(~0u, give, BIT);
    }
    if constexpr (N > 2)
        sum_over_channels<N / 2>(x);
}

/* Sums U dO over the warp's 16 columns of V, token by token. */
inline __device__ void multiply_diagonal(const float (&U)[CHUNK / 8][4], const __nv_bfloat16 *d_out,
                                         float *sums) {
    Values o;
    load_values<DIM>(d_out, o);
    float x[CHUNK / 4];
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++) {
        float2 upper = unpack_bf16(o[i / 2][i % 2 * 2]), lower = unpack_bf16(o[i / 2][i % 2 * 2 + 1]);
        x[2 * i] = fmaf(U[i][0], upper.x, U[i][2] * lower.x);
        x[2 * i + 1] = fmaf(U[i][1], upper.y, U[i][3] * lower.y);
    }
    sum_over_channels<CHUNK / 8>(x);
    x[0] += __shfl_xor_sync(~0u, x[0], 16), x[1] += __shfl_xor_sync(~0u, x[1], 16);
    int lane = (int)(thread() % 32);
    if (lane < 16)
        *reinterpret_cast<float2 *>(&sums[lane * 2]) = make_float2(x[0], x[1]);
}

/* Makes U of a chunk and, before the last one, takes S through it, as S^T [V][K]. */
template <bool last> __device__ void advance_state(const Context &c, int chunk, float (&S)[DIM / 8][4]) {
    GradientsShared &shared = c.shared;
    const StateInputs &in = shared.inputs[chunk % 2].state;
    int t = (int)(thread() % TEAM), warp = t / 32;
    uint64_t KT = wgmma_operand(in.operands.KT, 0, 8 * ROW, SWIZZLE_128);
    uint64_t KR = wgmma_operand(in.operands.KR, TOKENS * 2, 8 * ROW, SWIZZLE_128);
    uint64_t N = wgmma_operand(in.operands.N, 0, 8 * PAIR_ROW, SWIZZLE_64);
    bool keeps = chunk || c.chunks <= STATES; /* else S is found again when there is a place for it */
    MatrixRow<DIM, DIM> kept(shared.states[place_of_state(chunk)], true, thread() % 32);
    wait(shared.states_in[chunk % 2], chunk / 2 % 2);
    float W[CHUNK / 8][4], U[CHUNK / 8][4];
    multiply_state(W, S, KT, [&](int i, const uint32_t(&a)[4]) {
        if (keeps)
            stmatrix(kept.at(warp * 16, i * 16), a);
    });
    Values v;
    load_values<DIM>(in.v, v);
    clear_pairs(v, chunk_of(c.segment, chunk).count);
    alignas(16) float steps[CHUNK / 4];
    load_scales(in.operands.step, steps);
    wgmma_wait<0>();
    pin(W);
    uint32_t x[CHUNK / 16][4];
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float2 value = unpack_bf16(v[t][n]);
            const float *w = &W[2 * t + n / 2][n % 2 * 2];
            int i = 4 * t + n / 2 * 2;
            x[t][n] = pack_bf16((value.x - w[0]) * steps[i], (value.y - w[1]) * steps[i + 1]);
        }
    pin(U);
    wgmma_fence();
    wgmma<false, false>(U, x[0], N);
    wgmma<false, true>(U, x[1], advanced(N, 32));
    wgmma_commit();
    if constexpr (!last) {
        decay_by(S, in.operands.whole);
    }
    wgmma_wait<0>();
    pin(U);
    float *sums = shared.partial[warp] + chunk % 2 * CHUNK;
    uint32_t u[CHUNK / 16][4];
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        pack_operand(U[2 * t], U[2 * t + 1], u[t]);
    if constexpr (!last) {
        pin(S);
        wgmma_fence();
#pragma unroll
        for (int t = 0; t < CHUNK / 16; t++)
            wgmma<true, true>(S, u[t], advanced(KR, t * 16 * ROW));
        wgmma_commit();
    }
    /* The last chunk's is used at once; others wait in memory, and lie till then where no tiles are yet. */
    store_pairs(last ? shared.U : chunk == 0 ? shared.RQ : chunk == 1 ? shared.RK : shared.CK, warp, u);
    multiply_diagonal(U, shared.d_out[chunk % 2], sums);
    if constexpr (!last) {
        wgmma_wait<0>();
        pin(S);
        decay_by(S, in.operands.fraction);
    }
    fence_shared();
    barrier_wait(BARRIER_STATES, TEAM);
    if (t < CHUNK) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < TEAM / 32; i++)
            sum += shared.partial[i][chunk % 2 * CHUNK + t];
        shared.with_U[chunk][t] = sum;
    }
    if (threadIdx.x == 0) {
        if (!last) {
            ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, c.updates + chunk * TILE,
                               chunk == 0   ? shared.RQ
                               : chunk == 1 ? shared.RK
                                            : shared.CK,
                               TILE * 2u);
            ptx::cp_async_bulk_commit_group();
        }
        if (chunk + 2 < c.chunks)
            load_state_inputs(c, chunk + 2);
        else if (chunk + 2 == c.chunks)
            load_raw_inputs(c, chunk + 1);
        else if (chunk)
            load_raw_inputs(c, chunk - 1);
    }
}

/* Rows of dO and dX from `count` on become 0: they may be another sequence's. */
inline __device__ void clear_value_rows(GradientsShared &shared, int count) {
    for (int i = (int)(thread() % TEAM); i < 4 * (CHUNK - count) * (ROW / 16); i += TEAM) {
        int piece = i % (ROW / 16), row = count + i / (ROW / 16) % (CHUNK - count);
        int tile = i / (ROW / 16) / (CHUNK - count);
        reinterpret_cast<uint4 *>(shared.values[0] + tile * TOKENS + row * PANEL)[piece] =
            make_uint4(0, 0, 0, 0);
    }
    fence_shared();
}

/* Keeps S at the segment's start in the place of the last chunk's, which is done. */
inline __device__ void keep_first_state(const Context &c, const kda_state &first) {
    int t = (int)(thread() % TEAM), warp = t / 32, row = warp * 16 + t % 32 / 4;
    MatrixRow<DIM, DIM> kept(c.shared.states[place_of_state(0)], true, thread() % 32);
    if (first.data && first.dtype == KDA_BF16 && as_pairs(first)) {
        const char *rows[2] = {element(first, row, t % 4 * 2), element(first, row + 8, t % 4 * 2)};
#pragma unroll 1
        for (int panel = 0; panel < DIM; panel += PANEL) {
            uint32_t x[PANEL / 16][4];
#pragma unroll
            for (int i = 0; i < PANEL / 16; i++)
#pragma unroll
                for (int n = 0; n < 4; n++)
                    x[i][n] =
                        *reinterpret_cast<const uint32_t *>(rows[n % 2] + (panel + i * 16 + n / 2 * 8) * 2);
#pragma unroll
            for (int i = 0; i < PANEL / 16; i++)
                stmatrix(kept.at(warp * 16, panel + i * 16), x[i]);
        }
    } else {
#pragma unroll 1
        for (int channel = 0; channel < DIM; channel += 16) {
            uint32_t x[4];
#pragma unroll
            for (int n = 0; n < 4; n++)
                x[n] = load_state_pair(first, row + n % 2 * 8, channel + n / 2 * 8 + t % 4 * 2);
            stmatrix(kept.at(warp * 16, channel), x);
        }
    }
    fence_shared();
}

/* Multiplies rows of an accumulator by factors of their channels, the second `step` further than the first. */
template <int TILES>
__device__ void scale_rows(float (&d)[TILES][4], const float *factors, int channel, int step = 8) {
    float x = factors[channel], y = factors[channel + step];
#pragma unroll
    for (int i = 0; i < TILES; i++)
        d[i][0] *= x, d[i][1] *= x, d[i][2] *= y, d[i][3] *= y;
}

/* As scale_rows, for one of the blocks of tokens: the first or, if `later`, the second. The others are multiplied by 1:
 * were they left alone, the compiler would run all the kernel's products one by one. */
template <bool later, int TILES>
__device__ void scale_block(float (&d)[TILES][4], const float *factors, int channel) {
    float x = factors[channel], y = factors[channel + 8], one = some_one();
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        bool own = i % (CHUNK / 8) >= CHUNK / 16 == later;
        d[i][0] *= own ? x : one, d[i][1] *= own ? x : one, d[i][2] *= own ? y : one, d[i][3] *= own ? y : one;
    }
}

/* Multiplies sums with states, of channels and tokens, by what was cut off of decays from the chunk's start or,
 * to_end, to its end. Of d, tiles i and i + CHUNK / 8 are of the same tokens. */
template <bool bounded, bool to_end, int TILES>
__device__ void apply_rests(const Context &c, int chunk, int warp, float (&d)[TILES][4]) {
    if constexpr (!bounded) {
        if (__builtin_expect(!c.shared.cut[warp], 1))
            return;
        Pairs g;
        Elements rests;
        float all[2];
        load_pairs(c.shared.inputs[raw_place(chunk)].raw.g, warp, g);
        find_rests(find_gates<false>(c.b.forward, (int)c.segment.head, warp), g,
                   chunk_of(c.segment, chunk).count, rests, all);
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float rest = rests[i % (CHUNK / 8)][n / 2][n % 2];
                d[i][n] *= power_of_two((int)(to_end ? all[n / 2] - rest : rest));
            }
    }
}

/* Sums R S over V, for the thread's two channels. */
inline __device__ void find_h(GradientsShared &shared, int chunk, const float (&R)[DIM / 8][4], float (&h)[2]) {
    int warp = (int)(thread() % TEAM) / 32;
    MatrixRow<DIM, DIM> rows(shared.states[place_of_state(chunk)], false, thread() % 32);
    h[0] = h[1] = 0;
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        uint32_t s[4];
        ldmatrix_transposed(s, rows.at(i * 16, warp * 16));
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float2 x = unpack_bf16(s[n]);
            const float *r = &R[2 * i + n / 2][n % 2 * 2];
            h[n % 2] = fmaf(r[0], x.x, fmaf(r[1], x.y, h[n % 2]));
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        h[r] += __shfl_xor_sync(~0u, h[r], 1);
        h[r] += __shfl_xor_sync(~0u, h[r], 2);
    }
}

/* Takes R [K][V] through a chunk, and makes T3 and h. */
template <bool bounded>
__device__ void step_back(const Context &c, int chunk, float (&R)[DIM / 8][4], float (&h)[2]) {
    GradientsShared &shared = c.shared;
    int t = (int)(thread() % TEAM), warp = t / 32, panel = warp / 4, channel = warp * 16 + t % 32 / 4;
    uint64_t U = wgmma_operand(shared.U, 0, 8 * ROW, SWIZZLE_128);
    uint64_t d_out = wgmma_operand(shared.values[0], 2 * TOKENS * 2, 8 * ROW, SWIZZLE_128);
    uint64_t dX = wgmma_operand(shared.values[0] + TOKENS, 2 * TOKENS * 2, 8 * ROW, SWIZZLE_128);
    uint64_t QT = wgmma_operand(shared.decayed[panel][0], 0, 8 * ROW, SWIZZLE_128);
    uint64_t KT = wgmma_operand(shared.decayed[panel][1], 0, 8 * ROW, SWIZZLE_128);
    uint64_t RQ = wgmma_operand(shared.RQ + panel * TOKENS, 0, 8 * ROW, SWIZZLE_128);
    uint64_t RK = wgmma_operand(shared.RK + panel * TOKENS, 0, 8 * ROW, SWIZZLE_128);
    uint64_t dM = wgmma_operand(shared.pairs, 0, 8 * PAIR_ROW, SWIZZLE_64);
    uint64_t dL = advanced(dM, CHUNK * PAIR_ROW);
    float T3[CHUNK / 8][4];
    barrier_wait(BARRIER_TILES, GRADIENT_THREADS);
    scale_rows(R, shared.factors.fraction, channel_index(channel), 2);
    multiply_state(T3, R, U);
    scale_rows(R, shared.factors.whole, channel_index(channel), 2);
    pin(R);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++) {
        wgmma_both<true, true, true>(R, advanced(QT, t * 16 * ROW), advanced(d_out, t * 16 * ROW));
        wgmma_both<true, true, true, true>(R, advanced(KT, t * 16 * ROW), advanced(dX, t * 16 * ROW));
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(T3);
    pin(R);
    scale_rows(T3, shared.factors.to_end, channel);
    apply_rests<bounded, true>(c, chunk, warp, T3);
    barrier_wait(BARRIER_PAIRS, GRADIENT_THREADS);
    pin(T3);
    wgmma_fence();
    wgmma_both<true, true, true>(T3, advanced(RQ, 16 * ROW), advanced(dM, 16 * PAIR_ROW));
    wgmma_both<true, true, true, true>(T3, advanced(RK, 16 * ROW), advanced(dL, 16 * PAIR_ROW));
    wgmma_commit();
    find_h(shared, chunk, R, h);
    wgmma_wait<0>();
    pin(T3);
#pragma unroll
    for (int i = 0; i < (bounded ? 1 : 2); i++)
        scale_block<false>(T3, shared.factors.across[i], channel);
    pin(T3);
    wgmma_fence();
    wgmma_both<true, true, true>(T3, RQ, dM);
    wgmma_both<true, true, true, true>(T3, RK, dL);
    wgmma_commit();
    wgmma_wait<0>();
    pin(T3);
    /* The warpgroup alone has read its panel of QT and KT, and has done so. */
    barrier_wait(BARRIER_STATES, TEAM);
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
        shared.T3[panel][i][t % GROUP] = make_float4(T3[i][0], T3[i][1], T3[i][2], T3[i][3]);
    barrier_wait(BARRIER_SUMS, GRADIENT_THREADS);
}

/* Sums of the thread's channels over a segment: what it adds to dA_log and to d_dt_bias. */
struct GateSums {
    float A[2] /* times log2(e) */, bias[2];
};

/* x is the gradient of a token's log decay a, and becomes g's. With z = g + dt_bias, a = lower_bound sigmoid(A z)
 * or -A softplus(z). What does not exist is 0. */
template <bool bounded>
__device__ void gate_backward(const kda_prefill &p, const Gate &gate, const Pairs &g, float (&x)[CHUNK / 8][4],
                              GateSums &sums) {
    float to_g = gate.slope * -(1 / LOG2E);
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float2 raw = unpack_bf16(g[j / 2][j % 2 * 2 + r]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float one = e ? raw.y : raw.x, offset = r ? gate.offset.y : gate.offset.x, dg;
                if constexpr (bounded) {
                    /* -A z log2(e); beyond these limits its gradient is nothing, and the product with it is 0 */
                    float y = fmaxf(fminf(fmaf(one, gate.slope, offset), 120.f), -150.f);
                    float grown = exp2_approximate(y), s = reciprocal_approximate(1.f + grown);
                    float dy = p.lower_bound * s * (grown * s) * x[j][2 * r + e];
                    dg = dy * to_g, sums.A[r] = fmaf(-y, dy, sums.A[r]);
                } else {
                    float decay = log2_decay<false>(gate, one, offset), rest = rest_of(decay);
                    float da = rest == 0 ? x[j][2 * r + e] : x[j][2 * r + e] * power_of_two((int)rest);
                    float s = reciprocal_approximate(1.f + exp2_approximate(-fmaf(one, gate.slope, offset)));
                    dg = gate.bound * s * da, sums.A[r] += da == 0 ? 0.f : decay * da;
                }
                x[j][2 * r + e] = dg, sums.bias[r] += dg;
            }
        }
}

/* Rounds an accumulator's tiles into a tile of a chunk. */
inline __device__ void store_rows(__nv_bfloat16 *tile, int warp, const float (*x)[4]) {
    Pairs pairs;
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        pack_operand(x[2 * t], x[2 * t + 1], pairs[t]);
    store_pairs(tile, warp, pairs);
}

/* Makes the gradient of g, in its place. That of a token's log decay is h, and what leaves less what enters at all
 * tokens before it. */
template <bool bounded>
__device__ void finish_gates(const Context &c, int chunk, const Gate &gate, const float (&h)[2],
                             GateSums &sums) {
    GradientsShared &shared = c.shared;
    RawInputs &in = shared.inputs[raw_place(chunk)].raw;
    int t = (int)(thread() % TEAM), warp = t / 32, part = t % 4;
    wait(shared.raw_in[raw_place(chunk)], (c.chunks - 1 - chunk) / 2 % 2);
    Pairs g;
    load_pairs(in.g, warp, g);
    barrier_wait(BARRIER_DECAYS, GRADIENT_THREADS);
    float da[CHUNK / 8][4];
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        float4 x = shared.T3[warp / 4][j][t % GROUP];
        da[j][0] = x.x, da[j][1] = x.y, da[j][2] = x.z, da[j][3] = x.w;
    }
    fence_shared();
    barrier_wait(BARRIER_STATES, TEAM);
    if (t == 0 && chunk)
        load_decayed(c, chunk - 1);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = h[r];
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++) {
            float first = da[j][2 * r], all, before = sum + sum_before(first + da[j][2 * r + 1], part, all);
            da[j][2 * r] = before, da[j][2 * r + 1] = before + first;
            sum += all;
        }
    }
    int count = chunk_of(c.segment, chunk).count;
    clear_pairs(g, count);
    if (__builtin_expect(count < CHUNK, 0))
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                da[j][n] = j * 8 + part * 2 + n % 2 < count ? da[j][n] : 0.f;
    gate_backward<bounded>(c.b.forward, gate, g, da, sums);
    store_rows(in.g, warp, da);
    fence_shared();
    barrier_arrive(BARRIER_GATES, GRADIENT_THREADS);
}

/* Adds a thread's sums over its tokens to those of its quad and stores them. */
inline __device__ void store_gate_sums(const GateSums &sums, int warp, float *to) {
    int lane = (int)(thread() % 32);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float A = sums.A[r] / LOG2E, bias = sums.bias[r];
#pragma unroll
        for (int bit = 1; bit < 4; bit *= 2)
            A += __shfl_xor_sync(~0u, A, bit), bias += __shfl_xor_sync(~0u, bias, bit);
        int channel = warp * 16 + lane / 4 + r * 8;
        if (lane % 4 == 0)
            to[channel] = A, to[DIM + channel] = bias;
    }
}

template <bool bounded>
__device__ void run_states(const Context &c, const kda_state &first, const uint32_t *adjoint,
                           float *gate_sums) {
    GradientsShared &shared = c.shared;
    if (threadIdx.x == 0) {
        load_state_inputs(c, 0);
        if (c.chunks > 1)
            load_state_inputs(c, 1);
        else
            load_raw_inputs(c, 0);
        load_value_inputs(c, c.chunks - 1, false);
    }
    float S[DIM / 8][4];
    load_whole(first, S);
    for (int chunk = 0; chunk < c.chunks - 1; chunk++)
        advance_state<false>(c, chunk, S);
    advance_state<true>(c, c.chunks - 1, S);
    if (threadIdx.x == 0) { /* U is in memory, where the copy engine finds it soon */
        ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
        ptx::fence_proxy_async(ptx::space_global);
        load_decayed(c, c.chunks - 1); /* where dO was */
    }
    float R[DIM / 8][4];
    adjoint += threadIdx.x / 32 * (DIM / 8 * 2 * 32) + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < DIM / 8; i++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float2 pair = unpack_bf16(transpose(adjoint[(i * 2 + n) * 32]));
            R[i][2 * n] = pair.x, R[i][2 * n + 1] = pair.y;
        }
    barrier_wait(BARRIER_SUMS, GRADIENT_THREADS); /* S and U are there, and the tiles' places free */
    Gate gate = find_gates<bounded>(c.b.forward, (int)c.segment.head, (int)threadIdx.x / 32);
    GateSums sums = {};
    uint32_t parity = 0;
    for (int chunk = c.chunks - 1; chunk >= 0; chunk--) {
        float h[2];
        wait(shared.values_in, parity);
        parity ^= 1;
        int count = chunk_of(c.segment, chunk).count;
        if (__builtin_expect(count < CHUNK, 0))
            clear_value_rows(shared, count);
        step_back<bounded>(c, chunk, R, h);
        if (thread() == 0 && chunk)
            load_value_inputs(c, chunk - 1, true);
        if (chunk == STATES)
            keep_first_state(c, first);
        finish_gates<bounded>(c, chunk, gate, h, sums);
    }
    store_gate_sums(sums, (int)threadIdx.x / 32, gate_sums);
}

/* ---- The gradients' warpgroups -------------------------------------------------------------------- */

/* Makes the tiles of the warp's channels; `decayed` are its RK's and RQ's factors. The first tiles wait for their
 * place. */
template <bool bounded>
__device__ void make_tiles(const Context &c, const RawInputs &in, const Gate &gate, int count, int warp,
                           const float *scales, bool first, Elements &decayed) {
    GradientsShared &shared = c.shared;
    int lane = (int)(thread() % 32);
    Pairs raw, rows, columns;
    load_pairs(in.g, warp, raw);
    References found = find_decays<bounded>(gate, raw, count, decayed);
    Elements grown;
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = decayed[j][i / 2][i % 2];
            decayed[j][i / 2][i % 2] = exp2_approximate(x), grown[j][i / 2][i % 2] = exp2_approximate(-x);
        }
    load_pairs(in.k, warp, raw);
    clear_pairs(raw, count);
    scale_keys(raw, scales, decayed, grown, rows, columns);
    if (first)
        barrier_wait(BARRIER_SUMS, GRADIENT_THREADS);
    store_pairs(shared.RK, warp, rows);
    store_pairs(shared.CK, warp, columns);
    load_pairs(in.q, warp, raw);
    clear_pairs(raw, count);
    scale_pairs(raw, scales + CHUNK, decayed, rows);
    store_pairs(shared.RQ, warp, rows);
    if (lane % 4 == 0)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int channel = warp * 16 + lane / 4 + r * 8;
            ChannelFactors &to = shared.factors;
            to.from_start[channel] = power_of_two((int)found.middle[0][r]);
            int across = (int)(found.middle[1][r] - found.middle[0][r]), step = bounded ? across : across / 2;
            to.across[0][channel] = power_of_two(step), to.across[1][channel] = power_of_two(across - step);
            to.to_end[channel] = power_of_two((int)(found.end[r] - found.middle[1][r]));
        }
    if (!bounded && lane == 0)
        shared.cut[warp] = found.cut;
    fence_shared();
}

/* Rounds the warp's rows of [dO; dX] U^T below the diagonal, for 16 tokens of U, into pairs. The diagonals are kept
 * apart. */
inline __device__ void store_pair_products(GradientsShared &shared, const float (&d)[2][4], int warp) {
    int lane = (int)(thread() % 32), part = lane % 4 * 2, first = warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first + r * 8, i = row % CHUNK, column = warp / 4 * 16 + j * 8 + part;
            float left = d[j][2 * r], right = d[j][2 * r + 1];
            if (row >= CHUNK && (i == column || i == column + 1))
                shared.diagonals[i] = i == column ? left : right;
            store_shared(shared_address(&shared.pairs[swizzled<2 * CHUNK, CHUNK>(row, column)]),
                         pack_bf16(i > column ? left : 0.f, i > column + 1 ? right : 0.f));
        }
    fence_shared();
}

/* [T1 T2] of the warp's channels, from S, [dO; dX] and pairs. */
template <bool bounded>
__device__ void find_rows(const Context &c, int chunk, int warp, float (&T)[2 * CHUNK / 8][4]) {
    GradientsShared &shared = c.shared;
    int panel = warp / 4, channel = warp * 16 + (int)(thread() % 32) / 4;
    uint64_t S =
        wgmma_operand(shared.states[place_of_state(chunk)] + panel * DIM * PANEL, 0, 8 * ROW, SWIZZLE_128);
    uint64_t values = wgmma_operand(shared.values[0], 0, 8 * ROW, SWIZZLE_128);
    uint64_t U = wgmma_operand(shared.U + panel * 16 * PANEL, 0, 8 * ROW, SWIZZLE_128);
    uint64_t CK = wgmma_operand(shared.CK + panel * TOKENS, 0, 8 * ROW, SWIZZLE_128);
    uint64_t pairs = wgmma_operand(shared.pairs, 0, 8 * PAIR_ROW, SWIZZLE_64);
    float d[2][4];
    pin(d);
    pin(T);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        uint32_t further = i / 4 * 2 * TOKENS * 2 + i % 4 * 32, of_U = i / 4 * TOKENS * 2 + i % 4 * 32;
        if (i == 0)
            wgmma_both<false, false, false>(d, values, U);
        else
            wgmma_both<false, false, true>(d, advanced(values, further), advanced(U, of_U));
    }
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        uint32_t further = i / 4 * 2 * TOKENS * 2 + i % 4 * 32;
        if (i == 0)
            wgmma_both<true, false, false>(T, S, values);
        else
            wgmma_both<true, false, true>(T, advanced(S, i * 16 * ROW), advanced(values, further));
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
    pin(T);
    store_pair_products(shared, d, warp);
    scale_rows(T, shared.factors.from_start, channel);
    apply_rests<bounded, false>(c, chunk, warp, T);
    barrier_wait(BARRIER_PAIRS, GRADIENT_THREADS);
    pin(T);
    wgmma_fence();
    wgmma_both<true, false, true>(T, CK, pairs);
    wgmma_commit();
    wgmma_wait<0>();
    pin(T);
#pragma unroll
    for (int i = 0; i < (bounded ? 1 : 2); i++)
        scale_block<true>(T, shared.factors.across[i], channel);
    pin(T);
    wgmma_fence();
    wgmma_both<true, false, true>(T, advanced(CK, 16 * ROW), advanced(pairs, 32));
    wgmma_commit();
    wgmma_wait<0>();
    pin(T);
}

/* Stores gradients of q or k by value head, in fp32. */
inline __device__ void store_by_head(const kda_prefill &p, float *to, const Place &at, int warp,
                                     const float (*x)[4]) {
    int lane = (int)(thread() % 32), left = at.count - lane % 4 * 2; /* tokens from the thread's first one on */
    int64_t step = p.value_heads * DIM;
    float *row =
        to + (at.batch * p.tokens + at.token + lane % 4 * 2) * step + at.head * DIM + warp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++, row += 8 * step) {
        if (j * 8 < left)
            row[0] = x[j][0], row[8] = x[j][2];
        if (j * 8 + 1 < left)
            row[step] = x[j][1], row[step + 8] = x[j][3];
    }
}

/* The gradient of k or q, from d without what M's diagonal adds: that is `more` times the other one. Rows of x are
 * multiplied by `scales` to be normalised, and `less` times x leaves for that. The gradient goes to by_head or, if
 * that is NULL, to the tile. */
inline __device__ void finish_rows(const kda_prefill &p, __nv_bfloat16 *tile, const Place &at, int warp,
                                   const Pairs &x, const Pairs &other, const float *scales, const float *more,
                                   const float *less, float (*d)[4], float *by_head) {
    int part = (int)(thread() % 4) * 2;
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        auto of_tokens = [&](const float *values) {
            return *reinterpret_cast<const float2 *>(&values[j * 8 + part]);
        };
        float2 scale = of_tokens(scales), gain = of_tokens(more), loss = of_tokens(less);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float2 y = unpack_bf16(x[j / 2][j % 2 * 2 + r]), z = unpack_bf16(other[j / 2][j % 2 * 2 + r]);
            d[j][2 * r] = fmaf(fmaf(z.x, gain.x, d[j][2 * r]), scale.x, -y.x * loss.x);
            d[j][2 * r + 1] = fmaf(fmaf(z.y, gain.y, d[j][2 * r + 1]), scale.y, -y.y * loss.y);
        }
    }
    if (by_head) {
        store_by_head(p, by_head, at, warp, d);
        return;
    }
    store_rows(tile, warp, d);
}

/* Sends a chunk's gradients from `in` to memory. */
inline __device__ void send_gradients(const Context &c, const RawInputs &in, const Place &at, bool by_head) {
    int t = (int)(thread() % TEAM);
    if (at.count == CHUNK) {
        if (t)
            return;
#pragma unroll
        for (int i = 0; i < 3; i++) {
            if (i < 2 && by_head)
                continue;
            const CUtensorMap &map = i == 0 ? c.maps.dq : i == 1 ? c.maps.dk : c.maps.dg;
            const __nv_bfloat16 *from = i == 0 ? in.q : i == 1 ? in.k : in.g;
#pragma unroll
            for (int panel = 0; panel < 2; panel++) {
                const int32_t where[4] = {panel * PANEL, (int32_t)(i < 2 ? at.key_head : at.head),
                                          (int32_t)at.token, (int32_t)at.batch};
                ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, where,
                                          from + panel * TOKENS);
            }
        }
        ptx::cp_async_bulk_commit_group();
        return;
    }
    int token = t / 8, part = t % 8;
    for (int i = by_head ? 2 : 0; i < 3 && token < at.count; i++) { /* what lies after is another sequence's */
        const kda_tensor &to = i == 0 ? c.b.dq : i == 1 ? c.b.dk : c.b.dg;
        const __nv_bfloat16 *from = i == 0 ? in.q : i == 1 ? in.k : in.g;
        char *row = kda_row(&to, at.batch, at.token + token, i < 2 ? at.key_head : at.head);
        for (int n = 0; n < 2; n++) {
            int column = n * PANEL + part * 8;
            reinterpret_cast<uint4 *>(row)[column / 8] =
                *reinterpret_cast<const uint4 *>(&from[swizzled<CHUNK, DIM>(token, column)]);
        }
    }
    __syncwarp(); /* what follows is done by whole warps */
}

/* A chunk's gradients, from [T1 T2] and T3. The states' warpgroups make that of g meanwhile. */
inline __device__ void finish_chunk(const Context &c, RawInputs &in, const Place &at, int warp,
                                    const float *scales, const Elements &decayed, float (&T)[2 * CHUNK / 8][4],
                                    float *dq_heads, float *dk_heads) {
    const kda_prefill &p = c.b.forward;
    GradientsShared &shared = c.shared;
    int t = (int)(thread() % TEAM), lane = t % 32, part = lane % 4 * 2;
    float along[2 * CHUNK / 4]; /* of q's tokens, then of k's: two of each tile */
    uint32_t RQ[4], RK[4], CK[4];
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        if (j % 2 == 0) {
            load_half(shared.RQ, warp, j / 2, RQ);
            load_half(shared.RK, warp, j / 2, RK);
            load_half(shared.CK, warp, j / 2, CK);
        }
        float4 &own = shared.T3[warp / 4][j][t % GROUP];
        const float T3[4] = {own.x, own.y, own.z, own.w};
        float da[4];
        along[2 * j] = along[2 * j + 1] = along[CHUNK / 4 + 2 * j] = along[CHUNK / 4 + 2 * j + 1] = 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int n = j % 2 * 2 + r;
            float2 rq = unpack_bf16(RQ[n]), rk = unpack_bf16(RK[n]), ck = unpack_bf16(CK[n]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float of_q = (e ? rq.y : rq.x) * T[j][2 * r + e];
                float of_row = (e ? rk.y : rk.x) * -T[CHUNK / 8 + j][2 * r + e];
                float of_column = (e ? ck.y : ck.x) * T3[2 * r + e];
                along[2 * j + e] += of_q, along[CHUNK / 4 + 2 * j + e] += of_row + of_column;
                da[2 * r + e] = of_column - of_q - of_row;
                float x = decayed[j][r][e]; /* T1 and T2 become dq and dk, but for M's diagonal and the norms */
                T[j][2 * r + e] *= x;
                T[CHUNK / 8 + j][2 * r + e] =
                    fmaf(-x, T[CHUNK / 8 + j][2 * r + e], reciprocal_approximate(x) * T3[2 * r + e]);
            }
        }
        own = make_float4(da[0], da[1], da[2], da[3]);
    }
    barrier_arrive(BARRIER_DECAYS, GRADIENT_THREADS);
    /* along: index 2 j + e of q, 8 + 2 j + e of k; a lane ends with two neighbours. */
    sum_over_channels<CHUNK / 4>(along);
    {
        int first = lane / 4 * 2, tile = first / 2 % (CHUNK / 8), of_k = first / (CHUNK / 4);
        *reinterpret_cast<float2 *>(&shared.partial[warp][of_k * CHUNK + tile * 8 + part]) =
            make_float2(along[0], along[1]);
    }
    barrier_wait(BARRIER_GRADIENTS, TEAM);
    if (t < 2 * CHUNK) {
        float sum = shared.along[t];
#pragma unroll
        for (int i = 0; i < TEAM / 32; i++)
            sum += shared.partial[i][t];
        float scale = t < CHUNK ? scales[CHUNK + lane] / p.scale : scales[lane];
        shared.along[t] = p.qk_norm ? sum * scale * scale : 0.f;
    } else if (t < 3 * CHUNK && lane < at.count) {
        float step = shared.steps[lane];
        float d = step != 0 ? shared.diagonals[lane] / step * shared.steps[CHUNK + lane] : 0.f;
        store_float(kda_row(&c.b.dbeta, at.batch, at.token + lane, at.head), c.b.dbeta.dtype, 0, d);
    }
    Pairs q, k;
    load_pairs(in.q, warp, q), load_pairs(in.k, warp, k);
    barrier_wait(BARRIER_GRADIENTS, TEAM); /* sums along rows are there */
    finish_rows(p, in.q, at, warp, q, k, scales + CHUNK, shared.more, shared.along, T, dq_heads);
    finish_rows(p, in.k, at, warp, k, q, scales, shared.more + CHUNK, shared.along + CHUNK, T + CHUNK / 8,
                dk_heads);
    fence_shared();
}

template <bool bounded> __device__ void run_gradients(const Context &c, float *dq_heads, float *dk_heads) {
    GradientsShared &shared = c.shared;
    int t = (int)threadIdx.x - TEAM;
    Gate gate = find_gates<bounded>(c.b.forward, (int)c.segment.head, t / 32);
    float next_scale = 0, next_own = 0;
    auto load_scales = [&](int chunk) {
        const StateOperands &from = c.operands[chunk].state;
        next_scale = from.rk[t], next_own = from.diagonal[token_index(t % CHUNK)];
    };
    auto send = [&](int chunk) {
        barrier_wait(BARRIER_GATES, GRADIENT_THREADS);
        send_gradients(c, shared.inputs[raw_place(chunk)].raw, chunk_of(c.segment, chunk), dq_heads);
    };
    if (t < 4 * CHUNK)
        load_scales(c.chunks - 1);
    uint32_t parity = 0;
    for (int chunk = c.chunks - 1; chunk >= 0; chunk--) {
        RawInputs &in = shared.inputs[raw_place(chunk)].raw;
        Place at = chunk_of(c.segment, chunk);
        int warp = (int)(thread() % TEAM) / 32; /* anew: what follows from it is not kept for the next chunk */
        float *scales = shared.scales[chunk % 2];
        bool first = chunk == c.chunks - 1;
        Elements decayed;
        float T[2 * CHUNK / 8][4];
        if (t < 2 * CHUNK)
            scales[t] = next_scale;
        barrier_wait(BARRIER_GRADIENTS, TEAM);
        wait(shared.raw_in[raw_place(chunk)], (c.chunks - 1 - chunk) / 2 % 2);
        make_tiles<bounded>(c, in, gate, at.count, warp, scales, first, decayed);
        if (!first)
            send(chunk + 1);
        if (t < 2 * CHUNK) {
            float with_U = shared.with_U[chunk][t % CHUNK];
            shared.more[t] = with_U * next_scale;
            shared.along[t] = with_U * next_own;
        } else if (t < 4 * CHUNK)
            shared.steps[t - 2 * CHUNK] = next_scale;
        if (t < 4 * CHUNK && chunk)
            load_scales(chunk - 1);
        wait(shared.values_in, parity);
        parity ^= 1;
        barrier_wait(BARRIER_TILES, GRADIENT_THREADS);
        find_rows<bounded>(c, chunk, warp, T);
        if (t == 0 && chunk && !first) { /* when the gradients of the chunk after this one have left */
            ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
            load_raw_inputs(c, chunk - 1);
        }
        barrier_wait(BARRIER_SUMS, GRADIENT_THREADS);
        finish_chunk(c, in, at, warp, scales, decayed, T, dq_heads, dk_heads);
    }
    send(0);
    if (t == 0)
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
}

/* The state at the segment's start. */
inline __device__ kda_state first_state(const kda_backward &b, const Place &at) {
    return at.first ? kda_kept_state(&b, at.n, at.first, at.head)
                    : kda_state_in(&b.forward.base, &b.forward.initial_state, at.n, at.head);
}

template <bool bounded>
__global__ void __launch_bounds__(GRADIENT_THREADS, 1)
    make_gradients(const __grid_constant__ kda_backward b, const __grid_constant__ kda_sm90_backward_maps maps,
                   const __grid_constant__ kda_sm90_backward_memory memory) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    GradientsShared &shared = *reinterpret_cast<GradientsShared *>(bytes);
    let_next_begin();
    int64_t number = (int64_t)blockIdx.y * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++)
            ptx::mbarrier_init(&shared.states_in[i], 1), ptx::mbarrier_init(&shared.raw_in[i], 1);
        ptx::mbarrier_init(&shared.values_in, 2);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    __syncthreads();
    Context c = {b,
                 maps,
                 shared,
                 static_cast<const ChunkOperands *>(memory.operands) + number * CHUNKS,
                 memory.updates + number * (CHUNKS * TILE),
                 find_segment(b, blockIdx.x, blockIdx.y),
                 0};
    c.chunks = (c.segment.count + CHUNK - 1) / CHUNK;
    float *gate_sums = memory.sums + number * (2 * DIM);
    wait_for_kernel_before();
    if (c.chunks == 0) { /* a gap in the numbering: the sums are taken over all numbers */
        if (threadIdx.x < 2 * DIM)
            gate_sums[threadIdx.x] = 0;
        return;
    }
    if (threadIdx.x < TEAM) {
        set_registers<STATES_REGISTERS>();
        run_states<bounded>(c, first_state(b, c.segment), memory.adjoints + number * (DIM * DIM / 2),
                            gate_sums);
    } else {
        set_registers<GRADIENTS_REGISTERS>();
        run_gradients<bounded>(c, memory.queries, memory.keys);
    }
}

} // namespace
} // namespace kda

extern "C" cudaError_t kda_sm90_backward_gradients(const struct kda_backward *b,
                                                   const struct kda_backward_plan *,
                                                   const struct kda_launch *launch,
                                                   const struct kda_sm90_backward_memory *memory) {
    using namespace kda;
    auto *kernel = &make_gradients<true>;
    if (!is_bounded(&b->forward))
        kernel = &make_gradients<false>;
    kda_sm90_backward_maps maps;
    cudaError_t error = kda_sm90_map_backward(b, &maps);
    return error ? error
                 : launch_kernel(kernel, *launch, GRADIENT_THREADS, sizeof(GradientsShared), b->forward.stream,
                                 *b, maps, *memory);
}
