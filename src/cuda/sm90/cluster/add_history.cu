/* SPDX-License-Identifier: MIT */
/*
 * Finishes the outputs of all but first segments: O_B, which the local pass left from a zero state, plus O_A
 * times the segment's true state. Where checkpoints are asked for, other CTAs finish those: B plus A times that
 * state (kept.cuh).
 *
 * It is limited by memory. The state lies in shared memory, and each warp takes one strip of tokens after
 * another. Elements are rows and columns of a product in such an order that a lane's 16-byte pieces of O_A are
 * its first operands, and its sums are a 16-byte piece of the outputs. So everything goes from memory to
 * registers and back.
 */
#include "cuda/launch.cuh"
#include "cuda/ptx/stream.cuh"
#include "cuda/sm90/cluster/kept.cuh"
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

/* What a CTA works on, together with others: a segment, in chunks. */
struct Segment {
    int n, head, begin, end; /* end: 0 where there is nothing to do */
    int piece, pieces;       /* which of how many CTAs this one is */
    int64_t state;           /* chain * segments + segment */
    struct kda_sequence sequence;
};

__device__ Segment find_segment(const kda_prefill &p, const kda_sm90_stream_k &stream_k,
                                const kda_sm90_cluster_memory &memory, int pieces) {
    Segment s;
    int others = memory.segments - 1, rest = blockIdx.x / pieces;
    int segment = 1 + rest % others, chain = rest / others;
    s.piece = blockIdx.x % pieces, s.pieces = pieces;
    s.n = chain / (int)p.value_heads, s.head = chain % (int)p.value_heads;
    s.sequence = kda_sequence(&p, s.n);
    s.state = (int64_t)chain * memory.segments + segment;
    int all = (int)kda_chunks_of(s.sequence.length);
    bool incoming = comes_in(p, s.n), mine = kda_work_on(&p.border, s.n) == KDA_WORK_ALL;
    s.begin = begin_of_segment(incoming, all, memory.segments, segment);
    bool wanted = s.sequence.slot >= 0 && mine && is_pending(p, stream_k, s.n, s.head) && !grows(memory, chain);
    s.end = wanted ? min(begin_of_segment(incoming, all, memory.segments, segment + 1), all) : 0;
    return s;
}

/* ---- Outputs ------------------------------------------------------------------------------------------- */

struct Shared {
    uint4 state[SPANS][TILES][SPANS][32]; /* second operands: columns, then channels */
    float factors[DIM];                   /* of a column */
};

/* Some strips of a segment, and where its sequence begins. */
struct WorkTile {
    int64_t length;       /* of the sequence, in tokens */
    int begin, end, step; /* strips of the sequence: a warp works every step-th from begin to end */
    const char *of_A;     /* the lane's first piece */
    char *out;
    const int16_t *exponents;
};

__device__ int64_t row_of_A(const kda_prefill &p) { return p.value_heads * DIM * (int64_t)sizeof(uint16_t); }

__device__ WorkTile find_strips(const kda_prefill &p, int64_t chunks, const kda_sm90_cluster_memory &memory,
                                const Segment &s) {
    WorkTile work;
    int lane = threadIdx.x % 32;
    work.length = s.sequence.length;
    work.begin = s.begin * STRIPS + s.piece * WARPS;
    work.end = s.end * STRIPS;
    work.step = s.pieces * WARPS;
    int64_t token = s.sequence.first + lane / 4;
    work.of_A = reinterpret_cast<const char *>(memory.outputs) +
                (s.sequence.batch * (p.tokens - memory.skipped) + token - memory.skipped) * row_of_A(p) +
                s.head * DIM * (int)sizeof(uint16_t) + lane % 4 * PIECE;
    work.out = kda_row(&p.out, s.sequence.batch, s.sequence.first, s.head);
    work.exponents =
        memory.output_exponents + (s.head * chunks + kda_first_chunk(&p, s.sequence.first, s.n)) * EXPONENTS;
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

/* The largest of 8 exponents. */
__device__ int largest_exponent(const uint4 &exponents) {
    uint32_t most = __vmaxs2(__vmaxs2(exponents.x, exponents.y), __vmaxs2(exponents.z, exponents.w));
    return max(low(most), high(most));
}

__device__ void scale_pairs(uint4 &piece, __half2 factor) {
    __half2 *pairs = reinterpret_cast<__half2 *>(&piece);
#pragma unroll
    for (int i = 0; i < 4; i++)
        pairs[i] = __hmul2(pairs[i], factor);
}

/* Scales all channels of a strip to the largest of their exponents, which it returns. */
__device__ int level(Strip &strip) {
    uint4 exponents = strip.exponents;
    int largest = largest_exponent(exponents);
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

__device__ void finish_outputs(const kda_prefill &p, int64_t chunks, const kda_sm90_cluster_memory &memory,
                               const Segment &segment, Shared &shared) {
    WorkTile work = find_strips(p, chunks, memory, segment);
    if (work.begin >= work.end)
        return;
    load_state(memory, segment.state, shared);
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

/* ---- Checkpoints --------------------------------------------------------------------------------------- */

constexpr int BLOCKS =
    DIM / KDA_SM90_EXPONENT_COLUMNS; /* of columns or channels, each a warp's in the local pass */
static_assert(BLOCKS == WARPS && STATE_THREADS == WARPS * 32, "a warp finishes 16 channels of a checkpoint");

/* The true state before a segment. */
struct SharedState {
    __half rows[DIM][DIM + 8]; /* columns of V, whose pieces of 16 bytes meet in no bank */
    float factors[DIM];
};

__device__ void load_rows(const kda_sm90_cluster_memory &memory, int64_t state, SharedState &shared) {
    const uint4 *rows = reinterpret_cast<const uint4 *>(state_before(memory, state, 0));
    constexpr int PIECES = DIM * 2 / PIECE; /* of a row */
    for (int i = threadIdx.x; i < DIM * PIECES; i += WARPS * 32)
        copy_async(&shared.rows[i / PIECES][i % PIECES * 8],
                   &rows[i / PIECES * (STATE_ROW / PIECE) + i % PIECES]);
    copy_async_commit();
    for (int i = threadIdx.x; i < DIM; i += WARPS * 32)
        shared.factors[i] = power_of_two(memory.state_exponents[state * DIM + i]);
}

__device__ int exponent_at(const uint4 &exponents, int i) {
    uint32_t pair = i / 2 == 0   ? exponents.x
                    : i / 2 == 1 ? exponents.y
                    : i / 2 == 2 ? exponents.z
                                 : exponents.w;
    return i % 2 ? high(pair) : low(pair);
}

/* Second operands of the warp's channels: 16 columns of A each, times the power of two that makes `largest` the
 * exponent of all. */
__device__ void make_operands(const uint4 (&A)[BLOCKS], const uint4 &exponents, int largest,
                              uint32_t (&operands)[BLOCKS][4]) {
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
        __half2 factor = __float2half2_rn(power_of_two(exponent_at(exponents, j) - largest));
        const uint32_t pairs[4] = {A[j].x, A[j].y, A[j].z, A[j].w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t pair = transpose(pairs[i]);
            __half2 scaled = __hmul2(*reinterpret_cast<__half2 *>(&pair), factor);
            operands[j][i] = *reinterpret_cast<uint32_t *>(&scaled);
        }
    }
}

/* Stores 16 channels of a column of V, of which the lane has a pair of the lower 8 and one of the upper 8. */
__device__ void store_sixteen(const kda_state &to, int column, int channel, float2 lower, float2 upper) {
    int own = channel + threadIdx.x % 4 * 2;
    bool aligned = (reinterpret_cast<uintptr_t>(to.data) | to.stride) % sizeof(uint2) == 0;
    if (to.dtype == KDA_BF16 && to.v_first && aligned) {
        store_channels(element(to, column, channel), pack_bf16(lower.x, lower.y), pack_bf16(upper.x, upper.y));
    } else if (to.dtype == KDA_F32 && as_pairs(to)) {
        __stcs(reinterpret_cast<float2 *>(element(to, column, own)), lower);
        __stcs(reinterpret_cast<float2 *>(element(to, column, own + 8)), upper);
    } else {
        store_float(element(to, column, own), to.dtype, 0, lower.x);
        store_float(element(to, column, own + 1), to.dtype, 0, lower.y);
        store_float(element(to, column, own + 8), to.dtype, 0, upper.x);
        store_float(element(to, column, own + 9), to.dtype, 0, upper.y);
    }
}

/* The warp's channels of A and B up to a checkpoint, and exponents of all. */
struct Kept {
    uint4 A[BLOCKS], B[BLOCKS], of_A, of_B;
};

__device__ void load_kept(const kda_sm90_cluster_memory &memory, int64_t number, Kept &kept) {
    uint32_t A = place_of_kept(number, true), B = place_of_kept(number, false);
    int thread = threadIdx.x / 32 * STATE_THREADS + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
        kept.A[i] = __ldcs(kept_pieces(memory, A, thread) + i * 32);
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
        kept.B[i] = __ldcs(kept_pieces(memory, B, thread) + i * 32);
    kept.of_A = __ldcg(reinterpret_cast<const uint4 *>(kept_exponents(memory, A)));
    kept.of_B = __ldcg(reinterpret_cast<const uint4 *>(kept_exponents(memory, B)));
}

/* B + A S in the warp's channels. */
__device__ void finish_checkpoint(const Kept &kept, const kda_state &to, const SharedState &shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, largest = largest_exponent(kept.of_A);
    float factor_of_sums = power_of_two(largest);
    uint32_t operands[BLOCKS][4];
    make_operands(kept.A, kept.of_A, largest, operands);
    uint32_t row = shared_address(&shared.rows[lane % 16][lane / 16 * 8]);
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
        float sums[2][4] = {};
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            uint32_t S[4];
            ldmatrix(S, row + m * 16 * (uint32_t)sizeof *shared.rows + j * 32);
            mma_half<true>(sums[0], S, operands[j][0], operands[j][1]);
            mma_half<true>(sums[1], S, operands[j][2], operands[j][3]);
        }
        float factor_of_B = power_of_two(exponent_at(kept.of_B, m));
        const uint32_t pairs[2][2] = {{kept.B[m].x, kept.B[m].z}, {kept.B[m].y, kept.B[m].w}};
#pragma unroll
        for (int n = 0; n < 2; n++) {
            int column = m * 16 + n * 8 + lane / 4;
            float factor = shared.factors[column];
            float2 finished[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 own = __half22float2(*reinterpret_cast<const __half2 *>(&pairs[n][i]));
                finished[i].x = fmaf(own.x, factor_of_B, sums[i][2 * n] * factor_of_sums * factor);
                finished[i].y = fmaf(own.y, factor_of_B, sums[i][2 * n + 1] * factor_of_sums * factor);
            }
            store_sixteen(to, column, warp * 16, finished[0], finished[1]);
        }
    }
}

__device__ void finish_checkpoints(const kda_prefill &p, const kda_sm90_cluster_memory &memory,
                                   const Segment &s, SharedState &shared) {
    if (s.begin >= s.end)
        return;
    int64_t length = s.sequence.length, every = p.checkpoint_every, after = (int64_t)s.end * CHUNK;
    int first = (int)((int64_t)s.begin * CHUNK / every) + s.piece;
    int end = (int)kda_min64(after < length ? after / every : (length + every - 1) / every,
                             kda_checkpoint_count(&p, s.n));
    if (first >= end)
        return;
    load_rows(memory, s.state, shared);
    int64_t number = first_kept(p, memory, s.sequence.first, s.n, s.head);
    Kept kept;
    load_kept(memory, number + first, kept);
    copy_async_wait<0>();
    __syncthreads();
    for (int row = first; row < end;) {
        struct kda_state to = kda_checkpoint_row(&p, s.n, row, s.head);
        if (to.data)
            finish_checkpoint(kept, to, shared);
        row += s.pieces;
        if (row < end)
            load_kept(memory, number + row, kept);
    }
}

/* keeps: checkpoints are asked for; CTAs of the grid's second row finish them. */
template <bool keeps>
__global__ void __launch_bounds__(WARPS * 32, CTAS)
    add_history(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_stream_k stream_k,
                int64_t chunks, const __grid_constant__ kda_sm90_cluster_memory memory, int pieces) {
    let_next_begin();
    constexpr size_t BYTES =
        keeps && sizeof(SharedState) > sizeof(Shared) ? sizeof(SharedState) : sizeof(Shared);
    __shared__ alignas(16) char shared[BYTES];
    wait_for_kernel_before();
    if (nothing_pending(stream_k))
        return;
    Segment segment = find_segment(p, stream_k, memory, pieces);
    if (keeps && blockIdx.y == 1)
        finish_checkpoints(p, memory, segment, *reinterpret_cast<SharedState *>(shared));
    else
        finish_outputs(p, chunks, memory, segment, *reinterpret_cast<Shared *>(shared));
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_add_history(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                                 const kda_sm90_memory *memory) {
    using namespace kda;
    return launch_kernel(p->checkpoints.data ? add_history<true> : add_history<false>, *launch, WARPS * 32, 0,
                         p->stream, *p, memory->stream_k, plan->chunks, memory->cluster, launch->config);
}
