/* SPDX-License-Identifier: MIT */
/*
 * Gives every segment of a chain its true state: the state after segment s is A_s S + B_s, with S the state
 * before it.
 *
 * A CTA works ROWS columns of V and needs no others. A thread has two channels of all of them and a quarter of
 * the sum. The next A arrives while one is used.
 */
#include "cuda/launch.cuh"
#include "cuda/ptx/sm80.cuh"
#include "cuda/sm90/general/summaries.cuh"
#include "cuda/sm90/kernels.h"

namespace kda {
namespace {

constexpr int ROWS = KDA_SM90_GENERAL_SCAN_COLUMNS, QUARTERS = 4, MAX_K = 128;

struct Shared {
    float A[2][MAX_K * MAX_K]; /* A^T: row j is column j of A */
    alignas(16) float S[ROWS * MAX_K];
    alignas(16) float sums[QUARTERS][ROWS * MAX_K];
};

__device__ void fetch(const float *A, int K, float *to) {
    for (int i = threadIdx.x * 4; i < K * K; i += blockDim.x * 4)
        copy_async(to + i, A + i);
    copy_async_commit();
}

/* Puts a quarter of A S into sums. */
__device__ void multiply(const float *A, const float *S, int K, float *sums) {
    int quarter = threadIdx.x / (K / 2), channel = threadIdx.x % (K / 2) * 2;
    float2 sum[ROWS] = {};
#pragma unroll 2
    for (int j = quarter * 4; j < K; j += QUARTERS * 4) {
        float2 a[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[i] = *reinterpret_cast<const float2 *>(&A[(j + i) * K + channel]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float4 x = *reinterpret_cast<const float4 *>(&S[r * K + j]);
            sum[r].x = fmaf(a[0].x, x.x, sum[r].x), sum[r].y = fmaf(a[0].y, x.x, sum[r].y);
            sum[r].x = fmaf(a[1].x, x.y, sum[r].x), sum[r].y = fmaf(a[1].y, x.y, sum[r].y);
            sum[r].x = fmaf(a[2].x, x.z, sum[r].x), sum[r].y = fmaf(a[2].y, x.z, sum[r].y);
            sum[r].x = fmaf(a[3].x, x.w, sum[r].x), sum[r].y = fmaf(a[3].y, x.w, sum[r].y);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        *reinterpret_cast<float2 *>(&sums[quarter * ROWS * MAX_K + r * K + channel]) = sum[r];
}

__global__ void __launch_bounds__(QUARTERS *MAX_K / 2)
    general_scan(const __grid_constant__ kda_prefill p, kda_sm90_general_memory segments) {
    let_next_begin();
    extern __shared__ __align__(16) char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    int64_t chain = blockIdx.x;
    int K = (int)p.key_dim,
        own = threadIdx.x * 4;      /* the thread's elements of S, in rows of K: of ROWS K every thread has 4 */
    int count = segments.count - 1; /* summaries */
    wait_for_kernel_before();
    if (kda_sequence(&p, chain / p.value_heads).slot < 0) /* padding has no summaries */
        return;
    if (count > 1)
        fetch(summary(p, segments, chain, 1, true), K, shared.A[1]);
    for (int s = 0; s < count; s++) {
        float4 *B =
            reinterpret_cast<float4 *>(summary(p, segments, chain, s, false) + blockIdx.y * ROWS * K + own);
        float4 state = *B;
        if (s > 0) {
            copy_async_wait<0>();
            __syncthreads(); /* A has come for all; S is written, and the other A no longer read */
            if (s + 1 < count)
                fetch(summary(p, segments, chain, s + 1, true), K, shared.A[(s + 1) % 2]);
            multiply(shared.A[s % 2], shared.S, K, shared.sums[0]);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < QUARTERS; i++) {
                float4 sum = *reinterpret_cast<const float4 *>(&shared.sums[i][own]);
                state.x += sum.x, state.y += sum.y, state.z += sum.z, state.w += sum.w;
            }
        }
        *B = *reinterpret_cast<float4 *>(&shared.S[own]) = state;
    }
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_general_scan(const kda_prefill *p, const kda_plan *, const kda_launch *launch,
                                  const kda_sm90_memory *memory) {
    using namespace kda;
    return launch_kernel(general_scan, *launch, QUARTERS * (int)p->key_dim / 2, sizeof(Shared), p->stream, *p,
                         memory->general);
}
