/* SPDX-License-Identifier: MIT */
/*
 * Probes whether gates are strong where ranges begin (stream_k/ranges.cuh).
 *
 * The result decides only which kernels work. Those that drop a past measure that it was forgotten.
 */
#include "cuda/launch.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/mainloop/produce.cuh"
#include "cuda/sm90/stream_k/ranges.cuh"

namespace kda {
namespace {

constexpr int PAIRS = DIM / 2, RUNS = 8,
              THREADS = PAIRS * RUNS; /* a thread has two channels and a run of tokens */
constexpr int TOKENS = CHUNK / RUNS;
/* Stream-K is worth trying if every channel decays by so much over a chunk (log2). A is then below 2^-31 times
 * what the states differ by, if little of it moves between channels. */
constexpr float ENOUGH = -40;

/* log2 decay of the thread's channels over its tokens of the chunk. */
template <bool bounded> __device__ float2 decay(const kda_prefill &p, const kda_slice &slice) {
    struct kda_sequence sequence = kda_sequence(&p, slice.n);
    struct kda_span span = kda_chunk_span(&p, slice.n, sequence.length, slice.begin);
    int channel = threadIdx.x % PAIRS * 2, run = threadIdx.x / PAIRS * TOKENS;
    const char *rows =
        kda_row(&p.g, sequence.batch, sequence.first + span.first + run, slice.head) + channel * 2;
    uint32_t raw[TOKENS];
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
        raw[i] =
            run + i < span.count ? *reinterpret_cast<const uint32_t *>(rows + i * p.g.stride[1]) : NO_DECAY;
    Gate gate = find_gate<bounded>(p, slice.head, channel);
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        float2 g = unpack_bf16(raw[i]);
        sum.x += log2_decay<bounded>(gate, g.x, gate.offset.x),
            sum.y += log2_decay<bounded>(gate, g.y, gate.offset.y);
    }
    return sum;
}

__global__ void __launch_bounds__(THREADS)
    probe(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_stream_k stream_k) {
    let_next_begin();
    __shared__ kda_slice first;
    __shared__ float2 runs[RUNS][PAIRS];
    if (threadIdx.x == 0) {
        kda_first_slice(&p, &stream_k.split, blockIdx.x, &first);
        stream_k.firsts[blockIdx.x] = first;
    }
    __syncthreads();
    int seen = UNSPLIT;
    if (kda_split_before(&first)) {
        float2 &own = runs[threadIdx.x / PAIRS][threadIdx.x % PAIRS];
        own = is_bounded(&p) ? decay<true>(p, first) : decay<false>(p, first);
        __syncthreads();
        float2 sum = make_float2(0, 0);
#pragma unroll 1
        for (int i = 0; i < RUNS; i++) {
            float2 x = runs[i][threadIdx.x % PAIRS];
            sum.x += x.x, sum.y += x.y;
        }
        seen = __syncthreads_and(fmaxf(sum.x, sum.y) <= ENOUGH) ? FAST : SLOW;
    }
    if (threadIdx.x == 0)
        stream_k.probes[blockIdx.x] = seen;
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_probe(const kda_prefill *p, const kda_plan *, const kda_launch *launch,
                           const kda_sm90_memory *memory) {
    return kda::launch_kernel(kda::probe, *launch, kda::THREADS, 0, p->stream, *p, memory->stream_k);
}
