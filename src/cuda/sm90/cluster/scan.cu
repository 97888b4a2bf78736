/* SPDX-License-Identifier: MIT */
/*
 * Gives every segment of a chain its true state: the state after segment s is A_s S + B_s, with S the state
 * before it.
 *
 * A CTA takes some columns of V through all segments and needs no others. The length of a step is what counts,
 * so eight warps, the makers, do nothing but multiply: each makes 16 channels of the state, by which all
 * multiply in the next step. S is split into two terms of fp16, together as good as fp32, that lie as rows of
 * one first operand. Every 16 channels of a column have an exponent of their own, so that no warp waits for the
 * others' sizes; products are scaled as they are summed. Four other warps write the first terms as the states,
 * and one warp fetches A and B some segments ahead.
 */
#include "cuda/launch.cuh"
#include "cuda/sm90/cluster/segments.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/mainloop/consume.cuh"
#include "cuda/sm90/mainloop/warpgroup.cuh"
#include "cuda/sm90/stream_k/ranges.cuh"

namespace kda {
namespace {

constexpr int BLOCKS = DIM / KDA_SM90_EXPONENT_COLUMNS; /* of channels, each made by a warp */
constexpr int MAKERS = BLOCKS * 32, WRITERS = 4 * 32, THREADS = MAKERS + WRITERS + 32;
constexpr int ROWS = KDA_SM90_CLUSTER_SCAN_COLUMNS; /* columns of V in a first operand, each in two terms */
constexpr int TOP = 14;                             /* log2: scaled elements are below 2^(TOP + 1) */
/* Segments whose A and B are on their way or in use: as many as there is room for. */
template <int TILES> constexpr int STAGES = TILES < 4 ? 4 : 3;

/* A number for each block of each column of a tile. */
using Rows = float4[BLOCKS / 4][ROWS];

template <int TILES> struct Stage {
    alignas(1024) uint16_t A[DIM * DIM];
    float B[TILES * ROWS][DIM];
};

template <int TILES> struct Shared {
    Stage<TILES> stages[STAGES<TILES>];
    /* The state, in two buffers: before the next barrier the next step writes to the other one. */
    uint4 state[2][TILES][BLOCKS][32]; /* as first operands */
    Rows exponents[2][TILES];          /* their exponents, as powers of two */
    Rows factors[2][TILES];            /* of their products with A */
    int16_t transition_exponents[KDA_MAX_SEGMENTS][BLOCKS];
    uint64_t arrived[STAGES<TILES>];
};

/* A CTA's columns, and where a maker's elements are: in tile i the column i * ROWS further, and in it two
 * channels and the two that are 8 further. */
struct Position {
    int64_t first, matrices; /* the chain's first segment; its first transition, less one */
    int first_column, column, channel;
};

template <int TILES> using Elements = float2[TILES][2];

/* Where a segment's A and B lie, and the parity of their barrier's phase. Segment 0 has no A. */
template <int TILES> __device__ int stage_of(int segment) { return (segment - 1) % STAGES<TILES>; }
template <int TILES> __device__ uint32_t parity_of(int segment) { return (segment - 1) / STAGES<TILES> % 2; }

/* ---- Makers ------------------------------------------------------------------------------------------- */

/* Runs f(two neighbours, column, channel) over the thread's elements. */
template <int TILES, class F> __device__ void each_pair(float2 (&S)[TILES][2], const Position &position, F f) {
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            f(S[i][n], position.column + i * ROWS, position.channel + n * 8);
}

/* Second operands: the warp's channels by 16 columns of A each. */
using TransitionOperands = uint32_t[BLOCKS][4];

/* The lane's row of the first of them. */
template <int TILES> __device__ uint32_t row_of_A(const Shared<TILES> &shared, int segment) {
    return MatrixRow<DIM, DIM>(shared.stages[stage_of<TILES>(segment)].A, true).at(0, threadIdx.x / 32 * 16);
}

__device__ void load_A(uint32_t row, int j, TransitionOperands &A) {
    ldmatrix_transposed(A[j], row + j * 16 * PANEL * sizeof(__half));
}

/* The exponent that scales elements to below 2^(TOP + 1); its powers stay within fp32. */
__device__ int exponent_below(float largest) {
    return max((int)(__float_as_uint(largest) >> 23) - 127 - TOP, -126);
}

__device__ float largest_of_block(const float2 (&S)[2]) {
    float largest = fmaxf(fmaxf(fabsf(S[0].x), fabsf(S[0].y)), fmaxf(fabsf(S[1].x), fabsf(S[1].y)));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    return fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
}

/* Splits each of two elements into two terms. */
__device__ void split(float2 x, float factor, uint32_t &high, uint32_t &low) {
    x.x *= factor, x.y *= factor;
    high = pack_half(x.x, x.y);
    float2 rounded = __half22float2(*reinterpret_cast<__half2 *>(&high));
    low = pack_half(x.x - rounded.x, x.y - rounded.y);
}

__device__ float &of_block(Rows &rows, int row, int block) {
    return reinterpret_cast<float *>(&rows[block / 4][row])[block % 4];
}

/* Makes the warp's channels of S operands of all warps. */
template <int TILES> __device__ void share_state(const Elements<TILES> &S, int segment, Shared<TILES> &shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, buffer = segment % 2;
    float scale_of_A = power_of_two(shared.transition_exponents[segment][warp]);
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        int exponent = exponent_below(largest_of_block(S[i]));
        uint4 operand;
        split(S[i][0], power_of_two(-exponent), operand.x, operand.y);
        split(S[i][1], power_of_two(-exponent), operand.z, operand.w);
        shared.state[buffer][i][warp][lane] = operand;
        float power = power_of_two(exponent); /* the same in the four lanes of a row */
        of_block(shared.exponents[buffer][i], lane / 4, warp) = power;
        of_block(shared.factors[buffer][i], lane / 4, warp) = fminf(power * scale_of_A, 0x1p127f);
    }
}

/* S = A S + B. Meanwhile the next segment's A is loaded. */
template <int TILES>
__device__ void take_through(Shared<TILES> &shared, const Position &position, int segment, int next,
                             const TransitionOperands &A, TransitionOperands &next_A, Elements<TILES> &S) {
    int lane = threadIdx.x % 32, buffer = segment % 2;
    uint32_t row = row_of_A(shared, next);
    each_pair(S, position, [&](float2 &x, int column, int channel) {
        x = *reinterpret_cast<const float2 *>(
            &shared.stages[stage_of<TILES>(segment)].B[column - position.first_column][channel]);
    });
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        uint4 terms[BLOCKS];
        float4 factors[BLOCKS / 4];
#pragma unroll
        for (int j = 0; j < BLOCKS; j++)
            terms[j] = shared.state[buffer][i][j][lane];
#pragma unroll
        for (int j = 0; j < BLOCKS / 4; j++)
            factors[j] = shared.factors[buffer][i][j][lane / 4];
        float products[BLOCKS][2][4]; /* rows of first terms, then of second ones */
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            const uint32_t a[4] = {terms[j].x, terms[j].y, terms[j].z, terms[j].w};
            mma_half<false>(products[j][0], a, A[j][0], A[j][1]);
            mma_half<false>(products[j][1], a, A[j][2], A[j][3]);
            if (i == 0)
                load_A(row, j, next_A);
        }
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            float4 four = factors[j / 4];
            float factor = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const float(&product)[4] = products[j][n];
                S[i][n].x = fmaf(product[0] + product[2], factor, S[i][n].x);
                S[i][n].y = fmaf(product[1] + product[3], factor, S[i][n].y);
            }
        }
    }
}

template <int TILES>
__device__ void store_final(const kda_state &state, Elements<TILES> &S, const Position &position) {
    bool pairs = as_pairs(state);
    each_pair(S, position, [&](float2 x, int column, int channel) {
        char *to = element(state, column, channel);
        if (pairs && state.dtype == KDA_F32) {
            *reinterpret_cast<float2 *>(to) = x;
        } else if (pairs) {
            *reinterpret_cast<uint32_t *>(to) = pack_bf16(x.x, x.y);
        } else {
            store_float(to, state.dtype, 0, x.x);
            store_float(element(state, column, channel + 1), state.dtype, 0, x.y);
        }
    });
}

/* ---- Writers ------------------------------------------------------------------------------------------ */

__device__ uint32_t scale_halves(uint32_t pair, __half2 factor) {
    __half2 scaled = __hmul2(*reinterpret_cast<__half2 *>(&pair), factor);
    return *reinterpret_cast<uint32_t *>(&scaled);
}

__device__ float largest_of(const float4 &x) { return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)); }

/* Lane t of four has, of two blocks each, pair t of the low 8 channels and pair t of the high ones. It gets all
 * four pairs of one half of one block. */
__device__ uint4 transpose_halves(const uint32_t (&low)[2], const uint32_t (&high)[2]) {
    bool odd = threadIdx.x % 2, upper = threadIdx.x % 4 / 2;
    uint2 pairs[2];
#pragma unroll
    for (int b = 0; b < 2; b++) {
        uint32_t other = __shfl_xor_sync(~0u, odd ? low[b] : high[b], 1);
        pairs[b] = odd ? make_uint2(other, high[b]) : make_uint2(low[b], other);
    }
    uint2 own = upper ? pairs[1] : pairs[0], others = upper ? pairs[0] : pairs[1];
    others.x = __shfl_xor_sync(~0u, others.x, 2), others.y = __shfl_xor_sync(~0u, others.y, 2);
    return upper ? make_uint4(others.x, others.y, own.x, own.y) : make_uint4(own.x, own.y, others.x, others.y);
}

/* Stores the first terms as states, in which a column has one exponent. A warp stores two blocks. */
template <int TILES>
__device__ void store_states(const kda_sm90_cluster_memory &memory, const Position &position, int segment,
                             Shared<TILES> &shared) {
    int buffer = segment % 2, lane = threadIdx.x % 32, warp = (threadIdx.x - MAKERS) / 32;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        Rows &exponents = shared.exponents[buffer][i];
        float most = fmaxf(largest_of(exponents[0][lane / 4]), largest_of(exponents[1][lane / 4]));
        int exponent = (int)(__float_as_uint(most) >> 23) - 127;
        uint32_t low[2], high[2];
#pragma unroll
        for (int b = 0; b < 2; b++) {
            int block = warp * 2 + b;
            __half2 factor = __float2half2_rn(of_block(exponents, lane / 4, block) * power_of_two(-exponent));
            uint4 terms = shared.state[buffer][i][block][lane];
            low[b] = scale_halves(terms.x, factor), high[b] = scale_halves(terms.z, factor);
        }
        int column = position.first_column + i * ROWS + lane / 4;
        uint16_t *row = state_before(memory, position.first + segment, column);
        *reinterpret_cast<uint4 *>(&row[warp * 32 + lane % 4 * 8]) = transpose_halves(low, high);
        if (warp == 0 && lane % 4 == 0)
            memory.state_exponents[(position.first + segment) * DIM + column] = (int16_t)exponent;
    }
}

/* ---- The fetching warp ---------------------------------------------------------------------------------- */

/* One thread starts to fetch A and B of a segment, if there is one. Padding against bank conflicts would take a
 * copy for every row of B, which costs more. */
template <int TILES>
__device__ void fetch(const kda_sm90_cluster_memory &memory, const Position &position, int segment,
                      Shared<TILES> &shared) {
    if (segment >= memory.segments)
        return;
    Stage<TILES> &stage = shared.stages[stage_of<TILES>(segment)];
    uint64_t &arrived = shared.arrived[stage_of<TILES>(segment)];
    int64_t index = position.first + segment;
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &arrived,
                                   sizeof stage.A + sizeof stage.B);
    ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, stage.A,
                       memory.transitions + (position.matrices + segment) * DIM * DIM, sizeof stage.A,
                       &arrived);
    ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, stage.B,
                       memory.local_states + (index * DIM + position.first_column) * DIM, sizeof stage.B,
                       &arrived);
}

template <int TILES> __device__ void wait_for_segment(Shared<TILES> &shared, int segment) {
    wait(shared.arrived[stage_of<TILES>(segment)], parity_of<TILES>(segment));
}

/* ---- The kernel --------------------------------------------------------------------------------------- */

enum class Role { MAKER, WRITER, FETCHER };

/* All steps. Between two barriers makers take S through a segment and share it, writers write what it was
 * before, and the fetcher waits until the next segment is there. */
template <int TILES>
__device__ void step_through(const kda_sm90_cluster_memory &memory, const Position &position, Role role,
                             const kda_state &to, Shared<TILES> &shared) {
    Elements<TILES> S;
    TransitionOperands A[2];
    if (role == Role::MAKER) {
        each_pair(S, position, [&](float2 &x, int column, int channel) {
            x = __ldcg(reinterpret_cast<const float2 *>(
                &memory.local_states[(position.first * DIM + column) * DIM + channel]));
        });
        uint32_t row = row_of_A(shared, 1);
#pragma unroll
        for (int j = 0; j < BLOCKS; j++)
            load_A(row, j, A[0]);
    }
    int last = memory.segments - 1;
    for (int first = 1; first <= last; first += 2)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int s = first + i, next = min(s + 1, last);
            if (s > last)
                break;
            if (role == Role::MAKER)
                share_state(S, s, shared);
            else if (role == Role::FETCHER)
                wait_for_segment(shared, next);
            /* S and the next segment are there for all, and the one before is no longer read */
            __syncthreads();
            if (role == Role::WRITER)
                store_states(memory, position, s, shared);
            else if (role == Role::FETCHER && threadIdx.x % 32 == 0)
                fetch(memory, position, s + STAGES<TILES> - 1, shared);
            else if (role == Role::MAKER && (s < last || to.data))
                take_through(shared, position, s, next, A[i], A[1 - i], S);
        }
    if (role == Role::MAKER && to.data)
        store_final(to, S, position);
}

template <int TILES>
__global__ void __launch_bounds__(THREADS, 1)
    cluster_scan(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_stream_k stream_k,
                 const __grid_constant__ kda_sm90_cluster_memory memory) {
    let_next_begin();
    wait_for_kernel_before();
    if (nothing_pending(stream_k))
        return;
    extern __shared__ __align__(1024) char all[];
    Shared<TILES> &shared = *reinterpret_cast<Shared<TILES> *>(all);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES<TILES>; i++)
            ptx::mbarrier_init(&shared.arrived[i], 1);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    __syncthreads();
    int64_t chain = blockIdx.x, n = chain / p.value_heads, slot = kda_sequence(&p, n).slot;
    if (slot < 0 /* padding */ || kda_work_on(&p.border, n) != KDA_WORK_ALL ||
        !is_pending(p, stream_k, (int)n, (int)(chain % p.value_heads)) || grows(memory, chain))
        return;
    int lane = threadIdx.x % 32, first_column = (int)blockIdx.y * TILES * ROWS;
    Position position = {chain * memory.segments, before_matrices(memory, chain), first_column,
                         first_column + lane / 4, (int)threadIdx.x / 32 * 16 + lane % 4 * 2};
    Role role = threadIdx.x < MAKERS             ? Role::MAKER
                : threadIdx.x < MAKERS + WRITERS ? Role::WRITER
                                                 : Role::FETCHER;
    if (role == Role::FETCHER && lane == 0)
        for (int s = 1; s < STAGES<TILES>; s++)
            fetch(memory, position, s, shared);
    if (threadIdx.x > 0 && threadIdx.x < memory.segments)
        *reinterpret_cast<uint4 *>(shared.transition_exponents[threadIdx.x]) =
            __ldcg(reinterpret_cast<const uint4 *>(
                &memory.transition_exponents[(position.matrices + threadIdx.x) * BLOCKS]));
    if (role == Role::FETCHER)
        wait_for_segment(shared, 1);
    __syncthreads();
    step_through(memory, position, role, kda_state_at(&p, &p.final_state, slot, chain % p.value_heads), shared);
}

template <int TILES>
cudaError_t launch_scan(const kda_prefill *p, const kda_launch *launch, const kda_sm90_memory *memory) {
    return launch_kernel(cluster_scan<TILES>, *launch, THREADS, sizeof(Shared<TILES>), p->stream, *p,
                         memory->stream_k, memory->cluster);
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_cluster_scan(const kda_prefill *p, const kda_plan *, const kda_launch *launch,
                                  const kda_sm90_memory *memory) {
    auto launch_columns = launch->config == 1   ? kda::launch_scan<1>
                          : launch->config == 2 ? kda::launch_scan<2>
                                                : kda::launch_scan<4>;
    return launch_columns(p, launch, memory);
}
