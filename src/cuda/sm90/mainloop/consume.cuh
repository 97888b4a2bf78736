/* SPDX-License-Identifier: MIT */
/*
 * Consumers: a warpgroup takes 64 columns of V of the state, in its accumulators, through a chunk's operands
 * (tiles.cuh).
 *
 * Within a chunk S is relative to the chunk's middle, or to its first middle and then its second
 * (unbounded.cuh):
 *     [W | Y] = S^T [RK; RQ]^T   U^T = (V^T - W^T diag(rk)) F^T   O^T = Y^T diag(rq) + U^T M^T
 *     S^T <- S^T + U^T CK
 * Everything is transposed, so that an accumulator is, lane for lane, the next product's first operand.
 */
#ifndef KDA_CUDA_SM90_CONSUME_CUH
#define KDA_CUDA_SM90_CONSUME_CUH

#include "cuda/sm90/mainloop/tiles.cuh"
#include "cuda/sm90/mainloop/warpgroup.cuh"
#include "cuda/sm90/tensor_maps.h"

namespace kda {

constexpr int EDGE = 4; /* log2: scaled v and S stay below 2^EDGE */

/* to_middle or to_end of the thread's channels. */
template <int COUNT> __device__ void load_factors(const float *factors, float4 (&own)[COUNT]) {
#pragma unroll
    for (int c = 0; c < COUNT; c++)
        own[c] = *reinterpret_cast<const float4 *>(&factors[c * 16 + threadIdx.x % 4 * 4]);
}

template <int TILES> __device__ void decay_state(float (&S)[TILES][4], const float4 (&factors)[TILES / 2]) {
#pragma unroll
    for (int c = 0; c < TILES; c += 2) {
        float4 f = factors[c / 2];
        S[c][0] *= f.x, S[c][1] *= f.y, S[c][2] *= f.x, S[c][3] *= f.y;
        S[c + 1][0] *= f.z, S[c + 1][1] *= f.w, S[c + 1][2] *= f.z, S[c + 1][3] *= f.w;
    }
}

/* rk or rq of the thread's tokens. */
inline __device__ void load_scales(const float *scales, float (&own)[CHUNK / 4]) {
#pragma unroll
    for (int i = 0; i < CHUNK / 4; i += 4)
        *reinterpret_cast<float4 *>(&own[i]) =
            *reinterpret_cast<const float4 *>(&scales[threadIdx.x % 4 * 8 + i]);
}

/*
 * A warp scales S and v by a power of two of its own: they are multiples of 2^exponent, and the largest element
 * is near 1. In the middle of a chunk S is up to 2^115 times smaller than at its end, and what is added to it
 * up to 2^115 times larger. The exponent is raised at once when v needs it, and is measured again by S every
 * MEASURED tokens.
 */
constexpr int MEASURED = 512, LEAST_EXPONENT = -120, GREATEST_EXPONENT = 120;

/* 2^exponent, or 0 where that is below fp32's normal numbers. */
inline __device__ float power_of_two(int exponent) {
    return exponent < -126 ? 0.f : __int_as_float((exponent + 127) << 23);
}

inline __device__ int exponent_of(float largest) {
    int exponent = (int)(__float_as_uint(largest) >> 23) - 127;
    return min(max(exponent, LEAST_EXPONENT), GREATEST_EXPONENT);
}

inline __device__ float largest_of_warp(float x) {
#pragma unroll
    for (int n = 16; n; n /= 2)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, n));
    return x;
}

template <int TILES> __device__ void scale_tiles(float (&d)[TILES][4], float factor) {
#pragma unroll
    for (int c = 0; c < TILES; c++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            d[c][n] *= factor;
}

/* The largest of the thread's elements, without sign. */
template <int TILES> __device__ float largest_of_tiles(const float (&d)[TILES][4]) {
    float largest = 0;
#pragma unroll
    for (int c = 0; c < TILES; c++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            largest = fmaxf(largest, fabsf(d[c][n]));
    return largest;
}

/* The warp's largest element. A thread that has an infinite one is left out: it spoils its own column, and the
 * exponent must still suit the neighbours. */
inline __device__ float largest_that_counts(float of_thread) {
    return largest_of_warp(of_thread < INFINITY ? of_thread : 0.f);
}

/* Is fp16 exact enough for a warp's elements, of whose largest each thread has one? */
inline __device__ bool fits_half(float largest) {
    constexpr float LEAST = 0x1p-12f, GREATEST = 0x1p15f;
    return __any_sync(~0u, largest >= LEAST) && !__any_sync(~0u, largest >= GREATEST);
}

/* Changes to an exponent that brings S near 1. */
template <int TILES> __device__ void measure_exponent(float (&S)[TILES][4], int &exponent) {
    float largest = largest_that_counts(largest_of_tiles(S));
    if (largest >= 0.25f && largest <= power_of_two(EDGE))
        return;
    int next = min(max(exponent_of(largest) + exponent, LEAST_EXPONENT), GREATEST_EXPONENT);
    next = max(next, exponent - 120); /* a factor that fp32 holds */
    scale_tiles(S, power_of_two(exponent - next));
    exponent = next;
}

/* Scales a state that is not scaled yet; returns its exponent. */
template <int TILES> __device__ int measured(float (&S)[TILES][4]) {
    int exponent = 0;
    measure_exponent(S, exponent);
    return exponent;
}

/* V^T of a chunk as first operands: 16 tokens and the warp's 16 columns at a time. */
using Values = uint32_t[CHUNK / 16][4];

/* The largest of the thread's values, as bf16 without its sign: such bits are ordered as integers are. */
inline __device__ uint32_t largest_value(const Values &v) {
    uint32_t largest = 0; /* of each half */
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            largest = __vmaxu2(largest, v[t][n] & 0x7fff7fff);
    return max(largest & 0xffff, largest >> 16);
}

/* Loads values from rows of COLUMNS that all of the CTA's warps share. */
template <int COLUMNS> __device__ void load_values(const __nv_bfloat16 *rows, Values &v) {
    MatrixRow<CHUNK, COLUMNS> values(rows, false);
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        ldmatrix_transposed(v[t], values.at(t * 16, threadIdx.x / 32 * 16));
}

/* Takes S through one chunk, in the warp's exponent. While products run, load(v) loads the chunk's values,
 * send() sends the outputs of the chunk before, and leave(o) takes the chunk's outputs, which are scaled like
 * S. */
template <bool outputs, bool bounded, int DIM, class F, class G, class H>
__device__ void advance(const Tiles<DIM> &tiles, const Factors<DIM> &factors, float (&S)[DIM / 8][4],
                        int &exponent, F load, G send, H leave) {
    const Panel(&panels)[DIM / PANEL] = tiles.panels;
    uint64_t rows = wgmma_operand(panels[0].keys, 0, 8 * ROW, SWIZZLE_128);
    uint64_t columns = wgmma_operand(panels[0].gates, sizeof(Panel), 8 * ROW, SWIZZLE_128);
    uint64_t inverse = wgmma_operand(tiles.inverse, 0, 8 * CHUNK * 4, SWIZZLE_128);
    uint64_t M = wgmma_operand(tiles.M, 0, 8 * CHUNK * 2, SWIZZLE_64);

    float4 decays[DIM / 16];
    load_factors(factors.to_middle, decays);
    decay_state(S, decays);
    float wy[CHUNK / 4][4]; /* W^T, then Y^T */
    uint32_t a[DIM / 16][4];
#pragma unroll
    for (int c = 0; c < DIM / 16; c++)
        pack_operand(S[2 * c], S[2 * c + 1], a[c]);
    pin(wy);
    wgmma_fence();
    wgmma<false, false>(wy, a[0], rows);
#pragma unroll
    for (int c = 1; c < DIM / 16; c++)
        wgmma<false, true>(wy, a[c], advanced(rows, c / 4 * sizeof(Panel) + c % 4 * 32));
    wgmma_commit();

    Values v;
    load(v);
    alignas(16) float rk[CHUNK / 4];
    load_scales(factors.key_scale, rk);
    uint32_t largest = largest_value(v);
    wgmma_wait<0>();
    pin(wy);
    if (__builtin_expect(__any_sync(~0u, largest >= (uint32_t)(127 + exponent + EDGE) << 7), 0)) {
        constexpr uint32_t NOT_FINITE =
            0x7f80; /* bf16 from here on: the exponent does not follow it (largest_that_counts) */
        largest = __reduce_max_sync(~0u, largest < NOT_FINITE ? largest : 0);
        int next = max(exponent_of(__uint_as_float(largest << 16)), exponent);
        scale_tiles(S, power_of_two(exponent - next));
        scale_tiles(wy, power_of_two(exponent - next));
        exponent = next;
    }
    uint32_t downscale = (uint32_t)(127 - exponent) * 0x800080; /* 2^-exponent in bf16, twice */
    float U[CHUNK / 8][4];
    uint32_t x[CHUNK / 8][4];
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++) {
        float tile[4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float2 pair = unpack_bf16(multiply_pair(v[i / 2][i % 2 * 2 + n], downscale));
            tile[2 * n] = fmaf(-rk[2 * i], wy[i][2 * n], pair.x);
            tile[2 * n + 1] = fmaf(-rk[2 * i + 1], wy[i][2 * n + 1], pair.y);
        }
        tf32_operand(tile, x[i]);
    }
    pin(U);
    wgmma_fence();
    wgmma_tf32<false>(U, x[0], inverse);
#pragma unroll
    for (int i = 1; i < CHUNK / 8; i++)
        wgmma_tf32<true>(U, x[i], advanced(inverse, i * 32));
    wgmma_commit();
    send();
    wgmma_wait<0>();
    pin(U);

    if constexpr (!bounded) { /* from the first middle on to the second */
        load_factors(factors.across, decays);
        decay_state(S, decays);
    }
    uint32_t u[CHUNK / 16][4], u_half[CHUNK / 16][4];
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++) {
        pack_operand(U[2 * t], U[2 * t + 1], u[t]);
#pragma unroll
        for (int n = 0; n < 4; n++)
            u_half[t][n] = pack_half(U[2 * t + n / 2][n % 2 * 2], U[2 * t + n / 2][n % 2 * 2 + 1]);
    }
    float o[CHUNK / 8][4];
    pin(S);
    pin(o);
    wgmma_fence();
    if constexpr (outputs) {
        wgmma_half<false>(o, u_half[0], M);
        wgmma_half<true>(o, u_half[1], advanced(M, 32));
        wgmma_commit();
    }
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        wgmma<true, true>(S, u[t], advanced(columns, t * 16 * ROW));
    wgmma_commit();
    if constexpr (outputs) {
        alignas(16) float rq[CHUNK / 4];
        load_scales(factors.query_scale, rq);
        wgmma_wait<1>();
        pin(o);
#pragma unroll
        for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                o[i][n] = fmaf(wy[CHUNK / 8 + i][n], rq[2 * i + n % 2], o[i][n]);
        leave(o);
    }
    load_factors(factors.to_end, decays);
    wgmma_wait<0>();
    pin(S);
    decay_state(S, decays);
}

/* Runs f(two neighbours of S in a row of V, channel, column) over a thread's share of the state. Pass thread()
 * where registers are short (warpgroup.cuh). */
template <class S, int TILES, class F>
__device__ void each_pair(S (&state)[TILES][4], F f, uint32_t thread = threadIdx.x) {
    int t = (int)thread, lane = t % 32, column = t / 32 * 16 + lane / 4;
#pragma unroll
    for (int c = 0; c < TILES; c++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            f(state[c][2 * n], state[c][2 * n + 1], c * 8 + lane % 4 * 2, column + n * 8);
}

/* Makes S the identity times x. A thread has diagonal elements in two tiles only, which follow from its
 * warp. */
template <int TILES> __device__ void make_diagonal(float (&S)[TILES][4], float x) {
    uint32_t warp = thread() / 32, row = thread() % 32 / 4, channel = thread() % 4 * 2;
    const float on[2] = {row == channel ? x : 0.f, row == channel + 1 ? x : 0.f};
#pragma unroll
    for (uint32_t c = 0; c < TILES; c++)
#pragma unroll
        for (uint32_t n = 0; n < 4; n++) /* columns 0 to 7 of the warp's, then the others */
            S[c][n] = c % 2 == n / 2 && c / 2 == warp ? on[n % 2] : 0.f;
}

/* Where element (column of V, channel) of a state is. */
inline __device__ char *element(const kda_state &state, int column, int channel) {
    int row = state.v_first ? column : channel, i = state.v_first ? channel : column;
    return state.data + row * state.stride + i * (state.dtype == KDA_F32 ? 4 : 2);
}

/* The columns of V from `column` on. */
inline __device__ kda_state from_column(kda_state state, int column) {
    if (state.data)
        state.data = element(state, column, 0);
    return state;
}

/* Can two neighbouring channels be accessed at once? */
inline __device__ bool as_pairs(const kda_state &state) {
    return state.v_first &&
           (reinterpret_cast<uintptr_t>(state.data) | state.stride) % (state.dtype == KDA_F32 ? 8 : 4) == 0;
}

/* As load_float without fp16, which no state has: its branch would cost registers that the products need. */
inline __device__ float load_one(const kda_state &state, int column, int channel) {
    const char *at = element(state, column, channel);
    return state.dtype == KDA_F32 ? *reinterpret_cast<const float *>(at)
                                  : kda_from_bf16(*reinterpret_cast<const uint16_t *>(at));
}

/* As each_pair, over a state accessed as pairs: f(two neighbours of S, where they lie as elements of type E).
 * It has few addresses and few instructions, as these are fetched for every chain. */
template <class E, class S, int TILES, class F>
__device__ void each_pair_at(const kda_state &state, S (&S_own)[TILES][4], F f, uint32_t thread) {
    int lane = (int)thread % 32, column = (int)thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        E *row = reinterpret_cast<E *>(state.data + (column + n * 8) * state.stride) + lane % 4;
#pragma unroll
        for (int c = 0; c < TILES; c++)
            f(S_own[c][2 * n], S_own[c][2 * n + 1], row[c * 4]);
    }
}

template <int TILES>
__device__ void load_whole(const kda_state &state, float (&S)[TILES][4], uint32_t thread = threadIdx.x) {
    if (!state.data)
        each_pair(
            S, [](float &x, float &y, int, int) { x = y = 0.f; }, thread);
    else if (!as_pairs(state))
        each_pair(
            S,
            [&](float &x, float &y, int channel, int column) {
                x = load_one(state, column, channel), y = load_one(state, column, channel + 1);
            },
            thread);
    else if (state.dtype == KDA_F32)
        each_pair_at<const float2>(
            state, S, [](float &x, float &y, const float2 &pair) { x = pair.x, y = pair.y; }, thread);
    else
        each_pair_at<const uint32_t>(
            state, S,
            [](float &x, float &y, uint32_t raw) {
                float2 pair = unpack_bf16(raw);
                x = pair.x, y = pair.y;
            },
            thread);
}

template <int TILES>
__device__ void store_whole(const kda_state &state, const float (&S)[TILES][4], int exponent,
                            uint32_t thread = threadIdx.x) {
    float factor = power_of_two(exponent);
    if (!state.data)
        return;
    if (!as_pairs(state))
        each_pair(
            S,
            [&](float x, float y, int channel, int column) {
                store_float(element(state, column, channel), state.dtype, 0, x * factor);
                store_float(element(state, column, channel + 1), state.dtype, 0, y * factor);
            },
            thread);
    else if (state.dtype == KDA_F32)
        each_pair_at<float2>(
            state, S, [&](float x, float y, float2 &pair) { pair = make_float2(x * factor, y * factor); },
            thread);
    else
        each_pair_at<uint32_t>(
            state, S, [&](float x, float y, uint32_t &pair) { pair = pack_bf16(x * factor, y * factor); },
            thread);
}

/* Stores 16 channels in bf16, of which four lanes have pairs of the lower 8 and of the upper 8. They exchange pairs, so
 * that each stores 8 bytes. */
inline __device__ void store_channels(char *channels, uint32_t lower, uint32_t upper) {
    bool odd = threadIdx.x % 2;
    uint32_t other = __shfl_xor_sync(~0u, odd ? lower : upper, 1);
    reinterpret_cast<uint2 *>(channels)[odd * 2 + threadIdx.x % 4 / 2] =
        odd ? make_uint2(other, upper) : make_uint2(lower, other);
}

/* Stores a state that lies densely, V first and at a multiple of 16 bytes. All addresses are one and a constant. */
template <int TILES>
__device__ void store_dense(char *state, bool fp32, const float (&S)[TILES][4], int exponent) {
    constexpr int CHANNELS = TILES * 8;
    int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4;
    if (fp32) {
        float factor = power_of_two(exponent);
        float2 *own = reinterpret_cast<float2 *>(state) + column * (CHANNELS / 2) + lane % 4;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int c = 0; c < TILES; c++)
                own[n * 8 * (CHANNELS / 2) + c * 4] =
                    make_float2(S[c][2 * n] * factor, S[c][2 * n + 1] * factor);
        return;
    }
    uint32_t factors = (uint32_t)(127 + exponent) * 0x800080; /* 2^exponent in bf16, twice */
    char *own = state + column * (CHANNELS * 2);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int c = 0; c < TILES; c += 2)
            store_channels(own + n * 8 * (CHANNELS * 2) + c * 16,
                           multiply_pair(pack_bf16(S[c][2 * n], S[c][2 * n + 1]), factors),
                           multiply_pair(pack_bf16(S[c + 1][2 * n], S[c + 1][2 * n + 1]), factors));
}

/* Stores checkpoints at a position, wherever they lie: at 0 the state that the chain starts from, else the one after
 * that token. */
template <int TILES>
__device__ void store_whole_checkpoints(const kda_prefill &p, int n, int head, int column, int position,
                                        float (&S)[TILES][4], int exponent, uint32_t thread = threadIdx.x) {
    int64_t cursor = 0;
    while (p.checkpoints.data) {
        struct kda_state state = kda_checkpoint_at(&p, n, position, head, &cursor);
        if (!state.data)
            return;
        store_whole(from_column(state, column), S, exponent, thread);
        pin(S);
    }
}

/* What is special about a chunk; consumers test all of it at once. */
enum : uint32_t {
    ENDS = 1,    /* there is no chunk: the CTA's work is done */
    BEGINS = 2,  /* the CTA's first chunk of its sequence */
    EMPTY = 4,   /* its sequence has no tokens */
    PARTIAL = 8, /* fewer than CHUNK tokens */
    MEASURE = 16 /* S is to be measured after it */,
    CHECKPOINT = 32, /* there may be one after it */
    LAST = 64,       /* the CTA's last chunk of its sequence */
    /* In stream-K's ranges (stream_k/ranges.cuh): */
    SPLIT = 128, /* the chain is split in front of it */
    SPLIT_AFTER = 256,
    FROM_SPLIT = 512, /* LAST, and the CTA's part of the chain starts at a split */
    REHEARSAL = 1024, /* with SPLIT and BEGINS: no real chunk */
    PLACED = 2048,    /* with CHECKPOINT: there is one, at `place` */
    IN_FP32 = 4096    /* with PLACED: it is in fp32, not in bf16 */
};

/* What a scout says of a chunk. */
struct ChunkInfo {
    int n, head;      /* of its chain */
    int batch, token; /* where it begins in the tensors */
    int position;     /* where it ends in its sequence */
    int slot;         /* of its state; kernel cluster knows it without */
    uint32_t place;   /* where PLACED is set: of the checkpoint after the chunk, in pieces of 16 bytes */
    int16_t column;   /* first of the CTA's columns of V */
    int16_t count;    /* tokens; -1: see ENDS */
    uint32_t flags;
};

/* keeps: checkpoints are asked for. */
inline __device__ uint32_t find_flags(const ChunkInfo &info, bool first, bool last, bool keeps) {
    if (info.count < 0)
        return ENDS;
    return (first ? BEGINS : 0) | (info.count == 0 ? EMPTY : 0) | (info.count < CHUNK ? PARTIAL : 0) |
           (info.position % MEASURED < CHUNK ? MEASURE : 0) | (keeps ? CHECKPOINT : 0) | (last ? LAST : 0);
}

/* A sequence's checkpoints, if they are between whole chunks: found once a chain, so that scouts find each in few
 * instructions. place, step: where they lie in equal steps and store_dense can store them. */
struct Checkpoints {
    int every, rows;      /* chunks from one to the next, 0: it is not so; how many there are */
    uint32_t inverse;     /* 2^32 / every, rounded up; 0: it does not serve */
    uint32_t place, step; /* of the first, and from one to the next, in pieces of 16 bytes */
    uint32_t flags;       /* of a chunk that has one after it */
};

/* chunks: of the sequence. */
inline __device__ void find_steps(const kda_prefill &p, int n, int chunks, Checkpoints &x) {
    x = {};
    if (p.checkpoint_offsets.data || p.checkpoint_every % CHUNK)
        return;
    x.every = (int)kda_min64(p.checkpoint_every / CHUNK, INT32_MAX), x.rows = (int)kda_checkpoint_count(&p, n);
    if ((uint64_t)x.every * (uint64_t)(chunks + 1) <= UINT32_MAX) /* else a quotient by it may be wrong */
        x.inverse = UINT32_MAX / (uint32_t)x.every + 1;
}

/* column: the CTA's first of V. */
template <int DIM>
__device__ void find_checkpoints(const kda_prefill &p, int n, int head, int column, int chunks,
                                 Checkpoints &x) {
    find_steps(p, n, chunks, x);
    struct kda_state state = x.rows > 0 ? kda_checkpoint_row(&p, n, 0, head) : kda_state{};
    bool fp32 = state.dtype == KDA_F32, packed = p.checkpoint_cu_starts.data;
    int64_t bytes = fp32 ? sizeof(float) : sizeof(__nv_bfloat16);
    uint64_t offset = (uint64_t)(state.data - p.checkpoints.data + column * DIM * bytes),
             step = packed                   ? p.checkpoints.stride[0]
                    : p.checkpoints.rank > 4 ? p.checkpoints.stride[1]
                                             : 0;
    bool dense = state.data && !p.checkpoint_indices.data && state.v_first && state.stride == DIM * bytes &&
                 (reinterpret_cast<uintptr_t>(state.data) | offset | step) % sizeof(uint4) == 0 &&
                 !((offset + step * (uint64_t)x.rows) >> 36);
    x.flags = !dense ? 0 : fp32 ? PLACED | IN_FP32 : PLACED;
    x.place = (uint32_t)(offset / sizeof(uint4)), x.step = (uint32_t)(step / sizeof(uint4));
}

/* end: chunks of the sequence up to this one's end; last: it is the sequence's last one. */
inline __device__ void place_checkpoint(const Checkpoints &x, int end, bool last, ChunkInfo &info) {
    int quotient = x.inverse ? (int)((uint64_t)end * x.inverse >> 32) : end / x.every;
    bool exact = quotient * x.every == end;
    int row = quotient - exact;
    info.flags &= ~CHECKPOINT;
    if ((exact || last) && row < x.rows)
        info.flags |= CHECKPOINT | x.flags, info.place = x.place + (uint32_t)row * x.step;
}

/* Stores the checkpoint after a chunk, or all that are there. */
template <int TILES>
__device__ void store_checkpoints(const kda_prefill &p, const ChunkInfo &info, float (&S)[TILES][4],
                                  int exponent) {
    if (__builtin_expect(info.flags & PLACED, 1)) {
        store_dense(p.checkpoints.data + info.place * sizeof(uint4), info.flags & IN_FP32, S, exponent);
        pin(S);
    } else {
        store_whole_checkpoints(p, info.n, info.head, info.column, info.position, S, exponent, thread());
    }
}

/* Waits until rows are free: what was sent has left them, but for the last `later` times. */
template <int later> __device__ void wait_for_rows() {
    if (elected())
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<later>());
}

/* Puts the warp's outputs of a chunk [CHUNK][16 columns], from o^T, into its own `rows`. */
template <int later>
__device__ void place_outputs(kda_dtype dtype, const float (&o)[CHUNK / 8][4], __nv_bfloat16 *rows) {
    wait_for_rows<later>();
    __syncwarp();
    uint32_t pairs[CHUNK / 8][2];
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            pairs[i][n] = pack_output(dtype, o[i][2 * n], o[i][2 * n + 1]);
    transpose_outputs(pairs, rows);
}

/* Sends them from there to memory. */
inline __device__ void send_outputs(const kda_tensor &out, const CUtensorMap &map, const ChunkInfo &info,
                                    const __nv_bfloat16 *rows) {
    int lane = threadIdx.x % 32, column = info.column + threadIdx.x / 32 * 16;
    fence_shared();
    __syncwarp();
    if (!(info.flags & PARTIAL)) {
        if (elected()) {
            const int32_t at[4] = {column, info.head, info.token, info.batch};
            ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, at, rows);
            ptx::cp_async_bulk_commit_group();
        }
    } else if (lane < info.count) { /* what lies after is another sequence's */
        store_row(rows, kda_row(&out, info.batch, info.token + lane, info.head) + column * 2);
    }
}

/* Takes the warp's exponent out of outputs. */
inline __device__ void unscale_outputs(float (&o)[CHUNK / 8][4], int exponent) {
    if (__builtin_expect(exponent != 0, 0))
        scale_tiles(o, power_of_two(exponent));
}

/* The defaults of a schedule's policy: no chunk is worked twice, and no checkpoints are stored. */
template <int DIM> struct DefaultPolicy {
    __device__ bool again(const ChunkInfo &, float (&)[DIM / 8][4], int) const { return false; }
    __device__ void keep(const ChunkInfo &, float (&)[DIM / 8][4], int) const {}
};

/* A consumer warpgroup's work: all chunks that scouts send through `shared`, from `pipe` on. Outputs go to
 * `out`, which `map` maps. The schedule's policy has
 *   before(info, S)            makes S the state before a first chunk, and returns its exponent
 *   load(stage, flags, v)      loads a chunk's values
 *   again(info, S, exponent)   is called after a chunk in front of which the chain is split: true if it is to
 *                              be worked once more; the policy then takes the outputs itself
 *   finish(info, o, exponent)  turns scaled outputs into those to be stored, and returns their dtype
 *   keep(info, S, exponent)    stores checkpoints after a chunk
 *   after(info, S, exponent)   stores the state after a last chunk
 *
 * A rehearsal is a step before the first chunk, on whatever lies in its stage. It fetches the code while the
 * first chunk is on its way. */
template <int DIM, bool outputs, bool bounded, class Shared, class PipelineState, class Policy>
__device__ void consume(const kda_tensor &out, const CUtensorMap &map, Shared &shared, PipelineState pipe,
                        Policy policy) {
    float S[DIM / 8][4];
    int exponent = 0;
    constexpr int BUFFERS = sizeof shared.outputs / sizeof shared.outputs[0]; /* of outputs, used alternately */
    int buffer = 0;
    auto rows = [&] { return shared.outputs[buffer][threadIdx.x / 32]; };
    const ChunkInfo *leaving = nullptr; /* its outputs are in rows and leave during the next first product */
    for (;;) {
        wait(shared.full[pipe.stage], pipe.parity);
        const ChunkInfo &info = shared.infos[pipe.info_index()];
        uint32_t flags = info.flags;
        if (__builtin_expect(flags & (ENDS | BEGINS), 0)) {
            if (flags & ENDS)
                break;
            exponent = policy.before(info, S);
        }
        if (__builtin_expect(!(flags & EMPTY), 1))
            advance<outputs, bounded>(
                shared.tiles[pipe.stage], shared.factors[pipe.stage], S, exponent,
                [&](Values &v) { policy.load(pipe.stage, flags, v); },
                [&] {
                    if (outputs && leaving) {
                        send_outputs(out, map, *leaving, rows());
                        buffer = (buffer + 1) % BUFFERS;
                    }
                },
                [&](float(&o)[CHUNK / 8][4]) {
                    kda_dtype dtype = policy.finish(info, o, exponent);
                    place_outputs<BUFFERS - 1>(dtype, o, rows());
                    leaving = &info;
                });
        if (__builtin_expect(flags & SPLIT, 0) && policy.again(info, S, exponent)) {
            leaving = nullptr;
            if (flags & REHEARSAL) {
                ptx::mbarrier_arrive(&shared.empty[pipe.stage]);
                pipe.next();
            }
            continue;
        }
        ptx::mbarrier_arrive(&shared.empty[pipe.stage]);
        if (__builtin_expect(flags & (MEASURE | CHECKPOINT | LAST), 0)) {
            if (outputs && flags & CHECKPOINT && !(flags & EMPTY))
                policy.keep(info, S, exponent);
            if (flags & MEASURE)
                measure_exponent(S, exponent);
            if (flags & LAST)
                policy.after(info, S, exponent);
        }
        pipe.next();
    }
    if (outputs && leaving) {
        send_outputs(out, map, *leaving, rows());
        wait_for_rows<0>();
    }
}

} // namespace kda

#endif
