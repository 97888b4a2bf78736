/* SPDX-License-Identifier: MIT */
/*
 * What the cluster schedule needs where sequences begin or go on in other calls.
 *
 * Summaries: all segments of a chain take B, which starts from the state after the first segment or from zero, and M, which
 * starts from the identity, from X to X A_s^T + B_s. A CTA takes some rows of either through all of them. A is in fp16 and
 * so exact in tf32; X is split into two terms, together as good as fp32.
 */
#include "cuda/launch.cuh"
#include "cuda/sm90/cluster/segments.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/mainloop/consume.cuh"
#include "cuda/sm90/stream_k/ranges.cuh"

namespace kda {
namespace {

constexpr int ROWS = KDA_SM90_SUMMARY_ROWS, WARPS = 8, THREADS = WARPS * 32;
constexpr int TILES = DIM / 8 / WARPS; /* of 8 channels, that a warp makes */
constexpr int PADDED = DIM + 4;        /* so that rows begin in other banks */
constexpr uint32_t TF32 = 0xffffe000;  /* the bits that tf32 has */
constexpr int MATRIX_BYTES = DIM * DIM * sizeof(__half);

struct Shared {
    uint16_t A[2][DIM * DIM]; /* of a segment, and of the next */
    float X[ROWS][PADDED];
    float scales[KDA_MAX_SEGMENTS][KDA_SM90_EXPONENTS]; /* of A, by segment and 16 of its columns */
};

/* Starts to copy a segment's A; all threads do. */
__device__ void fetch(const kda_sm90_cluster_memory &memory, int64_t matrix, uint16_t (&to)[DIM * DIM]) {
    const char *from = reinterpret_cast<const char *>(memory.transitions + matrix * DIM * DIM);
    for (int i = threadIdx.x * 16; i < MATRIX_BYTES; i += THREADS * 16)
        copy_async(reinterpret_cast<char *>(to) + i, from + i);
    copy_async_commit();
}

/* What a CTA's rows start from: of M the identity's; of B the state after the first segment, unless that comes in later. */
__device__ float first_element(const kda_sm90_cluster_memory &memory, int64_t chain, bool incoming,
                               bool identity, int row, int channel) {
    if (identity)
        return row == channel;
    return incoming ? 0.f : __ldcg(&memory.local_states[(chain * memory.segments * DIM + row) * DIM + channel]);
}

/* The warp's sums start from B_s, 0 for M. */
__device__ void load_bias(const kda_sm90_cluster_memory &memory, int64_t segment, bool identity, int first,
                          float (&sums)[TILES][4]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            int row = first + lane / 4 + n * 8, channel = (threadIdx.x / 32 * TILES + i) * 8 + lane % 4 * 2;
            float2 x = make_float2(0, 0);
            if (!identity)
                x = __ldcg(reinterpret_cast<const float2 *>(
                    &memory.local_states[(segment * DIM + row) * DIM + channel]));
            sums[i][2 * n] = x.x, sums[i][2 * n + 1] = x.y;
        }
}

/* sums += X A^T */
__device__ void multiply(const Shared &shared, int segment, int buffer, float (&sums)[TILES][4]) {
    int lane = threadIdx.x % 32;
#pragma unroll 4
    for (int k = 0; k < DIM; k += 8) {
        float scale = shared.scales[segment][k / KDA_SM90_EXPONENT_COLUMNS];
        uint32_t high[4], low[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float x = shared.X[lane / 4 + n % 2 * 8][k + lane % 4 + n / 2 * 4] * scale;
            high[n] = __float_as_uint(x) & TF32;
            low[n] = __float_as_uint(x - __uint_as_float(high[n]));
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            int channel = (threadIdx.x / 32 * TILES + i) * 8 + lane / 4;
            uint32_t b[2];
#pragma unroll
            for (int n = 0; n < 2; n++)
                b[n] = __float_as_uint(__half2float(
                    __ushort_as_half(shared.A[buffer][swizzled<DIM, DIM>(k + lane % 4 + n * 4, channel)])));
            mma_tf32(sums[i], high, b[0], b[1]);
            mma_tf32(sums[i], low, b[0], b[1]);
        }
    }
}

__device__ void leave_sums(Shared &shared, const float (&sums)[TILES][4]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            shared.X[lane / 4 + n / 2 * 8][(threadIdx.x / 32 * TILES + i) * 8 + lane % 4 * 2 + n % 2] =
                sums[i][n];
}

__global__ void __launch_bounds__(THREADS)
    cluster_summaries(const __grid_constant__ kda_prefill p,
                      const __grid_constant__ kda_sm90_cluster_memory memory) {
    let_next_begin();
    wait_for_kernel_before();
    extern __shared__ __align__(16) char all[];
    Shared &shared = *reinterpret_cast<Shared *>(all);
    int64_t chain = blockIdx.x, n = chain / p.value_heads, head = chain % p.value_heads;
    int64_t place = kda_summary_of(&p.border, n);
    int first = (int)blockIdx.y * ROWS;
    bool identity = first >= DIM, incoming = comes_in(p, n);
    if (place < 0 || kda_sequence(&p, n).slot < 0 || (identity && !incoming)) /* M is 0 then */
        return;
    first -= identity ? DIM : 0;
    int64_t before = before_matrices(memory, chain);
    fetch(memory, before + 1, shared.A[1]);
    for (int i = threadIdx.x; i < memory.segments * KDA_SM90_EXPONENTS; i += THREADS) {
        int s = i / KDA_SM90_EXPONENTS, block = i % KDA_SM90_EXPONENTS;
        if (s > 0)
            shared.scales[s][block] =
                power_of_two(__ldcg(&memory.transition_exponents[(before + s) * KDA_SM90_EXPONENTS + block]));
    }
    for (int i = threadIdx.x; i < ROWS * DIM; i += THREADS)
        shared.X[i / DIM][i % DIM] = first_element(memory, chain, incoming, identity, first + i / DIM, i % DIM);
    for (int s = 1; s < memory.segments; s++) {
        float sums[TILES][4];
        load_bias(memory, chain * memory.segments + s, identity, first, sums);
        copy_async_wait<0>();
        __syncthreads(); /* A and X are there for all, and the other buffer is no longer read */
        if (s + 1 < memory.segments)
            fetch(memory, before + s + 1, shared.A[(s + 1) % 2]);
        multiply(shared, s, s % 2, sums);
        __syncthreads();
        leave_sums(shared, sums);
    }
    __syncthreads();
    kda_state to = identity ? kda_summary_transition(&p.base, &p.border, place, head)
                            : kda_summary_bias(&p.base, &p.border, place, head);
    for (int i = threadIdx.x; i < ROWS * DIM; i += THREADS)
        store_float(element(to, first + i / DIM, i % DIM), KDA_F32, 0, shared.X[i / DIM][i % DIM]);
}

/* A state that has come in goes to where the scan expects the one after the first segment. */
__global__ void __launch_bounds__(THREADS)
    take_incoming(const __grid_constant__ kda_prefill p,
                  const __grid_constant__ kda_sm90_cluster_memory memory) {
    let_next_begin();
    int64_t n = kda_index(&p.border.awaiting_rows, blockIdx.x, 0), head = blockIdx.y;
    if (n < 0 || n >= p.sequences)
        return;
    kda_state from = kda_state_in(&p.base, &p.border.states, blockIdx.x, head);
    float *to = memory.local_states + (n * p.value_heads + head) * memory.segments * DIM * DIM;
    for (int i = threadIdx.x; i < DIM * DIM; i += THREADS)
        to[i] = *reinterpret_cast<const float *>(element(from, i / DIM, i % DIM));
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_cluster_summaries(const kda_prefill *p, const kda_plan *, const kda_launch *launch,
                                       const kda_sm90_memory *memory) {
    using namespace kda;
    return launch_kernel(cluster_summaries, *launch, THREADS, sizeof(Shared), p->stream, *p, memory->cluster);
}

cudaError_t kda_sm90_take_incoming(const kda_prefill *p, const kda_plan *, const kda_launch *launch,
                                   const kda_sm90_memory *memory) {
    using namespace kda;
    return launch_kernel(take_incoming, *launch, THREADS, 0, p->stream, *p, memory->cluster);
}
