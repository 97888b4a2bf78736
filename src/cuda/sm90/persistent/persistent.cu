/* SPDX-License-Identifier: MIT */
/*
 * Prefill in one kernel, for K = V = 128 or 64, bf16, normalised q and k, the sigmoid gate or, for 128, the
 * softplus gate (docs/hopper.md).
 *
 * A CTA works one chain after another, or a range of all chains end to end (stream_k/ranges.cuh). A range that
 * starts inside a chain runs its first chunk twice: from S = I for A and O_A, then from S = 0. A shows whether
 * the past is forgotten by then, and O_A how the chunk's outputs depend on it.
 *
 * Producer warpgroups alternately make a chunk's operands, in place of its q, k and g. Consumer warpgroups,
 * with 64 columns of V each, take the state through them in their accumulators. When a chunk's tiles are made,
 * warps of its group go on to the group's next chunk as they get free: one finds the norms of k, another those
 * of q. The scout finds the chunk after that, describes it to all others and has the copy engine bring it.
 */
#include "cuda/launch.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/persistent/config.cuh"
#include "cuda/sm90/tensor_maps.h"

namespace kda {
namespace {

/* ---- Scouts --------------------------------------------------------------------------------------- */

__device__ bool sorts(const kda_prefill &p) { return p.cu_seqlens.data && p.sequences <= SORTED; }

/* Finds the order in which packed sequences are worked: the longest first, so that the CTAs end together. */
template <class Config> __device__ void sort_sequences(const kda_prefill &p, Shared<Config> &shared) {
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

/* The (sequence, head) that the CTA works in a round. Rounds run forwards and backwards alternately, so that a
 * CTA that had a long one first has a short one next. */
__device__ int find_item(int round) {
    int ctas = gridDim.x, cta = blockIdx.x;
    return round * ctas + (round % 2 ? ctas - 1 - cta : cta);
}

/* What a launch works: chains one by one, or ranges. */
struct Work {
    int items; /* chains */
    kda_sm90_stream_k stream_k;
};

/* Moves the scout to the chain of n and head. Returns its chunks: 0 where it is not to be worked. */
template <bool keeps, int DIM> __device__ int enter_chain(const kda_prefill &p, int n, int head, Scout &scout) {
    struct kda_sequence sequence = kda_sequence(&p, n);
    scout.n = n, scout.head = head;
    scout.key_head = head / (int)(p.value_heads / p.heads);
    scout.batch = (int)sequence.batch, scout.slot = (int)sequence.slot;
    scout.first = (int)sequence.first, scout.length = (int)sequence.length;
    int chunks = sequence.slot < 0 ? 0 : (int)kda_chunk_count(&p, n, sequence.length);
    if (keeps)
        find_checkpoints<DIM>(p, n, head, 0, chunks, scout.checkpoints);
    return chunks;
}

/* Enters the CTA's next chain, if there is one. */
template <bool keeps, class Config>
__device__ bool next_chain(const kda_prefill &p, Shared<Config> &shared, const Work &work, Scout &scout) {
    if (scout.round * (int)gridDim.x >= work.items)
        return false;
    int item = find_item(scout.round++);
    scout.chunks = 0;
    if (item < work.items) {
        int n = item / (int)p.value_heads, head = item % (int)p.value_heads;
        if (sorts(p))
            n = shared.order[n];
        if (is_pending(p, work.stream_k, n, head))
            scout.chunks = enter_chain<keeps, Config::DIM>(p, n, head, scout);
    }
    return true;
}

/* Enters the next slice of the CTA's range, if there is one. */
template <bool keeps>
__device__ bool next_slice(const kda_prefill &p, const kda_sm90_stream_k &stream_k, Scout &scout) {
    if (scout.round++ == 0)
        scout.slice = stream_k.firsts[blockIdx.x];
    else if (!kda_next_slice(&p, &stream_k.split, blockIdx.x, &scout.slice))
        return false;
    enter_chain<keeps, DIM>(p, scout.slice.n, scout.slice.head, scout);
    scout.chunks = scout.slice.end - scout.slice.begin;
    return true;
}

/* Moves some chunks on, through the chains of the CTA. */
template <bool ranges, bool keeps, class Config>
__device__ void find_next(const kda_prefill &p, Shared<Config> &shared, const Work &work, Scout &scout,
                          int chunks) {
    int chunk = scout.chunk + chunks;
    while (chunk >= scout.chunks) {
        chunk -= scout.chunks;
        if (!(ranges ? next_slice<keeps>(p, work.stream_k, scout)
                     : next_chain<keeps>(p, shared, work, scout))) {
            scout.count = -1;
            return;
        }
    }
    scout.chunk = chunk;
}

/* Sends the scout's chunk to all: its info, and by the copy engine its tensors. */
template <bool ranges, bool keeps, class Config>
__device__ void send(const kda_prefill &p, const kda_sm90_maps &maps, Shared<Config> &shared, Scout &scout,
                     const PipelineState<Config::STAGES> &pipe) {
    int s = pipe.stage, chunk = scout.chunk;
    uint64_t *arrived = &shared.arrived[s];
    ChunkInfo info;
    info.n = scout.n, info.head = scout.head, info.batch = scout.batch, info.slot = scout.slot;
    info.column = 0;
    info.count = scout.count;
    if (info.count >= 0) {
        int number = (ranges ? scout.slice.begin : 0) + chunk;
        struct kda_span span = keeps && scout.checkpoints.every
                                   ? kda_whole_chunk(scout.length, number)
                                   : kda_chunk_span(&p, info.n, scout.length, number);
        info.token = scout.first + (int)span.first, info.position = (int)(span.first + span.count);
        info.count = (int)span.count;
    }
    bool first = chunk == 0, last = chunk + 1 == scout.chunks;
    info.flags = find_flags(info, first, last, keeps);
    if (keeps && info.count > 0 && scout.checkpoints.every)
        place_checkpoint(scout.checkpoints, (ranges ? scout.slice.begin : 0) + chunk + 1,
                         info.position == scout.length, info);
    if (ranges && info.count >= 0)
        info.flags |= (first && scout.slice.begin ? SPLIT : 0) | (last && scout.slice.begin ? FROM_SPLIT : 0) |
                      (last && kda_split_after(&scout.slice) ? SPLIT_AFTER : 0);
    wait(shared.empty[s],
         pipe.parity ^ !(ranges && s == Config::STAGES - 1)); /* ranges rehearse in the last stage */
    shared.infos[pipe.info_index()] = info;
    scout.count = info.count;
    if (info.count <= 0) {
        ptx::mbarrier_arrive(arrived);
        return;
    }
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, arrived,
                                   (uint32_t)(sizeof shared.tiles[s].panels + sizeof shared.values[s]));
    int key_head = scout.key_head;
    auto bring = [&](void *to, const CUtensorMap &map, int panel, int head, uint64_t policy) {
        const int32_t at[4] = {panel * PANEL, head, info.token, info.batch};
        bring_box(to, map, at, *arrived, policy);
    };
    uint64_t own = read_once(), shared_by_heads = p.heads < p.value_heads ? read_again() : own;
#pragma unroll
    for (int i = 0; i < Config::DIM / PANEL; i++) {
        Panel &panel = shared.tiles[s].panels[i];
        bring(panel.keys, maps.k, i, key_head, shared_by_heads);
        bring(panel.queries, maps.q, i, key_head, shared_by_heads);
        bring(panel.gates, maps.g, i, info.head, own);
        bring(&shared.values[s][i * CHUNK * PANEL], maps.v, i, info.head, own);
    }
}

/* ---- Producers ------------------------------------------------------------------------------------ */

template <bool ranges, bool bounded, bool keeps, class Config>
__device__ void produce(const kda_prefill &p, const kda_sm90_maps &maps, Shared<Config> &shared,
                        const Work &work, int group) {
    constexpr int DIM = Config::DIM;
    int warp = threadIdx.x % GROUP / 32;
    Scratch &scratch = shared.scratch[group];
    PipelineState<Config::STAGES> pipe, ahead;
    pipe.next(group), ahead.next(group);
    auto go_on = [&](int chunks) {
        Scout &scout = scratch.scout;
        __syncwarp(); /* all lanes have read what is overwritten now */
        if (elected() && scout.count >= 0) {
            find_next<ranges, keeps>(p, shared, work, scout, chunks);
            send<ranges, keeps>(p, maps, shared, scout, ahead);
        }
        __syncwarp();
        ahead.next(Config::PRODUCERS);
    };
    int slot = 0;
    auto load = [&](const ChunkInfo &info) {
        return load_beta(p, info.batch, info.token, info.head, info.count);
    };
    auto receive = [&](uint32_t beta, bool is_loaded) {
        int s = pipe.stage;
        wait(shared.arrived[s], pipe.parity);
        const ChunkInfo &info = shared.infos[pipe.info_index()];
        if (warp == Config::BETA) {
            if (!is_loaded)
                beta = load(info);
            scratch.blocks.beta[slot][threadIdx.x % 32] = find_beta(p, info.count, beta);
        }
        receive_chunk<DIM / PANEL, false>(p, shared.tiles[s], shared.factors[s], shared.values[s],
                                          scratch.blocks, slot, info.count);
    };
    if (warp == SCOUT<DIM> && threadIdx.x % 32 == 0)
        scratch.scout = {};
    Gate gate;
    bool rehearses = ranges && group == Config::PRODUCERS - 1;
    int count = rehearses ? CHUNK : 0;
    /* The loop has every step once, also for rounds before the first chunk is made: code competes for the
     * instruction cache and takes time to be fetched. With ranges one group fetches it while the other's scout
     * works: it makes operands of whatever lies in its first stage. */
    for (int round = -Config::AHEAD - rehearses;; round++) {
        const ChunkInfo &info = shared.infos[pipe.info_index()];
        if (round >= 0) {
            barrier_wait(Config::BARRIER_GROUP + group, GROUP);
            count = info.count;
        }
        auto scout = [&] { go_on(round == -Config::AHEAD ? group : Config::PRODUCERS); };
        if (Config::AHEAD == 1 && warp == SCOUT<DIM>)
            scout();
        bool next_is_known = count >= 0 && round >= Config::AHEAD - 2;
        uint32_t beta = 0; /* of the next chunk, on its way */
        if (warp == Config::BETA && next_is_known) {
            PipelineState<Config::STAGES> next = pipe;
            if (round >= 0)
                next.next(Config::PRODUCERS);
            beta = load(shared.infos[next.info_index()]);
        }
        if (count > 0) {
            if (info.head != gate.head)
                gate = find_gate<bounded>(p, info.head, own_channel<DIM>(threadIdx.x));
            make_operands<bounded>(shared.tiles[pipe.stage], shared.factors[pipe.stage], scratch.blocks, slot,
                                   Config::BARRIER_GROUP + group, Config::BARRIER_INVERSE + group, gate);
        }
        if (ranges && __builtin_expect(round < -Config::AHEAD, 0)) {
            barrier_wait(Config::BARRIER_GROUP + group, GROUP); /* before the stage is filled */
            count = 0;
            continue;
        }
        if (round >= 0) {
            ptx::mbarrier_arrive(&shared.full[pipe.stage]);
            if (count < 0)
                return;
            pipe.next(Config::PRODUCERS);
            slot ^= 1;
        }
        if (Config::AHEAD == 2 && warp == SCOUT<DIM>)
            scout();
        if (round >= -1)
            receive(beta, Config::AHEAD == 1 || next_is_known);
    }
}

/* ---- Consumers ------------------------------------------------------------------------------------ */

/* Takes chains from the state before them to the one after. */
template <class Config, bool keeps> struct ChainPolicy : DefaultPolicy<Config::DIM> {
    static constexpr int DIM = Config::DIM;
    const kda_prefill &p;
    Shared<Config> &shared;

    __device__ ChainPolicy(const kda_prefill &p, Shared<Config> &shared) : p(p), shared(shared) {}
    __device__ int before(const ChunkInfo &info, float (&S)[DIM / 8][4]) const {
        load_whole(kda_state_before(&p, info.n, info.slot, info.head), S);
        if constexpr (keeps)
            store_whole_checkpoints(p, info.n, info.head, 0, 0, S, 0);
        return measured(S);
    }
    __device__ void load(int stage, uint32_t, Values &v) const { load_values<DIM>(shared.values[stage], v); }
    __device__ kda_dtype finish(const ChunkInfo &, float (&o)[CHUNK / 8][4], int exponent) const {
        unscale_outputs(o, exponent);
        return p.out.dtype;
    }
    __device__ void keep(const ChunkInfo &info, float (&S)[DIM / 8][4], int exponent) const {
        if constexpr (keeps)
            store_checkpoints(p, info, S, exponent);
    }
    __device__ void after(const ChunkInfo &info, float (&S)[DIM / 8][4], int exponent) const {
        store_whole(kda_state_at(&p, &p.final_state, info.slot, info.head), S, exponent);
    }
};

/* log2 of a number between the largest finite element of the warp's columns and its double; EXACT_ZERO if that
 * is 0. broken: is an element not finite? */
__device__ int16_t size_of_state(const float (&S)[DIM / 8][4], int exponent, bool &broken) {
    float largest = 0;
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            largest = max_or_nan(largest, fabsf(S[c][n]));
    broken = __any_sync(~0u, !(largest < INFINITY));
    largest = largest_that_counts(largest);
    return (int16_t)(largest == 0 ? EXACT_ZERO
                                  : exponent + max((int)(__float_as_uint(largest) >> 23), 1) - 126);
}

/* Stores a state for the fixup, 16 bytes of each thread at a time. */
__device__ void store_pieces(uint4 *to, const float (&S)[DIM / 8][4], int exponent) {
    float factor = power_of_two(exponent);
#pragma unroll
    for (int c = 0; c < DIM / 8; c += 2, to += STATE_THREADS)
        *to = make_uint4(pack_bf16(S[c][0] * factor, S[c][1] * factor),
                         pack_bf16(S[c][2] * factor, S[c][3] * factor),
                         pack_bf16(S[c + 1][0] * factor, S[c + 1][1] * factor),
                         pack_bf16(S[c + 1][2] * factor, S[c + 1][3] * factor));
}
__device__ void store_pieces(float4 *to, const float (&S)[DIM / 8][4], int exponent) {
    float factor = power_of_two(exponent);
#pragma unroll
    for (int c = 0; c < DIM / 8; c++, to += STATE_THREADS)
        *to = make_float4(S[c][0] * factor, S[c][1] * factor, S[c][2] * factor, S[c][3] * factor);
}

/* Works the CTA's range, in which only the first chain can be split in front. */
template <bool keeps> struct RangePolicy {
    const kda_prefill &p;
    Shared<Config128> &shared;
    const kda_sm90_stream_k &stream_k;

    __device__ int before(const ChunkInfo &info, float (&S)[DIM / 8][4]) const {
        if (!(info.flags & SPLIT)) {
            load_whole(kda_state_before(&p, info.n, info.slot, info.head), S, thread());
            if constexpr (keeps)
                store_whole_checkpoints(p, info.n, info.head, 0, 0, S, 0, thread());
            return measured(S);
        }
        bool &identity = shared.identity[thread() / 32], now = !(identity || info.flags & REHEARSAL);
        __syncwarp();
        identity = now;
        __syncwarp();
        make_diagonal(S, now ? 1.f : 0.f);
        return now ? 0 : LEAST_EXPONENT;
    }
    __device__ void load(int stage, uint32_t flags, Values &v) const {
        load_values<DIM>(shared.values[stage], v);
        if (__builtin_expect(flags & SPLIT, 0) && shared.identity[thread() / 32])
#pragma unroll
            for (int t = 0; t < CHUNK / 16; t++)
                v[t][0] = v[t][1] = v[t][2] = v[t][3] = 0;
    }
    __device__ bool again(const ChunkInfo &info, float (&S)[DIM / 8][4], int exponent) const {
        if (info.flags & REHEARSAL)
            return true;
        int warp = (int)thread() / 32, lane = (int)thread() % 32;
        bool broken;
        int16_t size = size_of_state(S, exponent, broken);
        if (!shared.identity[warp]) {
            shared.kept[warp] = size;
            return false;
        }
        stream_k.proofs[blockIdx.x].A[warp] = broken ? NEVER_SMALL : size;
        __syncwarp();
        uint16_t *to =
            stream_k.outputs + ((int64_t)blockIdx.x * CHUNK + lane) * DIM + warp * KDA_SM90_EXPONENT_COLUMNS;
        store_row(shared.outputs[0][warp], reinterpret_cast<char *>(to));
        return true;
    }
    __device__ kda_dtype finish(const ChunkInfo &info, float (&o)[CHUNK / 8][4], int exponent) const {
        unscale_outputs(o, exponent);
        return info.flags & SPLIT && shared.identity[thread() / 32] ? KDA_BF16 : p.out.dtype;
    }
    __device__ void keep(const ChunkInfo &info, float (&S)[DIM / 8][4], int exponent) const {
        if constexpr (keeps)
            store_checkpoints(p, info, S, exponent);
    }
    __device__ void after(const ChunkInfo &info, float (&S)[DIM / 8][4], int exponent) const {
        int warp = (int)thread() / 32;
        if (info.flags & (SPLIT_AFTER | FROM_SPLIT)) {
            bool broken;
            int16_t size = size_of_state(S, exponent, broken);
            if (info.flags & FROM_SPLIT)
                stream_k.proofs[blockIdx.x].kept[warp] = min(size, shared.kept[warp]);
            if (info.flags & SPLIT_AFTER)
                stream_k.proofs[blockIdx.x + 1].before[warp] = broken ? NEVER_SMALL : size;
        }
        if (info.flags & SPLIT_AFTER)
            store_pieces(state_pieces(stream_k, blockIdx.x + 1, thread()), S, exponent);
        else if (info.flags & FROM_SPLIT)
            store_pieces(final_pieces(p, stream_k, info.n, info.head, thread()), S, exponent);
        else
            store_whole(kda_state_at(&p, &p.final_state, info.slot, info.head), S, exponent, thread());
    }
};

/* Without checkpoints (keeps is false) their code is left out of a loop that competes for the instruction
 * cache. */
template <class Config, bool ranges, bool bounded, bool keeps>
__global__ void __maxnreg__(Config::REGISTERS)
    persistent(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_maps maps,
               const __grid_constant__ Work work) {
    extern __shared__ __align__(1024) char memory[];
    Shared<Config> &shared = *reinterpret_cast<Shared<Config> *>(memory);
    if (threadIdx.x == 0) {
        prefetch_maps(maps);
        for (int i = 0; i < Config::STAGES; i++) {
            ptx::mbarrier_init(&shared.arrived[i], 1);
            ptx::mbarrier_init(&shared.full[i], GROUP);
            ptx::mbarrier_init(&shared.empty[i], Config::CONSUMERS * GROUP);
        }
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    clear_inverses(shared.tiles);
    if (ranges && threadIdx.x < Config::WARPS)
        shared.identity[threadIdx.x] = false;
    if (ranges && threadIdx.x < 2 * Config::STAGES) {
        ChunkInfo rehearsal = {};
        rehearsal.flags = REHEARSAL | SPLIT | BEGINS;
        shared.infos[threadIdx.x] = rehearsal;
    }
    if (!ranges && sorts(p))
        sort_sequences(p, shared);
    wait_for_kernel_before();
    let_next_begin(); /* not earlier: the fixup reads what the probe left without waiting */
    bool slow = ranges && threadIdx.x < work.stream_k.split.ranges &&
                __ldcg(&work.stream_k.probes[threadIdx.x]) == SLOW;
    if (__syncthreads_or(slow) || (!ranges && nothing_pending(work.stream_k)))
        return;
    int group = threadIdx.x / GROUP;
    if (group < Config::CONSUMERS) {
        take_registers<Config::CONSUMER_REGISTERS>();
        if constexpr (ranges)
            consume<DIM, true, bounded>(p.out, maps.out, shared, before_first<Config128::STAGES>(),
                                        RangePolicy<keeps>{p, shared, work.stream_k});
        else
            consume<Config::DIM, true, bounded>(p.out, maps.out, shared, PipelineState<Config::STAGES>(),
                                                ChainPolicy<Config, keeps>(p, shared));
    } else {
        give_registers<Config::PRODUCER_REGISTERS>();
        produce<ranges, bounded, keeps>(p, maps, shared, work, group - Config::CONSUMERS);
    }
}

template <class Config, bool ranges, bool bounded, bool keeps>
cudaError_t launch_config(const kda_prefill *p, const kda_launch *launch, const kda_sm90_memory *memory) {
    const Work work = {ranges ? 0 : (int)(p->sequences * p->value_heads), memory->stream_k};
    kda_sm90_maps maps;
    cudaError_t error = kda_sm90_map(p, &maps);
    return error ? error
                 : launch_kernel(persistent<Config, ranges, bounded, keeps>, *launch, Config::THREADS,
                                 sizeof(Shared<Config>), p->stream, *p, maps, work);
}

template <class Config, bool ranges, bool bounded>
cudaError_t launch(const kda_prefill *p, const kda_launch *launch, const kda_sm90_memory *memory) {
    return (p->checkpoints.data ? launch_config<Config, ranges, bounded, true>
                                : launch_config<Config, ranges, bounded, false>)(p, launch, memory);
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_persistent(const kda_prefill *p, const kda_plan *, const kda_launch *launch,
                                const kda_sm90_memory *memory) {
    using namespace kda;
    auto launch_64 = launch->config == Config64::CTAS ? kda::launch<Config64, false, true>
                                                      : kda::launch<FewConfig64, false, true>;
    auto launch_128 =
        is_bounded(p) ? kda::launch<Config128, false, true> : kda::launch<Config128, false, false>;
    return (p->key_dim == 128 ? launch_128 : launch_64)(p, launch, memory);
}

cudaError_t kda_sm90_ranges(const kda_prefill *p, const kda_plan *, const kda_launch *launch,
                            const kda_sm90_memory *memory) {
    using namespace kda;
    return (is_bounded(p) ? kda::launch<Config128, true, true> : kda::launch<Config128, true, false>)(p, launch,
                                                                                                      memory);
}
