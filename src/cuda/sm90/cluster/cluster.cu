/* SPDX-License-Identifier: MIT */
/*
 * Prefill by clusters of two CTAs, for few chains (docs/hopper.md): for problems of K = V = 128 that kernel
 * persistent takes, where chains or their segments are no more than clusters.
 *
 * Each CTA of a cluster makes the operands of every second chunk and passes them on to the other, so that both
 * have all. Unsplit, each then takes 64 columns of V through them. Where sequences are split, one takes all of
 * V through a segment from zero, and the other the identity. From that scan.cu and add_history.cu find what
 * becomes of the true state.
 */
#include "cuda/launch.cuh"
#include "cuda/sm90/cluster/config.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tensor_maps.h"

namespace kda {
namespace {

/* Segments of a chain in this launch: without segments, or of chains that are worked whole, one. */
__host__ __device__ int segments_of(const kda_sm90_cluster_memory &memory) {
    return memory.again ? 1 : memory.segments;
}

/* whole: the chain has a segment that may grow a state, and is worked whole, as a first segment. local: the segment starts
 * from zero, so that it matters not whether its true state is known. */
__device__ WorkTile find_work(const kda_prefill &p, const kda_sm90_stream_k &stream_k,
                              const kda_sm90_cluster_memory &memory, int64_t all_chunks, bool whole,
                              bool local) {
    int segments = segments_of(memory), chain = blockIdx.x / CTAS / segments;
    WorkTile work;
    work.n = chain / (int)p.value_heads, work.head = chain % (int)p.value_heads;
    work.key_head = work.head / (int)(p.value_heads / p.heads);
    struct kda_sequence sequence = kda_sequence(&p, work.n);
    work.batch = (int)sequence.batch, work.first = (int)sequence.first;
    work.length = (int)sequence.length;
    work.index = blockIdx.x / CTAS, work.segment = work.index % segments;
    bool wanted = whole || !memory.again;
    work.slot = wanted && is_pending(p, stream_k, work.n, work.head) ? (int)sequence.slot : -1;
    int chunks = (int)kda_chunk_count(&p, work.n, sequence.length);
    bool incoming = comes_in(p, work.n);
    work.begin = begin_of_segment(incoming, chunks, segments, work.segment);
    int end = begin_of_segment(incoming, chunks, segments, work.segment + 1);
    if ((incoming && work.segment == 0) || (!local && kda_work_on(&p.border, work.n) != KDA_WORK_ALL))
        work.slot = -1;
    work.chunks = max(min(end, chunks) - work.begin, 1);
    work.exponents =
        memory.output_exponents +
        (work.head * all_chunks + kda_first_chunk(&p, work.first, work.n)) * (2 * KDA_SM90_EXPONENTS);
    return work;
}

/* Describes chunk number i of the work, or says that there is none. */
template <bool keeps>
__device__ ChunkInfo find_info(const kda_prefill &p, const WorkTile &work, const Checkpoints &checkpoints,
                               int column, int i) {
    ChunkInfo info;
    info.n = work.n, info.head = work.head, info.batch = work.batch;
    info.column = column;
    info.count = -1;
    if (i < work.chunks) {
        struct kda_span span = keeps && checkpoints.every
                                   ? kda_whole_chunk(work.length, work.begin + i)
                                   : kda_chunk_span(&p, work.n, work.length, work.begin + i);
        info.token = work.first + (int)span.first, info.position = (int)(span.first + span.count);
        info.count = (int)span.count;
    }
    info.flags = find_flags(info, i == 0, i + 1 == work.chunks, keeps);
    if (keeps && info.count > 0 && checkpoints.every)
        place_checkpoint(checkpoints, work.begin + i + 1, info.position == work.length, info);
    return info;
}

/* Where a chunk lies in both CTAs, and the parities of the barriers' phases in which it does. */
template <bool split> struct ClusterPipelineState : PipelineState<STAGES<split>> {
    int chunk;

    __device__ explicit ClusterPipelineState(int chunk) : chunk(chunk) {
        this->stage = chunk % STAGES<split>, this->parity = chunk / STAGES<split> & 1;
    }
    __device__ int info_index() const { return chunk % INFOS; }
    __device__ void next() { chunk++, PipelineState<STAGES<split>>::next(); }
    /* For a chunk made here. With an odd number of stages, only every second chunk of a stage is. */
    __device__ uint32_t parity_of_grant() const {
        constexpr int PERIOD = STAGES<split> % CTAS ? STAGES<split> * CTAS : STAGES<split>;
        return chunk / PERIOD & 1;
    }
};

template <class T> __device__ T *of_other(T *mine, int rank) {
    return static_cast<T *>(__cluster_map_shared_rank(mine, rank ^ 1));
}

/* ---- Producers ------------------------------------------------------------------------------------ */

template <bool split, bool bounded, bool keeps> struct Producer {
    static constexpr int VALUE_PANELS = CONSUMERS<split>;
    /* Bytes of a chunk's factors that are passed on. */
    static constexpr size_t FACTORS = bounded ? offsetof(Factors<DIM>, across) : sizeof(Factors<DIM>);

    const kda_prefill &p;
    const kda_sm90_maps &maps;
    const kda_sm90_cluster_memory &memory;
    Shared<split> &shared;
    int rank, group;
    uint8_t *grown; /* where to say whether beta makes a transition grow; NULL: it cannot, or nobody asks */

    __device__ bool brings_values() const { return !split || rank == 0; }
    __device__ int column() const { return split ? 0 : rank * GROUP_COLUMNS; }

    __device__ void bring(void *to, const CUtensorMap &map, int channel, int head, const ChunkInfo &info,
                          uint64_t *barrier, uint64_t policy) const {
        const int32_t at[4] = {channel, head, info.token, info.batch};
        bring_box(to, map, at, *barrier, policy);
    }
    /* Those of the sequence; in segments that are not first, where the CTA keeps A or B up to each. */
    __device__ Checkpoints find_all_checkpoints() const {
        const WorkTile &work = shared.work;
        int chunks = (int)kda_chunk_count(&p, work.n, work.length);
        Checkpoints x;
        if (work.segment == 0) {
            find_checkpoints<DIM>(p, work.n, work.head, column(), chunks, x);
            return x;
        }
        find_steps(p, work.n, chunks, x);
        x.flags = PLACED, x.step = KEPT_PIECES;
        x.place = place_of_kept(first_kept(p, memory, work.first, work.n, work.head), rank);
        return x;
    }

    /* Describes a chunk and has it brought. The scout opens a chunk whose operands this group makes. The host
     * opens one that the same group of the other CTA makes: it brings the values alone, and grants room for the
     * operands. */
    __device__ void open(const Checkpoints &checkpoints, int chunk) {
        bool own = chunk % CTAS == rank;
        ClusterPipelineState<split> pipe(chunk);
        int s = pipe.stage;
        ChunkInfo info = find_info<keeps>(p, shared.work, checkpoints, column(), chunk);
        wait(shared.empty[s], pipe.parity ^ 1);
        bool values = info.count > 0 && brings_values();
        if (values && !own && info.count < CHUNK) {
            load_tail(info, shared.values[s]);
            values = false;
        }
        uint64_t *barrier = own ? &shared.arrived[group] : &shared.full[s];
        bool leads = elected();
        if (!own) /* every lane, as each may have written values; as many as of a group that makes a chunk */
            ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier,
                                 GROUP / 32u - leads);
        __syncwarp();
        if (leads) {
            size_t bytes = own ? sizeof shared.tiles[s].panels : sizeof(Tiles<DIM>) + FACTORS;
            shared.infos[pipe.info_index()] = info;
            if (!own)
                ptx::mbarrier_arrive(&shared.empty[s]); /* this CTA does not pass it on */
            ptx::mbarrier_arrive_expect_tx(
                ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier,
                info.count > 0 ? (uint32_t)(bytes + (values ? sizeof shared.values[s] : 0)) : 0);
#pragma unroll 1
            for (int i = 0; i < VALUE_PANELS && values; i++)
                bring(&shared.values[s][i * CHUNK * PANEL], maps.v, column() + i * PANEL, info.head, info,
                      barrier, read_once());
            if (own && info.count > 0)
                bring_keys(shared.tiles[s], info, barrier);
            else if (info.count > 0)
                arrive_at(shared.granted[s], rank ^ 1);
        }
        __syncwarp();
    }

    __device__ void bring_keys(Tiles<DIM> &tiles, const ChunkInfo &info, uint64_t *barrier) const {
        uint64_t own = read_once(), shared_by_heads = p.heads < p.value_heads ? read_again() : own;
#pragma unroll 1
        for (int i = 0; i < DIM / PANEL; i++) {
            Panel &panel = tiles.panels[i];
            bring(panel.keys, maps.k, i * PANEL, shared.work.key_head, info, barrier, shared_by_heads);
            bring(panel.queries, maps.q, i * PANEL, shared.work.key_head, info, barrier, shared_by_heads);
            bring(panel.gates, maps.g, i * PANEL, info.head, info, barrier, own);
        }
    }

    /* Loads rows of v, with zeros after the sequence's end. */
    __device__ void load_tail(const ChunkInfo &info, __nv_bfloat16 *values) const {
        constexpr int COLUMNS = GROUP_COLUMNS * VALUE_PANELS, PIECES = COLUMNS / 8;
        const char *rows = kda_row(&p.v, info.batch, info.token, info.head) + info.column * 2;
        for (int i = threadIdx.x % 32; i < CHUNK * PIECES; i += 32) {
            int t = i / PIECES, c = i % PIECES * 8;
            uint4 piece = make_uint4(0, 0, 0, 0);
            if (t < info.count)
                piece = *reinterpret_cast<const uint4 *>(rows + t * p.v.stride[1] + c * 2);
            *reinterpret_cast<uint4 *>(&values[swizzled<CHUNK, COLUMNS>(t, c)]) = piece;
        }
    }

    /* Warp PUSH: copies a chunk's operands to the other CTA when they are made. */
    __device__ void pass_on(const ClusterPipelineState<split> &pipe, int count) {
        int s = pipe.stage;
        if (count > 0) {
            wait(shared.granted[s], pipe.parity_of_grant());
            if (elected()) {
                uint64_t *full = of_other(&shared.full[s], rank);
                ptx::cp_async_bulk(ptx::space_cluster, ptx::space_shared, of_other(&shared.tiles[s], rank),
                                   &shared.tiles[s], (uint32_t)sizeof(Tiles<DIM>), full);
                ptx::cp_async_bulk(ptx::space_cluster, ptx::space_shared, of_other(&shared.factors[s], rank),
                                   &shared.factors[s], (uint32_t)FACTORS, full);
                /* PTX speaks of bulk groups for copies to global memory only. On Hopper they hold for these
                 * too, which tests/check/cluster_copy.cu keeps checking. */
                ptx::cp_async_bulk_commit_group();
                ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
            }
            __syncwarp();
        }
        if (threadIdx.x % 32 == 0)
            ptx::mbarrier_arrive(&shared.empty[s]);
    }

    /* This CTA makes chunks rank and rank + 2 of every four, one in each group. When one is made, the group
     * goes on to the next. The loop has every step once, as code competes for the instruction cache. */
    __device__ void produce() {
        int warp = threadIdx.x % GROUP / 32, chunks = shared.work.chunks, slot = 0;
        Blocks &blocks = shared.blocks[group];
        uint32_t parity = 0;
        bool grows = false;
        Gate gate = find_gate<bounded>(p, shared.work.head, own_channel<DIM>(threadIdx.x));
        Checkpoints checkpoints;
        if (keeps && (warp == SCOUT<DIM> || warp == HOST))
            checkpoints = find_all_checkpoints();
#pragma unroll 1
        for (int next = rank + CTAS * group;; next += CHUNKS_PER_ROUND) {
            const ClusterPipelineState<split> pipe(next);
            const ChunkInfo &info = shared.infos[pipe.info_index()];
            uint32_t beta = 0;
            if (warp == SCOUT<DIM> || warp == HOST) {
                int chunk = warp == HOST ? next - (rank ? 1 : CHUNKS_PER_ROUND - 1) : next;
                if (chunk >= 0 && chunk <= chunks)
                    open(checkpoints, chunk);
                if (warp == SCOUT<DIM> && next <= chunks)
                    beta = load_beta(p, info.batch, info.token, info.head, info.count);
            }
            if (next > chunks) {
                if (split && grown && warp == SCOUT<DIM>)
                    *grown = __any_sync(~0u, grows);
                return;
            }
            int s = pipe.stage;
            wait(shared.arrived[group], parity);
            int count = info.count;
            receive_chunk<VALUE_PANELS, true>(p, shared.tiles[s], shared.factors[s], shared.values[s], blocks,
                                              slot, count);
            if (warp == SCOUT<DIM>) {
                float step = find_beta(p, count, beta);
                blocks.beta[slot][threadIdx.x % 32] = step;
                grows = grows || step < 0 || step > 2; /* keys have length 1: else |1 - beta| is at most 1 */
            }
            barrier_wait(BARRIER_GROUP + group, GROUP);
            if (count > 0)
                make_operands<bounded>(shared.tiles[s], shared.factors[s], blocks, slot, BARRIER_GROUP + group,
                                       BARRIER_INVERSE + group, gate);
            ptx::mbarrier_arrive(&shared.full[s]);
            slot ^= 1, parity ^= 1;
            if (warp == PUSH) {
                barrier_wait(BARRIER_MADE + group, GROUP);
                pass_on(pipe, count);
            } else {
                barrier_arrive(BARRIER_MADE + group, GROUP);
            }
        }
    }
};

/* ---- Consumers ------------------------------------------------------------------------------------ */

/* Takes 64 columns of V through a chain. */
template <bool keeps> struct TrueStatePolicy : DefaultPolicy<DIM> {
    const kda_prefill &p;
    Shared<false> &shared;

    __device__ TrueStatePolicy(const kda_prefill &p, Shared<false> &shared) : p(p), shared(shared) {}
    __device__ int before(const ChunkInfo &info, float (&S)[DIM / 8][4]) const {
        kda_state from = kda_state_before(&p, info.n, shared.work.slot, info.head);
        load_whole(from_column(from, info.column), S);
        if constexpr (keeps)
            store_whole_checkpoints(p, info.n, info.head, info.column, 0, S, 0);
        return measured(S);
    }
    __device__ void load(int stage, uint32_t, Values &v) const {
        load_values<GROUP_COLUMNS>(shared.values[stage], v);
    }
    __device__ kda_dtype finish(const ChunkInfo &, float (&o)[CHUNK / 8][4], int exponent) const {
        unscale_outputs(o, exponent);
        return p.out.dtype;
    }
    __device__ void keep(const ChunkInfo &info, float (&S)[DIM / 8][4], int exponent) const {
        if constexpr (keeps)
            store_checkpoints(p, info, S, exponent);
    }
    __device__ void after(const ChunkInfo &info, float (&S)[DIM / 8][4], int exponent) const {
        kda_state to = kda_state_at(&p, &p.final_state, shared.work.slot, info.head);
        store_whole(from_column(to, info.column), S, exponent);
    }
};

/* Scales a segment's outputs to where fp16 is exact enough; returns their exponent. */
__device__ int fit_half(float (&o)[CHUNK / 8][4], int exponent) {
    float largest = largest_of_tiles(o);
    if (__builtin_expect(fits_half(largest), 1))
        return exponent;
    int further = exponent_of(largest_that_counts(largest));
    scale_tiles(o, power_of_two(-further));
    return exponent + further;
}

/* Takes all of V from zero, or through a first segment from the state before it; or takes the identity. The
 * code is there once, because neighbouring multiprocessors share an instruction cache. */
template <bool keeps> struct LocalPolicy : DefaultPolicy<DIM> {
    const kda_prefill &p;
    bool identity;
    const kda_sm90_cluster_memory &memory;
    Shared<true> &shared;

    __device__ LocalPolicy(const kda_prefill &p, bool identity, const kda_sm90_cluster_memory &memory,
                           Shared<true> &shared)
        : p(p), identity(identity), memory(memory), shared(shared) {}
    __device__ int before(const ChunkInfo &info, float (&S)[DIM / 8][4]) const {
        if (identity) {
            make_diagonal(S, 1);
            return 0;
        }
        kda_state from = kda_state_before(&p, info.n, shared.work.slot, info.head);
        if (shared.work.segment > 0)
            from.data = nullptr;
        load_whole(from, S, thread());
        return measured(S);
    }
    __device__ void load(int stage, uint32_t, Values &v) const { load_values<DIM>(shared.values[stage], v); }
    __device__ kda_dtype finish(const ChunkInfo &info, float (&o)[CHUNK / 8][4], int exponent) const {
        if (shared.work.segment == 0) {
            unscale_outputs(o, exponent);
            return p.out.dtype;
        }
        exponent = fit_half(o, exponent);
        if (threadIdx.x % 32 == 0)
            shared.work.exponents[(info.position - 1) / CHUNK * (2 * KDA_SM90_EXPONENTS) +
                                  !identity * KDA_SM90_EXPONENTS + threadIdx.x / 32] = (int16_t)exponent;
        return KDA_F16;
    }
    __device__ void keep(const ChunkInfo &info, float (&S)[DIM / 8][4], int exponent) const {
        if constexpr (keeps) {
            if (shared.work.segment == 0)
                store_checkpoints(p, info, S, exponent);
            else
                keep_state(memory, info.place, S, exponent);
        }
    }
    __device__ void after(const ChunkInfo &, float (&S)[DIM / 8][4], int exponent) const {
        int64_t at = shared.work.index;
        if (!identity) {
            kda_state to = {reinterpret_cast<char *>(memory.local_states + at * DIM * DIM), KDA_F32, DIM * 4,
                            true};
            store_whole(to, S, exponent, thread());
            return;
        }
        measure_exponent(S, exponent);
        at = before_matrices(memory, shared.work.index / memory.segments) + shared.work.segment;
        uint16_t *A = memory.transitions + at * DIM * DIM;
        each_pair(
            S,
            [&](float x, float y, int channel, int column) {
                *reinterpret_cast<uint32_t *>(&A[swizzled<DIM, DIM>(column, channel)]) = pack_half(x, y);
            },
            thread());
        if (threadIdx.x % 32 == 0)
            memory.transition_exponents[at * KDA_SM90_EXPONENTS + threadIdx.x / 32] = (int16_t)exponent;
    }
};

/* A first segment needs no identity: its chunks only pass. */
__device__ void let_pass(Shared<true> &shared) {
    for (ClusterPipelineState<true> pipe(0);; pipe.next()) {
        wait(shared.full[pipe.stage], pipe.parity);
        if (shared.infos[pipe.info_index()].flags & ENDS)
            return;
        ptx::mbarrier_arrive(&shared.empty[pipe.stage]);
    }
}

/* ---- The kernel ----------------------------------------------------------------------------------- */

/* O_A as a tensor, and its map. */
struct OutputsOfA {
    kda_tensor out;
    CUtensorMap map;
};

/* Without checkpoints (keeps is false) their code is left out of a loop that competes for the instruction
 * cache. */
template <bool split, bool bounded, bool keeps>
__global__ void __cluster_dims__(CTAS) __maxnreg__(REGISTERS<split>)
    cluster(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_maps maps,
            const __grid_constant__ kda_sm90_stream_k stream_k,
            const __grid_constant__ kda_sm90_cluster_memory memory,
            const __grid_constant__ OutputsOfA outputs_of_A, int64_t chunks) {
    let_next_begin();
    extern __shared__ __align__(1024) char all[];
    Shared<split> &shared = *reinterpret_cast<Shared<split> *>(all);
    int rank = blockIdx.x % CTAS, group = threadIdx.x / GROUP;
    wait_for_kernel_before();
    if (nothing_pending(stream_k))
        return;
    clear_inverses(shared.tiles);
    bool whole = !split && threadIdx.x < 32 && grows(memory, blockIdx.x / CTAS / segments_of(memory));
    if (threadIdx.x == 0) {
        prefetch_maps(maps);
        shared.work = find_work(p, stream_k, memory, chunks, whole, split);
        for (int i = 0; i < PRODUCERS; i++)
            ptx::mbarrier_init(&shared.arrived[i], 1);
        for (int i = 0; i < STAGES<split>; i++) {
            ptx::mbarrier_init(&shared.full[i], GROUP);
            ptx::mbarrier_init(&shared.empty[i], CONSUMERS<split> * GROUP + 1);
            ptx::mbarrier_init(&shared.granted[i], 1);
        }
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    if (split && rank == 1) /* the identity has no values */
        for (uint4 *v = reinterpret_cast<uint4 *>(shared.values) + threadIdx.x;
             v < reinterpret_cast<uint4 *>(shared.values + STAGES<split>); v += THREADS<split>)
            *v = make_uint4(0, 0, 0, 0);
    __syncthreads();
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
    if (shared.work.slot < 0)
        return;
    if (group >= CONSUMERS<split>) {
        give_registers<PRODUCER_REGISTERS<split>>();
        int producer = group - CONSUMERS<split>;
        uint8_t *grown = nullptr;
        if (memory.grown)
            grown = reinterpret_cast<uint8_t *>(&memory.grown[shared.work.index]) + rank * PRODUCERS + producer;
        Producer<split, bounded, keeps>{p, maps, memory, shared, rank, producer, grown}.produce();
    } else {
        take_registers<CONSUMER_REGISTERS<split>>();
        if constexpr (!split)
            consume<DIM, true, bounded>(p.out, maps.out, shared, ClusterPipelineState<false>(0),
                                        TrueStatePolicy<keeps>(p, shared));
        else if (rank == 1 && shared.work.segment == 0)
            let_pass(shared);
        else
            consume<DIM, true, bounded>(rank ? outputs_of_A.out : p.out, rank ? outputs_of_A.map : maps.out,
                                        shared, ClusterPipelineState<true>(0),
                                        LocalPolicy<keeps>(p, rank, memory, shared));
    }
    ptx::barrier_cluster_arrive(); /* the other CTA may still write here */
    ptx::barrier_cluster_wait();
}

template <bool split, bool bounded, bool keeps>
cudaError_t launch_cluster(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                           const kda_sm90_stream_k &stream_k, const kda_sm90_cluster_memory &memory,
                           const OutputsOfA &outputs_of_A) {
    kda_sm90_maps maps;
    cudaError_t error = kda_sm90_map(p, &maps);
    return error ? error
                 : launch_kernel(cluster<split, bounded, keeps>, *launch, THREADS<split>, sizeof(Shared<split>),
                                 p->stream, *p, maps, stream_k, memory, outputs_of_A, split ? plan->chunks : 0);
}

template <bool split, bool bounded>
cudaError_t launch_bounded(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                           const kda_sm90_stream_k &stream_k, const kda_sm90_cluster_memory &memory,
                           const OutputsOfA &outputs_of_A) {
    return (p->checkpoints.data
                ? launch_cluster<split, bounded, true>
                : launch_cluster<split, bounded, false>)(p, plan, launch, stream_k, memory, outputs_of_A);
}

template <bool split>
cudaError_t launch_split(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                         const kda_sm90_stream_k &stream_k, const kda_sm90_cluster_memory &memory,
                         const OutputsOfA &outputs_of_A) {
    return (is_bounded(p) ? launch_bounded<split, true>
                          : launch_bounded<split, false>)(p, plan, launch, stream_k, memory, outputs_of_A);
}

} // namespace
} // namespace kda

cudaError_t kda_sm90_cluster(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                             const kda_sm90_memory *memory) {
    using namespace kda;
    return launch_split<false>(p, plan, launch, memory->stream_k, memory->cluster, {});
}

cudaError_t kda_sm90_cluster_again(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                                   const kda_sm90_memory *memory) {
    using namespace kda;
    kda_sm90_cluster_memory again = memory->cluster;
    again.again = true;
    return launch_split<false>(p, plan, launch, memory->stream_k, again, {});
}

cudaError_t kda_sm90_cluster_local(const kda_prefill *p, const kda_plan *plan, const kda_launch *launch,
                                   const kda_sm90_memory *memory) {
    using namespace kda;
    OutputsOfA outputs_of_A = {};
    kda_prefill of_A = *p;
    of_A.out.dtype = KDA_F16;
    for (int i = 3; i >= 0; i--)
        of_A.out.stride[i] = i == 3 ? 2 : of_A.out.stride[i + 1] * of_A.out.shape[i + 1];
    int64_t skipped = memory->cluster.skipped * of_A.out.stride[1]; /* these segments have no O_A */
    of_A.out.stride[0] -= skipped;
    of_A.out.data = reinterpret_cast<char *>(memory->cluster.outputs) - skipped;
    kda_sm90_maps maps;
    cudaError_t error = kda_sm90_map(&of_A, &maps);
    if (error)
        return error;
    outputs_of_A.out = of_A.out, outputs_of_A.map = maps.out;
    return launch_split<true>(p, plan, launch, memory->stream_k, memory->cluster, outputs_of_A);
}
