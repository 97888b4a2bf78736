/* SPDX-License-Identifier: MIT */
/*
 * What the kernels that prepare chunks share: gates, norms, KT, QT, KR, M and L0 (docs/maths.md). One CTA works one
 * chunk of one value head, and a thread two channels of a block of 16 tokens.
 *
 * Pairs of tokens meet in tensor-core products: k or q decayed from the middle of its block, times k grown back
 * to that middle. Such a product is exact in every exponent, but its factors reach 2^115. So within a block a
 * token's decay counts for at most exp(-10), which changes a pair by at most 4.5e-5 and keeps any gate in
 * range. The state's carry takes the true sum, so that a hard reset clears.
 */
#ifndef KDA_CUDA_SM80_PREPARE_CUH
#define KDA_CUDA_SM80_PREPARE_CUH

#include "cuda/floats.cuh"
#include "cuda/operands.cuh"
#include "cuda/ptx/sm80.cuh"

namespace kda {
namespace chunks {

constexpr int BLOCK = 16, BLOCKS = CHUNK / BLOCK,
              MIDDLE = BLOCK / 2; /* tokens; the first MIDDLE lie before it */
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float STRONGEST = -10 * LOG2E; /* decay of a token in a pair, log2 */

/* Log2 decay of one channel over a block: through all of it, before its middle, and after its middle. In the
 * latter two a token counts for at most STRONGEST. */
struct Decay {
    float2 through, before, after;
};

template <int KP> struct Shared {
    static constexpr int PAIRS = KP / 2, THREADS = BLOCKS * PAIRS, WARPS = THREADS / 32;
    /* Unit rows of k, then q: scaled to a length of 1 or near it, and decayed from the middle of their block. */
    __nv_bfloat16 rows[2][CHUNK * KP];
    __nv_bfloat16 columns[CHUNK * KP]; /* unit rows of k grown back to the middle of their block */
    __nv_bfloat16 across[BLOCK * KP];  /* those of block 0, decayed to the middle of block 1 */
    Decay decay[BLOCKS][PAIRS];
    float diagonal[CHUNK];           /* of M */
    float products[WARPS][BLOCK];    /* of a warp's channels of q and k of one token */
    float squares[WARPS][2 * BLOCK]; /* of a warp's channels of k, then q */
    alignas(16) float factor
        [2][WARPS][2 * BLOCK]; /* for a row of KT or QT, then for a unit row; each warp has its own copy */
    float undo[2][CHUNK];      /* |row| / |unit row| of k, then q, where rows are not normalised */
    float beta[CHUNK];
    float key_square[CHUNK]; /* |k|^2 as it is used */
    float growth[BLOCKS];    /* log2 of the channel that grows most; 0 if no log decay is above 0 */
    alignas(16) float L0[CHUNK][CHUNK + 4]; /* transposed: L without its factor beta */
};

/* 1 / (1 + exp2(x)) */
inline __device__ float logistic(float x) { return reciprocal_approximate(1.f + exp2_approximate(x)); }

/* log2 of the decay of one channel. A is exp(A_log). */
template <flash_kda_gate gate> __device__ float log2_decay(float g, float dt_bias, float A, float lower_bound) {
    if (gate == FLASH_KDA_GATE_SOFTPLUS) {
        float x = g + dt_bias, y = exp2_approximate(-fabsf(x) * LOG2E);
        /* log2(1 + y): the series where 1 + y would lose y */
        float tail = y < 0x1p-10f ? y * (LOG2E - y * (0.5f * LOG2E)) : __log2f(1.f + y);
        return -A * (fmaxf(x, 0.f) * LOG2E + tail);
    }
    if (gate == FLASH_KDA_GATE_SIGMOID)
        return lower_bound * LOG2E * logistic((g + dt_bias) * (-A * LOG2E));
    return g * LOG2E;
}

/* Two neighbouring channels of one token, as loaded. */
template <bool all_bf16> struct Pair;
template <> struct Pair<true> {
    uint32_t raw;
    __device__ void load(const char *row) { raw = *reinterpret_cast<const uint32_t *>(row); }
    __device__ void set(float2 x) { raw = pack_bf16(x.x, x.y); }
    __device__ float2 get() const { return unpack_bf16(raw); }
};
template <> struct Pair<false> {
    float2 x;
    __device__ void load(const char *row) { x = unpack_bf16(*reinterpret_cast<const uint32_t *>(row)); }
    __device__ void set(float2 y) { x = y; }
    __device__ float2 get() const { return x; }
};

/* What a thread works on. */
struct Position {
    int64_t batch, token; /* of the block's first token in the tensors */
    int64_t head, key_head;
    int count;    /* tokens of the block that exist */
    int block, c; /* c: first of two channels */
    int channels; /* how many of them exist */
};

/* Loads the block's rows of q, k or g; for a missing token, the last one that exists. All loads are issued
 * before the first is used. */
template <bool all_bf16>
__device__ void load_rows(const kda_tensor &t, const Position &at, int64_t head, Pair<all_bf16> (&x)[BLOCK]) {
    const char *row = kda_row(&t, at.batch, at.token, head) + (t.dtype == KDA_F32 ? 4 : 2) * at.c;
    int64_t stride = t.stride[1];
    bool pairs =
        t.dtype == KDA_BF16 && at.channels >= 2 && (reinterpret_cast<uintptr_t>(row) | stride) % 4 == 0;
    if (pairs && at.count >= BLOCK) {
#pragma unroll
        for (int i = 0; i < BLOCK; i++, row += stride)
            x[i].load(row);
        return;
    }
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
        const char *from = row + min(i, at.count - 1) * stride;
        x[i].set(make_float2(at.channels > 0 ? load_float(from, t.dtype, 0) : 0.f,
                             at.channels > 1 ? load_float(from, t.dtype, 1) : 0.f));
    }
}

/* Lane l ends with the sum of value l over the warp: in each step lanes exchange half of their values. */
template <int half> __device__ void sum_by_lane(float (&x)[32]) {
    bool high = threadIdx.x & half;
#pragma unroll
    for (int i = 0; i < half; i++) {
        float keep = high ? x[i + half] : x[i], give = high ? x[i] : x[i + half];
        x[i] = keep + __shfl_xor_sync(~0u, give, half);
    }
    if constexpr (half > 1)
        sum_by_lane<half / 2>(x);
}

/* Rows that are not normalised are made smaller by a power of two where their size could take a pair's factors
 * out of range. Their squares are summed small for the same reason. */
constexpr int SHRINK_LOG2 = 40;
constexpr float SHRINK = 0x1p-40f;

inline __device__ float2 times(float2 x, float2 factor) { return make_float2(x.x * factor.x, x.y * factor.y); }
inline __device__ float2 times(float2 x, float factor) { return make_float2(x.x * factor, x.y * factor); }

inline __device__ float square(float2 x, float factor) {
    x.x *= factor, x.y *= factor;
    return x.x * x.x + x.y * x.y;
}

inline __device__ float unit_factor(float squares) {
    int half_exponent = (((__float_as_int(squares) >> 23) - 127) >> 1) + 1 + SHRINK_LOG2;
    return half_exponent > 0 ? ldexpf(1.f, -half_exponent) : 1.f;
}

/* Squares of a warp's channels of k, then q, token by token, times `factor` squared: lane l has those of row
 * l. */
template <bool all_bf16>
__device__ float sum_squares(const Pair<all_bf16> (&k)[BLOCK], const Pair<all_bf16> (&q)[BLOCK], float factor) {
    float sums[2 * BLOCK];
#pragma unroll
    for (int t = 0; t < BLOCK; t++)
        sums[t] = square(k[t].get(), factor), sums[BLOCK + t] = square(q[t].get(), factor);
    sum_by_lane<16>(sums);
    return sums[0];
}

/* Their products, both rows times `factor`. */
template <bool all_bf16>
__device__ float sum_products(const Pair<all_bf16> (&k)[BLOCK], const Pair<all_bf16> (&q)[BLOCK],
                              float factor) {
    float sums[2 * BLOCK];
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
        float2 x = times(k[t].get(), factor), y = times(q[t].get(), factor);
        sums[t] = x.x * y.x + x.y * y.y, sums[BLOCK + t] = 0;
    }
    sum_by_lane<16>(sums);
    return sums[0];
}

/* Rows to be normalised are made smaller first where their squares could leave fp32. */
constexpr float LARGE = 0x1p100f, SMALLER = 0x1p-70f;

template <int KP, bool all_bf16>
__device__ void find_norms(const kda_prefill &p, const Position &at, const Pair<all_bf16> (&k)[BLOCK],
                           const Pair<all_bf16> (&q)[BLOCK], Shared<KP> &shared) {
    constexpr int PER_BLOCK = Shared<KP>::WARPS / BLOCKS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = at.block * PER_BLOCK;
    shared.squares[warp][lane] = sum_squares(k, q, p.qk_norm ? 1.f : SHRINK);
    /* The diagonal of M, often its largest part, is not left to rounded factors. */
    float own = sum_products(k, q, 1.f);
    if (lane < BLOCK)
        shared.products[warp][lane] = own;
    __syncthreads();
    float squares = 0, others = 0;
    for (int w = 0; w < Shared<KP>::WARPS; w++)
        (w / PER_BLOCK == at.block ? squares : others) += shared.squares[w][lane];
    bool large = p.qk_norm && !(squares < LARGE); /* or NaN */
    float up = 1;                                 /* what brings a product of such rows back, twice */
    if (__any_sync(~0u, large || (p.qk_norm && !(others < LARGE)))) { /* the same for all warps */
        bool other = __shfl_xor_sync(~0u, large, BLOCK), large_row = large || other;
        __syncthreads(); /* all have read them */
        float small_squares = sum_squares(k, q, SMALLER), small_products = sum_products(k, q, SMALLER);
        if (large)
            shared.squares[warp][lane] = small_squares;
        if (lane < BLOCK && large_row)
            shared.products[warp][lane] = small_products;
        __syncthreads();
        up = large_row ? 1 / SMALLER : 1.f;
        squares = 0;
        for (int w = 0; w < PER_BLOCK; w++)
            squares += shared.squares[first + w][lane];
    }
    float scale = lane < BLOCK ? 1.f : p.scale, unit = unit_factor(squares);
    if (p.qk_norm)
        unit = large ? rsqrtf(squares) * SMALLER : rsqrtf(squares + 1e-6f);
    bool exists = lane % BLOCK < at.count;
    shared.factor[0][warp][lane] = exists ? (p.qk_norm ? unit * scale : scale) : 0.f;
    shared.factor[1][warp][lane] = exists ? unit * (p.qk_norm ? scale : 1.f) : 0.f;
    if (warp % PER_BLOCK == 0)
        shared.undo[lane / BLOCK][at.block * BLOCK + lane % BLOCK] = scale / unit;
    __syncwarp();
    if (warp % PER_BLOCK == 0 && lane < BLOCK) {
        float product = 0;
        for (int w = 0; w < PER_BLOCK; w++)
            product += shared.products[first + w][lane];
        shared.diagonal[at.block * BLOCK + lane] =
            product * (shared.factor[0][warp][lane] * up) * (shared.factor[0][warp][BLOCK + lane] * up);
        shared.key_square[at.block * BLOCK + lane] = p.qk_norm ? 1.f : squares * (1 / SHRINK) * (1 / SHRINK);
    }
}

/* Turns g into x, the log2 decay of each token from the middle of its block, and finds the block's decays. */
template <int KP, flash_kda_gate gate, bool all_bf16>
__device__ void find_decays(const kda_prefill &p, const Position &at, const Pair<all_bf16> (&g)[BLOCK],
                            float2 (&x)[BLOCK], Decay &decay, Shared<KP> &shared) {
    const char *bias = p.dt_bias.data ? p.dt_bias.data + at.head * p.dt_bias.stride[0] : nullptr;
    float A =
        p.A_log.data
            ? min_or_nan(expf(load_float(p.A_log.data + at.head * p.A_log.stride[0], p.A_log.dtype, 0)), 3e38f)
            : 1.f;
    float b0 = bias && at.channels > 0 ? load_float(bias, p.dt_bias.dtype, at.c) : 0.f;
    float b1 = bias && at.channels > 1 ? load_float(bias, p.dt_bias.dtype, at.c + 1) : 0.f;
    decay.through = make_float2(0, 0);
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
        float2 raw = g[t].get();
        x[t] = make_float2(log2_decay<gate>(raw.x, b0, A, p.lower_bound),
                           log2_decay<gate>(raw.y, b1, A, p.lower_bound));
    }
    if (at.count < BLOCK || at.channels < 2) /* what does not exist does not decay */
#pragma unroll
        for (int t = 0; t < BLOCK; t++)
            x[t] = make_float2(t < at.count && at.channels > 0 ? x[t].x : 0.f,
                               t < at.count && at.channels > 1 ? x[t].y : 0.f);
    if (gate == FLASH_KDA_GATE_NONE) { /* the others' log decays are below 0 */
        float growth = 0;
#pragma unroll
        for (int t = 0; t < BLOCK; t++)
            growth += fmaxf(fmaxf(x[t].x, x[t].y), 0.f);
        if (growth > 0)
            atomicMax(reinterpret_cast<int *>(&shared.growth[at.block]), __float_as_int(growth));
    }
    if (gate != FLASH_KDA_GATE_SIGMOID) /* its bound is above STRONGEST */
#pragma unroll
        for (int t = 0; t < BLOCK; t++) {
            decay.through.x += x[t].x, decay.through.y += x[t].y;
            x[t] = make_float2(max_or_nan(x[t].x, STRONGEST), max_or_nan(x[t].y, STRONGEST));
        }
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int t = MIDDLE; t < BLOCK; t++) {
        sum.x += x[t].x, sum.y += x[t].y;
        x[t] = sum;
    }
    decay.after = sum;
    sum = make_float2(0, 0);
#pragma unroll
    for (int t = MIDDLE - 1; t >= 0; t--) {
        float2 a = x[t];
        x[t] = make_float2(-sum.x, -sum.y);
        sum.x += a.x, sum.y += a.y;
    }
    decay.before = sum;
    if (gate == FLASH_KDA_GATE_SIGMOID)
        decay.through = make_float2(decay.before.x + decay.after.x, decay.before.y + decay.after.y);
}

inline __device__ float2 exp2_pair(float x, float y) {
    return make_float2(exp2_approximate(x), exp2_approximate(y));
}

inline __device__ uint32_t pack(float2 x) { return pack_bf16(x.x, x.y); }

/* Kernels keep what they find for different readers. Out has the places of a chunk's operands: key(row, c) and query(row,
 * c) of KT and QT; keys_to_end, M and carry as in operands.cuh. */

/* Decay factors of two channels between the middles and ends of blocks. A longer distance is multiplied step by
 * step: one factor could vanish where its product with a row's factor does not. */
struct DecayFactors {
    float2 from_start;        /* to the middle of the thread's own block */
    float2 after_0, before_1; /* from the middle of block 0 to its end, from there to the middle of block 1 */
    float2 after_1;
};

template <int KP, class Out>
__device__ DecayFactors find_decay_factors(const Shared<KP> &shared, const Position &at, Out &out) {
    const Decay &first = shared.decay[0][at.c / 2], &second = shared.decay[1][at.c / 2];
    DecayFactors decays;
    decays.after_0 = exp2_pair(first.after.x, first.after.y);
    decays.before_1 = exp2_pair(second.before.x, second.before.y);
    decays.after_1 = exp2_pair(second.after.x, second.after.y);
    if (at.block == 0) {
        decays.from_start = exp2_pair(first.before.x, first.before.y);
        *reinterpret_cast<float2 *>(&out.carry[at.c]) =
            make_float2(expm1f((first.through.x + second.through.x) * LN2),
                        expm1f((first.through.y + second.through.y) * LN2));
    } else
        decays.from_start =
            times(exp2_pair(first.before.x + first.after.x, first.before.y + first.after.y), decays.before_1);
    return decays;
}

template <int KP, bool all_bf16, bool normalised, class Out>
__device__ void store_tiles(const Position &at, const Pair<all_bf16> (&k)[BLOCK],
                            const Pair<all_bf16> (&q)[BLOCK], const float2 (&x)[BLOCK], Shared<KP> &shared,
                            Out &out) {
    DecayFactors decays = find_decay_factors<KP>(shared, at, out);
    const float *row_factor = shared.factor[0][threadIdx.x / 32];
    float unit[2 * BLOCK];
#pragma unroll
    for (int t = 0; t < 2 * BLOCK; t += 4)
        *reinterpret_cast<float4 *>(&unit[t]) =
            *reinterpret_cast<const float4 *>(&shared.factor[1][threadIdx.x / 32][t]);
    auto put = [](__nv_bfloat16 *tile, int i, float2 pair) {
        *reinterpret_cast<uint32_t *>(&tile[i]) = pack(pair);
    };
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
        int row = at.block * BLOCK + t;
        int i = swizzled<CHUNK, KP>(row, at.c);
        float2 decayed = exp2_pair(x[t].x, x[t].y), grown = exp2_pair(-x[t].x, -x[t].y);
        float2 key_row = times(times(k[t].get(), unit[t]), decayed);
        float2 query_row = times(times(q[t].get(), unit[BLOCK + t]), decayed);
        float2 column = times(times(k[t].get(), unit[t]), grown);
        put(shared.rows[0], i, key_row);
        put(shared.rows[1], i, query_row);
        put(shared.columns, i, column);
        if (at.block == 0) {
            column = times(times(column, decays.after_0), decays.before_1);
            put(shared.across, swizzled<BLOCK, KP>(t, at.c), column);
        }
        if (!normalised) {
            key_row = times(times(k[t].get(), row_factor[t]), decayed);
            query_row = times(times(q[t].get(), row_factor[BLOCK + t]), decayed);
            column = times(times(k[t].get(), row_factor[t]), grown);
            if (at.block == 0)
                column = times(times(column, decays.after_0), decays.before_1);
        }
        put(out.key(row, at.c), 0, times(key_row, decays.from_start));
        put(out.query(row, at.c), 0, times(query_row, decays.from_start));
        put(out.keys_to_end, i, times(column, decays.after_1));
    }
}

/* sum [16][16] = 16 rows of k or q from row `down` on, times 16 columns. */
template <int columns, int KP>
__device__ void multiply_pairs(const MatrixRow<CHUNK, KP> &rows, int down, const MatrixRow<columns, KP> &tile,
                               int right, float (&sum)[2][4]) {
#pragma unroll
    for (int c = 0; c < KP; c += 16) {
        uint32_t a[4], b[4];
        ldmatrix(a, rows.at(down, c));
        ldmatrix(b, tile.at(right, c));
        mma(sum[0], a, b[0], b[1]);
        mma(sum[1], a, b[2], b[3]);
    }
}

/* Makes a block of L0 (from k's rows) or M (from q's): row block `later`, column block `earlier`. */
template <int KP, class Out>
__device__ void make_block(bool normalised, bool of_queries, int later, int earlier, Shared<KP> &shared,
                           Out &out) {
    float sum[2][4] = {};
    MatrixRow<CHUNK, KP> rows(shared.rows[of_queries], true);
    if (later > earlier)
        multiply_pairs<BLOCK, KP>(rows, later * BLOCK, MatrixRow<BLOCK, KP>(shared.across, false), 0, sum);
    else
        multiply_pairs<CHUNK, KP>(rows, later * BLOCK, MatrixRow<CHUNK, KP>(shared.columns, false),
                                  earlier * BLOCK, sum);
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        int i = later * BLOCK + lane / 4 + n % 2 * 8, j = earlier * BLOCK + n / 2 * 8 + lane % 4 * 2;
        float x = sum[n / 2][n % 2 * 2], y = sum[n / 2][n % 2 * 2 + 1];
        if (!normalised) {
            float undo = shared.undo[of_queries][i];
            x *= undo * shared.undo[0][j], y *= undo * shared.undo[0][j + 1];
        }
        /* Above the diagonal products may be infinite: they are replaced, never multiplied. */
        if (of_queries) {
            float own = shared.diagonal[i];
            uint32_t pair = pack_bf16(i == j ? own : i > j ? x : 0.f, i == j + 1 ? own : i > j ? y : 0.f);
            *reinterpret_cast<uint32_t *>(&out.M[swizzled<CHUNK, CHUNK>(i, j)]) = pair;
        } else {
            shared.L0[j][i] = i > j ? x : 0.f;
            shared.L0[j + 1][i] = i > j + 1 ? y : 0.f;
        }
    }
}

template <int KP, class Out> __device__ void make_blocks(bool normalised, Shared<KP> &shared, Out &out) {
    for (int n = threadIdx.x / 32; n < 6; n += Shared<KP>::WARPS)
        make_block(normalised, n >= 3, n % 3 > 0, n % 3 == 1, shared, out);
    /* the block of M above the diagonal blocks */
    for (int n = threadIdx.x; n < BLOCK * BLOCK / 2; n += Shared<KP>::THREADS)
        *reinterpret_cast<uint32_t *>(
            &out.M[swizzled<CHUNK, CHUNK>(n / (BLOCK / 2), BLOCK + n % (BLOCK / 2) * 2)]) = 0;
}

/* One warp: lane i finds row i of an inverse by substitution from its end, x_j = (i = j) - sum over m > j. Of I + diag(b)
 * L0 if `left`, b being the steps: of x_m b_m L0_mj. Else of I + L0 diag(b): of x_m L0_mj b_j. known: x, times b where it
 * stands beside x. */
template <bool left, int KP>
__device__ void invert(const Shared<KP> &shared, float (&x)[CHUNK], float (&known)[CHUNK]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = CHUNK - 1; j >= 0; j--) {
        float sum[2] = {0.f, 0.f};
#pragma unroll
        for (int m = j / 4 * 4; m < CHUNK; m += 4) {
            float4 L = *reinterpret_cast<const float4 *>(&shared.L0[j][m]);
            const float of[4] = {L.x, L.y, L.z, L.w};
#pragma unroll
            for (int n = 0; n < 4; n++)
                if (m + n > j)
                    sum[n % 2] += of[n] * known[m + n];
        }
        float rest = sum[0] + sum[1], own = j == lane ? 1.f : 0.f;
        x[j] = own - (left ? rest : rest * shared.beta[j]);
        known[j] = left ? x[j] * shared.beta[j] : x[j];
    }
}

/* Row `row` of a matrix [CHUNK][CHUNK], as operands of tf32 lie. */
inline __device__ void store_tf32_row(int row, const float (&x)[CHUNK], float (&to)[CHUNK * CHUNK]) {
    float y[CHUNK];
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
        y[j] = round_tf32(x[j]);
#pragma unroll
    for (int j = 0; j < CHUNK; j += j % 2 ? 7 : 1) /* even, then odd tokens of each group of 8 */
        *reinterpret_cast<float4 *>(&to[tf32_index(row, j)]) = make_float4(y[j], y[j + 2], y[j + 4], y[j + 6]);
}

/* Finds all but the inverse: tiles of `out`, and of `shared` what a warp needs to invert. */
template <int KP, bool all_bf16, class Out>
__device__ void prepare_tiles(const kda_prefill &p, const Position &at, Shared<KP> &shared, Out &out) {
    Pair<all_bf16> k[BLOCK], q[BLOCK], g[BLOCK];
    load_rows(p.k, at, at.key_head, k);
    load_rows(p.q, at, at.key_head, q);
    load_rows(p.g, at, at.head, g);
    int t = threadIdx.x % Shared<KP>::PAIRS;
    if (t == 0)
        shared.growth[at.block] = 0;
    if (t < BLOCK) {
        float beta =
            t < at.count ? load_float(kda_row(&p.beta, at.batch, at.token + t, at.head), p.beta.dtype, 0) : 0.f;
        if (p.beta_mode != FLASH_KDA_BETA_GIVEN)
            beta = logistic(beta * -LOG2E) * (p.beta_mode == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.f : 1.f);
        shared.beta[at.block * BLOCK + t] = t < at.count ? beta : 0.f;
    }
    find_norms<KP, all_bf16>(p, at, k, q, shared);
    float2 x[BLOCK];
    Decay decay;
    if (p.gate == FLASH_KDA_GATE_SOFTPLUS)
        find_decays<KP, FLASH_KDA_GATE_SOFTPLUS>(p, at, g, x, decay, shared);
    else if (p.gate == FLASH_KDA_GATE_SIGMOID)
        find_decays<KP, FLASH_KDA_GATE_SIGMOID>(p, at, g, x, decay, shared);
    else
        find_decays<KP, FLASH_KDA_GATE_NONE>(p, at, g, x, decay, shared);
    shared.decay[at.block][at.c / 2] = decay;
    __syncthreads();
    if (p.qk_norm)
        store_tiles<KP, all_bf16, true>(at, k, q, x, shared, out);
    else
        store_tiles<KP, all_bf16, false>(at, k, q, x, shared, out);
    __syncthreads();
    make_blocks(p.qk_norm, shared, out);
    __syncthreads();
}

} // namespace chunks
} // namespace kda

#endif
