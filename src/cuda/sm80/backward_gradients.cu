/* SPDX-License-Identifier: MIT */
/*
 * The gradients of q, k, g and beta, for every chunk of a slab at once, from the state before the chunk, the gradient of
 * that after it, e and Z (backward_chains.cu). One CTA works one chunk of one q/k head, with the value heads that read it
 * one after the other.
 *
 * Products with states are sums over V, tile by tile. A warp makes them for one block of 16 tokens and 32 channels, and
 * then each of its threads works one of these channels, token by token:
 *     dq, dk       products with states, decayed by factors of 1 at most; products of pairs around the middle of a block
 *     da           what passes a token: from the state before the chunk to that after it; from the former to rows from the
 *                  token on; from columns before the token to the latter; of pairs on both sides of the token.
 * Only the last of these is a difference, within a block: each product of a pair is added where it begins and taken off
 * where it ends. Both times it is made of the same rounded numbers, so what is left is as good as its parts.
 */
#include "cuda/sm80/prepare.cuh"

#include "cuda/launch.cuh"
#include "cuda/sm80/backward.cuh"
#include "cuda/sm80/kernels.h"

#include <cfloat>

namespace kda {
namespace {

using chunks::BLOCK;
using chunks::BLOCKS;
using chunks::LN2;
using chunks::LOG2E;
using chunks::MIDDLE;
using chunks::STRONGEST;

constexpr int LANE_CHANNELS = 32; /* of a warp */
constexpr int PAIR_BLOCKS = 6;    /* of 16 x 16 pairs: three of dL0, three of dM */

/* Everything of 64 columns of V. */
template <int KP> struct ColumnTile {
    __nv_bfloat16 S[STATE_ELEMENTS<KP>], R[STATE_ELEMENTS<KP>];
    __nv_bfloat16 e[ROWS_ELEMENTS], Z[ROWS_ELEMENTS], d_out[ROWS_ELEMENTS];
};

template <int KP> struct Config {
    static constexpr int THREADS = BLOCKS * KP, WARPS = THREADS / 32;
    static constexpr int STAGES = KP > 128 ? 1 : 2;
    static constexpr int PAIRS_OF_WARP = (PAIR_BLOCKS + WARPS - 1) / WARPS;
    static constexpr int SLICES = THREADS / (KP / 8); /* of the rows of a state, in sums over them */
};

/* Where a warp's accumulators become columns of channels. */
typedef float Exchange[BLOCK][LANE_CHANNELS + 1];

template <int KP> struct Shared {
    static constexpr int WARPS = Config<KP>::WARPS;
    union {
        ColumnTile<KP> stages[Config<KP>::STAGES];
        struct {
            union {
                float slices[Config<KP>::SLICES][KP]; /* sums over rows of S * R */
                Exchange of_states[2][WARPS];
                struct { /* as in prepare.cuh */
                    __nv_bfloat16 rows_k[CHUNK * KP], rows_q[CHUNK * KP], columns[CHUNK * KP],
                        across[BLOCK * KP];
                };
            };
            Exchange exchange[WARPS];
            alignas(16) float dots[2][WARPS][2 * BLOCK]; /* of rows of q, then k, with their gradients */
            float bias[KP], A_log[WARPS];
        };
    };
    __nv_bfloat16 dL[CHUNK * CHUNK], dM[CHUNK * CHUNK]; /* of pairs of unit rows, in a unit */
    float largest[WARPS];
    float own[CHUNK];                                       /* dM's diagonal */
    float d_steps[CHUNK];                                   /* e . Z */
    float steps[CHUNK], factors[2][CHUNK], units[2][CHUNK]; /* as in backward.cuh */
    float undo[2][CHUNK], redo[2][CHUNK];                   /* factors / units and units / factors */
    float through[BLOCKS][KP];                              /* log2 decay of a block */
    float to_next[BLOCKS][KP]; /* from the middle of block 0 to its end, to the middle of block 1; cut off */
    float rows_after[KP], columns_before[KP]; /* what block 1 takes of the state, and block 0 gives to it */
};

/* The thread's work. */
struct Position {
    int64_t batch, token; /* of the block's first token */
    int count;            /* tokens of the block that exist */
    int block, c;
    bool exists; /* the channel */
};

/* ---- Fetching ------------------------------------------------------------------------------------ */

template <int THREADS> __device__ void copy_elements(__nv_bfloat16 *to, const __nv_bfloat16 *from, int count) {
    for (int i = threadIdx.x * 8; i < count; i += THREADS * 8)
        copy_async(to + i, from + i);
}

/* Rows of dO in bf16; zeros where there are none. */
template <int THREADS>
__device__ void fetch_d_out(const kda_tensor &t, int64_t columns, int64_t batch, int64_t token, int64_t head,
                            int count, int column, __nv_bfloat16 *to) {
    const char *rows =
        t.data ? kda_row(&t, batch, token, head) + column * (t.dtype == KDA_F32 ? 4 : 2) : nullptr;
    int64_t stride = t.stride[1];
    if (rows && t.dtype == KDA_BF16 && columns >= COLUMNS &&
        (reinterpret_cast<uintptr_t>(rows) | stride) % 16 == 0) {
        for (int i = threadIdx.x; i < ROWS_ELEMENTS / 8; i += THREADS) {
            int row = i / (COLUMNS / 8), c = i % (COLUMNS / 8) * 8;
            copy_async(to + swizzled<CHUNK, COLUMNS>(row, c), row < count ? rows + row * stride + c * 2 : rows,
                       row < count);
        }
        return;
    }
    for (int i = threadIdx.x; i < ROWS_ELEMENTS; i += THREADS) {
        int row = i / COLUMNS, c = i % COLUMNS;
        bool real = rows && row < count && c < columns;
        to[swizzled<CHUNK, COLUMNS>(row, c)] =
            __float2bfloat16_rn(real ? load_float(rows + row * stride, t.dtype, c) : 0.f);
    }
}

/* Where the CTA's chunk is. */
struct Work {
    SlabSegment segment;
    struct kda_span span;
    int64_t number; /* the chunk's in the slab, of the value head that is worked */
};

template <int KP>
__device__ void fetch(const kda_backward &b, const Slab &slab, const BackwardMemory<KP> &memory,
                      const Work &work, int64_t head, int tile, ColumnTile<KP> &to) {
    constexpr int THREADS = Config<KP>::THREADS;
    int64_t at = work.number * slab.tiles + tile;
    copy_elements<THREADS>(to.S, memory.S + at * STATE_ELEMENTS<KP>, STATE_ELEMENTS<KP>);
    copy_elements<THREADS>(to.R, memory.R + at * STATE_ELEMENTS<KP>, STATE_ELEMENTS<KP>);
    copy_elements<THREADS>(to.e, memory.e + at * ROWS_ELEMENTS, ROWS_ELEMENTS);
    copy_elements<THREADS>(to.Z, memory.Z + at * ROWS_ELEMENTS, ROWS_ELEMENTS);
    int column = tile * COLUMNS;
    fetch_d_out<THREADS>(b.d_out, b.forward.value_dim - column, work.segment.sequence.batch,
                         work.segment.sequence.first + work.span.first, head, (int)work.span.count, column,
                         to.d_out);
}

/* ---- Sums over V --------------------------------------------------------------------------------- */

/* Of a warp: its block's rows, its channels. And of a thread: 8 channels of some rows of S and R. */
template <int KP> struct Sums {
    float d_out_S[4][4], Z_S[4][4], e_R[4][4];
    float pairs[Config<KP>::PAIRS_OF_WARP][2][4];
    float S_R[8];
};

/* Row and column block of block n of pairs; dM's are those from 3 on. */
struct PairBlock {
    bool of_queries;
    int later, earlier;
    __device__ explicit PairBlock(int n) : of_queries(n >= 3), later(n % 3 > 0), earlier(n % 3 == 2) {}
};

template <int KP> __device__ void add_tile(const ColumnTile<KP> &tile, Sums<KP> &sums) {
    constexpr int WARPS = Config<KP>::WARPS, SLICES = Config<KP>::SLICES;
    int warp = threadIdx.x / 32, block = warp / (WARPS / BLOCKS);
    int channel = warp % (WARPS / BLOCKS) * LANE_CHANNELS;
    MatrixRow<CHUNK, COLUMNS> d_out(tile.d_out, true), Z(tile.Z, true), e(tile.e, true), columns(tile.e, false);
    MatrixRow<COLUMNS, KP> S(tile.S, true), R(tile.R, true);
#pragma unroll
    for (int v = 0; v < COLUMNS; v += 16) {
        uint32_t a[3][4], x[4];
        ldmatrix(a[0], d_out.at(block * BLOCK, v));
        ldmatrix(a[1], Z.at(block * BLOCK, v));
        ldmatrix(a[2], e.at(block * BLOCK, v));
#pragma unroll
        for (int c = 0; c < 2; c++) {
            ldmatrix_transposed(x, S.at(v, channel + c * 16));
            mma(sums.d_out_S[2 * c], a[0], x[0], x[1]);
            mma(sums.d_out_S[2 * c + 1], a[0], x[2], x[3]);
            mma(sums.Z_S[2 * c], a[1], x[0], x[1]);
            mma(sums.Z_S[2 * c + 1], a[1], x[2], x[3]);
            ldmatrix_transposed(x, R.at(v, channel + c * 16));
            mma(sums.e_R[2 * c], a[2], x[0], x[1]);
            mma(sums.e_R[2 * c + 1], a[2], x[2], x[3]);
        }
#pragma unroll
        for (int i = 0; i < Config<KP>::PAIRS_OF_WARP; i++) {
            int n = warp + i * WARPS;
            if (n >= PAIR_BLOCKS)
                continue;
            PairBlock at(n);
            ldmatrix(a[0], at.of_queries ? d_out.at(at.later * BLOCK, v) : Z.at(at.later * BLOCK, v));
            ldmatrix(x, columns.at(at.earlier * BLOCK, v));
            mma(sums.pairs[i][0], a[0], x[0], x[1]);
            mma(sums.pairs[i][1], a[0], x[2], x[3]);
        }
    }
    int c = threadIdx.x % (KP / 8) * 8;
#pragma unroll
    for (int row = threadIdx.x / (KP / 8); row < COLUMNS; row += SLICES) {
        uint4 s = *reinterpret_cast<const uint4 *>(&tile.S[swizzled<COLUMNS, KP>(row, c)]);
        uint4 r = *reinterpret_cast<const uint4 *>(&tile.R[swizzled<COLUMNS, KP>(row, c)]);
        const uint32_t s_pairs[4] = {s.x, s.y, s.z, s.w}, r_pairs[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 x = unpack_bf16(s_pairs[i]), y = unpack_bf16(r_pairs[i]);
            sums.S_R[2 * i] = fmaf(x.x, y.x, sums.S_R[2 * i]);
            sums.S_R[2 * i + 1] = fmaf(x.y, y.y, sums.S_R[2 * i + 1]);
        }
    }
}

template <int KP>
__device__ void sum_tiles(const kda_backward &b, const Slab &slab, const BackwardMemory<KP> &memory,
                          const Work &work, int64_t head, Shared<KP> &shared, Sums<KP> &sums) {
    constexpr int STAGES = Config<KP>::STAGES, AHEAD = STAGES - 1;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            sums.d_out_S[i][n] = sums.Z_S[i][n] = sums.e_R[i][n] = 0;
#pragma unroll
    for (int i = 0; i < Config<KP>::PAIRS_OF_WARP; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            sums.pairs[i][0][n] = sums.pairs[i][1][n] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        sums.S_R[i] = 0;
    if (AHEAD)
        fetch<KP>(b, slab, memory, work, head, 0, shared.stages[0]);
    copy_async_commit();
    for (int tile = 0; tile < slab.tiles; tile++) {
        if (AHEAD)
            copy_async_wait<0>();
        __syncthreads();
        if (tile + AHEAD < slab.tiles)
            fetch<KP>(b, slab, memory, work, head, tile + AHEAD, shared.stages[(tile + AHEAD) % STAGES]);
        copy_async_commit();
        if (!AHEAD) {
            copy_async_wait<0>();
            __syncthreads();
        }
        add_tile<KP>(shared.stages[tile % STAGES], sums);
    }
    __syncthreads(); /* the stages are free */
}

/* ---- Pairs --------------------------------------------------------------------------------------- */

/* 2^exponent of x, within what has an inverse; 1 for 0. */
__device__ float power_below(float x) {
    int exponent = (int)(__float_as_uint(x) >> 23 & 255);
    exponent = x > 0 ? min(max(exponent, 1), 252) : 127;
    return __uint_as_float((uint32_t)exponent << 23);
}

/* A block of dM or dL0 from sums of Z . e or dO . e; for pairs of unit rows. Returns the largest one. */
template <int KP> __device__ float finish_pairs(const PairBlock &at, Shared<KP> &shared, float (&x)[2][4]) {
    int lane = threadIdx.x % 32;
    float largest = 0;
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int i = at.later * BLOCK + lane / 4 + n / 2 * 8,
                j = at.earlier * BLOCK + tile * 8 + lane % 4 * 2 + n % 2;
            float value = x[tile][n];
            if (i == j)
                (at.of_queries ? shared.own : shared.d_steps)[i] =
                    at.of_queries ? value * shared.steps[i] : value;
            value *= shared.steps[j] * (at.of_queries ? 1.f : -shared.steps[i]);
            value *= shared.undo[at.of_queries][i] * shared.undo[0][j];
            x[tile][n] = i > j ? value : 0.f;
            largest = fmaxf(largest, fabsf(x[tile][n]));
        }
    return largest;
}

template <int KP>
__device__ void store_pairs(const PairBlock &at, float factor, const float (&x)[2][4], Shared<KP> &shared) {
    int lane = threadIdx.x % 32;
    __nv_bfloat16 *to = at.of_queries ? shared.dM : shared.dL;
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = at.later * BLOCK + lane / 4 + half * 8, j = at.earlier * BLOCK + tile * 8 + lane % 4 * 2;
            *reinterpret_cast<uint32_t *>(&to[swizzled<CHUNK, CHUNK>(i, j)]) =
                pack_bf16(x[tile][half * 2] * factor, x[tile][half * 2 + 1] * factor);
        }
}

/* Writes dL and dM in a unit, which it returns: the largest of them is near 1, so that their products with tiles stay in
 * range. */
template <int KP> __device__ float make_pairs(Sums<KP> &sums, Shared<KP> &shared) {
    constexpr int WARPS = Config<KP>::WARPS;
    int warp = threadIdx.x / 32;
    float largest = 0;
#pragma unroll
    for (int i = 0; i < Config<KP>::PAIRS_OF_WARP; i++)
        if (warp + i * WARPS < PAIR_BLOCKS)
            largest = fmaxf(largest, finish_pairs<KP>(PairBlock(warp + i * WARPS), shared, sums.pairs[i]));
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bit));
    if (threadIdx.x % 32 == 0)
        shared.largest[warp] = largest;
    __syncthreads();
    for (int w = 0; w < WARPS; w++)
        largest = fmaxf(largest, shared.largest[w]);
    float unit = power_below(largest);
#pragma unroll
    for (int i = 0; i < Config<KP>::PAIRS_OF_WARP; i++)
        if (warp + i * WARPS < PAIR_BLOCKS)
            store_pairs<KP>(PairBlock(warp + i * WARPS), 1 / unit, sums.pairs[i], shared);
    return unit;
}

/* x [16][32] += a times the tile's 16 rows from `down` on, at a warp's channels. */
template <int rows, int KP>
__device__ void multiply(float (&x)[4][4], const uint32_t (&a)[4], const __nv_bfloat16 *tile, int down,
                         int channel) {
    MatrixRow<rows, KP> row(tile, true);
#pragma unroll
    for (int c = 0; c < 2; c++) {
        uint32_t y[4];
        ldmatrix_transposed(y, row.at(down, channel + c * 16));
        mma(x[2 * c], a, y[0], y[1]);
        mma(x[2 * c + 1], a, y[2], y[3]);
    }
}

/* A block of dM or dL as a first operand, and transposed. */
__device__ void load_pairs(uint32_t (&a)[4], const __nv_bfloat16 *pairs, int later, int earlier) {
    ldmatrix(a, MatrixRow<CHUNK, CHUNK>(pairs, true).at(later * BLOCK, earlier * BLOCK));
}
__device__ void load_pairs_transposed(uint32_t (&a)[4], const __nv_bfloat16 *pairs, int later, int earlier) {
    ldmatrix_transposed(a, MatrixRow<CHUNK, CHUNK>(pairs, false).at(later * BLOCK, earlier * BLOCK));
}

/* dRQ or dRK of the warp's block: with columns of its own block, and with those of the block before. */
template <int KP>
__device__ void multiply_columns(float (&x)[4][4], const __nv_bfloat16 *pairs, const Shared<KP> &shared,
                                 int block, int channel) {
    uint32_t a[4];
    load_pairs(a, pairs, block, block);
    multiply<CHUNK, KP>(x, a, shared.columns, block * BLOCK, channel);
    if (block == 0)
        return;
    load_pairs(a, pairs, 1, 0);
    multiply<BLOCK, KP>(x, a, shared.across, 0, channel);
}

/* dCK of the columns of block `earlier` by rows of block `later`. */
template <int KP>
__device__ void multiply_rows(float (&x)[4][4], const Shared<KP> &shared, int later, int earlier, int channel) {
    uint32_t a[4];
    load_pairs_transposed(a, shared.dM, later, earlier);
    multiply<CHUNK, KP>(x, a, shared.rows_q, later * BLOCK, channel);
    load_pairs_transposed(a, shared.dL, later, earlier);
    multiply<CHUNK, KP>(x, a, shared.rows_k, later * BLOCK, channel);
}

/* ---- Channels ------------------------------------------------------------------------------------ */

/* All tokens of a lane's channel, from accumulators of its warp. */
struct Tokens {
    const float *first;
    __device__ float operator[](int t) const { return first[t * (LANE_CHANNELS + 1)]; }
};

/* They are there until the buffer's next use. of_states: a state made them, and their columns lie as its channels. */
template <bool of_states> __device__ Tokens exchange(const float (&x)[4][4], Exchange &buffer) {
    int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int column = i * 8 + lane % 4 * 2 + n % 2;
            buffer[lane / 4 + n / 2 * 8][of_states ? channel_at(column) : column] = x[i][n];
        }
    __syncwarp();
    return {&buffer[0][lane]};
}

/* One channel of a block's rows of q or k, as loaded. */
template <bool all_bf16> struct Column;
template <> struct Column<true> {
    uint32_t raw[BLOCK / 2];
    __device__ void set(int t, const char *row, kda_dtype) {
        uint32_t x = *reinterpret_cast<const uint16_t *>(row);
        raw[t / 2] = t % 2 ? raw[t / 2] | x << 16 : x;
    }
    __device__ float get(int t) const {
        return __uint_as_float(t % 2 ? raw[t / 2] & 0xffff0000u : raw[t / 2] << 16);
    }
};
template <> struct Column<false> {
    float x[BLOCK];
    __device__ void set(int t, const char *row, kda_dtype dtype) { x[t] = load_float(row, dtype, 0); }
    __device__ float get(int t) const { return x[t]; }
};

/* Loads a block's elements of a channel; of a missing token the last one that exists, of a missing channel the first. */
template <class Into>
__device__ void load_column(const kda_tensor &t, const Position &at, int64_t head, Into &x) {
    const char *row =
        kda_row(&t, at.batch, at.token, head) + (at.exists ? at.c : 0) * (t.dtype == KDA_F32 ? 4 : 2);
#pragma unroll
    for (int i = 0; i < BLOCK; i++)
        x.set(i, row + min(i, at.count - 1) * t.stride[1], t.dtype);
}

/* The gate of a channel. */
struct Gate {
    float A, dt_bias;
};

__device__ Gate load_gate(const kda_prefill &p, const Position &at, int64_t head) {
    Gate gate = {1.f, 0.f};
    if (p.A_log.data)
        gate.A = min_or_nan(expf(load_float(p.A_log.data + head * p.A_log.stride[0], p.A_log.dtype, 0)), 3e38f);
    if (p.dt_bias.data && at.exists)
        gate.dt_bias = load_float(p.dt_bias.data + head * p.dt_bias.stride[0], p.dt_bias.dtype, at.c);
    return gate;
}

/* Log2 decays, of what does not exist 0. */
template <flash_kda_gate gate, bool all_bf16>
__device__ void find_decays(const kda_prefill &p, const Position &at, int64_t head, float (&a)[BLOCK]) {
    Column<all_bf16> g;
    if (at.count <= 0 || !at.exists) {
#pragma unroll
        for (int t = 0; t < BLOCK; t++)
            a[t] = 0;
        return;
    }
    Gate parameters = load_gate(p, at, head);
    load_column(p.g, at, head, g);
#pragma unroll
    for (int t = 0; t < BLOCK; t++)
        a[t] = t < at.count
                   ? chunks::log2_decay<gate>(g.get(t), parameters.dt_bias, parameters.A, p.lower_bound)
                   : 0.f;
}

/* A token's decay between the two of a pair. */
__device__ float cut_off(float a) { return max_or_nan(a, STRONGEST); }

/* Runs f(t, log2 decay from the middle of the block to token t). */
template <class F> __device__ void from_middle(const float (&a)[BLOCK], F f) {
    float sum = 0;
#pragma unroll
    for (int t = MIDDLE; t < BLOCK; t++) {
        sum += cut_off(a[t]);
        f(t, sum);
    }
    sum = 0;
#pragma unroll
    for (int t = MIDDLE - 1; t >= 0; t--) {
        f(t, sum);
        sum -= cut_off(a[t]);
    }
}

/* What a thread finds of its channel, of the scaled q and the normalised k, summed over value heads. */
struct Gradients {
    float dq[BLOCK], dk[BLOCK];
};

template <bool all_bf16> struct Channel {
    Column<all_bf16> q, k;

    __device__ void load(const kda_prefill &p, const Position &at, int64_t key_head) {
        if (at.count > 0 && at.exists) {
            load_column(p.q, at, key_head, q);
            load_column(p.k, at, key_head, k);
        } else
            *this = {};
    }
};

/* dO S^T, Z S^T and e R^T of the thread's channel. */
struct StateProducts {
    Tokens d_out_S, Z_S, e_R;
};

/* Products with states, and of tokens with themselves: adds to dq and dk; da begins with what passes each token from a
 * state or to one, as far as its block knows. */
template <int KP, bool all_bf16>
__device__ void finish_states(const Position &at, const StateProducts &products, const float (&a)[BLOCK],
                              const Channel<all_bf16> &channel, Gradients &gradients, float (&da)[BLOCK],
                              Shared<KP> &shared) {
    int first = at.block * BLOCK;
    float from_start = at.block ? exp2_approximate(shared.through[0][at.c]) : 1.f, sum = 0;
    float to_end = at.block ? 1.f : exp2_approximate(shared.through[1][at.c]);

#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
        sum += a[t];
        float d = products.d_out_S[t] * (exp2_approximate(sum) * from_start);
        da[t] = channel.q.get(t) * shared.factors[1][first + t] * d;
        gradients.dq[t] += d + shared.own[first + t] * (channel.k.get(t) * shared.factors[0][first + t]);
    }
    sum = 0;
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
        sum += a[t];
        float d = -shared.steps[first + t] * products.Z_S[t] * (exp2_approximate(sum) * from_start);
        da[t] += channel.k.get(t) * shared.factors[0][first + t] * d;
        gradients.dk[t] += d + shared.own[first + t] * (channel.q.get(t) * shared.factors[1][first + t]);
    }
#pragma unroll
    for (int t = BLOCK - 2; t >= 0; t--)
        da[t] += da[t + 1];
    if (at.block == 1)
        shared.rows_after[at.c] = da[0];
    float given[BLOCK];
    sum = 0;
#pragma unroll
    for (int t = BLOCK - 1; t >= 0; t--) {
        float d = products.e_R[t] * (shared.steps[first + t] * (exp2_approximate(sum) * to_end));
        gradients.dk[t] += d;
        given[t] = channel.k.get(t) * shared.factors[0][first + t] * d;
        sum += a[t];
    }
    sum = 0;
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
        da[t] += sum;
        sum += given[t];
    }
    if (at.block == 0)
        shared.columns_before[at.c] = sum;
}

/* Tiles of unit rows around the middle of the block. */
template <int KP, bool all_bf16>
__device__ void store_tiles(const Position &at, const float (&a)[BLOCK], const Channel<all_bf16> &channel,
                            Shared<KP> &shared) {
    float to_next = at.block == 0 ? exp2_approximate(shared.to_next[0][at.c]) : 0.f;
    float before_next = exp2_approximate(shared.to_next[1][at.c]);
    from_middle(a, [&](int t, float x) {
        int row = at.block * BLOCK + t, i = swizzled<CHUNK, KP>(row, at.c);
        float k = channel.k.get(t) * shared.units[0][row], q = channel.q.get(t) * shared.units[1][row];
        float decayed = exp2_approximate(x), column = k * exp2_approximate(-x);
        shared.rows_k[i] = __float2bfloat16_rn(k * decayed);
        shared.rows_q[i] = __float2bfloat16_rn(q * decayed);
        shared.columns[i] = __float2bfloat16_rn(column);
        if (at.block == 0)
            shared.across[swizzled<BLOCK, KP>(t, at.c)] = __float2bfloat16_rn(column * to_next * before_next);
    });
}

/* Products of pairs: adds to dq, dk and da. */
template <int KP>
__device__ void finish_pair_products(const Position &at, const float (&a)[BLOCK], float unit,
                                     Gradients &gradients, float (&da)[BLOCK], Shared<KP> &shared) {
    int first = at.block * BLOCK, channel = at.c / LANE_CHANNELS * LANE_CHANNELS;
    float sums[4][4] = {}, passing[BLOCK];
    Exchange &buffer = shared.exchange[threadIdx.x / 32];
    auto value = [&](const __nv_bfloat16 *tile, int t) {
        return __bfloat162float(tile[swizzled<CHUNK, KP>(first + t, at.c)]);
    };
    auto clear = [&]() {
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
    };
    multiply_columns<KP>(sums, shared.dM, shared, at.block, channel);
    Tokens x = exchange<false>(sums, buffer);
    from_middle(a, [&](int t, float decay) {
        passing[t] = value(shared.rows_q, t) * x[t];
        gradients.dq[t] += exp2_approximate(decay) * x[t] * (shared.redo[1][first + t] * unit);
    });
    clear();
    multiply_columns<KP>(sums, shared.dL, shared, at.block, channel);
    x = exchange<false>(sums, buffer);
    from_middle(a, [&](int t, float decay) {
        passing[t] += value(shared.rows_k, t) * x[t];
        gradients.dk[t] += exp2_approximate(decay) * x[t] * (shared.redo[0][first + t] * unit);
    });
    clear();
    multiply_rows<KP>(sums, shared, at.block, at.block, channel);
    x = exchange<false>(sums, buffer);
    from_middle(a, [&](int t, float decay) {
        passing[t] -= value(shared.columns, t) * x[t];
        gradients.dk[t] += exp2_approximate(-decay) * x[t] * (shared.redo[0][first + t] * unit);
    });
#pragma unroll
    for (int t = BLOCK - 2; t >= 0; t--)
        passing[t] += passing[t + 1];
    if (at.block == 0) {
        clear();
        multiply_rows<KP>(sums, shared, 1, 0, channel);
        x = exchange<false>(sums, buffer);
        float to_next = exp2_approximate(shared.to_next[0][at.c]);
        float before_next = exp2_approximate(shared.to_next[1][at.c]), given = 0;
        from_middle(a, [&](int t, float decay) {
            gradients.dk[t] +=
                exp2_approximate(-decay) * to_next * before_next * x[t] * (shared.redo[0][first + t] * unit);
        });
#pragma unroll
        for (int t = 0; t < BLOCK; t++) {
            passing[t] += given;
            given += __bfloat162float(shared.across[swizzled<BLOCK, KP>(t, at.c)]) * x[t];
        }
    }
#pragma unroll
    for (int t = 0; t < BLOCK; t++) { /* where a decay was cut off, all of it counts here */
        float cut = exp2_approximate(fminf(a[t] - STRONGEST, 0.f));
        da[t] += passing[t] * unit * cut;
    }
}

/* ---- The gate ------------------------------------------------------------------------------------ */

/* A product of which one factor may be infinite where the other is 0. */
__device__ float product(float x, float y) { return x == 0 || y == 0 ? 0.f : x * y; }

/* dg of a token's channel, from the gradient of its log decay; adds to A_log's. */
template <flash_kda_gate gate>
__device__ float gate_back(float g, const Gate &parameters, float lower_bound, float da, float &A_log) {
    float z = g + parameters.dt_bias, A = parameters.A;
    if (gate == FLASH_KDA_GATE_SOFTPLUS) {
        A_log += product(chunks::log2_decay<gate>(g, parameters.dt_bias, A, lower_bound) * LN2, da);
        return product(-A * chunks::logistic(-z * LOG2E), da);
    }
    if (gate == FLASH_KDA_GATE_SIGMOID) {
        float y = fminf(fmaxf(A * z, -FLT_MAX), FLT_MAX), scaled = y * LOG2E;
        float dy = product(lower_bound * chunks::logistic(-scaled) * chunks::logistic(scaled), da);
        A_log += product(y, dy);
        return product(A, dy);
    }
    return da;
}

/* Writes dg; returns dt_bias's, and A_log's to A_log, of the channel. */
template <flash_kda_gate gate, bool all_bf16>
__device__ float finish_gate(const kda_backward &b, const Position &at, int64_t head, const float (&da)[BLOCK],
                             float &A_log) {
    float bias = 0;
    A_log = 0;
    if (at.count <= 0 || !at.exists)
        return 0;
    Gate parameters = load_gate(b.forward, at, head);
    Column<all_bf16> g;
    load_column(b.forward.g, at, head, g);
    char *row = b.dg.data ? kda_row(&b.dg, at.batch, at.token, head) : nullptr;
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
        if (t >= at.count)
            continue;
        float dg = gate_back<gate>(g.get(t), parameters, b.forward.lower_bound, da[t], A_log);
        bias += dg;
        if (row)
            store_float(row + t * b.dg.stride[1], b.dg.dtype, at.c, dg);
    }
    return bias;
}

/* The chunk's share of dt_bias's and of A_log's gradients, [KP + 1]. */
template <int KP>
__device__ void store_sums(const Position &at, float bias, float A_log, float *to, Shared<KP> &shared) {
    if (!to)
        return;
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2)
        A_log += __shfl_xor_sync(~0u, A_log, bit);
    if (threadIdx.x % 32 == 0)
        shared.A_log[threadIdx.x / 32] = A_log;
    if (at.block == 1)
        shared.bias[at.c] = bias;
    __syncthreads();
    if (at.block == 0)
        to[at.c] = bias + shared.bias[at.c];
    if (threadIdx.x == 0) {
        float sum = 0;
        for (int w = 0; w < Shared<KP>::WARPS; w++)
            sum += shared.A_log[w];
        to[KP] = sum;
    }
}

/* ---- One value head ------------------------------------------------------------------------------ */

template <int KP> __device__ void load_tokens(const BackwardOperands<KP> &operands, Shared<KP> &shared) {
    if (threadIdx.x >= CHUNK)
        return;
    int t = (int)threadIdx.x;
    shared.steps[t] = __ldcg(&operands.steps[t]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float factor = __ldcg(&operands.factors[i][t]), unit = __ldcg(&operands.units[i][t]);
        bool same = factor == unit || factor == 0 || unit == 0; /* both are 0 where there is no token */
        shared.factors[i][t] = factor, shared.units[i][t] = unit;
        shared.undo[i][t] = same ? 1.f : factor / unit, shared.redo[i][t] = same ? 1.f : unit / factor;
    }
}

__device__ void store_d_steps(const kda_backward &b, const Work &work, int64_t head, float step, float d) {
    int t = (int)threadIdx.x;
    if (!b.dbeta.data || t >= work.span.count)
        return;
    int64_t token = work.segment.sequence.first + work.span.first + t, batch = work.segment.sequence.batch;
    const kda_tensor &beta = b.forward.beta;
    if (b.forward.beta_mode != FLASH_KDA_BETA_GIVEN)
        d *= step * chunks::logistic(load_float(kda_row(&beta, batch, token, head), beta.dtype, 0) * LOG2E);
    store_float(kda_row(&b.dbeta, batch, token, head), b.dbeta.dtype, 0, d);
}

template <int KP, bool all_bf16>
__device__ void run_head(const kda_backward &b, const Slab &slab, const BackwardMemory<KP> &memory, Work &work,
                         const Position &at, int64_t key_head, int64_t head, float *chunk_sums,
                         Gradients &gradients, Shared<KP> &shared) {
    Sums<KP> sums;
    Channel<all_bf16> channel;
    float a[BLOCK], da[BLOCK];
    load_tokens(memory.operands[work.number], shared);
    sum_tiles<KP>(b, slab, memory, work, head, shared, sums);
    if (b.forward.gate == FLASH_KDA_GATE_SOFTPLUS)
        find_decays<FLASH_KDA_GATE_SOFTPLUS, all_bf16>(b.forward, at, head, a);
    else if (b.forward.gate == FLASH_KDA_GATE_SIGMOID)
        find_decays<FLASH_KDA_GATE_SIGMOID, all_bf16>(b.forward, at, head, a);
    else
        find_decays<FLASH_KDA_GATE_NONE, all_bf16>(b.forward, at, head, a);
    float through = 0, to_next = 0;
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
        through += a[t];
        if ((t >= MIDDLE) == (at.block == 0))
            to_next += cut_off(a[t]);
    }
    shared.through[at.block][at.c] = through;
    shared.to_next[at.block][at.c] = to_next;
    int c = threadIdx.x % (KP / 8) * 8;
#pragma unroll
    for (int i = 0; i < 8; i++)
        shared.slices[threadIdx.x / (KP / 8)][channel_at(c + i)] = sums.S_R[i];
    float unit = make_pairs<KP>(sums, shared); /* which waits for all */
    float across = 0;
#pragma unroll
    for (int i = 0; i < Config<KP>::SLICES; i++)
        across += shared.slices[i][at.c];
    across *= exp2_approximate(shared.through[0][at.c] + shared.through[1][at.c]);
    __syncthreads(); /* the slices have been read */
    int warp = threadIdx.x / 32;
    StateProducts products = {exchange<true>(sums.d_out_S, shared.exchange[warp]),
                              exchange<true>(sums.Z_S, shared.of_states[0][warp]),
                              exchange<true>(sums.e_R, shared.of_states[1][warp])};
    channel.load(b.forward, at, key_head);
    finish_states<KP>(at, products, a, channel, gradients, da, shared);
    __syncthreads(); /* the products have been read */
    store_tiles<KP>(at, a, channel, shared);
    across += at.block ? shared.columns_before[at.c] : shared.rows_after[at.c];
    __syncthreads();
    finish_pair_products<KP>(at, a, unit, gradients, da, shared);
#pragma unroll
    for (int t = 0; t < BLOCK; t++)
        da[t] += across;
    if (threadIdx.x < CHUNK)
        store_d_steps(b, work, head, shared.steps[threadIdx.x], shared.d_steps[threadIdx.x]);
    float A_log, bias;
    if (b.forward.gate == FLASH_KDA_GATE_SOFTPLUS)
        bias = finish_gate<FLASH_KDA_GATE_SOFTPLUS, all_bf16>(b, at, head, da, A_log);
    else if (b.forward.gate == FLASH_KDA_GATE_SIGMOID)
        bias = finish_gate<FLASH_KDA_GATE_SIGMOID, all_bf16>(b, at, head, da, A_log);
    else
        bias = finish_gate<FLASH_KDA_GATE_NONE, all_bf16>(b, at, head, da, A_log);
    store_sums<KP>(at, bias, A_log, chunk_sums, shared);
}

/* ---- q and k ------------------------------------------------------------------------------------- */

/* Each lane's products of rows of q, then k, with their gradients, summed over all channels: of row l in lane l. */
template <int KP> __device__ float sum_rows(const Position &at, float (&x)[2 * BLOCK], Shared<KP> &shared) {
    constexpr int OF_BLOCK = Shared<KP>::WARPS / BLOCKS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    chunks::sum_by_lane<BLOCK>(x);
    shared.dots[0][warp][lane] = x[0];
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < OF_BLOCK; w++)
        sum += shared.dots[0][at.block * OF_BLOCK + w][lane];
    return sum;
}

__device__ void store_column(const kda_tensor &t, const Position &at, int64_t head, const float (&x)[BLOCK]) {
    if (!t.data || !at.exists || at.count <= 0)
        return;
    char *row = kda_row(&t, at.batch, at.token, head);
#pragma unroll
    for (int i = 0; i < BLOCK; i++)
        if (i < at.count)
            store_float(row + i * t.stride[1], t.dtype, at.c, x[i]);
}

/* From the scaled q and the normalised k back to both as given. */
template <int KP, bool all_bf16>
__device__ void store_rows(const kda_backward &b, const Position &at, int64_t key_head, Gradients &gradients,
                           Shared<KP> &shared) {
    const kda_prefill &p = b.forward;
    int first = at.block * BLOCK, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < BLOCK; t++)
        gradients.dq[t] *= p.scale;
    if (p.qk_norm) { /* dx = r (dy - y (y . dy)), y = r x */
        Channel<all_bf16> channel;
        channel.load(p, at, key_head);
        float x[2 * BLOCK];
#pragma unroll
        for (int t = 0; t < BLOCK; t++) {
            x[t] = channel.q.get(t) * (shared.factors[1][first + t] / p.scale) * gradients.dq[t];
            x[BLOCK + t] = channel.k.get(t) * shared.factors[0][first + t] * gradients.dk[t];
        }
        shared.dots[1][warp][lane] = sum_rows<KP>(at, x, shared);
        __syncwarp();
#pragma unroll
        for (int t = 0; t < BLOCK; t++) {
            float rq = shared.factors[1][first + t] / p.scale, rk = shared.factors[0][first + t];
            gradients.dq[t] = rq * (gradients.dq[t] - channel.q.get(t) * rq * shared.dots[1][warp][t]);
            gradients.dk[t] = rk * (gradients.dk[t] - channel.k.get(t) * rk * shared.dots[1][warp][BLOCK + t]);
        }
    }
    store_column(b.dq, at, key_head, gradients.dq);
    store_column(b.dk, at, key_head, gradients.dk);
}

/* grouped: several value heads read a q/k head. */
template <int KP, bool all_bf16, bool grouped>
__device__ void run_chunk(const kda_backward &b, const Slab &slab, const BackwardMemory<KP> &memory) {
    extern __shared__ __align__(16) char bytes[];
    Shared<KP> &shared = *reinterpret_cast<Shared<KP> *>(bytes);
    const kda_prefill &p = b.forward;
    int64_t key_head = blockIdx.y, group = p.value_heads / p.heads,
            number = slab.begin + blockIdx.x / slab.chunks;
    int64_t all_chunks = slab.segments * slab.chunks, chunk = blockIdx.x % slab.chunks;
    Work work;
    work.segment = find_segment(b, slab, number);
    work.span = kda_span_of_chunk(work.segment.sequence.length, work.segment.within * slab.chunks + chunk);
    auto sums_of = [&](int64_t head) {
        return memory.sums ? memory.sums + (head * all_chunks + number * slab.chunks + chunk) * (KP + 1)
                           : nullptr;
    };
    if (!work.span.count) { /* it adds nothing to sums */
        for (int64_t head = key_head * group; memory.sums && head < (key_head + 1) * group; head++)
            for (int c = threadIdx.x; c <= KP; c += Config<KP>::THREADS)
                sums_of(head)[c] = 0;
        return;
    }
    if (kda_work_on(&b.border, work.segment.n) != KDA_WORK_ALL)
        return;
    Position at;
    at.block = threadIdx.x / KP, at.c = threadIdx.x % KP;
    at.batch = work.segment.sequence.batch;
    at.token = work.segment.sequence.first + work.span.first + at.block * BLOCK;
    at.count = (int)work.span.count - at.block * BLOCK;
    at.exists = at.c < p.key_dim;
    Gradients gradients;
#pragma unroll
    for (int t = 0; t < BLOCK; t++)
        gradients.dq[t] = gradients.dk[t] = 0;
    for (int64_t i = 0; i < (grouped ? group : 1); i++) {
        int64_t head = key_head * (grouped ? group : 1) + i;
        work.number = slab.chunk(head, number, chunk);
        if (i > 0)
            __syncthreads(); /* the last head's tiles have been read */
        run_head<KP, all_bf16>(b, slab, memory, work, at, key_head, head, sums_of(head), gradients, shared);
    }
    store_rows<KP, all_bf16>(b, at, key_head, gradients, shared);
}

template <int KP, bool all_bf16, bool grouped>
__global__ void __launch_bounds__(Config<KP>::THREADS, 512 / Config<KP>::THREADS)
    backward_gradients(const __grid_constant__ kda_backward b, const __grid_constant__ Slab slab,
                       const __grid_constant__ BackwardMemory<KP> memory) {
    if (slab.begin == 0) /* the last slab that is worked; of others the chains ended before this kernel began */
        wait_for_kernel_before();
    let_next_begin();
    run_chunk<KP, all_bf16, grouped>(b, slab, memory);
    end_after_kernel_before();
}

/* ---- Launch -------------------------------------------------------------------------------------- */

template <int KP>
cudaError_t launch_padded(const kda_backward *b, const kda_backward_plan *plan,
                          const kda_backward_launch *launch, void *workspace) {
    const kda_prefill &p = b->forward;
    bool all_bf16 = p.q.dtype == KDA_BF16 && p.k.dtype == KDA_BF16 && p.g.dtype == KDA_BF16;
    auto kernel = !all_bf16                 ? backward_gradients<KP, false, true>
                  : p.value_heads > p.heads ? backward_gradients<KP, true, true>
                                            : backward_gradients<KP, true, false>;
    BackwardMemory<KP> memory = make_memory<KP>(b, plan, launch, workspace);
    if (!plan->needs_sums)
        memory.sums = nullptr;
    return launch_kernel(kernel, launch->grid, Config<KP>::THREADS, sizeof(Shared<KP>), p.stream,
                         launch->overlaps, *b, make_slab(b, plan, launch), memory);
}

} // namespace
} // namespace kda

cudaError_t kda_sm80_backward_gradients(const kda_backward *b, const kda_backward_plan *plan,
                                        const kda_backward_launch *launch, void *workspace) {
    int KP = kda_sm80_padded_key_dim(b);
    return KP == 64    ? kda::launch_padded<64>(b, plan, launch, workspace)
           : KP == 128 ? kda::launch_padded<128>(b, plan, launch, workspace)
                       : kda::launch_padded<256>(b, plan, launch, workspace);
}
