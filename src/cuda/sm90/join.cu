/* SPDX-License-Identifier: MIT */
/*
 * Judges by the proofs whether every part's past was forgotten (spread.cuh). If so, finishes what parts leave: the outputs of
 * the first chunk, O_B + O_A S, with S as the part before left it, and states behind chains, which must not be overwritten
 * before all is known.
 */
#include "cuda/sm90/consume.cuh"
#include "cuda/sm90/launch.cuh"
#include "cuda/sm90/spread.cuh"

namespace kda {
namespace {

constexpr int THREADS = STATE_THREADS; /* a warp has 16 columns of V */
static_assert(THREADS >= KDA_MAX_PARTS, "each judges one");
constexpr int MARGIN = 24 + 7; /* log2: what is dropped is so far below what is kept; 2^7 channels are summed */

__device__ int largest_of(const int16_t (&sizes)[KDA_SM90_UNITS]) {
    int largest = EXACT_ZERO;
    for (int i = 0; i < KDA_SM90_UNITS; i++)
        largest = max(largest, sizes[i]);
    return largest;
}

/* What of the state before is left behind the part's first chunk, |A S|, against the state from zero. Sizes are up to twice
 * the largest elements. */
__device__ bool is_forgotten(const kda_sm90_proof &proof) {
    int left = largest_of(proof.A) + largest_of(proof.before);
    return left < EXACT_ZERO / 2 || left + MARGIN < largest_of(proof.kept);
}

__device__ uint32_t load_pair(const uint16_t *at) { return *reinterpret_cast<const uint32_t *>(at); }

/* O_A S of the part's first chunk, of the warp's columns of V. Mostly a loop, as code that runs once takes as long as it is
 * fetched. */
__device__ void multiply_states(const kda_sm90_spread &spread, float (&sums)[CHUNK / 16][2][4]) {
    int lane = threadIdx.x % 32;
    const uint16_t *O_A = spread.outputs + (blockIdx.x * (int64_t)CHUNK + lane / 4) * DIM + lane % 4 * 2;
    const uint4 *S = state_pieces(spread, blockIdx.x, threadIdx.x);
#pragma unroll 4
    for (int c = 0; c < DIM; c += 16, S += THREADS) {
        uint4 b = *S; /* channels c to c + 8, then the others; columns 0 to 8, then the others */
#pragma unroll
        for (int m = 0; m < CHUNK / 16; m++) {
            const uint16_t *rows = O_A + m * 16 * DIM + c;
            const uint32_t a[4] = {load_pair(rows), load_pair(rows + 8 * DIM), load_pair(rows + 8),
                                   load_pair(rows + 8 * DIM + 8)};
            mma(sums[m][0], a, b.x, b.z);
            mma(sums[m][1], a, b.y, b.w);
        }
    }
}

/* The outputs of the part's first chunk in the warp's columns of V: those from zero, and what is to be added. */
struct Correction {
    char *out;  /* the thread's first token and pair of columns */
    int tokens; /* that there are, from that one on */
    uint32_t own[CHUNK / 8][2];
    float sums[CHUNK / 16][2][4];

    __device__ uint32_t &pair(const kda_prefill &p, int m, int n) const {
        return *reinterpret_cast<uint32_t *>(out + m * 8 * p.out.stride[1] + n * 16);
    }
};

__device__ void find_correction(const kda_prefill &p, const kda_sm90_spread &spread, const kda_stretch &stretch,
                                const struct kda_sequence &sequence, Correction &c) {
    int lane = threadIdx.x % 32, column = threadIdx.x / 32 * KDA_SM90_UNIT_COLUMNS + lane % 4 * 2;
    struct kda_span span = kda_chunk_span(&p, stretch.n, sequence.length, stretch.begin);
    c.out = kda_row(&p.out, sequence.batch, sequence.first + span.first + lane / 4, stretch.head) + column * 2;
    c.tokens = (int)span.count - lane / 4;
#pragma unroll
    for (int m = 0; m < CHUNK / 8; m++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            c.own[m][n] = m * 8 < c.tokens ? c.pair(p, m, n) : 0;
    multiply_states(spread, c.sums);
}

__device__ void correct_outputs(const kda_prefill &p, const Correction &c) {
#pragma unroll
    for (int m = 0; m < CHUNK / 8; m++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float2 own = unpack_output(p.out.dtype, c.own[m][n]);
            const float *sum = &c.sums[m / 2][n][m % 2 * 2];
            if (m * 8 < c.tokens)
                c.pair(p, m, n) = pack_output(p.out.dtype, own.x + sum[0], own.y + sum[1]);
        }
}

__device__ void store_final(const kda_prefill &p, const kda_sm90_spread &spread, const kda_state &to) {
    float S[DIM / 8][4];
    const float4 *pieces = final_pieces(spread, blockIdx.x, threadIdx.x);
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
        *reinterpret_cast<float4 *>(S[c]) = pieces[c * THREADS];
    store_whole(to, S, 0);
}

/* Every chain begins in one part, and its first stretch tells. */
__device__ void say_what_is_left(const kda_prefill &p, const kda_sm90_spread &spread, kda_stretch stretch) {
    do
        if (stretch.begin == 0)
            spread.left[stretch.n * p.value_heads + stretch.head] = kda_cut_behind(&stretch);
    while (kda_next_stretch(&p, &spread.all, blockIdx.x, &stretch));
}

__global__ void __launch_bounds__(THREADS)
    join(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_spread spread) {
    let_next_begin();
    wait_for_kernel_before();
    const kda_stretch first = spread.firsts[blockIdx.x];
    const struct kda_sequence sequence = kda_sequence(&p, first.n);
    int look = threadIdx.x < spread.all.parts ? spread.looks[threadIdx.x] : UNCUT;
    Verdict verdict = ALL_CHAINS;
    Correction correction = {};
    if (!__syncthreads_or(look == SLOW)) { /* there are proofs, and all else */
        bool remembered = look == FAST && !is_forgotten(spread.proofs[threadIdx.x]);
        if (kda_cut_before(&first)) /* on its way while the others judge */
            find_correction(p, spread, first, sequence, correction);
        verdict = __syncthreads_or(remembered) ? CUT_CHAINS : NOTHING;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *spread.verdict = verdict;
    if (verdict == CUT_CHAINS && threadIdx.x == 0)
        say_what_is_left(p, spread, first);
    if (verdict != NOTHING || !kda_cut_before(&first))
        return;
    correct_outputs(p, correction);
    if (!kda_cut_behind(&first))
        store_final(p, spread, kda_state_at(&p, &p.final_state, sequence.slot, first.head));
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_join(const kda_prefill *p, kda_sm90_spread spread, cudaStream_t stream) {
    return kda::launch_behind(kda::join, dim3((unsigned)spread.all.parts), kda::THREADS, 0, stream, *p, spread);
}
