/* SPDX-License-Identifier: MIT */
/*
 * Gives every segment of a chain its true state: S after segment s is A_s S + B_s, with S before it.
 *
 * A CTA works ROWS columns of V, for which nothing else is needed; a thread has one channel of half of them. The next
 * A comes while one is used.
 */
#include "cuda/ptx/sm80.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/launch.cuh"
#include "cuda/sm90/summaries.cuh"

namespace kda {
namespace {

constexpr int ROWS = 16, HALVES = 2, OWN = ROWS / HALVES, MAX_K = 128;

struct Shared {
    float A[2][MAX_K * MAX_K]; /* A^T: row j is column j of A */
    alignas(16) float S[ROWS][MAX_K];
};

__device__ void fetch(const float *A, int K, float *to) {
    for (int i = threadIdx.x * 4; i < K * K; i += blockDim.x * 4)
        copy_async(to + i, A + i);
    copy_async_commit();
}

__global__ void __launch_bounds__(HALVES *MAX_K)
    scan(const __grid_constant__ kda_prefill p, kda_sm90_segments segments) {
    let_next_begin();
    extern __shared__ __align__(16) char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    int64_t chain = blockIdx.x;
    int K = (int)p.key_dim, c = threadIdx.x % K, first = threadIdx.x / K * OWN, row = blockIdx.y * ROWS + first;
    int count = segments.count - 1; /* summaries */
    float sum[OWN];
    wait_for_kernel_before();
    if (kda_sequence(&p, chain / p.value_heads).slot < 0) /* padding has no summaries */
        return;
    if (count > 1)
        fetch(summary(p, segments, chain, 1, true), K, shared.A[1]);
    for (int s = 0; s < count; s++) {
        float *B = summary(p, segments, chain, s, false) + row * K;
#pragma unroll
        for (int r = 0; r < OWN; r++)
            sum[r] = B[r * K + c];
        if (s > 0) {
            copy_async_wait<0>();
            __syncthreads(); /* A has come for all; S is written, and the other A no longer read */
            if (s + 1 < count)
                fetch(summary(p, segments, chain, s + 1, true), K, shared.A[(s + 1) % 2]);
            const float *A = shared.A[s % 2];
#pragma unroll 4
            for (int j = 0; j < K; j += 4) {
                float a[4] = {A[j * K + c], A[(j + 1) * K + c], A[(j + 2) * K + c], A[(j + 3) * K + c]};
#pragma unroll
                for (int r = 0; r < OWN; r++) {
                    float4 x = *reinterpret_cast<const float4 *>(&shared.S[first + r][j]);
                    sum[r] = fmaf(a[0], x.x, sum[r]), sum[r] = fmaf(a[1], x.y, sum[r]);
                    sum[r] = fmaf(a[2], x.z, sum[r]), sum[r] = fmaf(a[3], x.w, sum[r]);
                }
            }
            __syncthreads(); /* S is no longer read */
        }
#pragma unroll
        for (int r = 0; r < OWN; r++)
            B[r * K + c] = shared.S[first + r][c] = sum[r];
    }
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_scan(const kda_prefill *p, kda_sm90_segments segments, cudaStream_t stream) {
    using namespace kda;
    cudaError_t error = cudaFuncSetAttribute(scan, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    if (error)
        return error;
    dim3 grid((unsigned)(p->sequences * p->value_heads), (unsigned)(p->value_dim / ROWS));
    return launch_behind(scan, grid, HALVES * (unsigned)p->key_dim, sizeof(Shared), stream, *p, segments);
}
