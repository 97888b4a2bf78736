/* SPDX-License-Identifier: MIT */
/*
 * Takes the state of every sequence and value head through its chunks, as sm80/general.cu does, with wgmma.
 *
 * A CTA works a chain for 64 columns of V in each of its consumer warpgroups, which share nothing but the
 * operands. A warp of one more warpgroup, the loader, brings these and the values some chunks ahead. A
 * consumer's state stays in its accumulators. Everything is transposed, so that an accumulator is, lane for
 * lane, the next product's first operand:
 *     [W | Y]^T = S^T [KT; QT]^T    X^T = V^T - W^T    U^T = X^T INV^T    O^T = Y^T + U^T M^T
 *     S^T <- S^T diag(1 + carry) + U^T KR
 */
#include "cuda/launch.cuh"
#include "cuda/sm90/general/config.cuh"
#include "cuda/sm90/kernels.h"

namespace kda {
namespace {

template <int KP, int GROUPS>
__device__ void load(const kda_prefill &p, const WorkTile &work, const Operands<KP> *all,
                     Shared<KP, GROUPS> &shared) {
    const Chain &chain = work.chain;
    constexpr int COLUMNS = GROUP_COLUMNS * GROUPS, PIECES = COLUMNS / 8;
    int lane = threadIdx.x % 32;
    PipelineState<STAGES<GROUPS>> pipe;
    for (int64_t chunk = work.begin; chunk < work.end; chunk++, pipe.next()) {
        struct kda_span span = kda_chunk_span(&p, chain.n, chain.sequence.length, chunk);
        if (!span.count)
            return;
        int64_t rows_given = work.identity ? 0 : span.count;
        Stage<KP, GROUPS> &stage = shared.stages[pipe.stage];
        uint64_t &full = shared.full[pipe.stage];
        wait(shared.empty[pipe.stage], pipe.parity ^ 1);
        if (lane == 0) {
            ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &full,
                                           (uint32_t)sizeof(Operands<KP>));
            ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, &stage.operands,
                               &all[chain.first_operands + chunk], (uint32_t)sizeof(Operands<KP>), &full);
        }
        const char *rows = kda_row(&p.v, chain.sequence.batch, chain.sequence.first + span.first, chain.head) +
                           chain.column * 2;
        for (int i = lane; i < CHUNK * PIECES; i += 32) {
            int t = i / PIECES, c = i % PIECES * 8;
            copy_async(&stage.values[swizzled<CHUNK, COLUMNS>(t, c)],
                       t < rows_given ? rows + t * p.v.stride[1] + c * 2 : p.v.data, t < rows_given);
        }
        ptx::cp_async_mbarrier_arrive_noinc(&full);
    }
}

/* Takes S through one chunk; o becomes its outputs. `meanwhile` runs during the first product. */
template <int KP, int GROUPS, Pass pass, class F>
__device__ void advance(const Stage<KP, GROUPS> &stage, float (&S)[KP / 8][4], float (&o)[CHUNK / 8][4],
                        F meanwhile) {
    const Operands<KP> &operands = stage.operands;
    constexpr int ROW = PANEL * 2; /* bytes */
    uint64_t queries_keys = wgmma_operand(operands.queries_keys, 0, 8 * ROW, SWIZZLE_128);
    uint64_t keys_to_end = wgmma_operand(operands.keys_to_end, CHUNK * ROW, 8 * ROW, SWIZZLE_128);
    uint64_t inverse = wgmma_operand(operands.inverse, 0, 8 * CHUNK * 4, SWIZZLE_128);
    uint64_t M = wgmma_operand(operands.M, 0, 8 * CHUNK * 2, SWIZZLE_64);

    float wy[CHUNK / 4][4]; /* W^T, then Y^T */
    uint32_t a[KP / 16][4];
#pragma unroll
    for (int c = 0; c < KP / 16; c++)
        pack_operand(S[2 * c], S[2 * c + 1], a[c]);
    pin(wy);
    wgmma_fence();
    wgmma<false, false>(wy, a[0], queries_keys);
#pragma unroll
    for (int c = 1; c < KP / 16; c++)
        wgmma<false, true>(wy, a[c], advanced(queries_keys, c / 4 * (2 * CHUNK * ROW) + c % 4 * 32));
    wgmma_commit();

    if (pass != LOCAL)
        meanwhile();
    uint32_t v[CHUNK / 16][4];
    MatrixRow<CHUNK, GROUP_COLUMNS * GROUPS> values(stage.values, false);
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        ldmatrix_transposed(v[t], values.at(t * 16, threadIdx.x / 32 * 16));
    int channel = threadIdx.x % 4 * 2;
#pragma unroll
    for (int c = 0; c < KP / 8; c++) {
        float2 carry = *reinterpret_cast<const float2 *>(&operands.carry[c * 8 + channel]);
        S[c][0] = fmaf(S[c][0], carry.x, S[c][0]), S[c][1] = fmaf(S[c][1], carry.y, S[c][1]);
        S[c][2] = fmaf(S[c][2], carry.x, S[c][2]), S[c][3] = fmaf(S[c][3], carry.y, S[c][3]);
    }
    wgmma_wait<0>();
    pin(wy);
    float U[CHUNK / 8][4];
    uint32_t x[CHUNK / 8][4];
    Split u[CHUNK / 16];
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++) {
        float tile[4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float2 pair = unpack_bf16(v[i / 2][i % 2 * 2 + n]);
            tile[2 * n] = pair.x - wy[i][2 * n], tile[2 * n + 1] = pair.y - wy[i][2 * n + 1];
        }
        tf32_operand(tile, x[i]);
    }
    pin(U);
    wgmma_fence();
    wgmma_tf32<false>(U, x[0], inverse);
#pragma unroll
    for (int i = 1; i < CHUNK / 8; i++)
        wgmma_tf32<true>(U, x[i], advanced(inverse, i * 32));
    wgmma_commit();
    wgmma_wait<0>();
    pin(U);

#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        split_operand(U[2 * t], U[2 * t + 1], u[t]);
    pin(S);
    pin(o);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++) {
        wgmma<true, true>(S, u[t].rounded, advanced(keys_to_end, t * 16 * ROW));
        wgmma<true, true>(S, u[t].rest, advanced(keys_to_end, t * 16 * ROW));
    }
    if constexpr (pass != LOCAL) {
        wgmma<false, false>(o, u[0].rounded, M);
        wgmma<false, true>(o, u[1].rounded, advanced(M, 32));
        wgmma<false, true>(o, u[0].rest, M);
        wgmma<false, true>(o, u[1].rest, advanced(M, 32));
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(S);
    pin(o);
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            o[i][n] += wy[CHUNK / 8 + i][n];
}

template <int KP, Pass pass>
__device__ void begin_state(const kda_prefill &p, const WorkTile &work, const kda_sm90_general_memory &segments,
                            float (&S)[KP / 8][4]) {
    const Chain &chain = work.chain;
    load_state<KP>(p, chain, state_before<pass>(p, work, segments), S);
    if (work.identity)
        each_element<KP>(p, chain, S,
                         [](float &s, int channel, int column) { s = channel == column ? 1.f : 0.f; });
    if (pass == LOCAL && work.segment == 0)
        store_state<KP>(p, chain, summary_state(p, segments, work, segments.count - 1), S);
    if (pass != LOCAL && work.segment == 0)
        store_checkpoints<KP>(p, chain, 0, S);
}

template <int KP, int GROUPS, Pass pass>
__device__ void consume(const kda_prefill &p, const WorkTile &work, const kda_sm90_general_memory &segments,
                        Shared<KP, GROUPS> &shared) {
    const Chain &chain = work.chain;
    float S[KP / 8][4], o[CHUNK / 8][4];
    begin_state<KP, pass>(p, work, segments, S);
    __nv_bfloat16 *rows = shared.rows[threadIdx.x / 32];
    bool pieces = in_pieces(p.out);
    Outputs outputs; /* of the chunk before */
    float growth = 0;
    PipelineState<STAGES<GROUPS>> pipe;
    for (int64_t chunk = work.begin; chunk < work.end; chunk++, pipe.next()) {
        struct kda_span span = kda_chunk_span(&p, chain.n, chain.sequence.length, chunk);
        if (!span.count)
            break;
        wait(shared.full[pipe.stage], pipe.parity);
        advance<KP, GROUPS, pass>(shared.stages[pipe.stage], S, o, [&] { store_pieces(outputs, rows); });
        if (pass == LOCAL)
            growth += shared.stages[pipe.stage].operands.growth;
        ptx::mbarrier_arrive(&shared.empty[pipe.stage]);
        if (pass == LOCAL)
            continue;
        if (pieces) {
#pragma unroll
            for (int i = 0; i < CHUNK / 8; i++) {
                outputs.pairs[i][0] = pack_output(p.out.dtype, o[i][0], o[i][1]);
                outputs.pairs[i][1] = pack_output(p.out.dtype, o[i][2], o[i][3]);
            }
            outputs.to = output_pointer(p, chain.sequence.batch, chain.sequence.first + span.first, span.count,
                                        chain.head, chain.column + threadIdx.x / 32 * 16);
        } else
            store_outputs<GROUP_COLUMNS * GROUPS>(p.out, chain, span, o);
        store_checkpoints<KP>(p, chain, span.first + span.count, S);
    }
    if (pass != LOCAL)
        store_pieces(outputs, rows);
    if (pass == LOCAL && !work.identity && chain.column == 0 && threadIdx.x == 0)
        growth_of(segments, p, chain, work.segment) = growth;
    kda_state to = state_after<pass>(p, work, segments);
    if (to.data)
        store_state<KP>(p, chain, to, S);
}

template <int KP, int GROUPS, Pass pass>
__global__ void __launch_bounds__((GROUPS + 1) * GROUP, 3 - GROUPS)
    general(const __grid_constant__ kda_prefill p, const Operands<KP> *operands, int64_t chunks,
            kda_sm90_general_memory segments) {
    extern __shared__ __align__(1024) char memory[];
    Shared<KP, GROUPS> &shared = *reinterpret_cast<Shared<KP, GROUPS> *>(memory);
    WorkTile work = find_work<GROUP_COLUMNS * GROUPS, pass>(p, chunks, segments);
    if (work.chain.sequence.slot < 0 || (pass == LOCAL && left_out(work)))
        return;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES<GROUPS>; i++) {
            ptx::mbarrier_init(&shared.full[i], 32 + 1);
            ptx::mbarrier_init(&shared.empty[i], GROUPS * GROUP);
        }
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    __syncthreads();
    if (threadIdx.x >= GROUPS * GROUP) {
        give_registers<40>();
        if (threadIdx.x < GROUPS * GROUP + 32)
            load<KP, GROUPS>(p, work, operands, shared);
    } else {
        take_registers<GROUPS == 2 ? 232 : 208>();
        consume<KP, GROUPS, pass>(p, work, segments, shared);
    }
}

template <int GROUPS, Pass pass>
cudaError_t launch_pass(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                        const kda_sm90_memory *memory) {
    constexpr int THREADS = (GROUPS + 1) * GROUP;
    if (p->key_dim <= 64)
        return launch_kernel(general<64, GROUPS, pass>, *launch, THREADS, sizeof(Shared<64, GROUPS>), p->stream,
                             *p, static_cast<const Operands<64> *>(memory->operands), plan->chunks,
                             memory->general);
    return launch_kernel(general<128, GROUPS, pass>, *launch, THREADS, sizeof(Shared<128, GROUPS>), p->stream,
                         *p, static_cast<const Operands<128> *>(memory->operands), plan->chunks,
                         memory->general);
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_general(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                             const kda_sm90_memory *memory) {
    return (launch->config == 2 ? kda::launch_pass<2, kda::WHOLE>
                                : kda::launch_pass<1, kda::WHOLE>)(p, plan, launch, memory);
}

cudaError_t kda_sm90_general_local(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                                   const kda_sm90_memory *memory) {
    return kda::launch_pass<1, kda::LOCAL>(p, plan, launch, memory);
}

cudaError_t kda_sm90_general_resume(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                                    const kda_sm90_memory *memory) {
    return kda::launch_pass<1, kda::RESUME>(p, plan, launch, memory);
}
