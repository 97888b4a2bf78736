/* SPDX-License-Identifier: MIT */
/* What is left to add once all segments are done (config.cuh): dA_log and d_dt_bias over segments, dq and dk over
 * the value heads that share them. The orders are fixed, so that bits do not change from run to run. */
#include "cuda/sm90/backward/config.cuh"
#include "cuda/sm90/kernels.h"

namespace kda {
namespace {

constexpr int HEADS_THREADS = 256, QUARTERS = 4 /* of the segments, side by side */,
              SUM_THREADS = QUARTERS * DIM;

/* A CTA has a value head, and a thread a channel of a quarter of the segments. */
__global__ void __launch_bounds__(SUM_THREADS)
    add_segments(const __grid_constant__ kda_backward b, const float *sums, int64_t segments) {
    __shared__ float parts[2][QUARTERS][DIM];
    int channel = threadIdx.x % DIM, quarter = threadIdx.x / DIM;
    int64_t head = blockIdx.x;
    let_next_begin();
    wait_for_kernel_before();
    const float *from = sums + head * segments * 2 * DIM + channel;
    float A = 0, bias = 0;
    for (int64_t i = segments * quarter / QUARTERS; i < segments * (quarter + 1) / QUARTERS; i++)
        A += from[i * 2 * DIM], bias += from[i * 2 * DIM + DIM];
    parts[0][quarter][channel] = A, parts[1][quarter][channel] = bias;
    __syncthreads();
    if (quarter)
        return;
    for (int i = 1; i < QUARTERS; i++)
        A += parts[0][i][channel], bias += parts[1][i][channel];
    if (b.d_dt_bias.data)
        store_float(b.d_dt_bias.data + head * b.d_dt_bias.stride[0], b.d_dt_bias.dtype, channel, bias);
    parts[0][0][channel] = A;
    barrier_wait(1, DIM);
    if (channel >= 32)
        return;
    A = parts[0][0][channel] + parts[0][0][channel + 32] + parts[0][0][channel + 64] +
        parts[0][0][channel + 96];
    for (int bit = 16; bit; bit /= 2)
        A += __shfl_xor_sync(~0u, A, bit);
    if (channel == 0 && b.dA_log.data)
        store_float(b.dA_log.data + head * b.dA_log.stride[0], b.dA_log.dtype, 0, A);
}

/* A CTA has a chunk of a q/k head, and a thread four channels of every eighth token. */
__global__ void __launch_bounds__(HEADS_THREADS)
    add_heads(const __grid_constant__ kda_backward b, const float *queries, const float *keys) {
    const kda_prefill &p = b.forward;
    int64_t group = p.value_heads / p.heads, head = blockIdx.y;
    let_next_begin();
    Place at = chunk_of(find_segment(b, blockIdx.x / CHUNKS, head * group), (int)(blockIdx.x % CHUNKS));
    wait_for_kernel_before();
    for (int token = threadIdx.x / 32; token < at.count; token += HEADS_THREADS / 32)
        for (int i = 0; i < 2; i++) {
            const kda_tensor &to = i ? b.dk : b.dq;
            const float4 *from =
                reinterpret_cast<const float4 *>(i ? keys : queries) + threadIdx.x % 32 +
                ((at.batch * p.tokens + at.token + token) * p.value_heads + at.head) * (DIM / 4);
            float4 sum = make_float4(0, 0, 0, 0);
            for (int64_t h = 0; h < group; h++) {
                float4 x = from[h * (DIM / 4)];
                sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
            }
            reinterpret_cast<uint2 *>(kda_row(&to, at.batch, at.token + token, head))[threadIdx.x % 32] =
                make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
        }
}

} // namespace
} // namespace kda

extern "C" cudaError_t kda_sm90_backward_sums(const struct kda_backward *b,
                                              const struct kda_backward_plan *plan,
                                              const struct kda_launch *launch,
                                              const struct kda_sm90_backward_memory *memory) {
    using namespace kda;
    return launch_kernel(add_segments, *launch, SUM_THREADS, 0, b->forward.stream, *b,
                         static_cast<const float *>(memory->sums), plan->segments);
}

extern "C" cudaError_t kda_sm90_backward_heads(const struct kda_backward *b, const struct kda_backward_plan *,
                                               const struct kda_launch *launch,
                                               const struct kda_sm90_backward_memory *memory) {
    using namespace kda;
    return launch_kernel(add_heads, *launch, HEADS_THREADS, 0, b->forward.stream, *b,
                         static_cast<const float *>(memory->queries), static_cast<const float *>(memory->keys));
}
