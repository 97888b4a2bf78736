/* SPDX-License-Identifier: MIT */
/*
 * Prefill in one kernel, for K = V = 128, bf16, normalised q and k and the bounded gate (docs/hopper.md).
 *
 * A CTA works one chain after another. Two producer warpgroups take turns at making a chunk's operands, in place of its
 * q, k and g; two consumer warpgroups, with 64 columns of V each, take the state through them in their accumulators.
 * Of each producer warpgroup two warps have less to do: one, the receiver, normalises the group's next chunk; the other,
 * the scout, finds the chunk after that, describes it to all others and has the copy engine bring it.
 *
 * With x_i the log2 decay from the chunk's middle to token i, and S in the coordinates of the middle,
 *     RK = k exp2(x)   RQ = q exp2(x)   CK = k exp2(-x)   [L0; M0] = [RK; RQ] CK^T   [W | Y] = S^T [RK; RQ]^T
 *     U^T = (V^T - W^T diag(rk)) F^T    O^T = (Y^T + U^T M0^T) diag(rq)    S^T <- S^T + U^T CK
 *     F = diag(rk) (I + diag(beta rk) L0 diag(rk))^-1 diag(beta)
 * where rk and rq undo the norms of k and q. Everything is transposed, so that an accumulator is, lane for lane, the
 * next product's first operand.
 */
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tensor_maps.h"
#include "cuda/sm90/warpgroup.cuh"

namespace kda {
namespace {

constexpr int DIM = 128; /* K and V */
constexpr int STAGES = 5, CONSUMERS = 2, PRODUCERS = 2;
constexpr int THREADS = (CONSUMERS + PRODUCERS) * GROUP;
constexpr int SORTED = 256;            /* sequences at most, more are worked in their own order */
constexpr int RECEIVER = 2, SCOUT = 3; /* warps of a producer warpgroup */
constexpr int HALF = CHUNK / 2, PANELS = DIM / PANEL;
constexpr int ROW = PANEL * 2;   /* bytes of a panel's row */
constexpr int PADDED = HALF + 4; /* floats from row to row of a scratch matrix: no two in a bank */
constexpr float SMALL = 0x1p-4f, LARGE = 0x1p22f; /* squared norms of k and q that meet factors of 2^115 well */
constexpr int EDGE = 4;                           /* log2: v and S stay below 2^EDGE of the warp's unit */
constexpr float LOG2E = 1.4426950408889634f;
constexpr uint32_t NO_DECAY = 0xff7fff7f; /* two raw gates, the least of bf16, whose decay is nothing */

/* Named barriers; 0 is __syncthreads. */
enum {
    BARRIER_GROUP = 1 /* and the next: of each producer warpgroup */,
    BARRIER_INVERSE = 3 /* and the next */
};

/* 64 channels of a chunk, swizzled by 128 bytes. */
struct Panel {
    __nv_bfloat16 keys[CHUNK * PANEL];    /* k, then RK */
    __nv_bfloat16 queries[CHUNK * PANEL]; /* q, then RQ */
    __nv_bfloat16 gates[CHUNK * PANEL];   /* g, then CK */
};

/* What a scout says of a chunk. */
struct Task {
    int n, head;      /* of its chain */
    int batch, token; /* where it begins in the tensors */
    int position;     /* where it ends in its sequence */
    int slot;         /* of its state */
    int count;        /* tokens; -1 behind the CTA's last chunk, 0 of a sequence without any */
    bool first, last; /* of its sequence */
};

/* Where a scout is: at a chunk of the CTA's chain before number `round`. */
struct Scout {
    int round, chunk, chunks;
    int n, head, key_head, batch, first, length, slot;
    int count; /* tokens of the chunk; -1 behind the last one */
};

/* A producer warpgroup's own. */
struct Scratch {
    alignas(16) float L[2][HALF * PADDED]; /* diagonal blocks of beta rk L0 rk, transposed */
    float Z[HALF * PADDED];                /* the block below: rk L0 */
    alignas(16) float rk[2][CHUNK];        /* of this chunk or the group's next one, in turn */
    float beta[2][CHUNK];
    Scout scout;
};

struct alignas(1024) Shared {
    Panel panels[STAGES][PANELS];
    __nv_bfloat16 values[STAGES][CHUNK * DIM];
    __nv_bfloat16 outputs[CONSUMERS * GROUP / 32][CHUNK * 16]; /* of each consumer warp, swizzled by 32 bytes */
    float inverse[STAGES][CHUNK * CHUNK];                      /* F, by tf32_place */
    float M[STAGES][CHUNK * CHUNK];                            /* M0, by tf32_place */
    float to_middle[STAGES][DIM]; /* decay of the state from the chunk's start, by channel_place */
    float to_end[STAGES][DIM];    /* and from there to its end */
    uint32_t largest[STAGES];     /* value, as bf16 without its sign */
    alignas(16) float key_scale[STAGES][CHUNK], query_scale[STAGES][CHUNK]; /* rk, rq by token_place */
    uint8_t order[SORTED];                                                  /* sequences, the longest first */
    Scratch scratch[PRODUCERS];
    Task tasks[STAGES];
    uint64_t arrived[STAGES]; /* q, k, v, g and the task: the scout and the bytes */
    uint64_t full[STAGES];    /* the operands: a producer warpgroup */
    uint64_t empty[STAGES];   /* both consumers are done */
};

/* A consumer's thread needs channels c * 8 + lane % 4 * 2 + {0, 1} of every c, four at a time. */
__device__ int channel_place(int channel) {
    return channel / 16 * 16 + channel % 8 / 2 * 4 + channel / 8 % 2 * 2 + channel % 2;
}
/* And tokens i * 8 + lane % 4 * 2 + {0, 1}. */
__device__ int token_place(int token) { return token % 8 / 2 * 8 + token / 8 * 2 + token % 2; }

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

/* At least 1, so that the state of a sequence without tokens is passed on. */
__device__ int count_chunks(const kda_prefill &p, int n, int length) {
    int64_t chunks = 0;
    if (kda_cuts(&p))
        while (kda_chunk_span(&p, n, length, chunks).count)
            chunks++;
    else if (kda_cut_every(&p))
        chunks = length / p.checkpoint_every * kda_chunks_of(p.checkpoint_every) +
                 kda_chunks_of(length % p.checkpoint_every);
    else
        chunks = kda_chunks_of(length);
    return chunks > 1 ? (int)chunks : 1;
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
        scout.chunks = count_chunks(p, scout.n, scout.length);
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
    task.count = scout.count;
    if (task.count >= 0) {
        struct kda_span span = kda_chunk_span(&p, task.n, scout.length, chunk);
        task.token = scout.first + (int)span.first, task.position = (int)(span.first + span.count);
        task.count = (int)span.count;
        task.first = chunk == 0, task.last = chunk + 1 == scout.chunks;
    }
    wait(shared.empty[s], turn.parity ^ 1);
    shared.tasks[s] = task;
    scout.count = task.count;
    if (task.count <= 0) {
        ptx::mbarrier_arrive(arrived);
        return;
    }
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, arrived,
                                   (uint32_t)(sizeof shared.panels[s] + sizeof shared.values[s]));
    int key_head = scout.key_head;
    auto bring = [&](void *to, const CUtensorMap &map, int panel, int head) {
        const int32_t at[4] = {panel * PANEL, head, task.token, task.batch};
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &map, at, arrived);
    };
#pragma unroll
    for (int i = 0; i < PANELS; i++) {
        Panel &panel = shared.panels[s][i];
        bring(panel.keys, maps.k, i, key_head);
        bring(panel.queries, maps.q, i, key_head);
        bring(panel.gates, maps.g, i, task.head);
        bring(&shared.values[s][i * CHUNK * PANEL], maps.v, i, task.head);
    }
}

/* beta of the lane's token as stored, on its way until it is used. */
__device__ uint32_t load_beta(const kda_prefill &p, const Task &task, int count) {
    int lane = threadIdx.x % 32;
    if (lane >= count)
        return 0;
    const char *at = kda_row(&p.beta, task.batch, task.token + lane, task.head);
    return p.beta.dtype == KDA_F32 ? *reinterpret_cast<const uint32_t *>(at)
                                   : *reinterpret_cast<const uint16_t *>(at);
}

__device__ float find_beta(const kda_prefill &p, int count, uint32_t raw) {
    float x = p.beta.dtype == KDA_F32    ? __uint_as_float(raw)
              : p.beta.dtype == KDA_BF16 ? kda_from_bf16((uint16_t)raw)
                                         : __half2float(__ushort_as_half((uint16_t)raw));
    if (p.beta_mode != FLASH_KDA_BETA_GIVEN)
        x = reciprocal_approximate(1.f + exp2_approximate(x * -LOG2E)) *
            (p.beta_mode == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.f : 1.f);
    return threadIdx.x % 32 < count ? x : 0.f;
}

/* threadIdx.x, read anew: what follows from it is computed where it is used, not kept in registers through all of a
 * chunk. */
__device__ uint32_t thread() {
    uint32_t x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/* ---- Producers ------------------------------------------------------------------------------------ */

/* The gate of a thread's two channels: log2 decay = bound / (1 + exp2(slope g + offset)). */
struct Gate {
    int head = -1;
    float bound, slope;
    float2 offset;
};

__device__ float load_parameter(const kda_tensor &t, int64_t head, int64_t channel) {
    const char *row = t.data + head * t.stride[0];
    if (t.dtype == KDA_F32)
        return reinterpret_cast<const float *>(row)[channel];
    uint16_t x = reinterpret_cast<const uint16_t *>(row)[channel];
    return t.dtype == KDA_BF16 ? kda_from_bf16(x) : __half2float(__ushort_as_half(x));
}

__device__ Gate find_gate(const kda_prefill &p, int head, int channel) {
    /* Within what leaves NO_DECAY without any, whatever the bias. */
    float rate = p.A_log.data ? fminf(fmaxf(expf(load_parameter(p.A_log, head, 0)), 1e-30f), 3e38f) : 1.f;
    Gate gate;
    gate.head = head;
    gate.bound = p.lower_bound * LOG2E, gate.slope = -rate * LOG2E;
    gate.offset = make_float2(0, 0);
    if (p.dt_bias.data)
        gate.offset = make_float2(load_parameter(p.dt_bias, head, channel) * gate.slope,
                                  load_parameter(p.dt_bias, head, channel + 1) * gate.slope);
    return gate;
}

/* A tile's rows from `count` on become `word`. */
__device__ void clear_rows(__nv_bfloat16 *tile, int count, uint32_t word) {
    for (int row = count; row < CHUNK; row++)
        reinterpret_cast<uint32_t *>(tile + row * PANEL)[thread() % 32] = word;
}

/* Squared norm of the lane's row of k or q. */
__device__ float find_square(const __nv_bfloat16 *tile) {
    uint32_t lane = thread() % 32;
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < PANELS; i++)
#pragma unroll
        for (uint32_t piece = 0; piece < PANEL / 8;
             piece++) { /* in an order in which no two lanes meet in a bank */
            const __nv_bfloat16 *at =
                tile + i * sizeof(Panel) / sizeof *tile + lane * PANEL + (piece ^ lane % 8) * 8;
            uint4 words = *reinterpret_cast<const uint4 *>(at);
            const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float2 x = unpack_bf16(pairs[n]);
                sums[n] = fmaf(x.x, x.x, fmaf(x.y, x.y, sums[n]));
            }
        }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/* Divides a row of k or q by a power of two. */
__device__ void divide_row(__nv_bfloat16 *tile, int token, float divisor) {
    for (int i = 0; i < PANELS; i++) {
        uint32_t &word = reinterpret_cast<uint32_t *>(tile + i * sizeof(Panel) / sizeof *tile +
                                                      token * PANEL)[thread() % 32];
        float2 x = unpack_bf16(word);
        word = pack_bf16(x.x / divisor, x.y / divisor);
    }
}

/* The power of two next to the norm of a row; 2^120 where the square is infinite: elements reach 2^128. */
__device__ float size_of_row(float square) {
    return ldexpf(1.f, square < INFINITY ? ((__float_as_int(square) >> 23) - 127) / 2 : 120);
}

/* The warp finds scale / norm of every row of k or q, to be kept by token_place and, if `plain`, in order. Rows whose
 * norm is far from 1 are brought near it by a power of two, so that they keep their digits under any decay. */
__device__ void find_norms(__nv_bfloat16 *tile, float scale, float *scales, float *plain) {
    int lane = thread() % 32;
    float square = find_square(tile), norm = rsqrtf(square + 1e-6f) * scale;
    bool ordinary = square >= SMALL && square <= LARGE;
    uint32_t others = __ballot_sync(~0u, !ordinary && square > 0);
    if (others) {
        float size = size_of_row(square);
        norm *= ordinary || square == 0 ? 1.f : size;
#pragma unroll 1
        for (; others; others &= others - 1) {
            int token = __ffs(others) - 1;
            divide_row(tile, token, __shfl_sync(~0u, size, token));
        }
    }
    scales[token_place(lane)] = norm;
    if (plain)
        plain[lane] = norm;
}

/* The warp finds the largest of the values, as bf16 without its sign: those are ordered as integers are. */
__device__ uint32_t find_largest(const __nv_bfloat16 *values) {
    uint32_t largest = 0; /* of each half */
#pragma unroll 4
    for (int i = 0; i < CHUNK * DIM; i += 32 * 8) {
        uint4 words = *reinterpret_cast<const uint4 *>(&values[i + thread() % 32 * 8]);
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int n = 0; n < 4; n++)
            largest = __vmaxu2(largest, pairs[n] & 0x7fff7fff);
    }
    return __reduce_max_sync(~0u, max(largest & 0xffff, largest >> 16));
}

/* What can be done as soon as a chunk is there, by the receiver and the scout. Behind a sequence's end k, q and v
 * become 0 and nothing decays. */
__device__ void receive(const kda_prefill &p, Shared &shared, Scratch &scratch, const Turn<STAGES> &turn,
                        int slot, uint32_t beta) {
    int s = turn.stage;
    wait(shared.arrived[s], turn.parity);
    int count = shared.tasks[s].count;
    if (count <= 0)
        return;
    bool scouts = thread() % GROUP / 32 == SCOUT;
    for (int i = 0; i < PANELS && count < CHUNK; i++)
        if (scouts) {
            clear_rows(&shared.values[s][i * CHUNK * PANEL], count, 0);
        } else {
            clear_rows(shared.panels[s][i].keys, count, 0);
            clear_rows(shared.panels[s][i].queries, count, 0);
            clear_rows(shared.panels[s][i].gates, count, NO_DECAY);
        }
    __syncwarp();
    if (scouts) {
        scratch.beta[slot][thread() % 32] = find_beta(p, count, beta);
        uint32_t largest = find_largest(shared.values[s]);
        if (thread() % 32 == 0)
            shared.largest[s] = largest;
    } else {
        find_norms(shared.panels[s][0].keys, 1.f, shared.key_scale[s], scratch.rk[slot]);
        find_norms(shared.panels[s][0].queries, p.scale, shared.query_scale[s], nullptr);
    }
}

/* k, q and g of the thread's two channels and half of the chunk become RK, RQ and CK. Returns the log2 decay of the
 * half, from the chunk's start to its middle or from there to its end. Works outwards from the middle. */
template <bool later> __device__ float2 make_tiles(const Panel &panel, const Gate &gate) {
    constexpr int TOGETHER = 4, QUERIES = sizeof panel.keys, GATES = 2 * QUERIES, STEP = later ? ROW : -ROW;
    uint32_t lane = thread() % 32;
    /* Of token i from the middle; a token's 16-byte pieces are permuted by token % 8. */
    uint32_t first =
        shared_address(panel.keys) + (later ? HALF : HALF - 1) * ROW + (lane * 4 ^ (later ? 0 : 7 << 4));
    auto place = [&](int n, int j) {
        return ((first + n * TOGETHER * STEP) ^ (n & 1) << 6 ^ j << 4) + j * STEP;
    };
    uint32_t k[TOGETHER], q[TOGETHER], g[TOGETHER];
    float2 sum = make_float2(0, 0);
    float direction =
        later ? gate.bound : -gate.bound;       /* before the middle, x is what is still to come, negated */
    auto share = [&](float raw, float offset) { /* of the bound */
                                                return reciprocal_approximate(
                                                    1.f + exp2_approximate(fmaf(raw, gate.slope, offset)));
    };
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
        uint32_t at = place(0, j);
        g[j] = load_shared(at + GATES), k[j] = load_shared(at), q[j] = load_shared(at + QUERIES);
    }
#pragma unroll 1
    for (int n = 0; n < HALF / TOGETHER; n++) {
        float2 x[TOGETHER];
        uint32_t key[TOGETHER], query[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            float2 raw = unpack_bf16(g[j]);
            float2 shares = make_float2(share(raw.x, gate.offset.x), share(raw.y, gate.offset.y));
            if (!later)
                x[j] = sum;
            sum.x = fmaf(shares.x, direction, sum.x), sum.y = fmaf(shares.y, direction, sum.y);
            if (later)
                x[j] = sum;
            key[j] = k[j], query[j] = q[j];
        }
        if (n + 1 < HALF / TOGETHER)
#pragma unroll
            for (int j = 0; j < TOGETHER; j++) {
                uint32_t at = place(n + 1, j);
                g[j] = load_shared(at + GATES), k[j] = load_shared(at), q[j] = load_shared(at + QUERIES);
            }
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            uint32_t at = place(n, j);
            float2 decayed = make_float2(exp2_approximate(x[j].x), exp2_approximate(x[j].y));
            float2 grown = make_float2(exp2_approximate(-x[j].x), exp2_approximate(-x[j].y));
            float2 k_pair = unpack_bf16(key[j]), q_pair = unpack_bf16(query[j]);
            store_shared(at, pack_bf16(k_pair.x * decayed.x, k_pair.y * decayed.y));
            store_shared(at + QUERIES, pack_bf16(q_pair.x * decayed.x, q_pair.y * decayed.y));
            store_shared(at + GATES, pack_bf16(k_pair.x * grown.x, k_pair.y * grown.y));
        }
    }
    return later ? sum : make_float2(-sum.x, -sum.y);
}

__device__ void make_decays(Shared &shared, int stage, const Gate &gate) {
    int warp = thread() % GROUP / 32, panel = warp % 2;
    const Panel &tiles = shared.panels[stage][panel];
    float2 way = warp < 2 ? make_tiles<false>(tiles, gate) : make_tiles<true>(tiles, gate);
    float *to = warp < 2 ? shared.to_middle[stage] : shared.to_end[stage];
    *reinterpret_cast<float2 *>(&to[channel_place(panel * PANEL + thread() % 32 * 2)]) =
        make_float2(exp2_approximate(way.x), exp2_approximate(way.y));
}

/* [L0; M0], in the accumulators of the warpgroup: warps 0 and 1 have rows of L0, the others of M0. */
__device__ void multiply_pairs(const Panel (&panels)[PANELS], float (&d)[CHUNK / 8][4]) {
    uint64_t rows = wgmma_operand(panels[0].keys, 0, 8 * ROW, SWIZZLE_128);
    uint64_t columns = wgmma_operand(panels[0].gates, 0, 8 * ROW, SWIZZLE_128);
    pin(d);
    wgmma_fence();
    wgmma_shared<false>(d, rows, columns);
#pragma unroll
    for (int c = 1; c < DIM / 16; c++) {
        uint32_t further = c / 4 * sizeof(Panel) + c % 4 * 32;
        wgmma_shared<true>(d, advanced(rows, further), advanced(columns, further));
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
}

/* Where a thread's elements of a tile lie by tf32_place, whose 16-byte pieces are permuted by row % 8: an address
 * costs one instruction. */
struct Tf32Places {
    uint32_t even, odd; /* of an even and of an odd token's element */

    /* Elements (row + lane / 4 + {0, 8}, token + lane % 4 * 2 + {0, 1}), as an accumulator has them. */
    static __device__ Tf32Places of_accumulator(const float *tile, int row) {
        uint32_t lane = thread() % 32, r = lane / 4;
        uint32_t at = shared_address(tile) + (row + r) * CHUNK * 4 + lane % 4 * 4;
        return {at + (r << 4), at + ((r ^ 1) << 4)};
    }
    __device__ uint32_t at(int row, int token) const { /* multiples of 8, but for token % 2 */
        return ((token & 1 ? odd : even) ^ (token / 8 * 2) << 4) + row * CHUNK * 4;
    }
};

/* The warp's rows of M0, of which nothing counts above the diagonal: it may be infinite, so it is replaced. */
__device__ void store_M(const float (&d)[CHUNK / 8][4], float *M) {
    int lane = thread() % 32, down = thread() / 32 % 2 * HALF;
    Tf32Places places = Tf32Places::of_accumulator(M, down);
    int ahead = down + lane / 4 - lane % 4 * 2; /* of the row before the token, in the first element */
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float x = ahead >= j * 8 + n % 2 - n / 2 * 8 ? round_tf32(d[j][n]) : 0.f;
            store_shared(places.at(n / 2 * 8, j * 8 + n % 2), __float_as_uint(x));
        }
}

/* A diagonal block of F by forward substitution, a column to a lane; both halves of the warp do the same. */
template <int block>
__device__ void invert_block(const float (&d)[CHUNK / 8][4], Scratch &scratch, int slot, float *F) {
    int lane = thread() % 32, row = lane / 4, column = lane % 4 * 2, own = lane % HALF;
    const float *rk = &scratch.rk[slot][block * HALF], *beta = &scratch.beta[slot][block * HALF];
    float *L = scratch.L[block];
    const float rows[2] = {rk[row], rk[row + 8]};
    const float factors[2] = {rows[0] * beta[row], rows[1] * beta[row + 8]};
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float2 columns = *reinterpret_cast<const float2 *>(&rk[j * 8 + column]);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            L[(j * 8 + column + n % 2) * PADDED + row + n / 2 * 8] =
                d[block * 2 + j][n] * factors[n / 2] * (n % 2 ? columns.y : columns.x);
            if (block == 1)
                scratch.Z[(row + n / 2 * 8) * PADDED + j * 8 + column + n % 2] =
                    round_tf32(d[j][n] * rows[n / 2]);
        }
    }
    __syncwarp();
    float x[HALF];
#pragma unroll
    for (int i = 0; i < HALF; i++)
        x[i] = i == own ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < HALF - 1; j++)
#pragma unroll
        for (int i = (j + 1) / 4 * 4; i < HALF; i += 4) {
            float4 of = *reinterpret_cast<const float4 *>(&L[j * PADDED + i]);
            const float l[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
            for (int n = 0; n < 4; n++)
                if (i + n > j)
                    x[i + n] = fmaf(-l[n], x[j], x[i + n]);
        }
    int half = lane / HALF * 8,
        piece = block * 4 + own / 8 * 2 + own % 2; /* half: of the column's rows to store */
    uint32_t at = shared_address(F) + (block * HALF + half) * CHUNK * 4 + (piece << 4) + own % 8 / 2 * 4;
    float step = beta[own];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        float4 of = *reinterpret_cast<const float4 *>(&rk[half + i]);
        const float norms[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float y = round_tf32((half ? x[i + n + 8] : x[i + n]) * step * norms[n]);
            store_shared((at ^ (i + n) << 4) + (i + n) * CHUNK * 4, __float_as_uint(y));
        }
    }
}

/* The block of F above the diagonal blocks. */
__device__ void clear_above(float *F) {
    uint32_t lane = thread() % 32, row = lane / 4, piece = (4 + lane % 4) ^ row;
#pragma unroll
    for (int n = 0; n < 2; n++)
        *reinterpret_cast<float4 *>(&F[(row + n * 8) * CHUNK + piece * 4]) = make_float4(0, 0, 0, 0);
}

/* The block of F below the diagonal blocks, -F11 Z F00. */
__device__ void join_blocks(const Scratch &scratch, float *F) {
    uint32_t lane = thread() % 32, row = lane / 4, part = lane % 4;
    float product[2][4] = {}, result[2][4] = {};
    Tf32Places places = Tf32Places::of_accumulator(F, HALF);
#pragma unroll
    for (int s = 0; s < 2; s++) {
        uint32_t a[4];
#pragma unroll
        for (int n = 0; n < 4; n++) /* as tf32_operand has columns */
            a[n] = load_shared(places.at(n % 2 * 8, HALF + s * 8 + n / 2));
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float *b = &scratch.Z[(s * 8 + part * 2) * PADDED + j * 8 + row];
            mma_tf32(product[j], a, __float_as_uint(b[0]), __float_as_uint(b[PADDED]));
        }
    }
    /* Elements (s * 8 + part * 2 + b, j * 8 + row) of F00. */
    uint32_t at = shared_address(F) + part * 2 * CHUNK * 4 + row / 2 * 4;
    uint32_t first = at + ((row % 2 ^ part * 2) << 4),
             second = at + CHUNK * 4 + ((row % 2 ^ (part * 2 + 1)) << 4);
#pragma unroll
    for (int s = 0; s < 2; s++) {
        uint32_t a[4];
#pragma unroll
        for (int n = 0; n < 4; n++)
            product[s][n] = round_tf32(product[s][n]);
        tf32_operand(product[s], a);
#pragma unroll
        for (int j = 0; j < 2; j++)
            mma_tf32(result[j], a, load_shared((first ^ j << 5) + s * 8 * CHUNK * 4),
                     load_shared((second ^ j << 5) + s * 8 * CHUNK * 4));
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            store_shared(places.at(n / 2 * 8, j * 8 + n % 2), __float_as_uint(-round_tf32(result[j][n])));
}

/* The operands of one chunk that was received. */
__device__ void make_operands(Shared &shared, Scratch &scratch, int stage, int slot, int group,
                              const Gate &gate) {
    make_decays(shared, stage, gate);
    fence_shared();
    barrier_wait(BARRIER_GROUP + group, GROUP);
    float d[CHUNK / 8][4];
    multiply_pairs(shared.panels[stage], d);
    float *inverse = shared.inverse[stage];
    int warp = thread() % GROUP / 32;
    if (warp == 0) {
        invert_block<0>(d, scratch, slot, inverse);
        barrier_arrive(BARRIER_INVERSE + group, 64);
        clear_above(inverse);
    } else if (warp == 1) {
        invert_block<1>(d, scratch, slot, inverse);
        barrier_wait(BARRIER_INVERSE + group, 64);
        join_blocks(scratch, inverse);
    } else
        store_M(d, shared.M[stage]);
    fence_shared();
}

__device__ void produce(const kda_prefill &p, const kda_sm90_maps &maps, Shared &shared, int items, int group) {
    int warp = threadIdx.x % GROUP / 32;
    bool receives = warp >= RECEIVER;
    Scratch &scratch = shared.scratch[group];
    Turn<STAGES> turn, next, ahead;
    turn.next(group), next.next(group), ahead.next(group);
    uint32_t beta[2] = {0, 0};     /* of the next chunk and the one after it */
    auto go_on = [&](int chunks) { /* the scout, two chunks ahead of what is received */
                                   Scout &scout = scratch.scout;
                                   __syncwarp(); /* all lanes have read what is overwritten now */
                                   if (threadIdx.x % 32 == 0 && scout.count >= 0) {
                                       find_next(p, shared, items, scout, chunks);
                                       send(p, maps, shared, scout, ahead);
                                   }
                                   __syncwarp();
                                   beta[0] = beta[1],
                                   beta[1] = load_beta(p, shared.tasks[ahead.stage], scout.count);
                                   ahead.next(PRODUCERS);
    };
    if (warp == SCOUT) {
        if (threadIdx.x % 32 == 0)
            scratch.scout = {};
        go_on(group);
        go_on(PRODUCERS);
    }
    int slot = 0;
    if (receives)
        receive(p, shared, scratch, next, slot, beta[0]);
    Gate gate;
    for (;; turn.next(PRODUCERS)) {
        wait(shared.arrived[turn.stage], turn.parity);
        barrier_wait(BARRIER_GROUP + group, GROUP);
        const Task &task = shared.tasks[turn.stage];
        int count = task.count;
        if (count > 0) {
            if (task.head != gate.head)
                gate = find_gate(p, task.head, warp % 2 * PANEL + threadIdx.x % 32 * 2);
            make_operands(shared, scratch, turn.stage, slot, group, gate);
        }
        ptx::mbarrier_arrive(&shared.full[turn.stage]);
        if (count < 0)
            return;
        slot ^= 1, next.next(PRODUCERS);
        if (warp == SCOUT)
            go_on(PRODUCERS);
        if (receives)
            receive(p, shared, scratch, next, slot, beta[0]);
    }
}

/* ---- Consumers ------------------------------------------------------------------------------------ */

__device__ void decay_state(float (&S)[DIM / 8][4], const float *factors) {
    int part = threadIdx.x % 4 * 4;
#pragma unroll
    for (int c = 0; c < DIM / 8; c += 2) {
        float4 f = *reinterpret_cast<const float4 *>(&factors[c * 8 + part]);
        S[c][0] *= f.x, S[c][1] *= f.y, S[c][2] *= f.x, S[c][3] *= f.y;
        S[c + 1][0] *= f.z, S[c + 1][1] *= f.w, S[c + 1][2] *= f.z, S[c + 1][3] *= f.w;
    }
}

/* rk or rq of the thread's tokens. */
__device__ void load_scales(const float *scales, float (&own)[CHUNK / 4]) {
#pragma unroll
    for (int i = 0; i < CHUNK / 4; i += 4)
        *reinterpret_cast<float4 *>(&own[i]) =
            *reinterpret_cast<const float4 *>(&scales[threadIdx.x % 4 * 8 + i]);
}

/*
 * A warp keeps S and v in a unit of its own, 2^unit, in which the largest element is near 1: in the middle of a chunk S is
 * up to 2^115 times smaller, and what is added to it up to 2^115 times larger, than in the end. The unit is raised at
 * once when v needs it, and is measured again, by S, every MEASURED tokens.
 */
constexpr int MEASURED = 512, LEAST_UNIT = -120, GREATEST_UNIT = 120;

/* 0 where fp32 has none so small. */
__device__ float power_of_two(int exponent) {
    return exponent < -126 ? 0.f : __int_as_float((exponent + 127) << 23);
}

__device__ int unit_of(float largest) {
    int exponent = (int)(__float_as_uint(largest) >> 23) - 127;
    return min(max(exponent, LEAST_UNIT), GREATEST_UNIT);
}

__device__ float largest_of_warp(float x) {
#pragma unroll
    for (int n = 16; n; n /= 2)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, n));
    return x;
}

/* Goes over to a unit in which S is near 1. */
__device__ void measure_unit(float (&S)[DIM / 8][4], int &unit) {
    float largest = 0;
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            largest = fmaxf(largest, fabsf(S[c][n]));
    largest = largest_of_warp(largest);
    if (largest >= 0.25f && largest <= power_of_two(EDGE))
        return;
    int next = min(max(unit_of(largest) + unit, LEAST_UNIT), GREATEST_UNIT);
    next = max(next, unit - 120); /* a factor that fp32 holds */
    float factor = power_of_two(unit - next);
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            S[c][n] *= factor;
    unit = next;
}

/* Raises the unit to that of the chunk's largest value. */
__device__ void raise_unit(uint32_t value, float (&S)[DIM / 8][4], int &unit) {
    int next = unit_of(__uint_as_float(value << 16));
    float factor = power_of_two(unit - next);
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            S[c][n] *= factor;
    unit = next;
}

/* One chunk: S goes on, o becomes its outputs before their scale, both in the warp's unit. */
__device__ void advance(const Shared &shared, int stage, float (&S)[DIM / 8][4], float (&o)[CHUNK / 8][4],
                        int &unit) {
    const Panel(&panels)[PANELS] = shared.panels[stage];
    uint64_t rows = wgmma_operand(panels[0].keys, 0, 8 * ROW, SWIZZLE_128);
    uint64_t columns = wgmma_operand(panels[0].gates, sizeof(Panel), 8 * ROW, SWIZZLE_128);
    uint64_t inverse = wgmma_operand(shared.inverse[stage], 0, 8 * CHUNK * 4, SWIZZLE_128);
    uint64_t M = wgmma_operand(shared.M[stage], 0, 8 * CHUNK * 4, SWIZZLE_128);

    uint32_t value = shared.largest[stage];
    if (value >= (uint32_t)(127 + unit + EDGE) << 7)
        raise_unit(value, S, unit);
    decay_state(S, shared.to_middle[stage]);
    float wy[CHUNK / 4][4]; /* W^T, then Y^T */
    uint32_t a[DIM / 16][4];
#pragma unroll
    for (int c = 0; c < DIM / 16; c++)
        pack_operand(S[2 * c], S[2 * c + 1], a[c]);
    pin(wy);
    wgmma_fence();
    wgmma<false, false>(wy, a[0], rows);
#pragma unroll
    for (int c = 1; c < DIM / 16; c++)
        wgmma<false, true>(wy, a[c], advanced(rows, c / 4 * sizeof(Panel) + c % 4 * 32));
    wgmma_commit();

    uint32_t v[CHUNK / 16][4];
    MatrixRow<CHUNK, DIM> values(shared.values[stage], false);
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        ldmatrix_transposed(v[t], values.at(t * 16, threadIdx.x / 32 * 16));
    alignas(16) float rk[CHUNK / 4];
    load_scales(shared.key_scale[stage], rk);
    wgmma_wait<0>();
    pin(wy);
    float in_units = power_of_two(-unit);
    float U[CHUNK / 8][4];
    uint32_t x[CHUNK / 8][4];
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++) {
        float tile[4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float2 pair = unpack_bf16(v[i / 2][i % 2 * 2 + n]);
            tile[2 * n] = fmaf(-rk[2 * i], wy[i][2 * n], pair.x * in_units);
            tile[2 * n + 1] = fmaf(-rk[2 * i + 1], wy[i][2 * n + 1], pair.y * in_units);
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

    uint32_t u[CHUNK / 16][4];
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        pack_operand(U[2 * t], U[2 * t + 1], u[t]);
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
        tf32_operand(U[i], x[i]);
    pin(S);
    pin(o);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        wgmma<true, true>(S, u[t], advanced(columns, t * 16 * ROW));
    wgmma_tf32<false>(o, x[0], M);
#pragma unroll
    for (int i = 1; i < CHUNK / 8; i++)
        wgmma_tf32<true>(o, x[i], advanced(M, i * 32));
    wgmma_commit();
    wgmma_wait<0>();
    pin(S);
    pin(o);
    decay_state(S, shared.to_end[stage]);
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            o[i][n] += wy[CHUNK / 8 + i][n];
}

/* Runs f(two neighbours of S in a row of V, channel, column) over the thread's share of the state. */
template <class S, class F> __device__ void each_pair(S (&state)[DIM / 8][4], F f) {
    int t = threadIdx.x, lane = t % 32, column = t / 32 * 16 + lane / 4;
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            f(state[c][2 * n], state[c][2 * n + 1], c * 8 + lane % 4 * 2, column + n * 8);
}

/* Where element (column of V, channel) of a state is. */
__device__ char *element(const kda_state &state, int column, int channel) {
    int row = state.v_first ? column : channel, i = state.v_first ? channel : column;
    return state.data + row * state.stride + i * (state.dtype == KDA_F32 ? 4 : 2);
}

/* Can a pair be accessed at once? */
__device__ bool as_pairs(const kda_state &state) {
    return state.v_first &&
           (reinterpret_cast<uintptr_t>(state.data) | state.stride) % (state.dtype == KDA_F32 ? 8 : 4) == 0;
}

__device__ float load_one(const kda_state &state, int column, int channel) {
    const char *at = element(state, column, channel);
    return state.dtype == KDA_F32 ? *reinterpret_cast<const float *>(at)
                                  : kda_from_bf16(*reinterpret_cast<const uint16_t *>(at));
}

__device__ void load_whole(const kda_state &state, float (&S)[DIM / 8][4]) {
    if (!state.data)
        each_pair(S, [](float &x, float &y, int, int) { x = y = 0.f; });
    else if (!as_pairs(state))
        each_pair(S, [&](float &x, float &y, int channel, int column) {
            x = load_one(state, column, channel), y = load_one(state, column, channel + 1);
        });
    else if (state.dtype == KDA_F32)
        each_pair(S, [&](float &x, float &y, int channel, int column) {
            float2 pair = *reinterpret_cast<const float2 *>(element(state, column, channel));
            x = pair.x, y = pair.y;
        });
    else
        each_pair(S, [&](float &x, float &y, int channel, int column) {
            float2 pair = unpack_bf16(*reinterpret_cast<const uint32_t *>(element(state, column, channel)));
            x = pair.x, y = pair.y;
        });
}

__device__ void store_whole(const kda_state &state, const float (&S)[DIM / 8][4], int unit) {
    float factor = power_of_two(unit);
    if (!as_pairs(state))
        each_pair(S, [&](float x, float y, int channel, int column) {
            store_float(element(state, column, channel), state.dtype, 0, x * factor);
            store_float(element(state, column, channel + 1), state.dtype, 0, y * factor);
        });
    else if (state.dtype == KDA_F32)
        each_pair(S, [&](float x, float y, int channel, int column) {
            *reinterpret_cast<float2 *>(element(state, column, channel)) = make_float2(x * factor, y * factor);
        });
    else
        each_pair(S, [&](float x, float y, int channel, int column) {
            *reinterpret_cast<uint32_t *>(element(state, column, channel)) = pack_bf16(x * factor, y * factor);
        });
}

/* At position 0 the state that the chain starts from, else the one behind that token. */
__device__ void store_whole_checkpoints(const kda_prefill &p, int n, int head, int position,
                                        const float (&S)[DIM / 8][4], int unit) {
    int64_t cursor = 0;
    while (p.checkpoints.data) {
        struct kda_state state = kda_checkpoint_at(&p, n, position, head, &cursor);
        if (!state.data)
            return;
        store_whole(state, S, unit);
    }
}

/* The warp's outputs of a chunk [CHUNK][16 columns], from o^T, to memory. */
__device__ void store_chunk(const kda_prefill &p, const kda_sm90_maps &maps, const Task &task,
                            const float (&o)[CHUNK / 8][4], const float (&scales)[CHUNK / 4],
                            __nv_bfloat16 *rows) {
    int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16;
    auto piece = [](int token, int half) { return token * 16 + (half ^ (token >> 2 & 1)) * 8; };
    if (lane == 0)
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>()); /* the chunk before has left */
    __syncwarp();
    uint32_t pairs[CHUNK / 8][2];
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            pairs[i][n] =
                pack_output(p.out.dtype, o[i][2 * n] * scales[2 * i], o[i][2 * n + 1] * scales[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i += 2)
        stmatrix_transposed(&rows[piece((i + lane / 16) * 8 + lane % 8, lane / 8 % 2)], pairs[i], pairs[i + 1]);
    fence_shared();
    __syncwarp();
    if (task.count == CHUNK) {
        if (lane == 0) {
            const int32_t at[4] = {column, task.head, task.token, task.batch};
            ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &maps.out, at, rows);
            ptx::cp_async_bulk_commit_group();
        }
    } else if (lane < task.count) { /* what lies behind is another sequence's */
        char *to = kda_row(&p.out, task.batch, task.token + lane, task.head) + column * 2;
        reinterpret_cast<uint4 *>(to)[0] = *reinterpret_cast<const uint4 *>(&rows[piece(lane, 0)]);
        reinterpret_cast<uint4 *>(to)[1] = *reinterpret_cast<const uint4 *>(&rows[piece(lane, 1)]);
    }
}

__device__ void consume(const kda_prefill &p, const kda_sm90_maps &maps, Shared &shared) {
    float S[DIM / 8][4];
    int unit = 0;
    for (Turn<STAGES> turn;; turn.next()) {
        wait(shared.full[turn.stage], turn.parity);
        const Task &sent = shared.tasks[turn.stage];
        if (sent.count < 0)
            break;
        if (sent.first) {
            load_whole(kda_state_at(&p, &p.initial_state, sent.slot, sent.head), S);
            store_whole_checkpoints(p, sent.n, sent.head, 0, S, 0);
            unit = 0;
            measure_unit(S, unit);
        }
        float o[CHUNK / 8][4];
        alignas(16) float rq[CHUNK / 4];
        if (sent.count > 0) {
            advance(shared, turn.stage, S, o, unit);
            load_scales(shared.query_scale[turn.stage], rq);
            if (unit != 0)
#pragma unroll
                for (int i = 0; i < CHUNK / 4; i++)
                    rq[i] *= power_of_two(unit);
        }
        const Task task = sent; /* the next one may overwrite it */
        ptx::mbarrier_arrive(&shared.empty[turn.stage]);
        if (task.count > 0) {
            store_chunk(p, maps, task, o, rq, shared.outputs[threadIdx.x / 32]);
            store_whole_checkpoints(p, task.n, task.head, task.position, S, unit);
            if (task.position % MEASURED < CHUNK)
                measure_unit(S, unit);
        }
        if (task.last && p.final_state.data)
            store_whole(kda_state_at(&p, &p.final_state, task.slot, task.head), S, unit);
    }
    if (threadIdx.x % 32 == 0)
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
}

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
        consume(p, maps, shared);
    } else {
        give_registers<PRODUCER_REGISTERS>();
        produce(p, maps, shared, items, group - CONSUMERS);
    }
}

} // namespace
} // namespace kda

bool kda_sm90_fuses(const kda_prefill *p) {
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
