/* SPDX-License-Identifier: MIT */
/*
 * Prefill in one kernel, for K = V = 128 or 64, bf16, normalised q and k, the sigmoid gate or, for 128, the softplus gate
 * (docs/hopper.md).
 *
 * A CTA works one chain after another; or a part of all chains end to end (spread.cuh), which begins from zero. There it takes
 * the identity through the part's first chunk before: it shows whether the past is forgotten by then, and how the chunk's
 * outputs depend on it. Producer warpgroups take turns at making a chunk's operands, in place of its
 * q, k and g; consumer warpgroups, with 64 columns of V each, take the state through them in their accumulators.
 * When a chunk's tiles are made, warps of its group go on to the next one as they get free: one finds the norms of k,
 * another those of q, and the scout finds the chunk after that, describes it to all others and has the copy engine bring
 * it.
 */
#include "cuda/launch.cuh"
#include "cuda/sm90/consume.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/spread.cuh"
#include "cuda/sm90/tensor_maps.h"
#include "cuda/sm90/unbounded.cuh"

namespace kda {
namespace {

/* The kernel's forms: K = V = dim, with so many CTAs on a multiprocessor. Two where K = V = 64: one chain leaves room for another,
 * and they need nothing of each other. Where there is a multiprocessor for each, one has twice the producers instead. */
template <int dim, int ctas> struct FormOf {
    static constexpr int DIM = dim, CTAS = ctas;
    static constexpr bool FEW = DIM == 64 && CTAS == 1;
    /* Warpgroups of a CTA. */
    static constexpr int PRODUCERS = FEW ? 4 : 2, CONSUMERS = DIM / GROUP_COLUMNS;
    static constexpr int THREADS = (CONSUMERS + PRODUCERS) * GROUP;
    static constexpr int WARPS = GROUP / 32 * CONSUMERS; /* of consumers */
    static constexpr int STAGES = DIM == 128 ? 5 : FEW ? 8 : 4;
    /* Registers of a thread at the start: all of a multiprocessor's, as far as they can be shared out. Consumers then take some of the producers'. */
    static constexpr int REGISTERS = DIM == 128 ? 128 : FEW ? 96 : 80;
    static constexpr int CONSUMER_REGISTERS = DIM == 128 ? 168 : FEW ? 128 : 112;
    static constexpr int PRODUCER_REGISTERS = DIM == 128 || FEW ? 88 : 64;
    static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCERS * PRODUCER_REGISTERS <=
                          (CONSUMERS + PRODUCERS) * REGISTERS &&
                      CTAS * THREADS * REGISTERS <= 65536,
                  "or a consumer waits for registers for ever");
    /* How many of its group's chunks a scout is ahead of what is received. It goes on while tiles are made, if its warp makes
     * none; else when the operands are made, too late for the next chunk. */
    static constexpr int AHEAD = IN_ONE_WARP<DIM> ? 1 : 2;
    static constexpr int BETA = IN_ONE_WARP<DIM> ? SCOUT<DIM> : 1; /* the warp that has beta */
    /* Named barriers, each and the next ones, of each producer warpgroup; 0 is __syncthreads. */
    static constexpr int BARRIER_GROUP = 1, BARRIER_INVERSE = BARRIER_GROUP + PRODUCERS;
};
using Of128 = FormOf<128, 1>; /* also that of parts */
using Of64 = FormOf<64, 2>;
using FewOf64 = FormOf<64, 1>;

constexpr int SORTED = 256; /* sequences at most, more are worked in their own order */

/* Where a scout is: at a chunk of the CTA's chain before number `round`. */
struct Scout {
    int round, chunk, chunks;
    int n, head, key_head, batch, first, length, slot;
    int count;           /* tokens of the chunk; -1 behind the last one */
    kda_stretch stretch; /* of parts: what of the chain is in the CTA's */
};

/* A producer warpgroup's own. */
struct Scratch {
    Blocks blocks;
    Scout scout;
};

template <class Form> struct alignas(1024) Shared {
    Tiles<Form::DIM> tiles[Form::STAGES]; /* k, q and g at first */
    __nv_bfloat16 values[Form::STAGES][CHUNK * Form::DIM];
    __nv_bfloat16 outputs[1][Form::WARPS][CHUNK * 16]; /* of each consumer warp, swizzled by 32 bytes */
    Factors<Form::DIM> factors[Form::STAGES];
    uint8_t order[SORTED]; /* sequences, the longest first */
    Scratch scratch[Form::PRODUCERS];
    Task tasks[2 * Form::STAGES];
    bool identity[Form::WARPS];     /* is what a consumer warp takes through the first chunk of a part */
    int16_t kept[Form::WARPS];      /* the size of its state behind that chunk */
    uint64_t arrived[Form::STAGES]; /* q, k, v, g and the task: the scout and the bytes */
    uint64_t full[Form::STAGES];    /* the operands: a producer warpgroup */
    uint64_t empty[Form::STAGES];   /* the consumers are done */
};

static_assert(sizeof(Shared<Of128>) == 216 * 1024, "docs/hopper.md says what lies where");
static_assert(sizeof(Shared<Of64>) == 105 * 1024,
              "likewise; two leave room for what the hardware keeps of 228 KiB");
static_assert(sizeof(Shared<FewOf64>) <= 227 * 1024, "all that a CTA can have");

/* ---- Scouts --------------------------------------------------------------------------------------- */

__device__ bool sorts(const kda_prefill &p) { return p.cu_seqlens.data && p.sequences <= SORTED; }

/* Finds the order in which packed sequences are worked: the longest first, so that the CTAs end together. */
template <class Form> __device__ void sort_sequences(const kda_prefill &p, Shared<Form> &shared) {
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

/* What a launch works: chains one by one, or parts. */
struct Work {
    int items; /* chains */
    kda_sm90_spread spread;
};

/* The scout's chain becomes that of n and head. Returns its chunks: none where it is not to be worked. */
__device__ int enter_chain(const kda_prefill &p, int n, int head, Scout &scout) {
    struct kda_sequence sequence = kda_sequence(&p, n);
    scout.n = n, scout.head = head;
    scout.key_head = head / (int)(p.value_heads / p.heads);
    scout.batch = (int)sequence.batch, scout.slot = (int)sequence.slot;
    scout.first = (int)sequence.first, scout.length = (int)sequence.length;
    return sequence.slot < 0 ? 0 : (int)kda_chunk_count(&p, n, sequence.length);
}

/* Enters the CTA's next chain, if there is one. */
template <class Form>
__device__ bool next_chain(const kda_prefill &p, Shared<Form> &shared, const Work &work, Scout &scout) {
    if (scout.round * (int)gridDim.x >= work.items)
        return false;
    int item = find_item(scout.round++);
    scout.chunks = 0;
    if (item < work.items) {
        int n = item / (int)p.value_heads, head = item % (int)p.value_heads;
        if (sorts(p))
            n = shared.order[n];
        if (is_left(p, work.spread, n, head))
            scout.chunks = enter_chain(p, n, head, scout);
    }
    return true;
}

/* Enters what of the next chain is in the CTA's part. */
__device__ bool next_of_part(const kda_prefill &p, const kda_sm90_spread &spread, Scout &scout) {
    if (scout.round++ == 0)
        scout.stretch = spread.firsts[blockIdx.x];
    else if (!kda_next_stretch(&p, &spread.all, blockIdx.x, &scout.stretch))
        return false;
    enter_chain(p, scout.stretch.n, scout.stretch.head, scout);
    scout.chunks = scout.stretch.end - scout.stretch.begin;
    return true;
}

/* Goes some chunks on, through the chains of the CTA. */
template <bool parts, class Form>
__device__ void find_next(const kda_prefill &p, Shared<Form> &shared, const Work &work, Scout &scout,
                          int chunks) {
    int chunk = scout.chunk + chunks;
    while (chunk >= scout.chunks) {
        chunk -= scout.chunks;
        if (!(parts ? next_of_part(p, work.spread, scout) : next_chain(p, shared, work, scout))) {
            scout.count = -1;
            return;
        }
    }
    scout.chunk = chunk;
}

/* Sends the scout's chunk to all: what it is, and by the copy engine its tensors. */
template <bool parts, bool keeps, class Form>
__device__ void send(const kda_prefill &p, const kda_sm90_maps &maps, Shared<Form> &shared, Scout &scout,
                     const Turn<Form::STAGES> &turn) {
    int s = turn.stage, chunk = scout.chunk;
    uint64_t *arrived = &shared.arrived[s];
    Task task;
    task.n = scout.n, task.head = scout.head, task.batch = scout.batch, task.slot = scout.slot;
    task.column = 0;
    task.count = scout.count;
    if (task.count >= 0) {
        struct kda_span span =
            kda_chunk_span(&p, task.n, scout.length, (parts ? scout.stretch.begin : 0) + chunk);
        task.token = scout.first + (int)span.first, task.position = (int)(span.first + span.count);
        task.count = (int)span.count;
    }
    bool first = chunk == 0, last = chunk + 1 == scout.chunks;
    task.flags = find_flags(task, first, last, keeps && (!parts || p.checkpoints.data));
    if (parts && task.count >= 0)
        task.flags |= (first && scout.stretch.begin ? CUT : 0) | (last && scout.stretch.begin ? FROM_CUT : 0) |
                      (last && kda_cut_behind(&scout.stretch) ? CUT_BEHIND : 0);
    wait(shared.empty[s], turn.parity ^ !(parts && s == Form::STAGES - 1)); /* the last one is rehearsed in */
    shared.tasks[turn.task()] = task;
    scout.count = task.count;
    if (task.count <= 0) {
        ptx::mbarrier_arrive(arrived);
        return;
    }
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, arrived,
                                   (uint32_t)(sizeof shared.tiles[s].panels + sizeof shared.values[s]));
    int key_head = scout.key_head;
    auto bring = [&](void *to, const CUtensorMap &map, int panel, int head, uint64_t policy) {
        const int32_t at[4] = {panel * PANEL, head, task.token, task.batch};
        bring_box(to, map, at, *arrived, policy);
    };
    uint64_t own = read_once(), shared_by_heads = p.heads < p.value_heads ? read_again() : own;
#pragma unroll
    for (int i = 0; i < Form::DIM / PANEL; i++) {
        Panel &panel = shared.tiles[s].panels[i];
        bring(panel.keys, maps.k, i, key_head, shared_by_heads);
        bring(panel.queries, maps.q, i, key_head, shared_by_heads);
        bring(panel.gates, maps.g, i, task.head, own);
        bring(&shared.values[s][i * CHUNK * PANEL], maps.v, i, task.head, own);
    }
}

/* ---- Producers ------------------------------------------------------------------------------------ */

template <bool parts, bool bounded, bool keeps, class Form>
__device__ void produce(const kda_prefill &p, const kda_sm90_maps &maps, Shared<Form> &shared, const Work &work,
                        int group) {
    constexpr int DIM = Form::DIM;
    int warp = threadIdx.x % GROUP / 32;
    Scratch &scratch = shared.scratch[group];
    Turn<Form::STAGES> turn, ahead;
    turn.next(group), ahead.next(group);
    auto go_on = [&](int chunks) {
        Scout &scout = scratch.scout;
        __syncwarp(); /* all lanes have read what is overwritten now */
        if (elected() && scout.count >= 0) {
            find_next<parts>(p, shared, work, scout, chunks);
            send<parts, keeps>(p, maps, shared, scout, ahead);
        }
        __syncwarp();
        ahead.next(Form::PRODUCERS);
    };
    int slot = 0;
    auto load = [&](const Task &task) { return load_beta(p, task.batch, task.token, task.head, task.count); };
    auto receive = [&](uint32_t beta, bool is_loaded) {
        int s = turn.stage;
        wait(shared.arrived[s], turn.parity);
        const Task &task = shared.tasks[turn.task()];
        if (warp == Form::BETA) {
            if (!is_loaded)
                beta = load(task);
            scratch.blocks.beta[slot][threadIdx.x % 32] = find_beta(p, task.count, beta);
        }
        receive_chunk<DIM / PANEL, false>(p, shared.tiles[s], shared.factors[s], shared.values[s],
                                          scratch.blocks, slot, task.count);
    };
    if (warp == SCOUT<DIM> && threadIdx.x % 32 == 0)
        scratch.scout = {};
    Gate gate;
    bool rehearses = parts && group == Form::PRODUCERS - 1;
    int count = rehearses ? CHUNK : 0;
    /* Every step stands once, also those before the first chunk is made: code competes for the instruction cache, and takes
     * time to be fetched. In parts one group fetches it while the other's scout works, by making operands of what lies in
     * its first stage. */
    for (int round = -Form::AHEAD - rehearses;; round++) {
        const Task &task = shared.tasks[turn.task()];
        if (round >= 0) {
            barrier_wait(Form::BARRIER_GROUP + group, GROUP);
            count = task.count;
        }
        auto scout = [&] { go_on(round == -Form::AHEAD ? group : Form::PRODUCERS); };
        if (Form::AHEAD == 1 && warp == SCOUT<DIM>)
            scout();
        bool next_is_known = count >= 0 && round >= Form::AHEAD - 2;
        uint32_t beta = 0; /* of the next chunk, on its way */
        if (warp == Form::BETA && next_is_known) {
            Turn<Form::STAGES> next = turn;
            if (round >= 0)
                next.next(Form::PRODUCERS);
            beta = load(shared.tasks[next.task()]);
        }
        if (count > 0) {
            if (task.head != gate.head)
                gate = find_gate<bounded>(p, task.head, own_channel<DIM>(threadIdx.x));
            make_operands<bounded>(shared.tiles[turn.stage], shared.factors[turn.stage], scratch.blocks, slot,
                                   Form::BARRIER_GROUP + group, Form::BARRIER_INVERSE + group, gate);
        }
        if (parts && __builtin_expect(round < -Form::AHEAD, 0)) {
            barrier_wait(Form::BARRIER_GROUP + group, GROUP); /* before the stage is filled */
            count = 0;
            continue;
        }
        if (round >= 0) {
            ptx::mbarrier_arrive(&shared.full[turn.stage]);
            if (count < 0)
                return;
            turn.next(Form::PRODUCERS);
            slot ^= 1;
        }
        if (Form::AHEAD == 2 && warp == SCOUT<DIM>)
            scout();
        if (round >= -1)
            receive(beta, Form::AHEAD == 1 || next_is_known);
    }
}

/* ---- Consumers ------------------------------------------------------------------------------------ */

/* Chains from the state before them to the one behind. */
template <bool bounded, bool keeps, class Form>
__device__ void consume_chains(const kda_prefill &p, const kda_sm90_maps &maps, Shared<Form> &shared) {
    constexpr int DIM = Form::DIM;
    consume<DIM, true, bounded>(
        p, p.out, maps.out, shared, Turn<Form::STAGES>(),
        [&](const Task &task, float(&S)[DIM / 8][4]) {
            load_whole(kda_state_at(&p, &p.initial_state, task.slot, task.head), S);
            if constexpr (keeps)
                store_whole_checkpoints(p, task.n, task.head, 0, 0, S, 0);
            return measured(S);
        },
        [&](const Turn<Form::STAGES> &turn, uint32_t, Values &v) {
            load_values<DIM>(shared.values[turn.stage], v);
        },
        NeverAgain(),
        [&](const Task &, float(&o)[CHUNK / 8][4], int unit) {
            leave_unit(o, unit);
            return p.out.dtype;
        },
        [&](const Task &task, float(&S)[DIM / 8][4], int unit) {
            if constexpr (keeps)
                store_checkpoints(p, task, -1, S, unit);
        },
        [&](const Task &task, float(&S)[DIM / 8][4], int unit) {
            store_whole(kda_state_at(&p, &p.final_state, task.slot, task.head), S, unit);
        });
}

/* log2 of a number between the largest element of the warp's columns that counts and its double; EXACT_ZERO if it is 0. broken:
 * is one not finite? */
__device__ int16_t size_of_state(const float (&S)[DIM / 8][4], int unit, bool &broken) {
    float largest = 0;
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            largest = max_or_nan(largest, fabsf(S[c][n]));
    broken = __any_sync(~0u, !(largest < INFINITY));
    largest = largest_that_counts(largest);
    return (int16_t)(largest == 0 ? EXACT_ZERO : unit + max((int)(__float_as_uint(largest) >> 23), 1) - 126);
}

/* Stores a state that kernel join will read, in 16 bytes of each thread at a time. */
__device__ void store_pieces(uint4 *to, const float (&S)[DIM / 8][4], int unit) {
    float factor = power_of_two(unit);
#pragma unroll
    for (int c = 0; c < DIM / 8; c += 2, to += STATE_THREADS)
        *to = make_uint4(pack_bf16(S[c][0] * factor, S[c][1] * factor),
                         pack_bf16(S[c][2] * factor, S[c][3] * factor),
                         pack_bf16(S[c + 1][0] * factor, S[c + 1][1] * factor),
                         pack_bf16(S[c + 1][2] * factor, S[c + 1][3] * factor));
}
__device__ void store_pieces(float4 *to, const float (&S)[DIM / 8][4], int unit) {
    float factor = power_of_two(unit);
#pragma unroll
    for (int c = 0; c < DIM / 8; c++, to += STATE_THREADS)
        *to = make_float4(S[c][0] * factor, S[c][1] * factor, S[c][2] * factor, S[c][3] * factor);
}

/* The CTA's part, in which only the first chain can be cut in front. */
template <bool bounded>
__device__ void consume_part(const kda_prefill &p, const kda_sm90_maps &maps, Shared<Of128> &shared,
                             const kda_sm90_spread &spread) {
    consume<DIM, true, bounded>(
        p, p.out, maps.out, shared, before_first<Of128::STAGES>(),
        [&](const Task &task, float(&S)[DIM / 8][4]) {
            if (!(task.flags & CUT)) {
                load_whole(kda_state_at(&p, &p.initial_state, task.slot, task.head), S, thread());
                store_whole_checkpoints(p, task.n, task.head, 0, 0, S, 0, thread());
                return measured(S);
            }
            bool &identity = shared.identity[thread() / 32], now = !(identity || task.flags & REHEARSAL);
            __syncwarp();
            identity = now;
            __syncwarp();
            make_diagonal(S, now ? 1.f : 0.f);
            return now ? 0 : LEAST_UNIT;
        },
        [&](const Turn<Of128::STAGES> &turn, uint32_t flags, Values &v) {
            load_values<DIM>(shared.values[turn.stage], v);
            if (__builtin_expect(flags & CUT, 0) && shared.identity[thread() / 32])
#pragma unroll
                for (int t = 0; t < CHUNK / 16; t++)
                    v[t][0] = v[t][1] = v[t][2] = v[t][3] = 0;
        },
        [&](const Task &task, float(&S)[DIM / 8][4], int unit) {
            if (task.flags & REHEARSAL)
                return true;
            int warp = (int)thread() / 32, lane = (int)thread() % 32;
            bool broken;
            int16_t size = size_of_state(S, unit, broken);
            if (!shared.identity[warp]) {
                shared.kept[warp] = size;
                return false;
            }
            spread.proofs[blockIdx.x].A[warp] = broken ? NEVER_SMALL : size;
            __syncwarp();
            uint16_t *to =
                spread.outputs + ((int64_t)blockIdx.x * CHUNK + lane) * DIM + warp * KDA_SM90_UNIT_COLUMNS;
            store_row(shared.outputs[0][warp], reinterpret_cast<char *>(to));
            return true;
        },
        [&](const Task &task, float(&o)[CHUNK / 8][4], int unit) {
            leave_unit(o, unit);
            return task.flags & CUT && shared.identity[thread() / 32] ? KDA_BF16 : p.out.dtype;
        },
        [&](const Task &task, float(&S)[DIM / 8][4], int unit) {
            store_whole_checkpoints(p, task.n, task.head, 0, task.position, S, unit, thread());
        },
        [&](const Task &task, float(&S)[DIM / 8][4], int unit) {
            int warp = (int)thread() / 32;
            if (task.flags & (CUT_BEHIND | FROM_CUT)) {
                bool broken;
                int16_t size = size_of_state(S, unit, broken);
                if (task.flags & FROM_CUT)
                    spread.proofs[blockIdx.x].kept[warp] = min(size, shared.kept[warp]);
                if (task.flags & CUT_BEHIND)
                    spread.proofs[blockIdx.x + 1].before[warp] = broken ? NEVER_SMALL : size;
            }
            if (task.flags & CUT_BEHIND)
                store_pieces(state_pieces(spread, blockIdx.x + 1, thread()), S, unit);
            else if (task.flags & FROM_CUT)
                store_pieces(final_pieces(p, spread, task.n, task.head, thread()), S, unit);
            else
                store_whole(kda_state_at(&p, &p.final_state, task.slot, task.head), S, unit, thread());
        });
}

/* Chains without checkpoints, `keeps` false, have the code of these left out of a loop that competes for the instruction cache;
 * parts have it in any case. */
template <class Form, bool parts, bool bounded, bool keeps>
__global__ void __maxnreg__(Form::REGISTERS)
    fused(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_maps maps,
          const __grid_constant__ Work work) {
    extern __shared__ __align__(1024) char memory[];
    Shared<Form> &shared = *reinterpret_cast<Shared<Form> *>(memory);
    if (threadIdx.x == 0) {
        prefetch_maps(maps);
        for (int i = 0; i < Form::STAGES; i++) {
            ptx::mbarrier_init(&shared.arrived[i], 1);
            ptx::mbarrier_init(&shared.full[i], GROUP);
            ptx::mbarrier_init(&shared.empty[i], Form::CONSUMERS * GROUP);
        }
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    clear_inverses(shared.tiles);
    if (parts && threadIdx.x < Form::WARPS)
        shared.identity[threadIdx.x] = false;
    if (parts && threadIdx.x < 2 * Form::STAGES) {
        Task rehearsal = {};
        rehearsal.flags = REHEARSAL | CUT | BEGINS;
        shared.tasks[threadIdx.x] = rehearsal;
    }
    if (!parts && sorts(p))
        sort_sequences(p, shared);
    wait_for_kernel_before();
    let_next_begin(); /* not earlier: join reads what look has left without waiting */
    bool slow = parts && threadIdx.x < work.spread.all.parts && __ldcg(&work.spread.looks[threadIdx.x]) == SLOW;
    if (__syncthreads_or(slow) || (!parts && nothing_is_left(work.spread)))
        return;
    int group = threadIdx.x / GROUP;
    if (group < Form::CONSUMERS) {
        take_registers<Form::CONSUMER_REGISTERS>();
        if constexpr (parts)
            consume_part<bounded>(p, maps, shared, work.spread);
        else
            consume_chains<bounded, keeps>(p, maps, shared);
    } else {
        give_registers<Form::PRODUCER_REGISTERS>();
        produce<parts, bounded, keeps>(p, maps, shared, work, group - Form::CONSUMERS);
    }
}

template <class Form, bool parts, bool bounded, bool keeps>
cudaError_t launch_form(const kda_prefill *p, const kda_launch *launch, const kda_sm90_memory *memory) {
    const Work work = {parts ? 0 : (int)(p->sequences * p->value_heads), memory->spread};
    kda_sm90_maps maps;
    cudaError_t error = kda_sm90_map(p, &maps);
    return error ? error
                 : launch_kernel(fused<Form, parts, bounded, keeps>, *launch, Form::THREADS,
                                 sizeof(Shared<Form>), p->stream, *p, maps, work);
}

template <class Form, bool bounded>
cudaError_t launch_chains(const kda_prefill *p, const kda_launch *launch, const kda_sm90_memory *memory) {
    return (p->checkpoints.data ? launch_form<Form, false, bounded, true>
                                : launch_form<Form, false, bounded, false>)(p, launch, memory);
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_persistent(const kda_prefill *p, const kda_plan *, const kda_launch *launch,
                                const kda_sm90_memory *memory) {
    using namespace kda;
    auto of_64 = launch->config == Of64::CTAS ? launch_chains<Of64, true> : launch_chains<FewOf64, true>;
    auto of_128 = is_bounded(p) ? launch_chains<Of128, true> : launch_chains<Of128, false>;
    return (p->key_dim == 128 ? of_128 : of_64)(p, launch, memory);
}

cudaError_t kda_sm90_ranges(const kda_prefill *p, const kda_plan *, const kda_launch *launch,
                            const kda_sm90_memory *memory) {
    using namespace kda;
    return (is_bounded(p) ? launch_form<Of128, true, true, true>
                          : launch_form<Of128, true, false, true>)(p, launch, memory);
}
