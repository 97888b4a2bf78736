/* SPDX-License-Identifier: MIT */
/* Takes R through chains (config.cuh):
 *     dU = M^T dO + KR exp2(G - e) R   dX = diag(beta) N^T dU   R <- exp2(e) exp2(G - e) R + QT^T dO - KT^T dX
 * Everything is transposed, so that an accumulator is, lane for lane, the next product's first operand. */
#include "cuda/sm90/backward/config.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tensor_maps.h"

namespace kda {
namespace {

constexpr int COLUMNS = 64, STAGES = 3, ADJOINT_THREADS = GROUP + 32; /* a warpgroup, and the warp that loads */

struct AdjointStage {
    ChunkOperands operands;
    __nv_bfloat16 d_out[TOKENS];
};

struct alignas(1024) AdjointShared {
    AdjointStage stages[STAGES];
    __nv_bfloat16 outputs[GROUP / 32][CHUNK * 16]; /* of each warp, swizzled by 32 bytes */
    uint64_t full[STAGES], empty[STAGES];
};

/* The chain's segments, chunks, and its CTA's columns of V. */
struct Work {
    Place first; /* its first segment */
    int64_t segment;
    int chunks, column;
};

__device__ Work find_chain_work(const kda_backward &b) {
    const kda_tokens &x = b.forward.base;
    int64_t n = blockIdx.x / x.value_heads, head = blockIdx.x % x.value_heads;
    struct kda_sequence s = kda_tokens_of(&x, n);
    Work work;
    work.segment = kda_first_segment(&x, SEGMENT, s.first, n);
    work.first = {n, head, 0, s.batch, s.first, s.length, 0, 0};
    work.chunks = (int)((s.length + CHUNK - 1) / CHUNK), work.column = blockIdx.y * COLUMNS;
    return work;
}

/* Chunk `chunk` of the chain. */
__device__ Place chunk_of_chain(const Work &work, int chunk) {
    Place at = work.first;
    at.first = (int64_t)chunk * CHUNK, at.token += at.first;
    at.count = (int)kda_min64(at.length - at.first, CHUNK);
    return at;
}

__device__ void load_chunks(const kda_backward &, const kda_sm90_backward_maps &maps, AdjointShared &shared,
                            const Work &work, const ChunkOperands *operands) {
    PipelineState<STAGES> pipe;
    uint64_t policy = read_again();
    for (int chunk = work.chunks - 1; chunk >= 0; chunk--, pipe.next()) {
        AdjointStage &stage = shared.stages[pipe.stage];
        uint64_t &full = shared.full[pipe.stage];
        wait(shared.empty[pipe.stage], pipe.parity ^ 1);
        Place at = chunk_of_chain(work, chunk);
        expect_bytes(full, sizeof(ChunkOperands) + TOKENS * 2);
        bring_bytes(&stage.operands, &operands[chunk], sizeof(ChunkOperands), full);
        bring_panel(stage.d_out, maps.d_out, work.column / PANEL, at, at.head, full, policy);
    }
}

/* Stores R as kernel gradients' threads have it (gradients.cu). */
__device__ void store_adjoint(uint32_t *to, int column, const float (&R)[DIM / 8][4]) {
    int lane = threadIdx.x % 32, first = column / 8 + threadIdx.x / 32 * 2;
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            to[((c / 2 * (DIM / 8) + first + n) * 2 + c % 2) * 32 + lane] =
                transpose(pack_bf16(R[c][2 * n], R[c][2 * n + 1]));
}

/* Values of tokens that do not exist become 0. */
__device__ void clear_values(Values &v, int count) {
    if (__builtin_expect(count == CHUNK, 1))
        return;
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int token = t * 16 + n / 2 * 8 + threadIdx.x % 4 * 2;
            v[t][n] &= token + 1 < count ? ~0u : token < count ? 0xffff : 0;
        }
}

/* Takes R through a chunk, and stores dX. */
__device__ void step_back(const kda_backward &b, const AdjointStage &stage, const Place &at, int column,
                          float (&R)[DIM / 8][4], __nv_bfloat16 *rows) {
    const StateOperands &state = stage.operands.state;
    uint64_t M = wgmma_operand(stage.operands.M, 0, 8 * PAIR_ROW, SWIZZLE_64);
    uint64_t N = wgmma_operand(state.N, 0, 8 * PAIR_ROW, SWIZZLE_64);
    uint64_t KR = wgmma_operand(state.KR, 0, 8 * ROW, SWIZZLE_128);
    uint64_t KT = wgmma_operand(state.KT, TOKENS * 2, 8 * ROW, SWIZZLE_128);
    uint64_t QT = wgmma_operand(stage.operands.QT, TOKENS * 2, 8 * ROW, SWIZZLE_128);
    uint32_t a[DIM / 16][4];
    float dU[CHUNK / 8][4], dX[CHUNK / 8][4];
    Values dO;
    load_values<COLUMNS>(stage.d_out, dO);
    clear_values(dO, at.count);
    decay_by(R, state.fraction);
#pragma unroll
    for (int c = 0; c < DIM / 16; c++)
        pack_operand(R[2 * c], R[2 * c + 1], a[c]);
    pin(dU);
    wgmma_fence();
    wgmma<true, false>(dU, dO[0], M);
    wgmma<true, true>(dU, dO[1], advanced(M, 16 * PAIR_ROW));
#pragma unroll
    for (int c = 0; c < DIM / 16; c++)
        wgmma<false, true>(dU, a[c], advanced(KR, c / 4 * TOKENS * 2 + c % 4 * 32));
    wgmma_commit();
    decay_by(R, state.whole);
    pin(R);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        wgmma<true, true>(R, dO[t], advanced(QT, t * 16 * ROW));
    wgmma_commit();
    alignas(16) float own[CHUNK / 4], steps[CHUNK / 4];
    load_scales(state.diagonal, own);
    load_scales(state.step, steps);
    wgmma_wait<1>();
    pin(dU);
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float2 x = unpack_bf16(dO[i / 2][i % 2 * 2 + n]);
            dU[i][2 * n] = fmaf(own[2 * i], x.x, dU[i][2 * n]);
            dU[i][2 * n + 1] = fmaf(own[2 * i + 1], x.y, dU[i][2 * n + 1]);
        }
    uint32_t u[CHUNK / 16][4];
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        pack_operand(dU[2 * t], dU[2 * t + 1], u[t]);
    pin(dX);
    wgmma_fence();
    wgmma<true, false>(dX, u[0], N);
    wgmma<true, true>(dX, u[1], advanced(N, 16 * PAIR_ROW));
    wgmma_commit();
    wgmma_wait<0>();
    pin(dX);
    pin(R);
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            dX[i][n] *= steps[2 * i + n % 2];
    uint32_t x[CHUNK / 16][4], negative[CHUNK / 16][4];
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++) {
        pack_operand(dX[2 * t], dX[2 * t + 1], x[t]);
#pragma unroll
        for (int n = 0; n < 4; n++)
            negative[t][n] = x[t][n] ^ 0x80008000;
    }
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        wgmma<true, true>(R, negative[t], advanced(KT, t * 16 * ROW));
    wgmma_commit();
    Outputs outputs;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            outputs.pairs[i][n] = x[i / 2][i % 2 * 2 + n];
    if (lane < at.count)
        outputs.to = kda_row(&b.dv, at.batch, at.token + lane, at.head) + (column + threadIdx.x / 32 * 16) * 2;
    store_pieces(outputs, rows);
    wgmma_wait<0>();
    pin(R);
}

__global__ void __launch_bounds__(ADJOINT_THREADS, 2)
    take_adjoint(const __grid_constant__ kda_backward b, const __grid_constant__ kda_sm90_backward_maps maps,
                 const ChunkOperands *operands, uint32_t *adjoints, int64_t segments) {
    extern __shared__ __align__(1024) uint8_t memory[];
    AdjointShared &shared = *reinterpret_cast<AdjointShared *>(memory);
    let_next_begin();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++)
            ptx::mbarrier_init(&shared.full[i], 1), ptx::mbarrier_init(&shared.empty[i], GROUP);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    __syncthreads();
    Work work = find_chain_work(b);
    wait_for_kernel_before();
    int64_t segment = work.first.head * segments + work.segment;
    if (threadIdx.x >= GROUP) {
        if (elected())
            load_chunks(b, maps, shared, work, operands + segment * CHUNKS);
        return;
    }
    const kda_tokens &x = b.forward.base;
    float R[DIM / 8][4];
    load_whole(from_column(kda_state_in(&x, &b.d_final_state, work.first.n, work.first.head), work.column), R);
    PipelineState<STAGES> pipe;
    for (int chunk = work.chunks - 1; chunk >= 0; chunk--, pipe.next()) {
        if (chunk == work.chunks - 1 || chunk % CHUNKS == CHUNKS - 1)
            store_adjoint(adjoints + (segment + chunk / CHUNKS) * (DIM * DIM / 2), work.column, R);
        wait(shared.full[pipe.stage], pipe.parity);
        step_back(b, shared.stages[pipe.stage], chunk_of_chain(work, chunk), work.column, R,
                  shared.outputs[threadIdx.x / 32]);
        ptx::mbarrier_arrive(&shared.empty[pipe.stage]);
    }
    store_whole(from_column(kda_state_in(&x, &b.d_initial_state, work.first.n, work.first.head), work.column),
                R, 0);
}

} // namespace
} // namespace kda

extern "C" cudaError_t kda_sm90_backward_adjoint(const struct kda_backward *b,
                                                 const struct kda_backward_plan *plan,
                                                 const struct kda_launch *launch,
                                                 const struct kda_sm90_backward_memory *memory) {
    using namespace kda;
    kda_sm90_backward_maps maps;
    cudaError_t error = kda_sm90_map_backward(b, &maps);
    return error
               ? error
               : launch_kernel(take_adjoint, *launch, ADJOINT_THREADS, sizeof(AdjointShared), b->forward.stream,
                               *b, maps, static_cast<const ChunkOperands *>(memory->operands), memory->adjoints,
                               plan->segments);
}
