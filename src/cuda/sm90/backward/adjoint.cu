/* SPDX-License-Identifier: MIT */
/* Takes R through chains, by operands that prepare has multiplied out (config.cuh):
 *     dX = P^T dO + W R   R <- exp2(G) R + QT^T dO - KT^T dX
 * Everything is transposed, so that an accumulator is, lane for lane, the next product's first operand. A chunk waits
 * for two products only, W R and KT^T dX; the decay and QT^T dO run beside the first, what leaves beside the second. */
#include "cuda/sm90/backward/config.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tensor_maps.h"

namespace kda {
namespace {

constexpr int COLUMNS = 64, ADJOINT_THREADS = GROUP + 32; /* a warpgroup, and the warp that loads */
enum Barrier { BARRIER_OUTPUTS = 1 };

/* Where two CTAs share a multiprocessor, and where each has its own: a chunk then takes less time than its operands
 * need to come. */
constexpr int SHARED_STAGES = 3, OWN_STAGES = 6;

/* When a chunk has been worked, dX of as many chunks may still be on its way. */
constexpr int STORED_LATER = 2;

struct alignas(1024) AdjointStage {
    __nv_bfloat16 d_out[TOKENS];
    uint8_t operands[ADJOINT_BYTES]; /* of ChunkOperands */
};

template <int STAGES> struct alignas(1024) AdjointShared {
    AdjointStage stages[STAGES];
    __nv_bfloat16 outputs[2][TOKENS]; /* dX of chunks, alternately */
    uint64_t full[STAGES], empty[STAGES];
};
static_assert(2 * (sizeof(AdjointShared<SHARED_STAGES>) + 1024) <= 228 * 1024, "two on a multiprocessor");

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
    /* By a shuffle the compiler knows that a warp agrees on it: descriptors then stay in uniform registers. */
    work.chunks = __shfl_sync(~0u, (int)((s.length + CHUNK - 1) / CHUNK), 0);
    work.column = blockIdx.y * COLUMNS;
    return work;
}

/* Chunk `chunk` of the chain. */
__device__ Place chunk_of_chain(const Work &work, int chunk) {
    Place at = work.first;
    at.first = (int64_t)chunk * CHUNK, at.token += at.first;
    at.count = (int)kda_min64(at.length - at.first, CHUNK);
    return at;
}

/* Tells kernel gradients that this half of a segment's R and dX is stored. */
__device__ void announce(uint32_t *done) {
    ptx::fence_proxy_async(ptx::space_global);
    count_up(done);
}

/* Loads chunks, and announces the segments from the last to the second. When a chunk has been worked, those after the
 * next one are stored. */
template <int STAGES>
__device__ void load_chunks(const kda_sm90_backward_maps &maps, AdjointShared<STAGES> &shared, const Work &work,
                            const ChunkOperands *operands, uint32_t *done) {
    PipelineState<STAGES> pipe;
    uint64_t policy = read_again();
    for (int chunk = work.chunks - 1; chunk > -STAGES; chunk--, pipe.next()) {
        AdjointStage &stage = shared.stages[pipe.stage];
        uint64_t &full = shared.full[pipe.stage];
        wait(shared.empty[pipe.stage], pipe.parity ^ 1);
        int worked = chunk + STAGES, first = worked + STORED_LATER;
        if (first < work.chunks && first % CHUNKS == 0)
            announce(&done[first / CHUNKS]);
        if (chunk < 0)
            continue;
        Place at = chunk_of_chain(work, chunk);
        expect_bytes(full, ADJOINT_BYTES + TOKENS * 2);
        bring_bytes(stage.operands, &operands[chunk], ADJOINT_BYTES, full);
        bring_panel(stage.d_out, maps.d_out, work.column / PANEL, at, at.head, full, policy);
    }
}

/* Stores R^T, rounded, where kernel gradients takes it from (config.cuh). */
__device__ void store_adjoint(uint4 *to, const uint32_t (&R)[DIM / 16][4]) {
#pragma unroll
    for (int c = 0; c < DIM / 16; c++)
        to[c * (DIM / 16 * 32)] = make_uint4(R[c][0], R[c][1], R[c][2], R[c][3]);
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

/* Sends dX from `rows` to memory. */
__device__ void send_outputs(const kda_backward &b, const CUtensorMap &map, const Place &at, int column,
                             const __nv_bfloat16 *rows) {
    if (at.count == CHUNK) {
        if (threadIdx.x / 32 == 0 && elected()) {
            const int32_t where[4] = {column, (int32_t)at.head, (int32_t)at.token, (int32_t)at.batch};
            ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, where, rows);
            ptx::cp_async_bulk_commit_group();
        }
        return;
    }
    int token = threadIdx.x / 4, part = threadIdx.x % 4 * 16; /* what lies after is another sequence's */
    if (token >= at.count)
        return;
    char *row = kda_row(&b.dv, at.batch, at.token + token, at.head) + column * 2;
#pragma unroll
    for (int i = part; i < part + 16; i += 8)
        *reinterpret_cast<uint4 *>(row + i * 2) =
            *reinterpret_cast<const uint4 *>(&rows[swizzled<CHUNK, COLUMNS>(token, i)]);
}

/* What of a chunk does not wait for R. */
struct Begun {
    uint64_t P;
    Values dO;
    float dX[CHUNK / 8][4]; /* what P's diagonal makes of dO */
};

__device__ const ChunkOperands &operands_of(const AdjointStage &stage) {
    return *reinterpret_cast<const ChunkOperands *>(stage.operands);
}

__device__ void begin_chunk(const AdjointStage &stage, int count, Begun &begun) {
    const ChunkOperands &in = operands_of(stage);
    alignas(16) float own[CHUNK / 4];
    begun.P = wgmma_operand(in.P, 0, 8 * PAIR_ROW, SWIZZLE_64);
    load_values<COLUMNS>(stage.d_out, begun.dO);
    load_scales(in.own, own);
    clear_values(begun.dO, count);
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float2 x = unpack_bf16(begun.dO[i / 2][i % 2 * 2 + n]);
            begun.dX[i][2 * n] = own[2 * i] * x.x, begun.dX[i][2 * n + 1] = own[2 * i + 1] * x.y;
        }
}

/* Takes R through the chain. */
template <int STAGES>
__device__ void take_chunks(const kda_backward &b, const CUtensorMap &dv, AdjointShared<STAGES> &shared,
                            const Work &work, int warp, uint4 *adjoints, float (&R)[DIM / 8][4]) {
    PipelineState<STAGES> pipe;
    Begun begun;
    float(&dX)[CHUNK / 8][4] = begun.dX;
    auto begin = [&](int chunk) {
        wait(shared.full[pipe.stage], pipe.parity);
        begin_chunk(shared.stages[pipe.stage], chunk_of_chain(work, chunk).count, begun);
    };
    if (work.chunks)
        begin(work.chunks - 1);
    for (int chunk = work.chunks - 1; chunk >= 0; chunk--) {
        const ChunkOperands &in = operands_of(shared.stages[pipe.stage]);
        uint64_t &read = shared.empty[pipe.stage];
        pipe.next();
        uint64_t W = wgmma_operand(in.W, 0, 8 * ROW, SWIZZLE_128);
        uint64_t KT = wgmma_operand(in.KT, TOKENS * 2, 8 * ROW, SWIZZLE_128);
        uint64_t QT = wgmma_operand(in.QT, TOKENS * 2, 8 * ROW, SWIZZLE_128);
        pin(dX);
        wgmma_fence();
#pragma unroll
        for (int t = 0; t < CHUNK / 16; t++)
            wgmma<true, true>(dX, begun.dO[t], advanced(begun.P, t * 16 * PAIR_ROW));
        /* In halves, or the compiler runs all of the decay before the products, and not beside them. */
        uint32_t rounded[DIM / 16][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int c = half * (DIM / 32); c < (half + 1) * (DIM / 32); c++)
                pack_operand(R[2 * c], R[2 * c + 1], rounded[c]);
            pin(dX);
            wgmma_fence();
#pragma unroll
            for (int c = half * (DIM / 32); c < (half + 1) * (DIM / 32); c++)
                wgmma<false, true>(dX, rounded[c], advanced(W, c / 4 * TOKENS * 2 + c % 4 * 32));
        }
        wgmma_commit();
        decay_by(R, in.decay); /* loaded here, as registers are short */
        pin(R);
        wgmma_fence();
#pragma unroll
        for (int t = 0; t < CHUNK / 16; t++)
            wgmma<true, true>(R, begun.dO[t], advanced(QT, t * 16 * ROW));
        wgmma_commit();
        wgmma_wait<1>();
        pin(dX);
        uint32_t x[CHUNK / 16][4];
#pragma unroll
        for (int t = 0; t < CHUNK / 16; t++)
            pack_operand(dX[2 * t], dX[2 * t + 1], x[t]);
        wgmma_fence();
#pragma unroll
        for (int t = 0; t < CHUNK / 16; t++)
            wgmma<true, true, true>(R, x[t], advanced(KT, t * 16 * ROW));
        wgmma_commit();
        __nv_bfloat16 *rows = shared.outputs[chunk % 2];
        MatrixRow<CHUNK, COLUMNS> places(rows, false);
#pragma unroll
        for (int t = 0; t < CHUNK / 16; t++)
            stmatrix_transposed(places.at(t * 16, warp * 16), x[t]);
        fence_shared();
        if (warp == 0 && elected()) { /* the other rows have left, and may be written after the barrier */
            ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
            ptx::cp_async_bulk_wait_group(ptx::n32_t<STORED_LATER - 1>()); /* and these are stored */
        }
        barrier_wait(BARRIER_OUTPUTS, GROUP);
        /* Not before the barrier, or the compiler puts the stores between the products that read `rounded`. */
        store_adjoint(adjoints + (int64_t)chunk * ADJOINT_PIECES, rounded);
        send_outputs(b, dv, chunk_of_chain(work, chunk), work.column, rows);
        wgmma_wait<1>(); /* dO has been read */
        if (chunk)
            begin(chunk - 1);
        wgmma_wait<0>();
        pin(R);
        ptx::mbarrier_arrive(&read);
    }
    if (warp == 0 && elected())
        ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
}

/* With more registers the compiler also puts copies of R on the way from one chunk to the next. */
template <int STAGES>
__global__ void __launch_bounds__(ADJOINT_THREADS, 2)
    take_adjoint(const __grid_constant__ kda_backward b, const __grid_constant__ kda_sm90_backward_maps maps,
                 const ChunkOperands *operands, uint4 *adjoints, uint32_t *done, int64_t segments) {
    extern __shared__ __align__(1024) uint8_t memory[];
    AdjointShared<STAGES> &shared = *reinterpret_cast<AdjointShared<STAGES> *>(memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++)
            ptx::mbarrier_init(&shared.full[i], 1), ptx::mbarrier_init(&shared.empty[i], GROUP);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    __syncthreads();
    Work work = find_chain_work(b);
    wait_for_kernel_before();
    let_next_begin(); /* only now: it does not wait for kernel prepare */
    int64_t segment = work.first.head * segments + work.segment;
    int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
    if (warp == GROUP / 32) {
        if (elected())
            load_chunks(maps, shared, work, operands + segment * CHUNKS, done + segment);
        return;
    }
    const kda_tokens &x = b.forward.base;
    float R[DIM / 8][4];
    load_whole(from_column(kda_state_in(&x, &b.d_final_state, work.first.n, work.first.head), work.column), R);
    adjoints += adjoint_piece(segment * CHUNKS, 0, work.column / 16 + warp, (int)threadIdx.x % 32);
    take_chunks(b, maps.dv, shared, work, warp, adjoints, R);
    barrier_wait(BARRIER_OUTPUTS, GROUP);
    if (threadIdx.x == 0 && work.chunks)
        announce(&done[segment]);
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
    if (error)
        return error;
    auto launch_with = [&](auto *kernel, size_t bytes) {
        return launch_kernel(kernel, *launch, ADJOINT_THREADS, bytes, b->forward.stream, *b, maps,
                             static_cast<const ChunkOperands *>(memory->operands),
                             reinterpret_cast<uint4 *>(memory->adjoints), memory->done, plan->segments);
    };
    bool alone = (int64_t)launch->grid[0] * launch->grid[1] <= plan->multiprocessors;
    return alone ? launch_with(take_adjoint<OWN_STAGES>, sizeof(AdjointShared<OWN_STAGES>))
                 : launch_with(take_adjoint<SHARED_STAGES>, sizeof(AdjointShared<SHARED_STAGES>));
}
