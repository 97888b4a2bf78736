/* SPDX-License-Identifier: MIT */
/*
 * Prefill in one kernel, for K = V = 128, bf16, normalised q and k and the bounded gate (docs/hopper.md).
 *
 * A CTA works one chain after another. Two producer warpgroups take turns at making a chunk's operands, in place of its
 * q, k and g; two consumer warpgroups, with 64 columns of V each, take the state through them in their accumulators.
 * When a chunk's tiles are made, warps of its group go on to the next one as they get free: one finds the norms of k,
 * another those of q, and the scout finds the chunk after that, describes it to all others and has the copy engine bring
 * it.
 */
#include "cuda/sm90/consume.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/produce.cuh"
#include "cuda/sm90/tensor_maps.h"

namespace kda {
namespace {

constexpr int STAGES = 5, CONSUMERS = 2, PRODUCERS = 2;
constexpr int THREADS = (CONSUMERS + PRODUCERS) * GROUP;
constexpr int SORTED = 256; /* sequences at most, more are worked in their own order */

/* Named barriers; 0 is __syncthreads. */
enum {
    BARRIER_GROUP = 1 /* and the next: of each producer warpgroup */,
    BARRIER_INVERSE = 3 /* and the next */
};

/* Where a scout is: at a chunk of the CTA's chain before number `round`. */
struct Scout {
    int round, chunk, chunks;
    int n, head, key_head, batch, first, length, slot;
    int count; /* tokens of the chunk; -1 behind the last one */
};

/* A producer warpgroup's own. */
struct Scratch {
    Blocks blocks;
    Scout scout;
};

struct alignas(1024) Shared {
    Tiles tiles[STAGES]; /* k, q and g at first */
    __nv_bfloat16 values[STAGES][CHUNK * DIM];
    __nv_bfloat16 outputs[CONSUMERS * GROUP / 32][CHUNK * 16]; /* of each consumer warp, swizzled by 32 bytes */
    Factors factors[STAGES];
    uint8_t order[SORTED]; /* sequences, the longest first */
    Scratch scratch[PRODUCERS];
    Task tasks[2 * STAGES];
    uint64_t arrived[STAGES]; /* q, k, v, g and the task: the scout and the bytes */
    uint64_t full[STAGES];    /* the operands: a producer warpgroup */
    uint64_t empty[STAGES];   /* both consumers are done */
};

static_assert(sizeof(Shared) == 214 * 1024, "docs/hopper.md says what lies where");

/* ---- Scouts --------------------------------------------------------------------------------------- */

__device__ bool sorts(const kda_prefill &p) { return p.cu_seqlens.data && p.sequences <= SORTED; }

/* Finds the order in which packed sequences are worked: the longest first, so that the CTAs end together. */
__device__ void sort_sequences(const kda_prefill &p, Shared &shared) {
    int *lengths = reinterpret_cast<int *>(shared.scratch); /* not in use yet */
    int count = (int)p.sequences, n = threadIdx.x;
    if (n < count)
        lengths[n] = (int)kda_sequence(&p, n).length;
    __syncthreads();
    if (n < count) {
        int rank = 0;
        for (int m = 0; m < count; m++)
            rank += lengths[m] > lengths[n] || (lengths[m] == lengths[n] && m < n);
        shared.order[rank] = (uint8_t)n;
    }
    __syncthreads();
}

/* The (sequence, head) that the CTA works in a round: forwards and backwards in turn, so that who began with a long
 * one goes on with a short one. */
__device__ int find_item(int round) {
    int across = gridDim.x, place = blockIdx.x;
    return round * across + (round % 2 ? across - 1 - place : place);
}

/* Goes some chunks on, through the chains of the CTA. */
__device__ void find_next(const kda_prefill &p, Shared &shared, int items, Scout &scout, int chunks) {
    int chunk = scout.chunk + chunks;
    while (chunk >= scout.chunks) {
        chunk -= scout.chunks, scout.chunks = 0;
        if (scout.round * (int)gridDim.x >= items) {
            scout.count = -1;
            return;
        }
        int item = find_item(scout.round++);
        if (item >= items)
            continue;
        scout.n = item / (int)p.value_heads, scout.head = item % (int)p.value_heads;
        if (sorts(p))
            scout.n = shared.order[scout.n];
        scout.key_head = scout.head / (int)(p.value_heads / p.heads);
        struct kda_sequence sequence = kda_sequence(&p, scout.n);
        if (sequence.slot < 0)
            continue;
        scout.batch = (int)sequence.batch, scout.slot = (int)sequence.slot;
        scout.first = (int)sequence.first, scout.length = (int)sequence.length;
        scout.chunks = (int)kda_chunk_count(&p, scout.n, scout.length);
    }
    scout.chunk = chunk;
}

/* Sends the scout's chunk to all: what it is, and by the copy engine its tensors. */
__device__ void send(const kda_prefill &p, const kda_sm90_maps &maps, Shared &shared, Scout &scout,
                     const Turn<STAGES> &turn) {
    int s = turn.stage, chunk = scout.chunk;
    uint64_t *arrived = &shared.arrived[s];
    Task task;
    task.n = scout.n, task.head = scout.head, task.batch = scout.batch, task.slot = scout.slot;
    task.column = 0;
    task.count = scout.count;
    if (task.count >= 0) {
        struct kda_span span = kda_chunk_span(&p, task.n, scout.length, chunk);
        task.token = scout.first + (int)span.first, task.position = (int)(span.first + span.count);
        task.count = (int)span.count;
    }
    task.flags = find_flags(p, task, chunk == 0, chunk + 1 == scout.chunks);
    wait(shared.empty[s], turn.parity ^ 1);
    shared.tasks[turn.in_double()] = task;
    scout.count = task.count;
    if (task.count <= 0) {
        ptx::mbarrier_arrive(arrived);
        return;
    }
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, arrived,
                                   (uint32_t)(sizeof shared.tiles[s].panels + sizeof shared.values[s]));
    int key_head = scout.key_head;
    auto bring = [&](void *to, const CUtensorMap &map, int panel, int head) {
        const int32_t at[4] = {panel * PANEL, head, task.token, task.batch};
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &map, at, arrived);
    };
#pragma unroll
    for (int i = 0; i < PANELS; i++) {
        Panel &panel = shared.tiles[s].panels[i];
        bring(panel.keys, maps.k, i, key_head);
        bring(panel.queries, maps.q, i, key_head);
        bring(panel.gates, maps.g, i, task.head);
        bring(&shared.values[s][i * CHUNK * PANEL], maps.v, i, task.head);
    }
}

/* ---- Producers ------------------------------------------------------------------------------------ */

__device__ void produce(const kda_prefill &p, const kda_sm90_maps &maps, Shared &shared, int items, int group) {
    int warp = threadIdx.x % GROUP / 32;
    Scratch &scratch = shared.scratch[group];
    Turn<STAGES> turn, next, ahead;
    turn.next(group), next.next(group), ahead.next(group);
    uint32_t beta[2] = {0, 0}; /* of the next chunk and the one after it */
    /* The scout, two chunks ahead of what is received. */
    auto go_on = [&](int chunks) {
        Scout &scout = scratch.scout;
        __syncwarp(); /* all lanes have read what is overwritten now */
        if (threadIdx.x % 32 == 0 && scout.count >= 0) {
            find_next(p, shared, items, scout, chunks);
            send(p, maps, shared, scout, ahead);
        }
        __syncwarp();
        const Task &sent = shared.tasks[ahead.in_double()];
        beta[0] = beta[1], beta[1] = load_beta(p, sent.batch, sent.token, sent.head, scout.count);
        ahead.next(PRODUCERS);
    };
    int slot = 0;
    auto receive = [&] {
        int s = next.stage;
        wait(shared.arrived[s], next.parity);
        receive_chunk<PANELS>(p, shared.tiles[s], shared.factors[s], shared.values[s], scratch.blocks, slot,
                              shared.tasks[next.in_double()].count, beta[0]);
    };
    if (warp == SCOUT) {
        if (threadIdx.x % 32 == 0)
            scratch.scout = {};
        go_on(group);
        go_on(PRODUCERS);
    }
    if (receives())
        receive();
    Gate gate;
    for (;; turn.next(PRODUCERS)) {
        wait(shared.arrived[turn.stage], turn.parity);
        barrier_wait(BARRIER_GROUP + group, GROUP);
        const Task &task = shared.tasks[turn.in_double()];
        int count = task.count;
        if (count > 0) {
            if (task.head != gate.head)
                gate = find_gate(p, task.head, warp % 2 * PANEL + threadIdx.x % 32 * 2);
            make_operands(shared.tiles[turn.stage], shared.factors[turn.stage], scratch.blocks, slot,
                          BARRIER_GROUP + group, BARRIER_INVERSE + group, gate);
        }
        ptx::mbarrier_arrive(&shared.full[turn.stage]);
        if (count < 0)
            return;
        slot ^= 1, next.next(PRODUCERS);
        if (warp == SCOUT)
            go_on(PRODUCERS);
        if (receives())
            receive();
    }
}

/* ---- Consumers ------------------------------------------------------------------------------------ */

/* Registers of a thread at the start: all of a multiprocessor's. Consumers then take some of the producers'. */
constexpr int REGISTERS = 128, CONSUMER_REGISTERS = 168, PRODUCER_REGISTERS = 88;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCERS * PRODUCER_REGISTERS <=
                  (CONSUMERS + PRODUCERS) * REGISTERS,
              "or a consumer waits for registers for ever");

__global__ void __maxnreg__(REGISTERS)
    fused(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_maps maps, int items) {
    extern __shared__ __align__(1024) char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            ptx::mbarrier_init(&shared.arrived[i], 1);
            ptx::mbarrier_init(&shared.full[i], GROUP);
            ptx::mbarrier_init(&shared.empty[i], CONSUMERS * GROUP);
        }
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    if (sorts(p))
        sort_sequences(p, shared);
    __syncthreads();
    int group = threadIdx.x / GROUP;
    if (group < CONSUMERS) {
        take_registers<CONSUMER_REGISTERS>();
        consume<DIM, true>(
            p, p.out, maps.out, shared,
            [&](const Task &task, float(&S)[DIM / 8][4]) {
                load_whole(kda_state_at(&p, &p.initial_state, task.slot, task.head), S);
                store_whole_checkpoints(p, task.n, task.head, 0, 0, S, 0);
            },
            [&](const Task &, float(&o)[CHUNK / 8][4], int unit) {
                leave_unit(o, unit);
                return p.out.dtype;
            },
            [&](const Task &task, float(&S)[DIM / 8][4], int unit) {
                store_whole(kda_state_at(&p, &p.final_state, task.slot, task.head), S, unit);
            });
    } else {
        give_registers<PRODUCER_REGISTERS>();
        produce(p, maps, shared, items, group - CONSUMERS);
    }
}

} // namespace
} // namespace kda

bool kda_sm90_has_tiles(const kda_prefill *p) {
    return p->key_dim == kda::DIM && p->value_dim == kda::DIM && p->qk_norm &&
           p->gate == FLASH_KDA_GATE_SIGMOID && p->tokens > 0 && p->tokens <= INT32_MAX && kda_sm90_can_map(p);
}

cudaError_t kda_sm90_fused(const kda_prefill *p, int processors, cudaStream_t stream) {
    int bytes = sizeof(kda::Shared), items = (int)(p->sequences * p->value_heads);
    int ctas = items < processors ? items : processors;
    kda_sm90_maps maps;
    cudaError_t error = kda_sm90_map(p, &maps);
    if (!error)
        error = cudaFuncSetAttribute(kda::fused, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error)
        return error;
    kda::fused<<<ctas, kda::THREADS, bytes, stream>>>(*p, maps, items);
    return cudaGetLastError();
}
