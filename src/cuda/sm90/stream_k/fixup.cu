/* SPDX-License-Identifier: MIT */
/*
 * Verifies by the proofs that every range's past was forgotten (stream_k/ranges.cuh). If so, it finishes what
 * ranges leave: outputs of first chunks, O_B + O_A S, with S as the range before left it; and final states of
 * split chains, which may not be overwritten before all is known.
 */
#include "cuda/launch.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/mainloop/consume.cuh"
#include "cuda/sm90/stream_k/ranges.cuh"

namespace kda {
namespace {

constexpr int THREADS = STATE_THREADS; /* a warp has 16 columns of V */
static_assert(THREADS >= KDA_MAX_RANGES, "each judges one");
constexpr int MARGIN = 24 + 7; /* log2: what is dropped is so far below what is kept; 2^7 channels are summed */

__device__ int largest_of(const int16_t (&sizes)[KDA_SM90_EXPONENTS]) {
    static_assert(sizeof sizes == sizeof(uint4) && sizeof(kda_sm90_proof) % sizeof(uint4) == 0, "a load each");
    uint4 pairs = *reinterpret_cast<const uint4 *>(sizes);
    uint32_t largest = __vmaxs2(__vmaxs2(pairs.x, pairs.y), __vmaxs2(pairs.z, pairs.w));
    return max((int)(int16_t)largest, (int)largest >> 16);
}

/* What the first chunk leaves of the state before the range, |A S|, against the local state. Sizes are up to
 * twice the largest elements. */
__device__ bool is_forgotten(const kda_sm90_proof &proof) {
    int remaining = largest_of(proof.A) + largest_of(proof.before);
    return remaining < EXACT_ZERO / 2 || remaining + MARGIN < largest_of(proof.kept);
}

/* The first chunk of a range that begins within a chain: its outputs from zero, and what is to be added to
 * them. */
struct FirstChunk {
    char *out;            /* the thread's first token and pair of columns */
    int64_t token_stride; /* bytes */
    int tokens;           /* that exist, from that one on */
    uint32_t own[CHUNK / 8][2];
    /* The state before the range, 16 channels each: the first 8 in x and y, columns 0 to 7 in x and z. */
    uint4 S[DIM / 16];

    __device__ FirstChunk(const kda_prefill &p, const kda_slice &first, const struct kda_sequence &sequence) {
        int lane = threadIdx.x % 32, column = threadIdx.x / 32 * KDA_SM90_EXPONENT_COLUMNS + lane % 4 * 2;
        struct kda_span span = kda_chunk_span(&p, first.n, sequence.length, first.begin);
        token_stride = p.out.stride[1];
        out = kda_row(&p.out, sequence.batch, sequence.first + span.first + lane / 4, first.head) + column * 2;
        tokens = (int)span.count - lane / 4;
    }
    __device__ uint32_t &pair(int m, int n) const {
        return *reinterpret_cast<uint32_t *>(out + m * 8 * token_stride + n * 16);
    }
};

using Rows = uint16_t[CHUNK][DIM + 8]; /* O_A; no two rows' pieces of 16 bytes meet in a bank */

/* Issues all loads together: they take as long as one. */
__device__ void load_first_chunk(const kda_sm90_stream_k &stream_k, FirstChunk &first_chunk, Rows &rows) {
    constexpr int PIECES = DIM / 8, COUNT = CHUNK * PIECES / THREADS;
    const uint4 *O_A = reinterpret_cast<const uint4 *>(stream_k.outputs) + blockIdx.x * CHUNK * PIECES;
    uint4 pieces[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        pieces[i] = O_A[i * THREADS + threadIdx.x];
    const uint4 *S = state_pieces(stream_k, blockIdx.x, threadIdx.x);
#pragma unroll
    for (int c = 0; c < DIM / 16; c++)
        first_chunk.S[c] = S[c * THREADS];
#pragma unroll
    for (int m = 0; m < CHUNK / 8; m++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            first_chunk.own[m][n] = m * 8 < first_chunk.tokens ? first_chunk.pair(m, n) : 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        int piece = i * THREADS + threadIdx.x;
        *reinterpret_cast<uint4 *>(&rows[piece / PIECES][piece % PIECES * 8]) = pieces[i];
    }
}

/* Adds O_A S in the warp's columns of V. */
__device__ void add_history(kda_dtype dtype, const FirstChunk &first_chunk, const Rows &rows) {
    float sums[CHUNK / 16][2][4] = {};
    uint32_t lane = threadIdx.x % 32, at = shared_address(&rows[lane % 16][lane / 16 * 8]);
#pragma unroll
    for (int c = 0; c < DIM / 16; c++)
#pragma unroll
        for (int m = 0; m < CHUNK / 16; m++) {
            uint32_t a[4];
            ldmatrix(a, at + m * 16 * (uint32_t)sizeof *rows + c * 32);
            mma(sums[m][0], a, first_chunk.S[c].x, first_chunk.S[c].z);
            mma(sums[m][1], a, first_chunk.S[c].y, first_chunk.S[c].w);
        }
#pragma unroll
    for (int m = 0; m < CHUNK / 8; m++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float2 own = unpack_output(dtype, first_chunk.own[m][n]);
            const float *sum = &sums[m / 2][n][m % 2 * 2];
            if (m * 8 < first_chunk.tokens)
                first_chunk.pair(m, n) = pack_output(dtype, own.x + sum[0], own.y + sum[1]);
        }
}

/* Says which chains are pending. Every chain begins in one range, whose CTA says it. */
__device__ void mark_pending(const kda_prefill &p, const kda_sm90_stream_k &stream_k, kda_slice slice) {
    do
        if (slice.begin == 0)
            stream_k.pending[slice.n * p.value_heads + slice.head] = kda_split_after(&slice);
    while (kda_next_slice(&p, &stream_k.split, blockIdx.x, &slice));
}

/* All CTAs find the same outcome, each after it has issued the loads that it will need. */
__device__ Outcome verify(const kda_sm90_stream_k &stream_k, int seen) {
    bool remembered = seen == FAST && !is_forgotten(stream_k.proofs[threadIdx.x]);
    return __syncthreads_or(remembered) ? SPLIT_CHAINS : NOTHING;
}

/* Finishes the outputs of the range's first chunk, if a chain is split in front of it. */
__device__ void finish_outputs(const kda_prefill &p, const kda_sm90_stream_k &stream_k, int seen,
                               const kda_slice &first, const struct kda_sequence &sequence) {
    __shared__ alignas(16) Rows rows;
    FirstChunk first_chunk(p, first, sequence);
    bool split_before = kda_split_before(&first);
    wait_for_kernel_before();
    if (split_before)
        load_first_chunk(stream_k, first_chunk, rows);
    Outcome outcome = verify(stream_k, seen);
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *stream_k.outcome = outcome;
    if (outcome == SPLIT_CHAINS && threadIdx.x == 0)
        mark_pending(p, stream_k, first);
    if (outcome == NOTHING && split_before)
        add_history(p.out.dtype, first_chunk, rows);
}

/* Finishes the final state of a chain that is split in front of the range and ends in it. */
__device__ void finish_state(const kda_prefill &p, const kda_sm90_stream_k &stream_k, int seen,
                             const kda_slice &first, const struct kda_sequence &sequence) {
    if (!kda_split_before(&first) || kda_split_after(&first))
        return;
    float S[DIM / 8][4];
    struct kda_state to = kda_state_at(&p, &p.final_state, sequence.slot, first.head);
    const float4 *pieces = final_pieces(p, stream_k, first.n, first.head, threadIdx.x);
    wait_for_kernel_before();
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
        *reinterpret_cast<float4 *>(S[c]) = pieces[c * THREADS];
    if (verify(stream_k, seen) == NOTHING)
        store_whole(to, S, 0);
}

/* Two CTAs for a range: one finishes outputs, the other a state. */
__global__ void __launch_bounds__(THREADS, 2)
    fixup(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_stream_k stream_k) {
    let_next_begin();
    bool state = blockIdx.y;
    /* All that the probe left is there already (persistent.cu). The rest is there when the kernel before has
     * ended. */
    int seen = threadIdx.x < stream_k.split.ranges ? stream_k.probes[threadIdx.x] : UNSPLIT;
    if (__syncthreads_or(seen == SLOW)) {
        wait_for_kernel_before();
        if (!state && blockIdx.x == 0 && threadIdx.x == 0)
            *stream_k.outcome = ALL_CHAINS;
        return;
    }
    const kda_slice first = stream_k.firsts[blockIdx.x];
    const struct kda_sequence sequence = kda_sequence(&p, first.n);
    if (state)
        finish_state(p, stream_k, seen, first, sequence);
    else
        finish_outputs(p, stream_k, seen, first, sequence);
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_fixup(const kda_prefill *p, const kda_plan *, const kda_launch *launch,
                           const kda_sm90_memory *memory) {
    return kda::launch_kernel(kda::fixup, *launch, kda::THREADS, 0, p->stream, *p, memory->stream_k);
}
