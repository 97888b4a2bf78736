/* SPDX-License-Identifier: MIT */
/*
 * Prefill by pairs of multiprocessors, for few chains (docs/hopper.md): what kernel fused takes, where chains or their
 * segments are no more than pairs.
 *
 * A cluster of two CTAs works a chain. Both make operands, of every second chunk, and pass them on to the other, so that
 * each has all of them. Then each takes 64 columns of V through them; or, where sequences are cut, one takes all of V
 * through a segment from zero, and the other the identity: compose.cu and correct.cu make of that what it is from the
 * true state.
 */
#include "cuda/launch.cuh"
#include "cuda/sm90/consume.cuh"
#include "cuda/sm90/cut.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/spread.cuh"
#include "cuda/sm90/tensor_maps.h"
#include "cuda/sm90/unbounded.cuh"

namespace kda {
namespace {

constexpr int PAIR = 2, PRODUCERS = 2;  /* CTAs of a cluster; producer warpgroups of each */
constexpr int TURNS = PAIR * PRODUCERS; /* chunks from one that a group makes to its next */
/* The warps of a producer warpgroup that pass operands on, and that open stages to those which the other CTA makes. */
constexpr int PUSH = 1, HOST = 2;

template <bool cut> constexpr int STAGES = cut ? 5 : 6;
constexpr int TASKS = 8; /* for two of each stage there is no room */
static_assert(PAIR * PRODUCERS == sizeof *kda_sm90_cut::grown, "each has a byte");
static_assert(TASKS > STAGES<true> && TASKS > STAGES<false>, "a task is read until the next chunk is done");
template <bool cut> constexpr int CONSUMERS = cut ? 2 : 1;
template <bool cut> constexpr int THREADS = (CONSUMERS<cut> + PRODUCERS) * GROUP;
/* Registers of a thread at the start, then of consumers and producers. */
template <bool cut> constexpr int REGISTERS = cut ? 128 : 168;
template <bool cut> constexpr int CONSUMER_REGISTERS = cut ? 168 : 200;
template <bool cut> constexpr int PRODUCER_REGISTERS = cut ? 88 : 152;

/* Named barriers; 0 is __syncthreads. */
enum {
    BARRIER_GROUP = 1 /* and the next: of each producer warpgroup */,
    BARRIER_INVERSE = BARRIER_GROUP + PRODUCERS,
    BARRIER_MADE = BARRIER_INVERSE + PRODUCERS
};

/* What a pair works on. */
struct Part {
    int n, head, key_head;
    int batch, first, length, slot; /* of the sequence; -1: there is nothing to do */
    int segment, begin, chunks;     /* chunks at least 1, the first of which may be empty */
    int index;                      /* chain, segment */
    bool to_end;                    /* the state behind it is the sequence's */
    int16_t *units;                 /* of outputs, from the sequence's first chunk on */
};

template <bool cut> struct alignas(1024) Shared {
    Tiles<DIM> tiles[STAGES<cut>]; /* k, q and g at first, where the CTA makes them */
    __nv_bfloat16 values[STAGES<cut>][CHUNK * GROUP_COLUMNS * CONSUMERS<cut>];
    /* Of each consumer warp, swizzled by 32 bytes; where there is room, beside those that are still on their way. */
    __nv_bfloat16 outputs[cut ? 2 : 1][CONSUMERS<cut> * GROUP / 32][CHUNK * 16];
    Factors<DIM> factors[STAGES<cut>];
    Blocks blocks[PRODUCERS];
    Task tasks[TASKS];
    Part part;
    uint64_t arrived[PRODUCERS];   /* a producer warpgroup's own chunk: the scout, the bytes of q, k, v and g */
    uint64_t full[STAGES<cut>];    /* the operands: a producer warpgroup, or the scout and the bytes */
    uint64_t empty[STAGES<cut>];   /* all consumers are done, and the operands are passed on */
    uint64_t granted[STAGES<cut>]; /* the other CTA has room for the chunk made here */
};
static_assert(sizeof(Shared<true>) <= 227 * 1024 && sizeof(Shared<false>) <= 227 * 1024,
              "all that a CTA can have");

/* Segments of a chain in this launch. */
__host__ __device__ int segments_of(const kda_sm90_cut &cut) { return cut.again ? 1 : cut.segments; }

/* whole: the chain grows, and is worked as a first segment. */
__device__ Part find_part(const kda_prefill &p, const kda_sm90_spread &spread, const kda_sm90_cut &cut,
                          int64_t all_chunks, bool whole) {
    int segments = segments_of(cut), chain = blockIdx.x / PAIR / segments;
    Part part;
    part.n = chain / (int)p.value_heads, part.head = chain % (int)p.value_heads;
    part.key_head = part.head / (int)(p.value_heads / p.heads);
    struct kda_sequence sequence = kda_sequence(&p, part.n);
    part.batch = (int)sequence.batch, part.first = (int)sequence.first;
    part.length = (int)sequence.length;
    part.index = blockIdx.x / PAIR, part.segment = part.index % segments;
    bool wanted = whole ? part.segment == 0 : !cut.again;
    part.slot = wanted && is_left(p, spread, part.n, part.head) ? (int)sequence.slot : -1;
    part.to_end = whole || segments == 1;
    int chunks = (int)kda_chunk_count(&p, part.n, sequence.length);
    part.begin = kda_begin_of_segment(chunks, segments, part.segment);
    int end = whole ? chunks : kda_begin_of_segment(chunks, segments, part.segment + 1);
    part.chunks = max(min(end, chunks) - part.begin, 1);
    part.units = cut.output_units +
                 (part.head * all_chunks + kda_first_chunk(&p, part.first, part.n)) * (2 * KDA_SM90_UNITS);
    return part;
}

/* The row of the checkpoint at a position, where they are in equal steps; -1: there is none. For loaders to find, as consumers
 * are what is waited for. */
__device__ int find_checkpoint(const kda_prefill &p, int n, int position, int length) {
    int every = (int)kda_min64(p.checkpoint_every, INT32_MAX), row = (position - 1) / every;
    bool here = position > 0 && (position - row * every == every || position == length);
    return here && row < kda_checkpoint_count(&p, n) ? row : -1;
}

/* Chunk number i of the part, or what says that there is none. */
template <bool keeps> __device__ Task find_task(const kda_prefill &p, const Part &part, int column, int i) {
    Task task;
    task.n = part.n, task.head = part.head, task.batch = part.batch, task.row = -1;
    task.column = column;
    task.count = -1;
    if (i < part.chunks) {
        struct kda_span span = kda_chunk_span(&p, part.n, part.length, part.begin + i);
        task.token = part.first + (int)span.first, task.position = (int)(span.first + span.count);
        task.count = (int)span.count;
    }
    task.flags = find_flags(task, i == 0, i + 1 == part.chunks, keeps);
    if (keeps && i < part.chunks && !p.checkpoint_offsets.data) {
        task.row = find_checkpoint(p, part.n, task.position, part.length);
        task.flags &= task.row < 0 ? ~CHECKPOINT : ~0u;
    }
    return task;
}

/* Where a chunk lies in both CTAs, and the parities of the barriers' phases in which it does. */
template <bool cut> struct PairTurn : Turn<STAGES<cut>> {
    int chunk;

    __device__ explicit PairTurn(int chunk) : chunk(chunk) {
        this->stage = chunk % STAGES<cut>, this->parity = chunk / STAGES<cut> & 1;
    }
    __device__ int task() const { return chunk % TASKS; }
    __device__ void next() { chunk++, Turn<STAGES<cut>>::next(); }
    /* Of a chunk made here: where the number of stages is odd, only every second one of a stage is. */
    __device__ uint32_t parity_of_grant() const {
        constexpr int PERIOD = STAGES<cut> % PAIR ? STAGES<cut> * PAIR : STAGES<cut>;
        return chunk / PERIOD & 1;
    }
};

template <class T> __device__ T *of_other(T *mine, int rank) {
    return static_cast<T *>(__cluster_map_shared_rank(mine, rank ^ 1));
}

/* ---- Producers ------------------------------------------------------------------------------------ */

template <bool cut, bool bounded, bool keeps> struct Producer {
    static constexpr int VALUE_PANELS = CONSUMERS<cut>;
    /* Bytes that are passed on of a chunk's factors. */
    static constexpr size_t FACTORS = bounded ? offsetof(Factors<DIM>, across) : sizeof(Factors<DIM>);

    const kda_prefill &p;
    const kda_sm90_maps &maps;
    Shared<cut> &shared;
    int rank, group;
    uint8_t *grown; /* where to say whether beta makes a transition grow; NULL: it cannot, or nobody asks */

    __device__ bool brings_values() const { return !cut || rank == 0; }
    __device__ int column() const { return cut ? 0 : rank * GROUP_COLUMNS; }

    __device__ void bring(void *to, const CUtensorMap &map, int channel, int head, const Task &task,
                          uint64_t *barrier, uint64_t policy) const {
        const int32_t at[4] = {channel, head, task.token, task.batch};
        bring_box(to, map, at, *barrier, policy);
    }
    /* Says what a chunk is and has it brought: by the scout one whose operands this group makes; by the host its values alone,
     * as there is room now for what the same group of the other CTA makes. */
    __device__ void open(int chunk) {
        bool own = chunk % PAIR == rank;
        PairTurn<cut> turn(chunk);
        int s = turn.stage;
        Task task = find_task<keeps>(p, shared.part, column(), chunk);
        wait(shared.empty[s], turn.parity ^ 1);
        bool values = task.count > 0 && brings_values();
        if (values && !own && task.count < CHUNK) {
            load_tail(task, shared.values[s]);
            values = false;
        }
        uint64_t *barrier = own ? &shared.arrived[group] : &shared.full[s];
        bool leads = elected();
        if (!own) /* every lane, as each may have written values; in all as many as arrive of a group that makes it */
            ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier,
                                 GROUP / 32u - leads);
        __syncwarp();
        if (leads) {
            size_t bytes = own ? sizeof shared.tiles[s].panels : sizeof(Tiles<DIM>) + FACTORS;
            shared.tasks[turn.task()] = task;
            if (!own)
                ptx::mbarrier_arrive(&shared.empty[s]); /* nothing is passed on */
            ptx::mbarrier_arrive_expect_tx(
                ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier,
                task.count > 0 ? (uint32_t)(bytes + (values ? sizeof shared.values[s] : 0)) : 0);
#pragma unroll 1
            for (int i = 0; i < VALUE_PANELS && values; i++)
                bring(&shared.values[s][i * CHUNK * PANEL], maps.v, column() + i * PANEL, task.head, task,
                      barrier, read_once());
            if (own && task.count > 0)
                bring_keys(shared.tiles[s], task, barrier);
            else if (task.count > 0)
                arrive_at(shared.granted[s], rank ^ 1);
        }
        __syncwarp();
    }

    __device__ void bring_keys(Tiles<DIM> &tiles, const Task &task, uint64_t *barrier) const {
        uint64_t own = read_once(), shared_by_heads = p.heads < p.value_heads ? read_again() : own;
#pragma unroll 1
        for (int i = 0; i < DIM / PANEL; i++) {
            Panel &panel = tiles.panels[i];
            bring(panel.keys, maps.k, i * PANEL, shared.part.key_head, task, barrier, shared_by_heads);
            bring(panel.queries, maps.q, i * PANEL, shared.part.key_head, task, barrier, shared_by_heads);
            bring(panel.gates, maps.g, i * PANEL, task.head, task, barrier, own);
        }
    }

    /* Rows of v, and zeros behind the sequence's end. */
    __device__ void load_tail(const Task &task, __nv_bfloat16 *values) const {
        constexpr int COLUMNS = GROUP_COLUMNS * VALUE_PANELS, PIECES = COLUMNS / 8;
        const char *rows = kda_row(&p.v, task.batch, task.token, task.head) + task.column * 2;
        for (int i = threadIdx.x % 32; i < CHUNK * PIECES; i += 32) {
            int t = i / PIECES, c = i % PIECES * 8;
            uint4 piece = make_uint4(0, 0, 0, 0);
            if (t < task.count)
                piece = *reinterpret_cast<const uint4 *>(rows + t * p.v.stride[1] + c * 2);
            *reinterpret_cast<uint4 *>(&values[swizzled<CHUNK, COLUMNS>(t, c)]) = piece;
        }
    }

    /* Warp PUSH: a chunk's operands are made, and go to the other CTA. */
    __device__ void pass_on(const PairTurn<cut> &turn, int count) {
        int s = turn.stage;
        if (count > 0) {
            wait(shared.granted[s], turn.parity_of_grant());
            if (elected()) {
                uint64_t *full = of_other(&shared.full[s], rank);
                ptx::cp_async_bulk(ptx::space_cluster, ptx::space_shared, of_other(&shared.tiles[s], rank),
                                   &shared.tiles[s], (uint32_t)sizeof(Tiles<DIM>), full);
                ptx::cp_async_bulk(ptx::space_cluster, ptx::space_shared, of_other(&shared.factors[s], rank),
                                   &shared.factors[s], (uint32_t)FACTORS, full);
                /* PTX speaks of bulk groups for copies to global memory only. On Hopper they hold for these too, which
                 * tests/check/cluster_copy.cu keeps checking. */
                ptx::cp_async_bulk_commit_group();
                ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
            }
            __syncwarp();
        }
        if (threadIdx.x % 32 == 0)
            ptx::mbarrier_arrive(&shared.empty[s]);
    }

    /* Chunks rank and rank + 2 of every four are this CTA's, one for each group. When one is made, the group goes on to the
     * next: every step stands in the loop once, as code competes for the instruction cache. */
    __device__ void produce() {
        int warp = threadIdx.x % GROUP / 32, chunks = shared.part.chunks, slot = 0;
        Blocks &blocks = shared.blocks[group];
        uint32_t parity = 0;
        bool grows = false;
        Gate gate = find_gate<bounded>(p, shared.part.head, own_channel<DIM>(threadIdx.x));
#pragma unroll 1
        for (int next = rank + PAIR * group;; next += TURNS) {
            const PairTurn<cut> turn(next);
            const Task &task = shared.tasks[turn.task()];
            uint32_t beta = 0;
            if (warp == SCOUT<DIM> || warp == HOST) {
                int chunk = warp == HOST ? next - (rank ? 1 : TURNS - 1) : next;
                if (chunk >= 0 && chunk <= chunks)
                    open(chunk);
                if (warp == SCOUT<DIM> && next <= chunks)
                    beta = load_beta(p, task.batch, task.token, task.head, task.count);
            }
            if (next > chunks) {
                if (cut && grown && warp == SCOUT<DIM>)
                    *grown = __any_sync(~0u, grows);
                return;
            }
            int s = turn.stage;
            wait(shared.arrived[group], parity);
            int count = task.count;
            receive_chunk<VALUE_PANELS, true>(p, shared.tiles[s], shared.factors[s], shared.values[s], blocks,
                                              slot, count);
            if (warp == SCOUT<DIM>) {
                float step = find_beta(p, count, beta);
                blocks.beta[slot][threadIdx.x % 32] = step;
                grows = grows || step < 0 || step > 2; /* keys are of length 1: else |1 - beta| is at most 1 */
            }
            barrier_wait(BARRIER_GROUP + group, GROUP);
            if (count > 0)
                make_operands<bounded>(shared.tiles[s], shared.factors[s], blocks, slot, BARRIER_GROUP + group,
                                       BARRIER_INVERSE + group, gate);
            ptx::mbarrier_arrive(&shared.full[s]);
            slot ^= 1, parity ^= 1;
            if (warp == PUSH) {
                barrier_wait(BARRIER_MADE + group, GROUP);
                pass_on(turn, count);
            } else {
                barrier_arrive(BARRIER_MADE + group, GROUP);
            }
        }
    }
};

/* ---- Consumers ------------------------------------------------------------------------------------ */

/* The state before a segment that is not the first. */
__device__ void load_composed(const kda_sm90_cut &cut, int first_column, float (&S)[DIM / 8][4]) {
    int64_t segment = blockIdx.x / PAIR;
    const int16_t *units = cut.state_units + segment * DIM;
    each_pair(S, [&](float &x, float &y, int channel, int column) {
        const uint16_t *row = state_before(cut, segment, first_column + column);
        uint32_t pair = *reinterpret_cast<const uint32_t *>(&row[channel]);
        float factor = power_of_two(units[first_column + column]);
        float2 of_unit = __half22float2(*reinterpret_cast<__half2 *>(&pair));
        x = of_unit.x * factor, y = of_unit.y * factor;
    });
}

/* 64 columns of V from the true state before the part to the one behind it. */
template <bool bounded, bool keeps>
__device__ void consume_whole(const kda_prefill &p, const kda_sm90_maps &maps, const kda_sm90_cut &cut,
                              Shared<false> &shared) {
    consume<DIM, true, bounded>(
        p, p.out, maps.out, shared, PairTurn<false>(0),
        [&](const Task &task, float(&S)[DIM / 8][4]) {
            if (shared.part.segment > 0) {
                load_composed(cut, task.column, S);
                return measured(S);
            }
            kda_state from = kda_state_at(&p, &p.initial_state, shared.part.slot, task.head);
            load_whole(from_column(from, task.column), S);
            if constexpr (keeps)
                store_whole_checkpoints(p, task.n, task.head, task.column, 0, S, 0);
            return measured(S);
        },
        [&](const PairTurn<false> &turn, uint32_t, Values &v) {
            load_values<GROUP_COLUMNS>(shared.values[turn.stage], v);
        },
        NeverAgain(),
        [&](const Task &, float(&o)[CHUNK / 8][4], int unit) {
            leave_unit(o, unit);
            return p.out.dtype;
        },
        [&](const Task &task, float(&S)[DIM / 8][4], int unit) {
            if constexpr (keeps)
                store_checkpoints(p, task, task.row, S, unit);
        },
        [&](const Task &task, float(&S)[DIM / 8][4], int unit) {
            kda_state to = kda_state_at(&p, &p.final_state, shared.part.slot, task.head);
            if (shared.part.to_end) /* else it is there already */
                store_whole(from_column(to, task.column), S, unit);
        });
}

/* Brings a segment's outputs to where fp16 is exact enough; returns their unit. */
__device__ int fit_half(float (&o)[CHUNK / 8][4], int unit) {
    constexpr float LEAST = 0x1p-12f, GREATEST = 0x1p15f; /* of the largest one */
    float largest = largest_of_tiles(o);
    if (__builtin_expect(__any_sync(~0u, largest >= LEAST) && !__any_sync(~0u, largest >= GREATEST), 1))
        return unit;
    int further = unit_of(largest_that_counts(largest));
    scale_tiles(o, power_of_two(-further));
    return unit + further;
}

/* All of V from zero, or in a sequence's first segment from the state before it; or the identity. One version of the
 * code, because neighbouring multiprocessors share an instruction cache. */
template <bool bounded>
__device__ void consume_segment(const kda_prefill &p, const kda_tensor &out, const CUtensorMap &map,
                                bool identity, const kda_sm90_cut &cut, Shared<true> &shared) {
    consume<DIM, true, bounded>(
        p, out, map, shared, PairTurn<true>(0),
        [&](const Task &task, float(&S)[DIM / 8][4]) {
            if (identity) {
                make_diagonal(S, 1);
                return 0;
            }
            kda_state from = kda_state_at(&p, &p.initial_state, shared.part.slot, task.head);
            if (shared.part.segment > 0)
                from.data = nullptr;
            load_whole(from, S, thread());
            return measured(S);
        },
        [&](const PairTurn<true> &turn, uint32_t, Values &v) {
            load_values<DIM>(shared.values[turn.stage], v);
        },
        NeverAgain(),
        [&](const Task &task, float(&o)[CHUNK / 8][4], int unit) {
            if (shared.part.segment == 0) {
                leave_unit(o, unit);
                return p.out.dtype;
            }
            unit = fit_half(o, unit);
            if (threadIdx.x % 32 == 0)
                shared.part.units[(task.position - 1) / CHUNK * (2 * KDA_SM90_UNITS) +
                                  !identity * KDA_SM90_UNITS + threadIdx.x / 32] = (int16_t)unit;
            return KDA_F16;
        },
        [](const Task &, float(&)[DIM / 8][4], int) {}, /* the states are not the true ones */
        [&](const Task &, float(&S)[DIM / 8][4], int unit) {
            int64_t at = shared.part.index;
            if (!identity) {
                kda_state to = {reinterpret_cast<char *>(cut.B + at * DIM * DIM), KDA_F32, DIM * 4, true};
                store_whole(to, S, unit, thread());
                return;
            }
            measure_unit(S, unit);
            at = before_matrices(cut, shared.part.index / cut.segments) + shared.part.segment;
            uint16_t *A = cut.A + at * DIM * DIM;
            each_pair(
                S,
                [&](float x, float y, int channel, int column) {
                    *reinterpret_cast<uint32_t *>(&A[swizzled<DIM, DIM>(column, channel)]) = pack_half(x, y);
                },
                thread());
            if (threadIdx.x % 32 == 0)
                cut.A_units[at * KDA_SM90_UNITS + threadIdx.x / 32] = (int16_t)unit;
        });
}

/* A sequence's first segment needs no identity: its chunks only pass. */
__device__ void let_pass(Shared<true> &shared) {
    for (PairTurn<true> turn(0);; turn.next()) {
        wait(shared.full[turn.stage], turn.parity);
        if (shared.tasks[turn.task()].flags & ENDS)
            return;
        ptx::mbarrier_arrive(&shared.empty[turn.stage]);
    }
}

/* ---- The kernel ----------------------------------------------------------------------------------- */

/* O_A as a tensor, and its map. */
struct Other {
    kda_tensor out;
    CUtensorMap map;
};

/* Without checkpoints, `keeps` false, their code is left out of a loop that competes for the instruction cache. */
template <bool cut, bool bounded, bool keeps>
__global__ void __cluster_dims__(PAIR) __maxnreg__(REGISTERS<cut>)
    pairs(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_maps maps,
          const __grid_constant__ kda_sm90_spread spread, const __grid_constant__ kda_sm90_cut memory_of_cut,
          const __grid_constant__ Other other, int64_t chunks) {
    let_next_begin();
    extern __shared__ __align__(1024) char memory[];
    Shared<cut> &shared = *reinterpret_cast<Shared<cut> *>(memory);
    int rank = blockIdx.x % PAIR, group = threadIdx.x / GROUP;
    wait_for_kernel_before();
    if (nothing_is_left(spread))
        return;
    clear_inverses(shared.tiles);
    bool whole =
        !cut && threadIdx.x < 32 && grows(memory_of_cut, blockIdx.x / PAIR / segments_of(memory_of_cut));
    if (threadIdx.x == 0) {
        prefetch_maps(maps);
        shared.part = find_part(p, spread, memory_of_cut, chunks, whole);
        for (int i = 0; i < PRODUCERS; i++)
            ptx::mbarrier_init(&shared.arrived[i], 1);
        for (int i = 0; i < STAGES<cut>; i++) {
            ptx::mbarrier_init(&shared.full[i], GROUP);
            ptx::mbarrier_init(&shared.empty[i], CONSUMERS<cut> * GROUP + 1);
            ptx::mbarrier_init(&shared.granted[i], 1);
        }
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    if (cut && rank == 1) /* the identity has no values */
        for (uint4 *v = reinterpret_cast<uint4 *>(shared.values) + threadIdx.x;
             v < reinterpret_cast<uint4 *>(shared.values + STAGES<cut>); v += THREADS<cut>)
            *v = make_uint4(0, 0, 0, 0);
    __syncthreads();
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
    if (shared.part.slot < 0)
        return;
    if (group >= CONSUMERS<cut>) {
        give_registers<PRODUCER_REGISTERS<cut>>();
        int producer = group - CONSUMERS<cut>;
        uint8_t *grown = nullptr;
        if (memory_of_cut.grown)
            grown = reinterpret_cast<uint8_t *>(&memory_of_cut.grown[shared.part.index]) + rank * PRODUCERS +
                    producer;
        Producer<cut, bounded, keeps>{p, maps, shared, rank, producer, grown}.produce();
    } else {
        take_registers<CONSUMER_REGISTERS<cut>>();
        if constexpr (!cut)
            consume_whole<bounded, keeps>(p, maps, memory_of_cut, shared);
        else if (rank == 1 && shared.part.segment == 0)
            let_pass(shared);
        else
            consume_segment<bounded>(p, rank ? other.out : p.out, rank ? other.map : maps.out, rank,
                                     memory_of_cut, shared);
    }
    ptx::barrier_cluster_arrive(); /* the other one may still write here */
    ptx::barrier_cluster_wait();
}

template <bool cut, bool bounded, bool keeps>
cudaError_t launch_pairs(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                         const kda_sm90_spread &spread, const kda_sm90_cut &memory, const Other &other) {
    kda_sm90_maps maps;
    cudaError_t error = kda_sm90_map(p, &maps);
    return error ? error
                 : launch_kernel(pairs<cut, bounded, keeps>, *launch, THREADS<cut>, sizeof(Shared<cut>),
                                 p->stream, *p, maps, spread, memory, other, cut ? plan->chunks : 0);
}

template <bool bounded>
cudaError_t launch_true(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                        const kda_sm90_spread &spread, const kda_sm90_cut &memory) {
    return (p->checkpoints.data ? launch_pairs<false, bounded, true>
                                : launch_pairs<false, bounded, false>)(p, plan, launch, spread, memory, {});
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_cluster(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                             const kda_sm90_memory *memory) {
    using namespace kda;
    return (is_bounded(p) ? launch_true<true> : launch_true<false>)(p, plan, launch, memory->spread,
                                                                    memory->cut);
}

cudaError_t kda_sm90_cluster_again(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                                   const kda_sm90_memory *memory) {
    using namespace kda;
    kda_sm90_cut cut = memory->cut;
    cut.again = true;
    return (is_bounded(p) ? launch_true<true> : launch_true<false>)(p, plan, launch, memory->spread, cut);
}

cudaError_t kda_sm90_cluster_local(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                                   const kda_sm90_memory *memory) {
    using namespace kda;
    const kda_sm90_cut &cut = memory->cut;
    Other other = {};
    kda_prefill of_B = *p, of_A = *p;
    of_B.checkpoints.data = NULL; /* the second pass stores them */
    of_A.out.dtype = KDA_F16;
    for (int i = 3; i >= 0; i--)
        of_A.out.stride[i] = i == 3 ? 2 : of_A.out.stride[i + 1] * of_A.out.shape[i + 1];
    int64_t skipped = cut.skipped * of_A.out.stride[1]; /* no segment there has the identity's outputs */
    of_A.out.stride[0] -= skipped;
    of_A.out.data = reinterpret_cast<char *>(cut.outputs) - skipped;
    kda_sm90_maps maps;
    cudaError_t error = kda_sm90_map(&of_A, &maps);
    if (error)
        return error;
    other.out = of_A.out, other.map = maps.out;
    return (is_bounded(p) ? launch_pairs<true, true, false>
                          : launch_pairs<true, false, false>)(&of_B, plan, launch, memory->spread, cut, other);
}
