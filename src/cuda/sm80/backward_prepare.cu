/* SPDX-License-Identifier: MIT */
/* Finds what neither depends on a state nor on the gradient of one, for every chunk of a slab and every value head at
 * once. */
#include "cuda/sm80/prepare.cuh"

#include "cuda/launch.cuh"
#include "cuda/sm80/backward.cuh"
#include "cuda/sm80/kernels.h"

namespace kda {
namespace {

using namespace chunks;

/* One warp. */
template <int KP> __device__ void store_inverse(const Shared<KP> &shared, BackwardOperands<KP> &out) {
    float x[CHUNK], known[CHUNK];
    invert<false>(shared, x, known);
    store_tf32_row(threadIdx.x, x, out.inverse);
}

/* One warp. Its lanes have rows of what is stored transposed: element j of all of them is a row there. */
template <int KP> __device__ void store_adjoint_inverse(const Shared<KP> &shared, BackwardOperands<KP> &out) {
    float x[CHUNK], known[CHUNK];
    invert<true>(shared, x, known);
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
        out.adjoint_inverse[tf32_index(j, threadIdx.x % 32)] = round_tf32(x[j]);
}

/* One warp: what belongs to tokens. Each warp of `shared` has the factors of its own block. */
template <int KP> __device__ void store_tokens(const Shared<KP> &shared, BackwardOperands<KP> &out) {
    int token = threadIdx.x % 32, block = token / BLOCK, warp = block * (Shared<KP>::WARPS / BLOCKS);
    out.steps[token] = shared.beta[token];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        out.factors[i][token] = shared.factor[0][warp][i * BLOCK + token % BLOCK];
        out.units[i][token] = shared.factor[1][warp][i * BLOCK + token % BLOCK];
    }
}

template <int KP, bool all_bf16>
__device__ void prepare_chunk(const kda_backward &b, const Slab &slab, BackwardOperands<KP> *operands) {
    extern __shared__ __align__(16) char memory[];
    Shared<KP> &shared = *reinterpret_cast<Shared<KP> *>(memory);
    const kda_prefill &p = b.forward;
    int64_t number = slab.begin + blockIdx.x / slab.chunks, head = blockIdx.y;
    int chunk = blockIdx.x % slab.chunks, warp = threadIdx.x / 32;
    SlabSegment segment = find_segment(b, slab, number);
    struct kda_span span = kda_span_of_chunk(segment.sequence.length, segment.within * slab.chunks + chunk);
    if (!span.count)
        return;
    Position at;
    at.block = threadIdx.x / Shared<KP>::PAIRS;
    at.batch = segment.sequence.batch, at.token = segment.sequence.first + span.first + at.block * BLOCK;
    at.count = (int)span.count - at.block * BLOCK;
    at.head = head, at.key_head = head / (p.value_heads / p.heads);
    at.c = threadIdx.x % Shared<KP>::PAIRS * 2;
    at.channels = (int)p.key_dim - at.c;
    BackwardOperands<KP> &out = operands[slab.chunk(head, number, chunk)];
    prepare_tiles<KP, all_bf16>(p, at, shared, out);
    if (warp == 0)
        store_inverse(shared, out);
    else if (warp == 1)
        store_adjoint_inverse(shared, out);
    if (warp == Shared<KP>::WARPS - 1)
        store_tokens(shared, out);
}

template <int KP, bool all_bf16>
__global__ void __launch_bounds__(Shared<KP>::THREADS, 512 / Shared<KP>::THREADS)
    backward_prepare(const __grid_constant__ kda_backward b, const __grid_constant__ Slab slab,
                     BackwardOperands<KP> *operands) {
    let_next_begin();
    prepare_chunk<KP, all_bf16>(b, slab, operands);
    end_after_kernel_before();
}

template <int KP>
cudaError_t launch_padded(const kda_backward *b, const kda_backward_plan *plan,
                          const kda_backward_launch *launch, void *workspace) {
    const kda_prefill &p = b->forward;
    bool all_bf16 = p.q.dtype == KDA_BF16 && p.k.dtype == KDA_BF16 && p.g.dtype == KDA_BF16;
    return launch_kernel(all_bf16 ? backward_prepare<KP, true> : backward_prepare<KP, false>, launch->grid,
                         Shared<KP>::THREADS, sizeof(Shared<KP>), p.stream, launch->overlaps, *b,
                         make_slab(b, plan, launch), make_memory<KP>(b, plan, launch, workspace).operands);
}

} // namespace
} // namespace kda

cudaError_t kda_sm80_backward_prepare(const kda_backward *b, const kda_backward_plan *plan,
                                      const kda_backward_launch *launch, void *workspace) {
    int KP = kda_sm80_padded_key_dim(b);
    return KP == 64    ? kda::launch_padded<64>(b, plan, launch, workspace)
           : KP == 128 ? kda::launch_padded<128>(b, plan, launch, workspace)
                       : kda::launch_padded<256>(b, plan, launch, workspace);
}
