/* SPDX-License-Identifier: MIT */
/*
 * Finishes the outputs of all but first segments: O_B, which the local pass left from a zero state, plus O_A
 * times the segment's true state.
 *
 * It is limited by memory. The state lies in shared memory, and each warp takes one strip of tokens after
 * another. Elements are rows and columns of a product in such an order that a lane's 16-byte pieces of O_A are
 * its first operands, and its sums are a 16-byte piece of the outputs. So everything goes from memory to
 * registers and back.
 */
#include "cuda/launch.cuh"
#include "cuda/ptx/stream.cuh"
#include "cuda/sm90/cluster/segments.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/mainloop/consume.cuh"
#include "cuda/sm90/stream_k/ranges.cuh"

namespace kda {
namespace {

constexpr int WARPS = KDA_SM90_HISTORY_WARPS, CTAS = KDA_SM90_HISTORY_CTAS; /* of a CTA; of a multiprocessor */
constexpr int SPAN = 32; /* channels or columns, of which four lanes have a piece each */
constexpr int SPANS = DIM / SPAN, TILES = SPAN / 8;
constexpr int STRIP = KDA_SM90_HISTORY_TOKENS; /* tokens */
constexpr int TOKENS = STRIP / 8;              /* of a lane: 8 m + lane / 4 */
constexpr int STRIPS = CHUNK / STRIP;
constexpr int PIECE = 16;                                      /* bytes */
constexpr int EXPONENTS = 2 * DIM / KDA_SM90_EXPONENT_COLUMNS; /* of a chunk: of O_A, then of O_B */

struct Shared {
    uint4 state[SPANS][TILES][SPANS][32]; /* second operands: columns, then channels */
    float factors[DIM];                   /* of a column */
};

/* What a CTA works on: some strips of a segment, and where its sequence begins. */
struct WorkTile {
    int64_t state;        /* chain * segments + segment */
    int64_t length;       /* of the sequence, in tokens */
    int begin, end, step; /* strips of the sequence: a warp works every step-th from begin to end */
    const char *of_A;     /* the lane's first piece */
    char *out;
    const int16_t *exponents;
};

__device__ int64_t row_of_A(const kda_prefill &p) { return p.value_heads * DIM * (int64_t)sizeof(uint16_t); }

__device__ WorkTile find_work(const kda_prefill &p, const kda_sm90_stream_k &stream_k, int64_t chunks,
                              const kda_sm90_cluster_memory &memory, int pieces) {
    WorkTile work;
    int others = memory.segments - 1, piece = blockIdx.x % pieces, rest = blockIdx.x / pieces;
    int segment = 1 + rest % others, chain = rest / others, lane = threadIdx.x % 32;
    int n = chain / (int)p.value_heads, head = chain % (int)p.value_heads;
    struct kda_sequence sequence = kda_sequence(&p, n);
    work.state = (int64_t)chain * memory.segments + segment;
    work.length = sequence.length;
    int all = (int)kda_chunks_of(sequence.length);
    bool incoming = comes_in(p, n);
    int end = min(begin_of_segment(incoming, all, memory.segments, segment + 1), all);
    work.begin = begin_of_segment(incoming, all, memory.segments, segment) * STRIPS + piece * WARPS;
    bool wanted = sequence.slot >= 0 && kda_work_on(&p.border, n) == KDA_WORK_ALL && is_pending(p, stream_k, n, head) && !grows(memory, chain);
    work.end = wanted ? end * STRIPS : 0;
    work.step = pieces * WARPS;
    int64_t token = sequence.first + lane / 4;
    work.of_A = reinterpret_cast<const char *>(memory.outputs) +
                (sequence.batch * (p.tokens - memory.skipped) + token - memory.skipped) * row_of_A(p) +
                head * DIM * (int)sizeof(uint16_t) + lane % 4 * PIECE;
    work.out = kda_row(&p.out, sequence.batch, sequence.first, head);
    work.exponents =
        memory.output_exponents + (head * chunks + kda_first_chunk(&p, sequence.first, n)) * EXPONENTS;
    return work;
}

/* Columns of a span are permuted: accumulators of tile t have column 8 i + 2 t + b in lane i of four, b = 0,
 * 1. */
__device__ void load_state(const kda_sm90_cluster_memory &memory, int64_t state, Shared &shared) {
    const uint4 *rows = reinterpret_cast<const uint4 *>(state_before(memory, state, 0));
    int lane = threadIdx.x % 32, row = lane / 4;
    for (int i = threadIdx.x / 32; i < SPANS * TILES * SPANS; i += WARPS) {
        int channels = i % SPANS, tile = i / SPANS % TILES, columns = i / SPANS / TILES;
        int column = columns * SPAN + row / 2 * 8 + tile * 2 + row % 2;
        copy_async(&shared.state[columns][tile][channels][lane],
                   &rows[column * (STATE_ROW / PIECE) + channels * (SPAN / 8) + lane % 4]);
    }
    copy_async_commit();
    for (int i = threadIdx.x; i < DIM; i += WARPS * 32)
        shared.factors[i] = power_of_two(memory.state_exponents[state * DIM + i]);
}

/* A lane's pieces of a strip of O_A, and their exponents. */
struct Strip {
    uint4 pieces[SPANS][TOKENS];
    uint4 exponents;
};

/* Does token t of a strip exist? */
__device__ bool has_token(const WorkTile &work, int number, int t) {
    return number * (int64_t)STRIP + t < work.length;
}

/* Prefetches a strip's outputs: a lane half a row. */
__device__ void prefetch_outputs(const kda_prefill &p, const WorkTile &work, int number) {
    int token = threadIdx.x % 32 / 2;
    if (has_token(work, number, token))
        prefetch_line(work.out + (number * (int64_t)STRIP + token) * p.out.stride[1] + threadIdx.x % 2 * DIM);
}

__device__ void load_strip(const kda_prefill &p, const WorkTile &work, int number, Strip &strip) {
    int lane = threadIdx.x % 32;
    prefetch_outputs(p, work, number);
    const char *rows = work.of_A + number * (STRIP * row_of_A(p));
    strip.exponents =
        __ldcg(reinterpret_cast<const uint4 *>(work.exponents + number / STRIPS * (int64_t)EXPONENTS));
#pragma unroll
    for (int m = 0; m < TOKENS; m++)
#pragma unroll
        for (int i = 0; i < SPANS; i++)
            strip.pieces[i][m] =
                has_token(work, number, lane / 4 + m * 8)
                    ? __ldcs(reinterpret_cast<const uint4 *>(rows + m * (8 * row_of_A(p)) + i * 4 * PIECE))
                    : make_uint4(0, 0, 0, 0);
}

__device__ int low(uint32_t x) { return (int16_t)x; }
__device__ int high(uint32_t x) { return (int)x >> 16; }

__device__ void scale_pairs(uint4 &piece, __half2 factor) {
    __half2 *pairs = reinterpret_cast<__half2 *>(&piece);
#pragma unroll
    for (int i = 0; i < 4; i++)
        pairs[i] = __hmul2(pairs[i], factor);
}

/* Scales all channels of a strip to the largest of their exponents, which it returns. */
__device__ int level(Strip &strip) {
    uint4 exponents = strip.exponents;
    uint32_t most = __vmaxs2(__vmaxs2(exponents.x, exponents.y), __vmaxs2(exponents.z, exponents.w));
    int largest = max(low(most), high(most));
    const uint32_t of_span[SPANS] = {exponents.x, exponents.y, exponents.z, exponents.w};
#pragma unroll
    for (int i = 0; i < SPANS; i++) {
        int exponent = threadIdx.x % 4 < 2 ? low(of_span[i]) : high(of_span[i]);
        __half2 factor = __float2half2_rn(power_of_two(exponent - largest));
#pragma unroll
        for (int m = 0; m < TOKENS; m++)
            scale_pairs(strip.pieces[i][m], factor);
    }
    return largest;
}

/* sums = O_A S of 32 columns. */
__device__ void multiply(const Strip &strip, const uint4 (&state)[TILES][SPANS][32], float (&sums)[TILES][4]) {
#pragma unroll
    for (int i = 0; i < SPANS; i++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint4 b = state[tile][i][threadIdx.x % 32];
            const uint4 &upper = strip.pieces[i][0], &lower = strip.pieces[i][1];
            const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
            const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
            if (i == 0)
                mma_half<false>(sums[tile], first, b.x, b.y);
            else
                mma_half<true>(sums[tile], first, b.x, b.y);
            mma_half<true>(sums[tile], second, b.z, b.w);
        }
}

/* The finished outputs of 8 columns of a token, from scaled O_B and scaled sums. */
__device__ uint4 finish(kda_dtype dtype, uint4 piece, float factor, const float (&sums)[TILES][4], int lower,
                        float factor_of_sums, const float2 (&of_columns)[TILES]) {
    const uint32_t pairs[TILES] = {piece.x, piece.y, piece.z, piece.w};
    uint32_t results[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float2 x = __half22float2(*reinterpret_cast<const __half2 *>(&pairs[tile]));
        float2 sum =
            make_float2(sums[tile][lower * 2] * factor_of_sums, sums[tile][lower * 2 + 1] * factor_of_sums);
        results[tile] = pack_output(dtype, fmaf(x.x, factor, sum.x * of_columns[tile].x),
                                    fmaf(x.y, factor, sum.y * of_columns[tile].y));
    }
    return make_uint4(results[0], results[1], results[2], results[3]);
}

__device__ void add_to_strip(const kda_prefill &p, const WorkTile &work, int number, Strip &strip,
                             const Shared &shared) {
    int lane = threadIdx.x % 32;
    float factor_of_sums = power_of_two(max(level(strip), -126));
    char *rows = work.out + (number * (int64_t)STRIP + lane / 4) * p.out.stride[1] + lane % 4 * PIECE;
    const int16_t *exponents =
        work.exponents + number / STRIPS * (int64_t)EXPONENTS + EXPONENTS / 2 + lane % 4 / 2;
#pragma unroll 1
    for (int columns = 0; columns < SPANS;
         columns++, rows += 4 * PIECE, exponents += SPAN / KDA_SM90_EXPONENT_COLUMNS) {
        uint4 pieces[TOKENS];
#pragma unroll
        for (int m = 0; m < TOKENS; m++)
            if (has_token(work, number, lane / 4 + m * 8))
                pieces[m] = __ldcs(reinterpret_cast<const uint4 *>(rows + m * 8 * p.out.stride[1]));
        float factor = power_of_two(*exponents);
        float sums[TILES][4];
        multiply(strip, shared.state[columns], sums);
        float2 of_columns[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            of_columns[tile] =
                *reinterpret_cast<const float2 *>(&shared.factors[columns * SPAN + lane % 4 * 8 + tile * 2]);
#pragma unroll
        for (int m = 0; m < TOKENS; m++)
            if (has_token(work, number, lane / 4 + m * 8))
                __stcs(reinterpret_cast<uint4 *>(rows + m * 8 * p.out.stride[1]),
                       finish(p.out.dtype, pieces[m], factor, sums, m, factor_of_sums, of_columns));
    }
}

__global__ void __launch_bounds__(WARPS * 32, CTAS)
    add_history(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_stream_k stream_k,
                int64_t chunks, const __grid_constant__ kda_sm90_cluster_memory memory, int pieces) {
    let_next_begin();
    __shared__ Shared shared;
    wait_for_kernel_before();
    if (nothing_pending(stream_k))
        return;
    WorkTile work = find_work(p, stream_k, chunks, memory, pieces);
    if (work.begin >= work.end)
        return;
    load_state(memory, work.state, shared);
    int number = work.begin + threadIdx.x / 32;
    Strip strip;
    if (number < work.end)
        load_strip(p, work, number, strip);
    copy_async_wait<0>();
    __syncthreads();
    while (number < work.end) {
        add_to_strip(p, work, number, strip, shared);
        number += work.step;
        if (number < work.end)
            load_strip(p, work, number, strip);
    }
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_add_history(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                                 const kda_sm90_memory *memory) {
    using namespace kda;
    return launch_kernel(add_history, *launch, WARPS * 32, 0, p->stream, *p, memory->stream_k, plan->chunks,
                         memory->cluster, launch->config);
}
