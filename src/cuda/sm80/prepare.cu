/* SPDX-License-Identifier: MIT */
/* Finds what does not depend on the state, for every chunk of every value head at once: KT, QT, KR, M and the inverse
 * of I + L (docs/maths.md). */
#include "cuda/sm80/prepare.cuh"

#include "cuda/launch.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/plan.h"

namespace kda {
namespace {

using namespace chunks;

/* One warp: bounds how much the chunk's transition grows a state. A token's transition, (I - beta k k^T)
 * diag(exp(a)), grows none by more than max(|1 - beta |k|^2|, 1) times the largest exp(a). */
template <int KP> __device__ void bound_growth(const Shared<KP> &shared, Operands<KP> &out) {
    int token = threadIdx.x % 32;
    float growth = log2f(fmaxf(fabsf(1 - shared.beta[token] * shared.key_square[token]), 1.f));
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2)
        growth += __shfl_xor_sync(~0u, growth, bit);
    if (token == 0)
        out.growth = growth + shared.growth[0] + shared.growth[1];
}

/* (I + L)^-1 diag(beta) */
template <int KP> __device__ void store_inverse(const Shared<KP> &shared, Operands<KP> &out) {
    float x[CHUNK], with_beta[CHUNK];
    invert<true>(shared, x, with_beta);
    store_tf32_row(threadIdx.x, with_beta, out.inverse);
}

template <int KP, bool all_bf16>
__global__ void __launch_bounds__(Shared<KP>::THREADS, 512 / Shared<KP>::THREADS)
    prepare(const __grid_constant__ kda_prefill p, void *operands) {
    extern __shared__ __align__(16) char memory[];
    Shared<KP> &shared = *reinterpret_cast<Shared<KP> *>(memory);
    int64_t chunk = blockIdx.x, head = blockIdx.y;
    /* The last sequence whose chunks begin at or before this one. */
    int64_t low = 0, high = p.sequences - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (kda_first_chunk(&p, kda_sequence(&p, middle).first, middle) <= chunk)
            low = middle;
        else
            high = middle - 1;
    }
    struct kda_sequence s = kda_sequence(&p, low);
    chunk -= kda_first_chunk(&p, s.first, low); /* negative where sequences do not begin at token 0 */
    struct kda_span span = {0, 0};
    if (chunk >= 0)
        span = kda_chunk_span(&p, low, s.length, chunk);
    if (s.slot < 0 || span.count == 0)
        return;
    Position at;
    at.block = threadIdx.x / Shared<KP>::PAIRS;
    at.batch = s.batch, at.token = s.first + span.first + at.block * BLOCK;
    at.count = (int)span.count - at.block * BLOCK;
    at.head = head, at.key_head = head / (p.value_heads / p.heads);
    at.c = threadIdx.x % Shared<KP>::PAIRS * 2;
    at.channels = (int)p.key_dim - at.c;
    Operands<KP> &out = static_cast<Operands<KP> *>(operands)[head * gridDim.x + blockIdx.x];
    prepare_tiles<KP, all_bf16>(p, at, shared, out);
    if (threadIdx.x < 32) {
        store_inverse(shared, out);
        bound_growth(shared, out);
    }
}

} // namespace
} // namespace kda

template <int KP>
static cudaError_t launch_padded(const kda_prefill *p, const kda_launch *launch, void *operands) {
    using namespace kda;
    static_assert(sizeof(Operands<KP>) == KDA_SM80_OPERANDS(KP), "what the plan makes room for");
    bool all_bf16 = p->q.dtype == KDA_BF16 && p->k.dtype == KDA_BF16 && p->g.dtype == KDA_BF16;
    return launch_kernel(all_bf16 ? prepare<KP, true> : prepare<KP, false>, *launch, Shared<KP>::THREADS,
                         sizeof(Shared<KP>), p->stream, *p, operands);
}

cudaError_t kda_sm80_prepare(const kda_prefill *p, const kda_plan *, const kda_launch *launch, void *operands) {
    return p->key_dim <= 64    ? launch_padded<64>(p, launch, operands)
           : p->key_dim <= 128 ? launch_padded<128>(p, launch, operands)
                               : launch_padded<256>(p, launch, operands);
}
