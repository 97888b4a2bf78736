/* SPDX-License-Identifier: MIT */
/*
 * Takes the state of every sequence and value head through its chunks, as chain.cu does, by operands in the form of
 * three tiles (kernel tiles_prepare), K = V = 128.
 *
 * A CTA works a chain, or a segment of one, for 64 columns of V in each of its consumer warpgroups; a warp of one more
 * warpgroup, the loader, brings operands and values some chunks ahead.
 */
#include "cuda/sm90/consume.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/launch.cuh"
#include "cuda/sm90/parts.cuh"
#include "cuda/sm90/tensor_maps.h"

namespace kda {
namespace {

constexpr int STAGES = 5;

/* Registers of a thread at the start, then of the consumers', then of the loader's warpgroup. */
template <int GROUPS> constexpr int REGISTERS = GROUPS == 1 ? 152 : 128;
template <int GROUPS> constexpr int CONSUMER_REGISTERS = GROUPS == 1 ? 200 : 168;
template <int GROUPS> constexpr int LOADER_REGISTERS = GROUPS == 1 ? 104 : 48;

template <int GROUPS> struct alignas(1024) Shared {
    Tiles tiles[STAGES];
    __nv_bfloat16 values[STAGES][CHUNK * GROUP_COLUMNS * GROUPS];
    __nv_bfloat16 outputs[GROUPS * GROUP / 32][CHUNK * 16]; /* of each consumer warp, swizzled by 32 bytes */
    Factors factors[STAGES];
    Task tasks[STAGES];
    Part part;
    uint64_t full[STAGES];  /* a chunk has arrived: the loader's lanes, the bytes of its operands and values */
    uint64_t empty[STAGES]; /* every consumer is done with it */
};

/* A chunk's rows of v, and zeros behind them; for an identity zeros alone. */
template <int GROUPS>
__device__ void load_values(const kda_prefill &p, const Task &task, bool identity, __nv_bfloat16 *values) {
    constexpr int COLUMNS = GROUP_COLUMNS * GROUPS, PIECES = COLUMNS / 8;
    int given = identity ? 0 : task.count;
    const char *rows = kda_row(&p.v, task.batch, task.token, task.head) + task.column * 2;
    for (int i = threadIdx.x % 32; i < CHUNK * PIECES; i += 32) {
        int t = i / PIECES, c = i % PIECES * 8;
        copy_async(&values[swizzled<CHUNK, COLUMNS>(t, c)],
                   t < given ? rows + t * p.v.stride[1] + c * 2 : p.v.data, t < given);
    }
}

/* Sends one chunk to the consumers. */
template <int GROUPS>
__device__ void send(const kda_prefill &p, const kda_sm90_maps &maps, const Prepared *operands,
                     const Task &task, bool identity, const Turn<STAGES> &turn, Shared<GROUPS> &shared) {
    int s = turn.stage, lane = threadIdx.x % 32;
    uint64_t &full = shared.full[s];
    bool whole = task.count == CHUNK && !identity; /* v by the copy engine, too */
    wait(shared.empty[s], turn.parity ^ 1);
    if (lane == 0) {
        uint32_t bytes = sizeof(Tiles) + sizeof(Factors) + (whole ? sizeof shared.values[s] : 0);
        shared.tasks[s] = task;
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &full,
                                       task.count > 0 ? bytes : 0);
    }
    if (task.count > 0 && lane == 0) {
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, &shared.tiles[s], &operands->tiles,
                           (uint32_t)sizeof(Tiles), &full);
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, &shared.factors[s], &operands->factors,
                           (uint32_t)sizeof(Factors), &full);
        for (int i = 0; i < GROUPS && whole; i++) {
            const int32_t at[4] = {task.column + i * PANEL, task.head, task.token, task.batch};
            ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global,
                                      &shared.values[s][i * CHUNK * PANEL], &maps.v, at, &full);
        }
    }
    if (task.count > 0 && !whole)
        load_values<GROUPS>(p, task, identity, shared.values[s]);
    ptx::cp_async_mbarrier_arrive_noinc(&full);
}

template <int GROUPS>
__device__ void load(const kda_prefill &p, const kda_sm90_maps &maps, const Part &part,
                     const Prepared *operands, Shared<GROUPS> &shared) {
    const Chain &chain = part.chain;
    auto find_span = [&](int64_t chunk) {
        return chunk < part.end ? kda_chunk_span(&p, chain.n, chain.sequence.length, chunk) : kda_span{0, 0};
    };
    Task task = {};
    task.n = (int)chain.n, task.head = (int)chain.head, task.batch = (int)chain.sequence.batch;
    task.slot = (int)chain.sequence.slot, task.column = chain.column, task.first = true;
    operands += chain.first_operands + part.begin;
    struct kda_span span = find_span(part.begin);
    Turn<STAGES> turn;
    for (int64_t chunk = part.begin; !task.last; turn.next()) {
        struct kda_span next = find_span(++chunk);
        task.token = (int)(chain.sequence.first + span.first);
        task.position = (int)(span.first + span.count), task.count = (int)span.count;
        task.last = next.count == 0;
        send(p, maps, operands++, task, part.identity, turn, shared);
        task.first = false, span = next;
    }
    task.count = -1;
    send(p, maps, operands, task, part.identity, turn, shared);
}

/* S before a part's first chunk. */
template <Pass pass>
__device__ void begin_state(const kda_prefill &p, const Part &part, const kda_sm90_segments &segments,
                            float (&S)[DIM / 8][4]) {
    int first = part.chain.column;
    if (part.identity) {
        each_pair(S, [&](float &x, float &y, int channel, int column) {
            x = channel == first + column ? 1.f : 0.f, y = channel + 1 == first + column ? 1.f : 0.f;
        });
        return;
    }
    load_whole(from_column(state_before<pass>(p, part, segments), first), S);
    if (part.segment > 0)
        return;
    if (pass == SUMMARISE)
        store_whole(from_column(summary_state(p, segments, part, segments.count - 1), first), S, 0);
    else
        store_whole_checkpoints(p, (int)part.chain.n, (int)part.chain.head, first, 0, S, 0);
}

template <int GROUPS, Pass pass>
__global__ void __maxnreg__(REGISTERS<GROUPS>)
    run(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_maps maps,
        const Prepared *operands, int64_t chunks, kda_sm90_segments segments) {
    let_next_begin();
    extern __shared__ __align__(1024) char memory[];
    Shared<GROUPS> &shared = *reinterpret_cast<Shared<GROUPS> *>(memory);
    Part part = find_part<GROUP_COLUMNS * GROUPS, pass>(p, chunks, segments);
    if (threadIdx.x == 0) {
        shared.part = part; /* consumers need it seldom */
        for (int i = 0; i < STAGES; i++) {
            ptx::mbarrier_init(&shared.full[i], 32 + 1);
            ptx::mbarrier_init(&shared.empty[i], GROUPS * GROUP);
        }
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    __syncthreads();
    wait_for_kernel_before();
    if (part.chain.sequence.slot < 0 || (pass == SUMMARISE && left_out(part, segments)))
        return;
    if (threadIdx.x >= GROUPS * GROUP) {
        give_registers<LOADER_REGISTERS<GROUPS>>();
        if (threadIdx.x < GROUPS * GROUP + 32)
            load(p, maps, part, operands, shared);
    } else {
        take_registers<CONSUMER_REGISTERS<GROUPS>>();
        consume<GROUP_COLUMNS * GROUPS, pass != SUMMARISE>(
            p, maps, shared,
            [&](const Task &, float(&S)[DIM / 8][4]) { begin_state<pass>(p, shared.part, segments, S); },
            [&](const Task &) { return state_after<pass>(p, shared.part, segments); });
    }
}

template <int GROUPS, Pass pass>
cudaError_t launch(const kda_prefill *p, int64_t chunks, const void *operands, kda_sm90_segments segments,
                   cudaStream_t stream) {
    int bytes = sizeof(Shared<GROUPS>);
    kda_sm90_maps maps;
    cudaError_t error = kda_sm90_map(p, &maps);
    if (!error)
        error = cudaFuncSetAttribute(run<GROUPS, pass>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error)
        return error;
    int columns = DIM + (pass == SUMMARISE ? DIM : 0);
    dim3 grid((unsigned)(p->sequences * p->value_heads * segments.count),
              (unsigned)(columns / (GROUP_COLUMNS * GROUPS)));
    return launch_behind(run<GROUPS, pass>, grid, (GROUPS + 1) * GROUP, bytes, stream, *p, maps,
                         static_cast<const Prepared *>(operands), chunks, segments);
}

/* One group to a CTA while there are multiprocessors for it. */
template <Pass pass>
cudaError_t launch(const kda_prefill *p, int64_t chunks, const void *operands, kda_sm90_segments segments,
                   int processors, cudaStream_t stream) {
    int64_t parts = DIM / GROUP_COLUMNS, each = segments.count * parts;
    if (pass == SUMMARISE) /* see left_out */
        each = (segments.count - 1) * parts + (segments.count - 2) * parts;
    return p->sequences * p->value_heads * each > processors
               ? launch<2, pass>(p, chunks, operands, segments, stream)
               : launch<1, pass>(p, chunks, operands, segments, stream);
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_tiles_chain(const kda_prefill *p, int64_t chunks, const void *operands, int processors,
                                 cudaStream_t stream) {
    return kda::launch<kda::WHOLE>(p, chunks, operands, {1, nullptr}, processors, stream);
}

cudaError_t kda_sm90_tiles_summarise(const kda_prefill *p, int64_t chunks, const void *operands,
                                     kda_sm90_segments segments, int processors, cudaStream_t stream) {
    return kda::launch<kda::SUMMARISE>(p, chunks, operands, segments, processors, stream);
}

cudaError_t kda_sm90_tiles_resume(const kda_prefill *p, int64_t chunks, const void *operands,
                                  kda_sm90_segments segments, int processors, cudaStream_t stream) {
    return kda::launch<kda::RESUME>(p, chunks, operands, segments, processors, stream);
}
