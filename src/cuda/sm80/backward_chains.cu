/* SPDX-License-Identifier: MIT */
/*
 * Takes states and gradients of states through the chunks of a slab, with the operands that backward_prepare.cu left.
 *
 * One CTA works a chain, or a segment of one, for 64 columns of V. A warp works 16 of them and, where K is long, half of
 * the channels, transposed as in general.cu:
 *     there   X^T = V^T - S^T KT^T       e^T = X^T INV^T      U^T = e^T diag(b)
 *             S^T <- S^T diag(1 + carry) + U^T KR
 *     back    dU^T = R^T KR^T + dO^T M   Z^T = dU^T INV'      dV^T = Z^T diag(b)
 *             R^T <- R^T diag(1 + carry) + dO^T QT - dV^T KT
 * R enters in two terms of bf16: where keys nearly coincide dV is a small difference of what it makes.
 * Neither needs anything of the other, so the ways back of whole chains and those there of single segments, whose first
 * states are known, share a launch: the few CTAs of the former leave room.
 */
#include "cuda/sm80/columns.cuh"

#include "cuda/launch.cuh"
#include "cuda/sm80/backward.cuh"
#include "cuda/sm80/kernels.h"

#include <cstddef>

namespace kda {
namespace {

/* The halves of K, or all of it, that warps share a state by. */
constexpr int PART_THREADS = COLUMNS / 16 * 32;
template <int KP> constexpr int PARTS = KP > 64 ? 2 : 1;
template <int KP> constexpr int CHANNELS = KP / PARTS<KP>; /* of a part */
template <int KP> constexpr int THREADS = PARTS<KP> *PART_THREADS;

template <int KP> constexpr int CTAS = KP > 128 ? 1 : 2; /* of a multiprocessor, at least */

/* A warp's share of a state: [16][CHANNELS], transposed. */
template <int KP> using State = float[CHANNELS<KP> / 8][4];

template <int KP> __device__ int part() { return PARTS<KP> > 1 ? (int)threadIdx.x / PART_THREADS : 0; }

template <int KP> struct Stage {
    BackwardOperands<KP> operands;
    char values[]; /* v or dO [CHUNK][COLUMNS] in its own dtype */
};

/* So that two stages fit wherever they can, and one everywhere. */
template <int KP> constexpr int STAGES = KP > 128 ? 1 : 2;

__host__ __device__ constexpr int size_of(kda_dtype dtype) { return dtype == KDA_F32 ? 4 : 2; }

template <int KP> __host__ __device__ constexpr int stage_bytes(int size) {
    return (int)sizeof(BackwardOperands<KP>) + CHUNK * COLUMNS * size;
}

/* Before the stages: what parts give each other, a sum [16][CHUNK] of each warp. */
template <int KP> constexpr int SUMS_BYTES = PARTS<KP> > 1 ? PARTS<KP> *COLUMNS *CHUNK * 4 : 0;

/* What of the operands a way needs. */
template <int KP> constexpr int THERE_BEGIN = 0;
template <int KP> constexpr int THERE_END = offsetof(BackwardOperands<KP>, queries);
template <int KP> constexpr int BACK_BEGIN = offsetof(BackwardOperands<KP>, keys);
template <int KP> constexpr int BACK_END = offsetof(BackwardOperands<KP>, adjoint_inverse) + CHUNK *CHUNK * 4;

/* What a CTA walks along: chunks of one sequence and value head, as far as they lie in the slab. */
struct Way {
    Chain chain;             /* first_operands: where chunk 0 of the sequence would be in the slab */
    int64_t first, segments; /* of the sequence: its first segment's number, and how many it has */
    int64_t begin, end;      /* segments of the way, counted within the sequence */
    int tile;
};

/* False if there is nothing to do. */
template <int KP>
__device__ bool find_way(const kda_backward &b, const Slab &slab, const SlabSegment &s, int64_t head,
                         Way &way) {
    const kda_prefill &p = b.forward;
    way.tile = (int)(blockIdx.x % (unsigned)slab.tiles);
    way.first = kda_first_segment(&p.base, slab.segment, s.sequence.first, s.n);
    way.segments = kda_segments_of(s.sequence.length, slab.segment);
    way.begin = max(slab.begin - way.first, (int64_t)0);
    way.end = min(slab.end - way.first, way.segments);
    Chain &chain = way.chain;
    chain.sequence = s.sequence, chain.n = s.n, chain.head = head;
    chain.column = way.tile * COLUMNS;
    chain.columns = (int)min(p.value_dim - chain.column, (int64_t)COLUMNS);
    chain.first_operands = slab.chunk(head, way.first, 0);
    chain.share_column = (int)threadIdx.x % PART_THREADS / 32 * 16,
    chain.share_channel = part<KP>() * CHANNELS<KP>;
    return way.begin < way.end;
}

/* The chain number `number` of those that may have segments in the slab. */
template <int KP>
__device__ bool find_chain_in_slab(const kda_backward &b, const Slab &slab, int64_t number, Way &way) {
    const kda_tokens &x = b.forward.base;
    SlabSegment s;
    s.n = kda_sequence_of_segment(&x, slab.segment, slab.begin) + number / x.value_heads;
    if (s.n >= x.sequences)
        return false;
    s.sequence = kda_tokens_of(&x, s.n);
    return find_way<KP>(b, slab, s, number % x.value_heads, way);
}

/* ---- Memory -------------------------------------------------------------------------------------- */

/* A state's place in memory that has so many tiles of 64 columns, KP times as many elements each. */
template <int KP, class T> __device__ T *state_at(T *states, const Slab &slab, int64_t number, int tile) {
    return states + (number * slab.tiles + tile) * STATE_ELEMENTS<KP>;
}

/* Where the lane's pieces of a state that is kept begin (backward.cuh). */
template <int KP> __device__ int kept_piece(int c) {
    int lane = threadIdx.x % 32, row = (int)threadIdx.x % PART_THREADS / 32 * 16 + lane / 4;
    return part<KP>() * CHANNELS<KP> * COLUMNS + swizzled<COLUMNS, CHANNELS<KP>>(row, c * 8 + lane % 4 * 8);
}

template <int KP> __device__ void keep_state(__nv_bfloat16 *to, const State<KP> &S) {
#pragma unroll
    for (int c = 0; c < CHANNELS<KP> / 8; c += 4)
#pragma unroll
        for (int n = 0; n < 4; n += 2) /* the row, that 8 below */
            *reinterpret_cast<uint4 *>(&to[kept_piece<KP>(c) + n / 2 * 8 * PANEL]) =
                make_uint4(pack_bf16(S[c][n], S[c][n + 1]), pack_bf16(S[c + 1][n], S[c + 1][n + 1]),
                           pack_bf16(S[c + 2][n], S[c + 2][n + 1]), pack_bf16(S[c + 3][n], S[c + 3][n + 1]));
}

template <int KP> __device__ void load_kept_state(const __nv_bfloat16 *from, State<KP> &S) {
#pragma unroll
    for (int c = 0; c < CHANNELS<KP> / 8; c += 4)
#pragma unroll
        for (int n = 0; n < 4; n += 2) {
            uint4 piece = *reinterpret_cast<const uint4 *>(&from[kept_piece<KP>(c) + n / 2 * 8 * PANEL]);
            const uint32_t pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 pair = unpack_bf16(pairs[i]);
                S[c + i][n] = pair.x, S[c + i][n + 1] = pair.y;
            }
        }
}

/* Between slabs states stay as they are: a thread finds what it left. */
template <int KP> __device__ void leave_carried(float *to, const State<KP> &S) {
#pragma unroll
    for (int c = 0; c < CHANNELS<KP> / 8; c++)
        reinterpret_cast<float4 *>(to)[c * THREADS<KP> + threadIdx.x] =
            make_float4(S[c][0], S[c][1], S[c][2], S[c][3]);
}

template <int KP> __device__ void take_carried(const float *from, State<KP> &S) {
#pragma unroll
    for (int c = 0; c < CHANNELS<KP> / 8; c++) {
        float4 x = reinterpret_cast<const float4 *>(from)[c * THREADS<KP> + threadIdx.x];
        S[c][0] = x.x, S[c][1] = x.y, S[c][2] = x.z, S[c][3] = x.w;
    }
}

template <int KP>
__device__ float *carried_at(const kda_backward &b, const Slab &slab, float *carried, int turn,
                             const Way &way) {
    return state_at<KP>(carried, slab, turn * b.forward.value_heads + way.chain.head, way.tile);
}

/* Rows of e or Z, from e^T or Z^T, as one swizzled tile. Each part stores its share. */
template <int KP> __device__ void keep_rows(__nv_bfloat16 *to, const float (&x)[CHUNK / 8][4]) {
    int lane = threadIdx.x % 32, column = (int)threadIdx.x % PART_THREADS / 32 * 16 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++) {
        if (i % PARTS<KP> != part<KP>())
            continue;
#pragma unroll
        for (int half = 0; half < 2; half++)
            *reinterpret_cast<uint32_t *>(&to[swizzled<CHUNK, COLUMNS>(i * 8 + lane / 4, column + half * 8)]) =
                transpose(pack_bf16(x[i][half * 2], x[i][half * 2 + 1]));
    }
}

/* The state that prefill kept after `position` tokens, if it kept one, in place of S. */
template <int KP>
__device__ void take_kept(const kda_backward &b, const Chain &chain, int64_t position, State<KP> &S) {
    if (!b.forward.checkpoints.data)
        return;
    struct kda_state state = kda_kept_state(&b, chain.n, position, chain.head);
    if (state.data)
        load_state<CHANNELS<KP>>(b.forward, chain, state, S);
}

/* ---- Operands ------------------------------------------------------------------------------------- */

/* Starts to copy bytes begin .. end of a chunk's operands, and its rows of v or dO. */
template <int KP>
__device__ void fetch(const BackwardOperands<KP> *all, const kda_tensor &values, const Chain &chain,
                      int64_t chunk, int begin, int end, Stage<KP> &stage) {
    struct kda_span span = kda_span_of_chunk(chain.sequence.length, chunk);
    const char *from = reinterpret_cast<const char *>(&all[chain.first_operands + chunk]);
    char *to = reinterpret_cast<char *>(&stage.operands);
    for (int i = begin + threadIdx.x * 16; i < end; i += THREADS<KP> * 16)
        copy_async(to + i, from + i);
    if (values.data)
        fetch_values<THREADS<KP>, COLUMNS>(values, chain, span, stage.values);
}

/* Stages of shared memory, in turns. walk runs f(chunk, its stage) for count chunks from `chunk` on, `step` (1 or -1)
 * from one to the next. */
template <int KP> struct Stages {
    char *memory;
    int bytes;
    __device__ Stage<KP> &operator[](int i) const {
        return *reinterpret_cast<Stage<KP> *>(memory + i % STAGES<KP> * bytes);
    }
};

template <int KP, int begin, int end, class F>
__device__ void walk(const BackwardOperands<KP> *operands, const kda_tensor &values, const Chain &chain,
                     int64_t chunk, int64_t step, int count, F f) {
    extern __shared__ __align__(16) char memory[];
    constexpr int AHEAD = STAGES<KP> - 1;
    Stages<KP> stages = {memory + SUMS_BYTES<KP>, stage_bytes<KP>(values.data ? size_of(values.dtype) : 2)};
    if (AHEAD && count > 0)
        fetch<KP>(operands, values, chain, chunk, begin, end, stages[0]);
    copy_async_commit();
    for (int i = 0; i < count; i++) {
        if (AHEAD)
            copy_async_wait<0>();
        __syncthreads(); /* what was ahead has arrived for all; the stage of the last chunk is free */
        if (i + AHEAD < count)
            fetch<KP>(operands, values, chain, chunk + (i + AHEAD) * step, begin, end, stages[i + AHEAD]);
        copy_async_commit();
        if (!AHEAD) {
            copy_async_wait<0>();
            __syncthreads();
        }
        f(chunk + i * step, stages[i]);
    }
}

/* ---- Products ------------------------------------------------------------------------------------- */

/* S^T <- S^T diag(1 + carry) */
template <int KP> __device__ void decay(State<KP> &S, const BackwardOperands<KP> &operands) {
    const float *carries = &operands.carry[part<KP>() * CHANNELS<KP> + threadIdx.x % 4 * 2];
#pragma unroll
    for (int c = 0; c < CHANNELS<KP> / 8; c++) {
        float2 carry = *reinterpret_cast<const float2 *>(&carries[c * 8]);
        S[c][0] = fmaf(S[c][0], carry.x, S[c][0]), S[c][1] = fmaf(S[c][1], carry.y, S[c][1]);
        S[c][2] = fmaf(S[c][2], carry.x, S[c][2]), S[c][3] = fmaf(S[c][3], carry.y, S[c][3]);
    }
}

/* x^T <- x^T diag(factor steps) */
template <int KP>
__device__ void times_steps(float (&x)[CHUNK / 8][4], float factor, const BackwardOperands<KP> &operands) {
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++) {
        float2 step = *reinterpret_cast<const float2 *>(&operands.steps[i * 8 + threadIdx.x % 4 * 2]);
        step.x *= factor, step.y *= factor;
        x[i][0] *= step.x, x[i][1] *= step.y, x[i][2] *= step.x, x[i][3] *= step.y;
    }
}

/* The part's channels of a tile [CHUNK][KP]: a tile of its own. */
template <int KP> __device__ const __nv_bfloat16 *share_of(const __nv_bfloat16 *tile) {
    return tile + part<KP>() * CHUNK * CHANNELS<KP>;
}

/* Adds the parts' sums: each part gets the same. */
template <int KP> __device__ void add_parts(float (&x)[CHUNK / 8][4]) {
    if (PARTS<KP> == 1)
        return;
    extern __shared__ __align__(16) char memory[];
    float4 *sums = reinterpret_cast<float4 *>(memory);
    int thread = (int)threadIdx.x % PART_THREADS;
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
        sums[(part<KP>() * (CHUNK / 8) + i) * PART_THREADS + thread] =
            make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++) {
        float4 y = sums[((1 - part<KP>()) * (CHUNK / 8) + i) * PART_THREADS + thread];
        x[i][0] += y.x, x[i][1] += y.y, x[i][2] += y.z, x[i][3] += y.w;
    }
}

/* x^T [16][CHUNK] += S^T rows^T over the part's channels; S in one term, or in two. */
template <int KP, bool exact>
__device__ void multiply_state(float (&x)[CHUNK / 8][4], const State<KP> &S, const __nv_bfloat16 *rows) {
    MatrixRow<CHUNK, CHANNELS<KP>> tile(share_of<KP>(rows), false);
#pragma unroll
    for (int c = 0; c < CHANNELS<KP> / 16; c++) {
        Split a;
        uint32_t k[4];
        if (exact)
            split_operand(S[2 * c], S[2 * c + 1], a);
        else
            pack_operand(S[2 * c], S[2 * c + 1], a.rounded);
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++) {
            ldmatrix(k, tile.at(i * 16, c * 16));
            mma(x[2 * i], a.rounded, k[0], k[1]);
            mma(x[2 * i + 1], a.rounded, k[2], k[3]);
            if (exact) {
                mma(x[2 * i], a.rest, k[0], k[1]);
                mma(x[2 * i + 1], a.rest, k[2], k[3]);
            }
        }
    }
}

/* S^T += a times the tile's 16 rows from t on. */
template <int KP>
__device__ void add_rows(State<KP> &S, const uint32_t (&a)[4], const MatrixRow<CHUNK, CHANNELS<KP>> &tile,
                         int t) {
#pragma unroll
    for (int c = 0; c < CHANNELS<KP> / 16; c++) {
        uint32_t k[4];
        ldmatrix_transposed(k, tile.at(t, c * 16));
        mma(S[2 * c], a, k[0], k[1]);
        mma(S[2 * c + 1], a, k[2], k[3]);
    }
}

/* S^T += x^T rows, x in two terms. */
template <int KP>
__device__ void add_product(State<KP> &S, const float (&x)[CHUNK / 8][4], const __nv_bfloat16 *rows) {
    MatrixRow<CHUNK, CHANNELS<KP>> tile(share_of<KP>(rows), true);
#pragma unroll
    for (int i = 0; i < CHUNK / 16; i++) {
        Split a;
        split_operand(x[2 * i], x[2 * i + 1], a);
#pragma unroll
        for (int c = 0; c < CHANNELS<KP> / 16; c++) {
            uint32_t k[4];
            ldmatrix_transposed(k, tile.at(i * 16, c * 16));
            mma(S[2 * c], a.rounded, k[0], k[1]);
            mma(S[2 * c + 1], a.rounded, k[2], k[3]);
            mma(S[2 * c], a.rest, k[0], k[1]);
            mma(S[2 * c + 1], a.rest, k[2], k[3]);
        }
    }
}

/* ---- There --------------------------------------------------------------------------------------- */

/* S^T becomes that after the chunk; e^T is the chunk's. */
template <int KP>
__device__ void advance(const kda_tensor &v, const Chain &chain, const Stage<KP> &stage, State<KP> &S,
                        float (&e)[CHUNK / 8][4]) {
    const BackwardOperands<KP> &operands = stage.operands;
    float x[CHUNK / 8][4] = {};
    multiply_state<KP, false>(x, S, operands.keys);
    add_parts<KP>(x);
#pragma unroll
    for (int i = 0; i < CHUNK / 16; i++) {
        float values[2][4];
        load_values<COLUMNS>(v.dtype, stage.values, chain.share_column, i * 16, values);
#pragma unroll
        for (int n = 0; n < 4; n++)
            x[2 * i][n] = values[0][n] - x[2 * i][n], x[2 * i + 1][n] = values[1][n] - x[2 * i + 1][n];
    }
    multiply_inverse<false>(e, x, operands.inverse);
    float u[CHUNK / 8][4];
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
        u[i][0] = e[i][0], u[i][1] = e[i][1], u[i][2] = e[i][2], u[i][3] = e[i][3];
    times_steps(u, 1.f, operands);
    decay<KP>(S, operands);
    add_product<KP>(S, u, operands.keys_to_end);
}

/* Takes a chain's state through its chunks in the slab and keeps those before segments. */
template <int KP>
__global__ void __launch_bounds__(THREADS<KP>, CTAS<KP>)
    backward_states(const __grid_constant__ kda_backward b, const __grid_constant__ Slab slab,
                    const __grid_constant__ BackwardMemory<KP> memory) {
    wait_for_kernel_before();
    let_next_begin();
    Way way;
    if (!find_chain_in_slab<KP>(b, slab, blockIdx.x / (unsigned)slab.tiles, way))
        return;
    const Chain &chain = way.chain;
    int64_t end = min(way.end, way.segments - 1); /* nothing begins after the last segment */
    if (way.begin >= end || kda_work_on(&b.border, chain.n) != KDA_WORK_ALL)
        return;
    State<KP> S;
    if (way.begin > 0)
        take_carried<KP>(carried_at<KP>(b, slab, memory.carried_S, !slab.turn, way), S);
    else
        load_state<CHANNELS<KP>>(b.forward, chain,
                                 kda_state_at(&b.forward, &b.forward.initial_state, chain.n, chain.head), S);
    walk<KP, THERE_BEGIN<KP>, THERE_END<KP>>(
        memory.operands, b.forward.v, chain, way.begin * slab.chunks, 1, (int)(end - way.begin) * slab.chunks,
        [&](int64_t chunk, const Stage<KP> &stage) {
            float e[CHUNK / 8][4] = {};
            advance<KP>(b.forward.v, chain, stage, S, e);
            take_kept<KP>(b, chain, (chunk + 1) * CHUNK, S);
            if ((chunk + 1) % slab.chunks == 0)
                keep_state<KP>(state_at<KP>(memory.kept, slab,
                                            chain.head * slab.segments + way.first + (chunk + 1) / slab.chunks,
                                            way.tile),
                               S);
        });
    if (way.end < way.segments - 1)
        leave_carried<KP>(carried_at<KP>(b, slab, memory.carried_S, slab.turn, way), S);
}

/* Takes the state before a segment through it; keeps it before every chunk, and e. */
template <int KP>
__device__ void run_segment(const kda_backward &b, const Slab &slab, const BackwardMemory<KP> &memory,
                            int64_t number) {
    Way way;
    int64_t head = number % b.forward.value_heads, segment = slab.begin + number / b.forward.value_heads;
    SlabSegment s = find_segment(b, slab, segment);
    if (!find_way<KP>(b, slab, s, head, way) || s.within < 0 || s.within >= way.segments ||
        kda_work_on(&b.border, s.n) != KDA_WORK_ALL)
        return;
    const Chain &chain = way.chain;
    State<KP> S;
    if (s.within == 0)
        load_state<CHANNELS<KP>>(b.forward, chain,
                                 kda_state_at(&b.forward, &b.forward.initial_state, chain.n, head), S);
    else if (slab.finds_states)
        load_kept_state<KP>(state_at<KP>(memory.kept, slab, head * slab.segments + segment, way.tile), S);
    else
        load_state<CHANNELS<KP>>(b.forward, chain, kda_kept_state(&b, chain.n, s.within * slab.segment, head),
                                 S);
    int64_t first = s.within * slab.chunks;
    int count = (int)(min(first + slab.chunks, kda_chunks_of(chain.sequence.length)) - first);
    walk<KP, THERE_BEGIN<KP>, THERE_END<KP>>(
        memory.operands, b.forward.v, chain, first, 1, count, [&](int64_t chunk, const Stage<KP> &stage) {
            int64_t at = chain.first_operands + chunk;
            float e[CHUNK / 8][4] = {};
            keep_state<KP>(state_at<KP>(memory.S, slab, at, way.tile), S);
            advance<KP>(b.forward.v, chain, stage, S, e);
            keep_rows<KP>(memory.e + (at * slab.tiles + way.tile) * ROWS_ELEMENTS, e);
            if (chunk + 1 < first + count)
                take_kept<KP>(b, chain, (chunk + 1) * CHUNK, S);
        });
}

/* ---- Back ---------------------------------------------------------------------------------------- */

/* sum^T [16][CHUNK] += a times the 16 rows of M from token i on; M is lower triangular. */
__device__ void multiply_M(float (&sum)[CHUNK / 8][4], const uint32_t (&a)[4], const __nv_bfloat16 *M, int i) {
    MatrixRow<CHUNK, CHUNK> rows(M, true);
#pragma unroll
    for (int j = 0; j < CHUNK / 16; j++) {
        if (j * 16 > i)
            continue;
        uint32_t m[4];
        ldmatrix_transposed(m, rows.at(i, j * 16));
        mma(sum[2 * j], a, m[0], m[1]);
        mma(sum[2 * j + 1], a, m[2], m[3]);
    }
}

/* R^T becomes that before the chunk; Z^T is the chunk's. */
template <int KP>
__device__ void go_back(const kda_tensor &d_out, const Chain &chain, const Stage<KP> &stage, State<KP> &R,
                        float (&Z)[CHUNK / 8][4]) {
    const BackwardOperands<KP> &operands = stage.operands;
    uint32_t given[CHUNK / 16][4] = {}; /* dO^T */
    float dU[CHUNK / 8][4] = {};
    multiply_state<KP, true>(dU, R, operands.keys_to_end);
    if (d_out.data)
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++) {
            float values[2][4];
            load_values<COLUMNS>(d_out.dtype, stage.values, chain.share_column, i * 16, values);
            pack_operand(values[0], values[1], given[i]);
            if (part<KP>() == 0)
                multiply_M(dU, given[i], operands.M, i * 16);
        }
    add_parts<KP>(dU);
    multiply_inverse<true>(Z, dU, operands.adjoint_inverse);
    decay<KP>(R, operands);
    if (d_out.data) {
        MatrixRow<CHUNK, CHANNELS<KP>> queries(share_of<KP>(operands.queries), true);
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++)
            add_rows<KP>(R, given[i], queries, i * 16);
    }
    float u[CHUNK / 8][4]; /* -dV^T */
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
        u[i][0] = Z[i][0], u[i][1] = Z[i][1], u[i][2] = Z[i][2], u[i][3] = Z[i][3];
    times_steps(u, -1.f, operands);
    add_product<KP>(R, u, operands.keys);
}

/* The gradient of the state after a chain's last token. */
inline __device__ struct kda_state last_R(const kda_backward &b, const Chain &chain, bool whole) {
    int64_t awaited = kda_awaited_by(&b.border, chain.n);
    struct kda_state none = {nullptr, KDA_F32, 0, false};
    return !whole         ? none
           : awaited >= 0 ? kda_state_in(&b.forward.base, &b.border.states, awaited, chain.head)
                          : kda_state_at(&b.forward, &b.d_final_state, chain.n, chain.head);
}

/* Takes the gradient of a chain's state back through its chunks in the slab; writes dV and keeps it after every chunk,
 * and Z. */
template <int KP>
__device__ void run_back(const kda_backward &b, const Slab &slab, const BackwardMemory<KP> &memory,
                         int64_t number) {
    Way way;
    if (!find_chain_in_slab<KP>(b, slab, number, way))
        return;
    const Chain &chain = way.chain;
    kda_work work = kda_work_on(&b.border, chain.n);
    bool whole = work == KDA_WORK_ALL; /* or only the summary: from 0 on, nothing else is written */
    if (work == KDA_WORK_NONE)
        return;
    State<KP> R;
    if (way.end < way.segments)
        take_carried<KP>(carried_at<KP>(b, slab, memory.carried_R, !slab.turn, way), R);
    else
        load_state<CHANNELS<KP>>(b.forward, chain, last_R(b, chain, whole), R);
    int64_t first = way.begin * slab.chunks;
    int count = (int)(min(way.end * slab.chunks, kda_chunks_of(chain.sequence.length)) - first);
    walk<KP, BACK_BEGIN<KP>, BACK_END<KP>>(
        memory.operands, b.d_out, chain, first + count - 1, -1, count,
        [&](int64_t chunk, const Stage<KP> &stage) {
            int64_t at = chain.first_operands + chunk;
            float Z[CHUNK / 8][4] = {};
            if (memory.R && whole)
                keep_state<KP>(state_at<KP>(memory.R, slab, at, way.tile), R);
            go_back<KP>(b.d_out, chain, stage, R, Z);
            if (memory.R && whole)
                keep_rows<KP>(memory.Z + (at * slab.tiles + way.tile) * ROWS_ELEMENTS, Z);
            if (b.dv.data && whole && part<KP>() == 0) {
                times_steps(Z, 1.f, stage.operands);
                store_outputs<COLUMNS>(b.dv, chain, kda_span_of_chunk(chain.sequence.length, chunk), Z);
            }
        });
    struct kda_state initial = kda_state_at(&b.forward, &b.d_initial_state, chain.n, chain.head);
    if (way.begin > 0)
        leave_carried<KP>(carried_at<KP>(b, slab, memory.carried_R, slab.turn, way), R);
    else {
        int64_t place = kda_summary_of(&b.border, chain.n);
        if (initial.data && whole)
            store_state<CHANNELS<KP>>(b.forward, chain, initial, R);
        if (place >= 0)
            store_state<CHANNELS<KP>>(b.forward, chain,
                                      kda_state_in(&b.forward.base, &b.border.summaries, place, chain.head), R);
    }
}

template <int KP>
__global__ void __launch_bounds__(THREADS<KP>, CTAS<KP>)
    backward_chains(const __grid_constant__ kda_backward b, const __grid_constant__ Slab slab,
                    const __grid_constant__ BackwardMemory<KP> memory, int chains) {
    wait_for_kernel_before();
    let_next_begin(); /* so late that what begins knows that all before this kernel has ended */
    int number = (int)(blockIdx.x / (unsigned)slab.tiles);
    if (number < chains)
        run_back<KP>(b, slab, memory, number);
    else
        run_segment<KP>(b, slab, memory, number - chains);
}

/* ---- Launches ------------------------------------------------------------------------------------ */

template <int KP>
cudaError_t launch_states(const kda_backward *b, const kda_backward_plan *plan,
                          const kda_backward_launch *launch, void *workspace) {
    return launch_kernel(backward_states<KP>, launch->grid, THREADS<KP>,
                         SUMS_BYTES<KP> + STAGES<KP> * stage_bytes<KP>(size_of(b->forward.v.dtype)),
                         b->forward.stream, launch->overlaps, *b, make_slab(b, plan, launch),
                         make_memory<KP>(b, plan, launch, workspace));
}

template <int KP>
cudaError_t launch_chains(const kda_backward *b, const kda_backward_plan *plan,
                          const kda_backward_launch *launch, void *workspace) {
    BackwardMemory<KP> memory = make_memory<KP>(b, plan, launch, workspace);
    bool wide = (plan->needs_gradients && b->forward.v.dtype == KDA_F32) ||
                (b->d_out.data && b->d_out.dtype == KDA_F32);
    if (!plan->needs_gradients)
        memory.R = nullptr;
    return launch_kernel(backward_chains<KP>, launch->grid, THREADS<KP>,
                         SUMS_BYTES<KP> + STAGES<KP> * stage_bytes<KP>(wide ? 4 : 2), b->forward.stream,
                         launch->overlaps, *b, make_slab(b, plan, launch), memory,
                         (int)kda_sm80_chains_in_slab(b, plan, launch->slab));
}

} // namespace
} // namespace kda

cudaError_t kda_sm80_backward_states(const kda_backward *b, const kda_backward_plan *plan,
                                     const kda_backward_launch *launch, void *workspace) {
    int KP = kda_sm80_padded_key_dim(b);
    return KP == 64    ? kda::launch_states<64>(b, plan, launch, workspace)
           : KP == 128 ? kda::launch_states<128>(b, plan, launch, workspace)
                       : kda::launch_states<256>(b, plan, launch, workspace);
}

cudaError_t kda_sm80_backward_chains(const kda_backward *b, const kda_backward_plan *plan,
                                     const kda_backward_launch *launch, void *workspace) {
    int KP = kda_sm80_padded_key_dim(b);
    return KP == 64    ? kda::launch_chains<64>(b, plan, launch, workspace)
           : KP == 128 ? kda::launch_chains<128>(b, plan, launch, workspace)
                       : kda::launch_chains<256>(b, plan, launch, workspace);
}
