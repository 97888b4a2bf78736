/* SPDX-License-Identifier: MIT */
/*
 * The operands of every chunk of every value head in the form of three tiles (tiles.cuh), for tiles_chain.cu.
 *
 * A CTA has several producer warpgroups that share nothing: while one waits for its chunk, others work.
 */
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/launch.cuh"
#include "cuda/sm90/produce.cuh"
#include "cuda/sm90/tensor_maps.h"

namespace kda {
namespace {

constexpr int GROUPS = 5, RECEIVE_BETA = 2 /* warp */;

/* Named barriers; 0 is __syncthreads. */
enum { BARRIER_GROUP = 1 /* and the next: of each warpgroup */, BARRIER_INVERSE = BARRIER_GROUP + GROUPS };

struct alignas(1024) Shared {
    Tiles tiles[GROUPS]; /* k, q and g at first */
    Factors factors[GROUPS];
    Blocks blocks[GROUPS];
    uint64_t arrived[GROUPS]; /* k, q and g are there */
};

/* A chunk of one head. */
struct Place {
    int batch, token, count; /* count: 0 if there is none */
};

__device__ Place find_place(const kda_prefill &p, int64_t chunk) {
    /* The last sequence whose chunks begin at or before this one. */
    int64_t low = 0, high = p.sequences - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (kda_first_chunk(&p, kda_sequence(&p, middle).first, middle) <= chunk)
            low = middle;
        else
            high = middle - 1;
    }
    struct kda_sequence s = kda_sequence(&p, low);
    chunk -= kda_first_chunk(&p, s.first, low); /* negative where sequences do not begin at token 0 */
    struct kda_span span = {0, 0};
    if (chunk >= 0 && s.slot >= 0)
        span = kda_chunk_span(&p, low, s.length, chunk);
    return {(int)s.batch, (int)(s.first + span.first), (int)span.count};
}

__device__ void bring(const kda_sm90_maps &maps, Tiles &tiles, uint64_t &arrived, const Place &at, int head,
                      int key_head) {
    ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>()); /* the chunk before has left */
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &arrived,
                                   (uint32_t)sizeof tiles.panels);
    auto copy = [&](void *to, const CUtensorMap &map, int panel, int h) {
        const int32_t from[4] = {panel * PANEL, h, at.token, at.batch};
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &map, from, &arrived);
    };
#pragma unroll
    for (int i = 0; i < PANELS; i++) {
        copy(tiles.panels[i].keys, maps.k, i, key_head);
        copy(tiles.panels[i].queries, maps.q, i, key_head);
        copy(tiles.panels[i].gates, maps.g, i, head);
    }
}

/* Norms of k by warp 0 and of q by warp 1, beta by another; behind a sequence's end k and q become 0 and nothing decays. */
__device__ void receive(const kda_prefill &p, Tiles &tiles, Factors &factors, Blocks &blocks, int count,
                        uint32_t beta) {
    int warp = thread() % GROUP / 32;
    if (warp > RECEIVE_BETA)
        return;
    for (int i = 0; i < PANELS && count < CHUNK; i++) {
        Panel &panel = tiles.panels[i];
        clear_rows(warp == 0   ? panel.keys
                   : warp == 1 ? panel.queries
                               : panel.gates,
                   count, warp < 2 ? 0 : NO_DECAY);
    }
    __syncwarp();
    if (warp == RECEIVE_BETA)
        blocks.beta[0][thread() % 32] = find_beta(p, count, beta);
    else
        find_norms(warp == 0 ? tiles.panels[0].keys : tiles.panels[0].queries, warp == 0 ? 1.f : p.scale,
                   warp == 0 ? factors.key_scale : factors.query_scale, warp == 0 ? blocks.rk[0] : nullptr);
}

__global__ void __launch_bounds__(GROUPS *GROUP, 1)
    prepare(const __grid_constant__ kda_prefill p, const __grid_constant__ kda_sm90_maps maps, Prepared *all,
            int64_t chunks) {
    let_next_begin();
    extern __shared__ __align__(1024) char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    if (threadIdx.x < GROUPS)
        ptx::mbarrier_init(&shared.arrived[threadIdx.x], 1);
    if (threadIdx.x == 0)
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    __syncthreads();
    int group = threadIdx.x / GROUP, heads = (int)p.value_heads, shared_by = heads / (int)p.heads;
    bool leads = threadIdx.x % GROUP == 0;
    Tiles &tiles = shared.tiles[group];
    Factors &factors = shared.factors[group];
    uint32_t parity = 0;
    Gate gate;
    for (int64_t item = blockIdx.x * GROUPS + group; item < chunks * heads; item += gridDim.x * GROUPS) {
        int64_t chunk = item / heads;
        int head = (int)(item % heads);
        Place at = find_place(p, chunk);
        if (at.count == 0)
            continue;
        if (leads)
            bring(maps, tiles, shared.arrived[group], at, head, head / shared_by);
        uint32_t beta = load_beta(p, at.batch, at.token, head, at.count);
        if (head != gate.head)
            gate = find_gate(p, head, threadIdx.x / 32 % 2 * PANEL + threadIdx.x % 32 * 2);
        wait(shared.arrived[group], parity);
        parity ^= 1;
        receive(p, tiles, factors, shared.blocks[group], at.count, beta);
        barrier_wait(BARRIER_GROUP + group, GROUP);
        make_operands(tiles, factors, shared.blocks[group], 0, BARRIER_GROUP + group, BARRIER_INVERSE + group,
                      gate);
        barrier_wait(BARRIER_GROUP + group, GROUP);
        if (leads) {
            Prepared *to = &all[head * chunks + chunk];
            ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, &to->tiles, &tiles,
                               (uint32_t)sizeof tiles);
            ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, &to->factors, &factors,
                               (uint32_t)sizeof factors);
            ptx::cp_async_bulk_commit_group();
        }
    }
    if (leads)
        ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
}

} // namespace
} // namespace kda

size_t kda_sm90_tiles_size(void) { return sizeof(kda::Prepared); }

cudaError_t kda_sm90_tiles_prepare(const kda_prefill *p, int64_t chunks, void *operands, int processors,
                                   cudaStream_t stream) {
    int bytes = sizeof(kda::Shared);
    kda_sm90_maps maps;
    cudaError_t error = kda_sm90_map(p, &maps);
    if (!error)
        error = cudaFuncSetAttribute(kda::prepare, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error)
        return error;
    kda::prepare<<<processors, kda::GROUPS * kda::GROUP, bytes, stream>>>(
        *p, maps, static_cast<kda::Prepared *>(operands), chunks);
    return cudaGetLastError();
}
