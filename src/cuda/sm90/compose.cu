/* SPDX-License-Identifier: MIT */
/*
 * Gives every segment of a chain its true state: S after segment s is A_s S + B_s, with S before it.
 *
 * A CTA takes some columns of V through all segments, for which nothing else is needed; a warp makes 16 channels of them,
 * which all warps multiply with in the next step. For that S is split into two terms of fp16, which lie as rows of one
 * first operand: as good as fp32. Every 16 channels of a column have a unit of their own, so that no warp waits to know
 * the others'; their products are weighed as they are summed. A and B come some segments ahead.
 */
#include "cuda/segments.h"
#include "cuda/sm90/consume.cuh"
#include "cuda/sm90/cut.cuh"
#include "cuda/sm90/launch.cuh"

namespace kda {
namespace {

constexpr int THREADS = BLOCKS * 32;
constexpr int ROWS = 8;        /* columns of V in a first operand, each in two terms */
constexpr int TOP = 14;        /* log2: of elements in units, the largest is below 2^(TOP + 1) */
constexpr int STAGES = 4;      /* of A and B: segments on their way or in use */
constexpr int B_ROW = DIM + 8; /* floats: so that four rows lie in different banks */

template <int TILES> struct Shared {
    uint4 A[STAGES][BLOCKS][THREADS]; /* of every thread its own */
    float B[STAGES][TILES * ROWS][B_ROW];
    /* S: before the next barrier the next step writes to the other one of two. */
    uint4 state[2][TILES][BLOCKS][32];          /* as first operands */
    float4 factors[2][TILES][BLOCKS / 4][ROWS]; /* of a block's products with A, four blocks together */
    float4 largest[2][TILES][BLOCKS / 4][ROWS]; /* of a block, without sign */
    alignas(16) int16_t units[KDA_CUDA_MAX_SEGMENTS][BLOCKS]; /* of A */
};

/* A CTA's columns, and where the thread's elements are: of tile i the column i * ROWS further, and of it two channels and
 * the two 8 further. */
struct Place {
    int64_t first; /* of the chain's segments */
    int first_column, column, channel;
};

__device__ int64_t row_of(const Place &place, int segment, int tile) {
    return (place.first + segment) * DIM + place.column + tile * ROWS;
}

/* Starts to bring what takes S through a segment, if there is one. */
template <int TILES>
__device__ void fetch(const kda_sm90_cut &cut, const Place &place, int segment, Shared<TILES> &shared) {
    if (segment < cut.segments) {
        int stage = segment % STAGES;
        const uint4 *A = part_of_A(cut, place.first + segment, 0, threadIdx.x / 32);
#pragma unroll
        for (int j = 0; j < BLOCKS; j++)
            copy_async(&shared.A[stage][j][threadIdx.x], A + j * BLOCKS * 32);
        const float *B = cut.B + ((place.first + segment) * DIM + place.first_column) * DIM;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            int at = (threadIdx.x + i * THREADS) * 4;
            copy_async(&shared.B[stage][at / DIM][at % DIM], B + at);
        }
    }
    copy_async_commit();
}

/* Of the segment fetched STAGES - 2 before the newest. B, which other threads have fetched, is there behind the next
 * barrier. */
template <int TILES> __device__ void load_A(const Shared<TILES> &shared, int segment, uint4 (&A)[BLOCKS]) {
    copy_async_wait<STAGES - 2>();
#pragma unroll
    for (int j = 0; j < BLOCKS; j++)
        A[j] = shared.A[segment % STAGES][j][threadIdx.x];
}

/* The unit in which elements are below 2^(TOP + 1), unless they are tiny: its powers stay within fp32. */
__device__ int unit_below(float largest) {
    return max((int)(__float_as_uint(largest) >> 23) - 127 - TOP, -126);
}

__device__ float largest_of_block(const float2 (&S)[2]) {
    float largest = fmaxf(fmaxf(fabsf(S[0].x), fabsf(S[0].y)), fmaxf(fabsf(S[1].x), fabsf(S[1].y)));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    return fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
}

/* Two elements as two terms. */
__device__ void split(float2 x, float factor, uint32_t &high, uint32_t &low) {
    x.x *= factor, x.y *= factor;
    high = pack_half(x.x, x.y);
    float2 rounded = __half22float2(*reinterpret_cast<__half2 *>(&high));
    low = pack_half(x.x - rounded.x, x.y - rounded.y);
}

__device__ float &of_block(float4 (&rows)[BLOCKS / 4][ROWS], int row, int block) {
    return reinterpret_cast<float *>(&rows[block / 4][row])[block % 4];
}

/* The warp's channels of S become operands of all. */
template <int TILES>
__device__ void share_state(const float2 (&S)[TILES][2], int segment, Shared<TILES> &shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, turn = segment % 2;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        float largest = largest_of_block(S[i]);
        int unit_of_A = shared.units[segment][warp];
        int unit = max(unit_below(largest), -126 - unit_of_A); /* nor does the factor below vanish */
        uint4 operand;
        split(S[i][0], power_of_two(-unit), operand.x, operand.y);
        split(S[i][1], power_of_two(-unit), operand.z, operand.w);
        shared.state[turn][i][warp][lane] = operand;
        if (lane % 4 == 0) {
            of_block(shared.largest[turn][i], lane / 4, warp) = largest;
            of_block(shared.factors[turn][i], lane / 4, warp) = power_of_two(min(unit + unit_of_A, 127));
        }
    }
}

/* S to states, in one unit for all channels of a column. */
template <int TILES>
__device__ void store_states(const float2 (&S)[TILES][2], const kda_sm90_cut &cut, const Place &place,
                             int segment, const Shared<TILES> &shared) {
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        float largest = 0;
#pragma unroll
        for (int j = 0; j < BLOCKS / 4; j++) {
            float4 four = shared.largest[segment % 2][i][j][threadIdx.x % 32 / 4];
            largest = fmaxf(largest, fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)));
        }
        int unit = unit_below(largest);
        float factor = power_of_two(-unit);
        int64_t row = row_of(place, segment, i);
#pragma unroll
        for (int n = 0; n < 2; n++)
            *reinterpret_cast<uint32_t *>(&cut.states[row * DIM + place.channel + n * 8]) =
                pack_half(S[i][n].x * factor, S[i][n].y * factor);
        if (threadIdx.x < 32 && threadIdx.x % 4 == 0)
            cut.state_units[row] = (int16_t)unit;
    }
}

/* What a step reads of a tile: S as all have shared it, the factors of its products with A, and the thread's B. */
struct Tile {
    uint4 S[BLOCKS];
    float4 factors[BLOCKS / 4];
    float2 B[2];
};

template <int TILES>
__device__ void load_tile(const Shared<TILES> &shared, const Place &place, int segment, int i, Tile &tile) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 2; n++)
        tile.B[n] = *reinterpret_cast<const float2 *>(
            &shared.B[segment % STAGES][i * ROWS + lane / 4][place.channel + n * 8]);
#pragma unroll
    for (int j = 0; j < BLOCKS / 4; j++)
        tile.factors[j] = shared.factors[segment % 2][i][j][lane / 4];
#pragma unroll
    for (int j = 0; j < BLOCKS; j++)
        tile.S[j] = shared.state[segment % 2][i][j][lane];
}

/* Products with A, block by block: rows of the first terms, then of the second ones. */
__device__ void multiply(const uint4 (&A)[BLOCKS], const uint4 (&S)[BLOCKS], float (&products)[BLOCKS][2][4]) {
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
        const uint32_t terms[4] = {S[j].x, S[j].y, S[j].z, S[j].w};
        mma_half<false>(products[j][0], terms, A[j].x, A[j].y);
        mma_half<false>(products[j][1], terms, A[j].z, A[j].w);
    }
}

/* S = B and all products. */
__device__ void sum_up(const Tile &tile, const float (&products)[BLOCKS][2][4], float2 (&S)[2]) {
#pragma unroll
    for (int n = 0; n < 2; n++)
        S[n] = tile.B[n];
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
        float4 four = tile.factors[j / 4];
        float factor = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            S[n].x = fmaf(products[j][n][0] + products[j][n][2], factor, S[n].x);
            S[n].y = fmaf(products[j][n][1] + products[j][n][3], factor, S[n].y);
        }
    }
}

template <int TILES>
__device__ void store_final(const kda_state &state, const float2 (&S)[TILES][2], const Place &place) {
    bool pairs = as_pairs(state);
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            int column = place.column + i * ROWS, channel = place.channel + n * 8;
            char *to = element(state, column, channel);
            if (pairs && state.dtype == KDA_F32) {
                *reinterpret_cast<float2 *>(to) = S[i][n];
            } else if (pairs) {
                *reinterpret_cast<uint32_t *>(to) = pack_bf16(S[i][n].x, S[i][n].y);
            } else {
                store_float(to, state.dtype, 0, S[i][n].x);
                store_float(element(state, column, channel + 1), state.dtype, 0, S[i][n].y);
            }
        }
}

template <int TILES>
__global__ void __launch_bounds__(THREADS, 1)
    compose(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_cut cut) {
    let_next_begin();
    extern __shared__ __align__(16) char memory[];
    Shared<TILES> &shared = *reinterpret_cast<Shared<TILES> *>(memory);
    int64_t chain = blockIdx.x;
    int lane = threadIdx.x % 32, column = (int)blockIdx.y * TILES * ROWS;
    Place place = {chain * cut.segments, column, column + lane / 4, (int)threadIdx.x / 32 * 16 + lane % 4 * 2};
    wait_for_kernel_before();
    int64_t slot = kda_sequence(&p, chain / p.value_heads).slot;
    if (slot < 0) /* padding */
        return;
    for (int s = 1; s < STAGES; s++)
        fetch(cut, place, s, shared);
    if (threadIdx.x > 0 && threadIdx.x < cut.segments)
        *reinterpret_cast<uint4 *>(shared.units[threadIdx.x]) =
            __ldcg(reinterpret_cast<const uint4 *>(&cut.A_units[(place.first + threadIdx.x) * BLOCKS]));
    float2 S[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            S[i][n] =
                *reinterpret_cast<const float2 *>(&cut.B[row_of(place, 0, i) * DIM + place.channel + n * 8]);
    kda_state to = kda_state_at(&p, &p.final_state, slot, chain % p.value_heads);
    uint4 A[BLOCKS];
    load_A(shared, 1, A);
    __syncthreads(); /* the units are there for all */
    int last = cut.segments - 1;
    for (int s = 1;; s++) {
        share_state(S, s, shared);
        __syncthreads(); /* the segment before is no longer read, either */
        if (s == last && !to.data) {
            store_states(S, cut, place, s, shared);
            return;
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            Tile tile;
            float products[BLOCKS][2][4];
            load_tile(shared, place, s, i, tile);
            if (i == 0)
                fetch(cut, place, s + STAGES - 1, shared);
            multiply(A, tile.S, products);
            if (i == 0)
                store_states(S, cut, place, s, shared);
            if (i == TILES - 1)
                load_A(shared, s + 1, A);
            sum_up(tile, products, S[i]);
        }
        if (s == last)
            break;
    }
    store_final(to, S, place);
}

template <int TILES>
cudaError_t launch_compose(const kda_prefill *p, const kda_sm90_cut &cut, cudaStream_t stream) {
    int bytes = sizeof(Shared<TILES>);
    cudaError_t error =
        cudaFuncSetAttribute(compose<TILES>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error)
        return error;
    dim3 grid((unsigned)(p->sequences * p->value_heads), DIM / (TILES * ROWS));
    return launch_behind(compose<TILES>, grid, THREADS, bytes, stream, *p, cut);
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_compose(const kda_prefill *p, kda_sm90_cut cut, cudaStream_t stream) {
    /* Every CTA reads all of A: where many do, fewer with more columns each. */
    bool many = p->sequences * p->value_heads > 4;
    return many ? kda::launch_compose<2>(p, cut, stream) : kda::launch_compose<1>(p, cut, stream);
}
