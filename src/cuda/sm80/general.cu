/* SPDX-License-Identifier: MIT */
/*
 * Takes the state of every sequence and value head through its chunks, with the operands that prepare.cu left.
 *
 * One CTA works a chain for 64 columns of V, and one warp 16 of them. Warps wait for each other only when
 * operands arrive. Everything is transposed, so that what one product leaves in registers is, lane for lane,
 * the first operand of the next:
 *     [W | Y]^T = S^T [KT; QT]^T    X^T = V^T - W^T    U^T = X^T INV^T    O^T = Y^T + U^T M^T
 *     S^T <- S^T diag(1 + carry) + U^T KR
 *
 * A sequence of which only a summary is wanted starts from zero; CTAs beyond the columns of V take the identity through
 * it, with v = 0.
 */
#include "cuda/chain.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80/columns.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/plan.h"

namespace kda {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int COLUMNS = WARPS * 16; /* of V, of one CTA */
static_assert(COLUMNS == KDA_SM80_COLUMNS, "what the plan makes grids for");
constexpr int STAGES = 3;

template <int KP> struct Stage {
    Operands<KP> operands;
    char values[]; /* v [CHUNK][COLUMNS] in its own dtype; 2-byte elements swizzled */
};

/* Bytes of a stage for elements of v of `size` bytes. */
template <int KP> __host__ __device__ constexpr int stage_bytes(int size) {
    return (int)sizeof(Operands<KP>) + CHUNK * COLUMNS * size;
}

/* Starts to copy one chunk's operands and values; nothing after the sequence's end. */
template <int KP>
__device__ void fetch(const kda_prefill &p, const Chain &chain, const Operands<KP> *all, int64_t chunk,
                      struct kda_span span, bool has_values, Stage<KP> &stage) {
    if (!span.count)
        return;
    const char *from = reinterpret_cast<const char *>(&all[chain.first_operands + chunk]);
    char *to = reinterpret_cast<char *>(&stage.operands);
    for (int i = threadIdx.x * 16; i < (int)sizeof(Operands<KP>); i += THREADS * 16)
        copy_async(to + i, from + i);

    if (!has_values)
        span.count = 0;
    fetch_values<THREADS, COLUMNS>(p.v, chain, span, stage.values);
}

/* The state that a chain starts from. */
template <int KP>
__device__ void load_first_state(const kda_prefill &p, const Chain &chain, kda_work work, bool identity,
                                 float (&S)[KP / 8][4]) {
    struct kda_state none = {nullptr, KDA_F32, 0, false};
    load_state<KP>(
        p, chain,
        work == KDA_WORK_SUMMARY ? none : kda_state_before(&p, chain.n, chain.sequence.slot, chain.head), S);
    if (identity)
        each_element<KP>(p, chain, S, [](float &s, int channel, int column) { s = channel == column; });
}

template <int KP>
__device__ void store_last_state(const kda_prefill &p, const Chain &chain, kda_work work, bool identity,
                                 float (&S)[KP / 8][4]) {
    int64_t place = kda_summary_of(&p.border, chain.n);
    struct kda_state final_state = kda_state_at(&p, &p.final_state, chain.sequence.slot, chain.head);
    if (final_state.data && work == KDA_WORK_ALL)
        store_state<KP>(p, chain, final_state, S);
    if (place >= 0)
        store_state<KP>(p, chain,
                        identity ? kda_summary_transition(&p.base, &p.border, place, chain.head)
                                 : kda_summary_bias(&p.base, &p.border, place, chain.head),
                        S);
}

/* sum^T [16][CHUNK] += u^T [16][CHUNK] M^T; M is lower triangular. */
__device__ void multiply_M(float (&sum)[CHUNK / 8][4], const Split (&u)[CHUNK / 16], const __nv_bfloat16 *M) {
    MatrixRow<CHUNK, CHUNK> rows(M, false);
#pragma unroll
    for (int j = 0; j < CHUNK / 16; j++)
#pragma unroll
        for (int i = j; i < CHUNK / 16; i++) {
            uint32_t b[4];
            ldmatrix(b, rows.at(i * 16, j * 16));
            mma(sum[2 * i], u[j].rounded, b[0], b[1]);
            mma(sum[2 * i + 1], u[j].rounded, b[2], b[3]);
            mma(sum[2 * i], u[j].rest, b[0], b[1]);
            mma(sum[2 * i + 1], u[j].rest, b[2], b[3]);
        }
}

template <int KP>
__device__ void advance(const kda_prefill &p, const Chain &chain, const Stage<KP> &stage, float (&S)[KP / 8][4],
                        float (&o)[CHUNK / 8][4]) {
    const Operands<KP> &operands = stage.operands;
    MatrixRow<2 * CHUNK, KP> queries_keys(operands.queries_keys, false);
    MatrixRow<CHUNK, KP> keys_to_end(operands.keys_to_end, true);
    float w[CHUNK / 8][4] = {}; /* W^T, then X^T */
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
        o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
#pragma unroll
    for (int c = 0; c < KP / 16; c++) {
        uint32_t a[4], b[4];
        pack_operand(S[2 * c], S[2 * c + 1], a);
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++) {
            ldmatrix(b, queries_keys.at(i * 16, c * 16));
            mma(w[2 * i], a, b[0], b[1]);
            mma(w[2 * i + 1], a, b[2], b[3]);
            ldmatrix(b, queries_keys.at(CHUNK + i * 16, c * 16));
            mma(o[2 * i], a, b[0], b[1]);
            mma(o[2 * i + 1], a, b[2], b[3]);
        }
    }
#pragma unroll
    for (int i = 0; i < CHUNK / 16; i++) {
        float v[2][4];
        load_values<COLUMNS>(p.v.dtype, stage.values, chain.share_column, i * 16, v);
#pragma unroll
        for (int n = 0; n < 4; n++)
            w[2 * i][n] = v[0][n] - w[2 * i][n], w[2 * i + 1][n] = v[1][n] - w[2 * i + 1][n];
    }
    float U[CHUNK / 8][4] = {};
    Split u[CHUNK / 16];
    multiply_inverse<false>(U, w, operands.inverse);
#pragma unroll
    for (int i = 0; i < CHUNK / 16; i++)
        split_operand(U[2 * i], U[2 * i + 1], u[i]);
    multiply_M(o, u, operands.M);
    int channel = threadIdx.x % 4 * 2;
#pragma unroll
    for (int c = 0; c < KP / 8; c++) {
        float2 carry = *reinterpret_cast<const float2 *>(&operands.carry[c * 8 + channel]);
        S[c][0] = fmaf(S[c][0], carry.x, S[c][0]), S[c][1] = fmaf(S[c][1], carry.y, S[c][1]);
        S[c][2] = fmaf(S[c][2], carry.x, S[c][2]), S[c][3] = fmaf(S[c][3], carry.y, S[c][3]);
    }
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int c = 0; c < KP / 16; c++) {
            uint32_t b[4];
            ldmatrix_transposed(b, keys_to_end.at(t * 16, c * 16));
            mma(S[2 * c], u[t].rounded, b[0], b[1]);
            mma(S[2 * c + 1], u[t].rounded, b[2], b[3]);
            mma(S[2 * c], u[t].rest, b[0], b[1]);
            mma(S[2 * c + 1], u[t].rest, b[2], b[3]);
        }
}

template <int KP>
__global__ void __launch_bounds__(THREADS)
    general(const __grid_constant__ kda_prefill p, const Operands<KP> *operands, int64_t chunks) {
    extern __shared__ __align__(16) char memory[];
    int bytes = stage_bytes<KP>(p.v.dtype == KDA_F32 ? 4 : 2);
    auto stage = [&](int64_t i) -> Stage<KP> & {
        return *reinterpret_cast<Stage<KP> *>(memory + i % STAGES * bytes);
    };
    Chain chain = find_chain<COLUMNS>(p, blockIdx.x, chunks);
    kda_work work = kda_work_on(&p.border, chain.n);
    bool identity = chain.column >= p.value_dim, whole = work == KDA_WORK_ALL;
    if (chain.sequence.slot < 0 || work == KDA_WORK_NONE || (identity && whole))
        return;
    if (identity) { /* columns of M */
        chain.column -= (int)(p.value_dim + COLUMNS - 1) / COLUMNS * COLUMNS;
        chain.columns = (int)min(p.key_dim - chain.column, (int64_t)COLUMNS);
    }

    float S[KP / 8][4], o[CHUNK / 8][4];
    load_first_state<KP>(p, chain, work, identity, S);
    if (whole)
        store_checkpoints<KP>(p, chain, 0, S);
    int64_t length = chain.sequence.length;
    for (int i = 0; i < STAGES - 1; i++) {
        fetch<KP>(p, chain, operands, i, kda_chunk_span(&p, chain.n, length, i), !identity, stage(i));
        copy_async_commit();
    }
    for (int64_t chunk = 0;; chunk++) {
        struct kda_span span = kda_chunk_span(&p, chain.n, length, chunk);
        if (!span.count)
            break;
        copy_async_wait<STAGES - 2>();
        __syncthreads(); /* this chunk has arrived for all; the stage of the last one is free */
        int64_t next = chunk + STAGES - 1;
        fetch<KP>(p, chain, operands, next, kda_chunk_span(&p, chain.n, length, next), !identity, stage(next));
        copy_async_commit();
        advance<KP>(p, chain, stage(chunk), S, o);
        if (!whole)
            continue;
        store_outputs<COLUMNS>(p.out, chain, span, o);
        store_checkpoints<KP>(p, chain, span.first + span.count, S);
    }
    store_last_state<KP>(p, chain, work, identity, S);
}

} // namespace
} // namespace kda

template <int KP>
static cudaError_t launch_padded(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                                 const void *operands) {
    using namespace kda;
    int bytes = STAGES * stage_bytes<KP>(p->v.dtype == KDA_F32 ? 4 : 2);
    return launch_kernel(general<KP>, *launch, THREADS, bytes, p->stream, *p,
                         static_cast<const Operands<KP> *>(operands), plan->chunks);
}

cudaError_t kda_sm80_general(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                             void *operands) {
    return p->key_dim <= 64    ? launch_padded<64>(p, plan, launch, operands)
           : p->key_dim <= 128 ? launch_padded<128>(p, plan, launch, operands)
                               : launch_padded<256>(p, plan, launch, operands);
}
