/* SPDX-License-Identifier: MIT */
/* dA_log and d_dt_bias: adds what every chunk left, in the order of chunks. */
#include "cuda/floats.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80/backward.cuh"
#include "cuda/sm80/kernels.h"

namespace kda {
namespace {

constexpr int LANES = 32, WARPS = 8;

/* A warp adds every eighth chunk of 32 channels. The sum behind the last channel's is A_log's. */
__global__ void __launch_bounds__(LANES *WARPS)
    backward_sums(const __grid_constant__ kda_backward b, const float *sums, int64_t chunks, int KP) {
    __shared__ double parts[WARPS][LANES];
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    int64_t head = blockIdx.x, K = b.forward.key_dim, c = (int64_t)blockIdx.y * LANES + lane;
    const float *from = sums + head * chunks * (KP + 1) + (c < K ? c : KP);
    double sum = 0;
    for (int64_t i = warp; i < chunks && c <= K; i += WARPS)
        sum += (double)from[i * (KP + 1)];
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || c > K)
        return;
    for (int w = 1; w < WARPS; w++)
        sum += parts[w][lane];
    const kda_tensor &to = c < K ? b.d_dt_bias : b.dA_log;
    if (to.data)
        store_float(to.data + head * to.stride[0], to.dtype, c < K ? c : 0, (float)sum);
}

} // namespace
} // namespace kda

cudaError_t kda_sm80_backward_sums(const kda_backward *b, const kda_backward_plan *plan,
                                   const kda_backward_launch *launch, void *workspace) {
    using namespace kda;
    kda_sm80_backward_memory memory;
    kda_sm80_backward_lay_out(b, plan, workspace, &memory);
    return launch_kernel(backward_sums, launch->grid, LANES * WARPS, 0, b->forward.stream, false, *b,
                         static_cast<const float *>(memory.sums), plan->segments * (plan->segment / CHUNK),
                         kda_sm80_padded_key_dim(b));
}
