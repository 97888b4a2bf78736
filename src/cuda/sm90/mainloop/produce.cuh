/* SPDX-License-Identifier: MIT */
/*
 * Producers: a warpgroup turns a chunk's k, q and g, where they lie, into its operands (tiles.cuh).
 *
 * With x_i the log2 decay from the chunk's middle to token i,
 *     RK = k exp2(x)   RQ = q exp2(x)   CK = k exp2(-x)   [L0; M0] = [RK; RQ] CK^T
 *     F = diag(rk) (I + diag(beta rk) L0 diag(rk))^-1 diag(beta)
 * where rk and rq undo the norms of k and q.
 */
#ifndef KDA_CUDA_SM90_PRODUCE_CUH
#define KDA_CUDA_SM90_PRODUCE_CUH

#include "cuda/floats.cuh"
#include "cuda/sm90/mainloop/tiles.cuh"
#include "cuda/sm90/mainloop/warpgroup.cuh"
#include "cuda/sm90/tensor_maps.h"

namespace kda {

/* F is built from diagonal blocks of 8 tokens, which are joined to two of 16 and these to one. PADDED and
 * PADDED_EIGHT are the floats from row to row of scratch matrices, of which no two rows meet in a bank. */
constexpr int EIGHT = 8, PADDED = HALF + 4, PADDED_EIGHT = EIGHT + 4;
constexpr float SMALL = 0x1p-4f, LARGE = 0x1p22f; /* squared norms of k and q that suit factors of 2^115 */
constexpr float LOG2E = 1.4426950408889634f;
constexpr uint32_t NO_DECAY = 0xff7fff7f; /* two raw gates, the least of bf16, which decay nothing */

/* A producer warpgroup's own memory. */
struct Blocks {
    union {
        struct {
            alignas(16) float L[2][2][EIGHT * PADDED_EIGHT]; /* diagonal blocks of beta rk L0 rk, transposed */
            float Z_eight[2][EIGHT * PADDED_EIGHT];          /* the blocks below them, of rk L0 */
            float Z[HALF * PADDED];                          /* the block below two of them */
        };
        float4 halves[GROUP]; /* for unbounded.cuh, before the others are used */
    };
    alignas(16) float rk[2][CHUNK]; /* of this chunk and of the group's next one, alternately */
    float beta[2][CHUNK];
};

/* Does the gate have a bound, so that factors around one middle of a chunk are within bf16's range? */
inline __device__ __host__ bool is_bounded(const kda_prefill *p) { return p->gate == FLASH_KDA_GATE_SIGMOID; }

/* The gate of a thread's two channels: log2 decay = bound / (1 + exp2(slope g + offset)). Without a bound it is
 * bound log2(1 + exp2(slope g + offset)), where `bound` holds the negated rate. */
struct Gate {
    int head = -1;
    float bound, slope;
    float2 offset;
};

template <bool bounded> __device__ Gate find_gate(const kda_prefill &p, int head, int channel) {
    /* Clamped so that NO_DECAY decays nothing, whatever the bias. */
    float rate =
        p.A_log.data
            ? min_or_nan(max_or_nan(expf(load_float(p.A_log.data + head * p.A_log.stride[0], p.A_log.dtype, 0)),
                                    1e-30f),
                         3e38f)
            : 1.f;
    Gate gate;
    gate.head = head;
    gate.bound = bounded ? p.lower_bound * LOG2E : -rate;
    gate.slope = bounded ? -rate * LOG2E : LOG2E;
    gate.offset = make_float2(0, 0);
    if (p.dt_bias.data) {
        const char *bias = p.dt_bias.data + head * p.dt_bias.stride[0];
        gate.offset = make_float2(load_float(bias, p.dt_bias.dtype, channel) * gate.slope,
                                  load_float(bias, p.dt_bias.dtype, channel + 1) * gate.slope);
    }
    return gate;
}

/* A raw gate's decay, as a share of the bound. */
inline __device__ float share_of_bound(const Gate &gate, float raw, float offset) {
    return reciprocal_approximate(1.f + exp2_approximate(fmaf(raw, gate.slope, offset)));
}

/* A raw gate's log2 decay. */
template <bool bounded> __device__ float log2_decay(const Gate &gate, float raw, float offset) {
    if (bounded)
        return share_of_bound(gate, raw, offset) * gate.bound;
    /* log2(1 + 2^x) = max(x, 0) + y P(y), y = 2^-|x|. The error is 9e-6 of it, however small it is. */
    constexpr float P[] = {1.44268298f,   -0.720428526f, 0.469187111f,
                           -0.303065836f, 0.146062374f,  -0.0344465896f};
    float x = fmaf(raw, gate.slope, offset), y = exp2_approximate(-fabsf(x)), sum = P[5];
#pragma unroll
    for (int i = 4; i >= 0; i--)
        sum = fmaf(sum, y, P[i]);
    return gate.bound * fmaf(sum, y, fmaxf(x, 0.f));
}

/* One thread calls it, before the first chunk is found. */
inline __device__ void prefetch_maps(const kda_sm90_maps &maps) {
    prefetch_map(maps.k), prefetch_map(maps.q), prefetch_map(maps.g), prefetch_map(maps.v),
        prefetch_map(maps.out);
}

/* A tile's rows from `count` on become `word`. */
inline __device__ void clear_rows(__nv_bfloat16 *tile, int count, uint32_t word) {
    for (int row = count; row < CHUNK; row++)
        reinterpret_cast<uint32_t *>(tile + row * PANEL)[thread() % 32] = word;
}

/* The squared norms of 8 rows of k or q are the diagonal of the rows times themselves. With X and Y of 8
 * channels each, the first operand is [X Y; Y X], whose upper half also serves as the second operand: the upper
 * product is X X^T + Y Y^T. */
struct RowSquares {
    uint32_t at; /* address of the lane's row of 8, for ldmatrix */

    __device__ RowSquares(const __nv_bfloat16 *tile) {
        uint32_t lane = thread() % 32, row = lane % 8, second = lane / 8 % 2 ^ lane / 16;
        at = shared_address(tile) + row * ROW + ((second ^ row) << 4);
    }
    /* Adds those of 8 rows from 8 block on, in 16 channels. */
    __device__ void add(float (&d)[4], int block, int i) const {
        uint32_t a[4];
        ldmatrix(a, (at ^ i % (PANEL / 16) << 5) + i / (PANEL / 16) * sizeof(Panel) + block * 8 * ROW);
        mma(d, a, a[0], a[1]);
    }
    /* Row lane % 8's, out of the diagonal: element (r, r) is in lane r * 4 + r / 2. */
    static __device__ float own(const float (&d)[4]) {
        uint32_t lane = thread() % 32, row = lane % 8;
        return __shfl_sync(~0u, lane / 4 % 2 ? d[1] : d[0], row * 4 + row / 2);
    }
};

/* The squared norm of the lane's row of k or q, in few instructions. */
template <int DIM> __device__ float find_square(const __nv_bfloat16 *tile) {
    RowSquares rows(tile);
    float squares[CHUNK / 8][4] = {}, square = 0;
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
#pragma unroll
        for (int block = 0; block < CHUNK / 8; block++)
            rows.add(squares[block], block, i);
#pragma unroll
    for (int block = 0; block < CHUNK / 8; block++) {
        float x = RowSquares::own(squares[block]);
        square = thread() % 32 / 8 == block ? x : square;
    }
    return square;
}

/* The same, sooner: no product waits for another one, as each queues after the consumers' products. */
template <int DIM> __device__ float find_square_soon(const __nv_bfloat16 *tile) {
    RowSquares rows(tile);
    float square = 0;
#pragma unroll 1
    for (uint32_t block = 0; block < CHUNK / 8; block++, rows.at += 8 * ROW) {
        float squares[DIM / 16][4] = {};
#pragma unroll
        for (int i = 0; i < DIM / 16; i++)
            rows.add(squares[i], 0, i);
#pragma unroll
        for (int i = 1; i < DIM / 16; i++)
            squares[0][0] += squares[i][0], squares[0][1] += squares[i][1];
        float x = RowSquares::own(squares[0]);
        square = thread() % 32 / 8 == block ? x : square;
    }
    return square;
}

/* Divides rows of k or q by powers of two, each by its lane's own, where `rows` has the lane's bit. Returns the
 * new square of the lane's row, if that is one of them. */
template <int DIM> __device__ float divide_rows(__nv_bfloat16 *tile, uint32_t rows, float own_divisor) {
    float own = 0;
#pragma unroll 1
    for (; rows; rows &= rows - 1) {
        int token = __ffs(rows) - 1;
        float factor = 1 / __shfl_sync(~0u, own_divisor, token), square = 0;
        for (int i = 0; i < DIM / PANEL; i++) {
            uint32_t &word = reinterpret_cast<uint32_t *>(tile + i * sizeof(Panel) / sizeof *tile +
                                                          token * PANEL)[thread() % 32];
            float2 x = unpack_bf16(word);
            x.x *= factor, x.y *= factor;
            word = pack_bf16(x.x, x.y);
            square = fmaf(x.x, x.x, fmaf(x.y, x.y, square));
        }
#pragma unroll
        for (int bit = 16; bit; bit /= 2)
            square += __shfl_xor_sync(~0u, square, bit);
        own = thread() % 32 == token ? square : own;
    }
    return own;
}

/* The power of two next to a row's norm. Where the square is infinite it is 2^120, as elements reach 2^128, and
 * the norm is to be found again. */
inline __device__ float size_of_row(float square) {
    return ldexpf(1.f, square < INFINITY ? ((__float_as_int(square) >> 23) - 127) / 2 : 120);
}

/* The warp finds scale / norm of every row of k or q, and keeps it by token_index and, if `plain`, in order. It
 * brings rows whose norm is far from 1 near it by a power of two, so that they keep their digits under any
 * decay. */
template <bool is_waited_for, int DIM>
__device__ void find_norms(__nv_bfloat16 *tile, float scale, float *scales, float *plain) {
    int lane = thread() % 32;
    float square = is_waited_for ? find_square_soon<DIM>(tile) : find_square<DIM>(tile);
    float norm = rsqrtf(square + 1e-6f) * scale;
    bool ordinary = square >= SMALL && square <= LARGE;
    uint32_t others = __ballot_sync(~0u, !ordinary && square > 0);
    if (__builtin_expect(others, 0)) {
        bool endless = square == INFINITY;
        float size = size_of_row(square), again = divide_rows<DIM>(tile, others, size);
        norm *= ordinary || square == 0 ? 1.f : size;
        others = __ballot_sync(~0u, endless);
        if (others) {
            size = size_of_row(again);
            divide_rows<DIM>(tile, others, size);
            norm = endless ? rsqrtf(again) * size * scale : norm;
        }
    }
    scales[token_index(lane)] = norm;
    if (plain)
        plain[lane] = norm;
}

/* A thread that makes tiles owns two channels of half a chunk. With 128 channels all four warps make tiles.
 * With 64 the last two do; their lanes split early and late tokens, so that token % 8 differs in all its bits,
 * and so do the banks. */
template <int DIM> constexpr bool IN_ONE_WARP = DIM == PANEL; /* one warp has both halves of a channel */
template <int DIM> __device__ bool makes_tiles(uint32_t thread) {
    return !IN_ONE_WARP<DIM> || thread % GROUP >= GROUP / 2;
}
template <int DIM> __device__ bool has_later(uint32_t thread) {
    return IN_ONE_WARP<DIM> ? thread % 32 >= 16 : thread % GROUP >= GROUP / 2;
}
template <int DIM> __device__ int own_channel(uint32_t thread) {
    return (int)(thread / 32 % 2 * (DIM / 2) + thread % (DIM / 4) * 2);
}

/* Turns k, q and g of the thread's two channels and half of the chunk into RK, RQ and CK. Works outwards from
 * the middle. Returns the log2 decay of the half, from the chunk's start to its middle or from there to its
 * end. */
inline __device__ float2 make_tiles(const Panel &panel, uint32_t channel, bool later, const Gate &gate) {
    constexpr int TOGETHER = 4, QUERIES = sizeof panel.keys, GATES = 2 * QUERIES;
    int step = later ? ROW : -ROW;
    /* The address of token i from the middle. A token's 16-byte pieces are permuted by token % 8. */
    uint32_t first =
        shared_address(panel.keys) + (later ? HALF : HALF - 1) * ROW + (channel * 2 ^ (later ? 0 : 7 << 4));
    auto address = [&](int n, int j) {
        return ((first + n * TOGETHER * step) ^ (n * TOGETHER & 7) << 4 ^ j << 4) + j * step;
    };
    struct Tokens {
        uint32_t k[TOGETHER], q[TOGETHER], g[TOGETHER];
    };
    auto load = [&](int n) {
        Tokens tokens;
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            uint32_t at = address(n, j);
            tokens.g[j] = load_shared(at + GATES), tokens.k[j] = load_shared(at),
            tokens.q[j] = load_shared(at + QUERIES);
        }
        return tokens;
    };
    Tokens now = load(0);
    /* Before the middle, x is the decay that is still to come, negated, without the token's own. */
    float direction = later ? gate.bound : -gate.bound, own = later ? gate.bound : 0.f;
    float2 sum = make_float2(0, 0), x[TOGETHER];
    auto find_x = [&](int j) {
        float2 raw = unpack_bf16(now.g[j]);
        float2 shares =
            make_float2(share_of_bound(gate, raw.x, gate.offset.x), share_of_bound(gate, raw.y, gate.offset.y));
        x[j].x = fmaf(shares.x, own, sum.x), x[j].y = fmaf(shares.y, own, sum.y);
        sum.x = fmaf(shares.x, direction, sum.x), sum.y = fmaf(shares.y, direction, sum.y);
    };
    /* exp2 and the reciprocal alternate with all else, two tokens apart; a branch would part them. */
#pragma unroll 1
    for (int n = 0; n < HALF / TOGETHER; n++) {
        find_x(0), find_x(1);
        Tokens next = load(min(n + 1, HALF / TOGETHER - 1));
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            uint32_t at = address(n, j);
            float2 decayed = make_float2(exp2_approximate(x[j].x), exp2_approximate(x[j].y));
            float2 grown = make_float2(exp2_approximate(-x[j].x), exp2_approximate(-x[j].y));
            if (j + 2 < TOGETHER)
                find_x(j + 2);
            float2 k = unpack_bf16(now.k[j]), q = unpack_bf16(now.q[j]);
            store_shared(at, pack_bf16(k.x * decayed.x, k.y * decayed.y));
            store_shared(at + QUERIES, pack_bf16(q.x * decayed.x, q.y * decayed.y));
            store_shared(at + GATES, pack_bf16(k.x * grown.x, k.y * grown.y));
        }
        now = next;
    }
    return later ? sum : make_float2(-sum.x, -sum.y);
}

/* Starts to load beta of the lane's token, as stored; nothing waits for it until it is used. */
inline __device__ uint32_t load_beta(const kda_prefill &p, int64_t batch, int64_t token, int64_t head,
                                     int count) {
    int lane = threadIdx.x % 32;
    if (lane >= count)
        return 0;
    const char *at = kda_row(&p.beta, batch, token + lane, head);
    return p.beta.dtype == KDA_F32 ? *reinterpret_cast<const uint32_t *>(at)
                                   : *reinterpret_cast<const uint16_t *>(at);
}

inline __device__ float find_beta(const kda_prefill &p, int count, uint32_t raw) {
    float half = __half2float(__ushort_as_half((uint16_t)raw));
    float x = __uint_as_float(p.beta.dtype == KDA_BF16 ? raw << 16 : raw); /* fp32, too */
    x = p.beta.dtype == KDA_F16 ? half : x;
    if (p.beta_mode != FLASH_KDA_BETA_GIVEN)
        x = reciprocal_approximate(1.f + exp2_approximate(x * -LOG2E)) *
            (p.beta_mode == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.f : 1.f);
    return threadIdx.x % 32 < count ? x : 0.f;
}

/* Warps of a producer warpgroup: the scout, and the one that has the keys; warp 2 has the queries. The scout
 * also finds the group's next chunk, which is long work: while others invert or, where not all warps make
 * tiles, while they make them. */
template <int DIM> constexpr int SCOUT = IN_ONE_WARP<DIM> ? 0 : 3;
template <int DIM> constexpr int KEYS = 3 - SCOUT<DIM>;

/* What these warps can do as soon as a chunk is there: find the norms of k or of q. After a sequence's end k, q
 * and v become 0 and nothing decays. */
template <int VALUE_PANELS, bool is_waited_for, int DIM>
__device__ void receive_chunk(const kda_prefill &p, Tiles<DIM> &tiles, Factors<DIM> &factors,
                              __nv_bfloat16 *values, Blocks &blocks, int slot, int count) {
    int warp = thread() % GROUP / 32;
    if (count <= 0 || warp == 1)
        return;
    for (int i = 0; i < DIM / PANEL && __builtin_expect(count < CHUNK, 0); i++) {
        Panel &panel = tiles.panels[i];
        if (warp != SCOUT<DIM>)
            clear_rows(warp == KEYS<DIM> ? panel.keys : panel.queries, count, 0);
        else if (i < VALUE_PANELS)
            clear_rows(values + i * CHUNK * PANEL, count, 0);
        if (warp == SCOUT<DIM>)
            clear_rows(panel.gates, count, NO_DECAY);
    }
    __syncwarp();
    if (warp != SCOUT<DIM>)
        find_norms<is_waited_for, DIM>(warp == KEYS<DIM> ? tiles.panels[0].keys : tiles.panels[0].queries,
                                       warp == KEYS<DIM> ? 1.f : p.scale,
                                       warp == KEYS<DIM> ? factors.key_scale : factors.query_scale,
                                       warp == KEYS<DIM> ? blocks.rk[slot] : nullptr);
}

/* Makes the tiles and the state's decays. All threads of the warpgroup call it. */
template <int DIM> __device__ void make_decays(Tiles<DIM> &tiles, Factors<DIM> &factors, const Gate &gate) {
    if (!makes_tiles<DIM>(thread()))
        return;
    bool later = has_later<DIM>(threadIdx.x);
    int channel = own_channel<DIM>(threadIdx.x);
    float2 decay = make_tiles(tiles.panels[channel / PANEL], channel % PANEL, later, gate);
    float *to = later ? factors.to_end : factors.to_middle;
    *reinterpret_cast<float2 *>(&to[channel_index(own_channel<DIM>(thread()))]) =
        make_float2(exp2_approximate(decay.x), exp2_approximate(decay.y));
}

/* [L0; M0], in the accumulators of the warpgroup: warps 0 and 1 have rows of L0, the others of M0. */
template <int PANELS, int TILES>
__device__ void multiply_pairs(const Panel (&panels)[PANELS], float (&d)[TILES][4]) {
    uint64_t rows = wgmma_operand(panels[0].keys, 0, 8 * ROW, SWIZZLE_128);
    uint64_t columns = wgmma_operand(panels[0].gates, 0, 8 * ROW, SWIZZLE_128);
    pin(d);
    wgmma_fence();
    wgmma_shared<false>(d, rows, columns);
#pragma unroll
    for (int c = 1; c < PANELS * PANEL / 16; c++) {
        uint32_t further = c / 4 * sizeof(Panel) + c % 4 * 32;
        wgmma_shared<true>(d, advanced(rows, further), advanced(columns, further));
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
}

/* Addresses of a thread's elements of a tile in the order of tf32_index, whose 16-byte pieces are permuted by
 * row % 8. One costs an instruction. */
struct Tf32Addresses {
    uint32_t even, odd; /* of an even and of an odd token's element */

    /* Elements (row + lane / 4 + {0, 8}, token + lane % 4 * 2 + {0, 1}), as an accumulator has them. */
    static __device__ Tf32Addresses of_accumulator(const float *tile, int row) {
        uint32_t lane = thread() % 32, r = lane / 4;
        uint32_t at = shared_address(tile) + (row + r) * CHUNK * 4 + lane % 4 * 4;
        return {at + (r << 4), at + ((r ^ 1) << 4)};
    }
    __device__ uint32_t at(int row, int token) const { /* multiples of 8, but for token % 2 */
        return ((token & 1 ? odd : even) ^ (token / 8 * 2) << 4) + row * CHUNK * 4;
    }
};

/* Stores the warp's rows of M, M0 times rq. Above the diagonal M0 may be infinite, so it is replaced by 0. */
inline __device__ void store_M(const float (&d)[CHUNK / 8][4], const float *query_scale, const __half *M) {
    uint32_t lane = thread() % 32, row = thread() / 32 % 2 * HALF + lane / 4;
    int ahead = (int)(row - lane % 4 * 2); /* the first element's row, less its token */
    uint32_t at = shared_address(M) + row * CHUNK * 2 + ((row / 2 % 4) << 4) + lane % 4 * 4;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float rq = query_scale[token_index(row + n * 8)];
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++) {
            float left = ahead >= j * 8 - n * 8 ? d[j][2 * n] * rq : 0.f;
            float right = ahead >= j * 8 - n * 8 + 1 ? d[j][2 * n + 1] * rq : 0.f;
            store_shared((at ^ j << 4) + n * 8 * CHUNK * 2, pack_half(left, right));
        }
    }
}

/* F is 0 above the diagonal blocks of 8 tokens, where nobody writes: all threads of a CTA clear it once. */
template <int STAGES, int DIM> __device__ void clear_inverses(Tiles<DIM> (&tiles)[STAGES]) {
    constexpr int PIECES = sizeof tiles->inverse / sizeof(float4);
    for (int i = threadIdx.x; i < STAGES * PIECES; i += blockDim.x)
        reinterpret_cast<float4 *>(tiles[i / PIECES].inverse)[i % PIECES] = make_float4(0, 0, 0, 0);
    fence_shared();
}

/* Finds a diagonal block of 16 tokens of F: by forward substitution in its blocks of 8, a column for a lane, in
 * which both halves of the warp do the same; then what is below these, -F11 Z F00. */
inline __device__ void invert_block(const float (&d)[CHUNK / 8][4], int block, Blocks &blocks, int slot,
                                    float *F) {
    uint32_t lane = thread() % 32, row = lane / 4, part = lane % 4;
    const float *rk = &blocks.rk[slot][block * HALF], *beta = &blocks.beta[slot][block * HALF];
    const float rows[2] = {rk[row], rk[row + EIGHT]};
#pragma unroll
    for (int s = 0; s < 2; s++) {
        float2 columns = *reinterpret_cast<const float2 *>(&rk[s * EIGHT + part * 2]);
        float factor = rows[s] * beta[s * EIGHT + row];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float x = block == 0 ? d[s][2 * s + n] : d[2 + s][2 * s + n];
            blocks.L[block][s][(part * 2 + n) * PADDED_EIGHT + row] = x * factor * (n ? columns.y : columns.x);
        }
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
        blocks.Z_eight[block][row * PADDED_EIGHT + part * 2 + n] =
            round_tf32((block == 0 ? d[0][2 + n] : d[2][2 + n]) * rows[1]);
    if (block == 1)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                blocks.Z[(row + n / 2 * 8) * PADDED + j * 8 + part * 2 + n % 2] =
                    round_tf32(d[j][n] * rows[n / 2]);
    __syncwarp();
    uint32_t own = lane % EIGHT, s = lane / EIGHT % 2, upper = lane / HALF;
    const float *L = blocks.L[block][s];
    float x[EIGHT];
#pragma unroll
    for (int i = 0; i < EIGHT; i++)
        x[i] = i == own ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < EIGHT - 1; j++)
#pragma unroll
        for (int i = (j + 1) / 4 * 4; i < EIGHT; i += 4) {
            float4 of = *reinterpret_cast<const float4 *>(&L[j * PADDED_EIGHT + i]);
            const float l[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
            for (int n = 0; n < 4; n++)
                if (i + n > j)
                    x[i + n] = fmaf(-l[n], x[j], x[i + n]);
        }
    /* Each half of the warp stores half of the column's rows. */
    uint32_t corner = shared_address(F) + block * HALF * CHUNK * 4, first = upper * 4;
    uint32_t at = corner + (s * EIGHT + first) * CHUNK * 4 + own / 2 * 4;
    uint32_t piece = (block * 2 + s) * 2 + own % 2;
    float4 of = *reinterpret_cast<const float4 *>(&rk[s * EIGHT + first]);
    const float norms[4] = {of.x, of.y, of.z, of.w};
    float step = beta[s * EIGHT + own];
#pragma unroll
    for (int i = 0; i < 4; i++)
        store_shared(at + i * CHUNK * 4 + ((piece ^ (first + i)) << 4),
                     __float_as_uint(round_tf32((upper ? x[i + 4] : x[i]) * step * norms[i])));
    __syncwarp();
    /* Operands as in join_blocks. */
    Tf32Addresses addresses = Tf32Addresses::of_accumulator(F, block * HALF + EIGHT);
    float product[4] = {}, result[4] = {};
    uint32_t a[4] = {load_shared(addresses.at(0, block * HALF + EIGHT)), 0,
                     load_shared(addresses.at(0, block * HALF + EIGHT + 1)), 0};
    const float *b = &blocks.Z_eight[block][part * 2 * PADDED_EIGHT + row];
    mma_tf32(product, a, __float_as_uint(b[0]), __float_as_uint(b[PADDED_EIGHT]));
    a[0] = __float_as_uint(round_tf32(product[0])), a[2] = __float_as_uint(round_tf32(product[1]));
    uint32_t above = corner + part * 2 * CHUNK * 4 + row / 2 * 4;
    uint32_t column = block * 4 + row % 2;
    mma_tf32(result, a, load_shared(above + ((column ^ part * 2) << 4)),
             load_shared(above + CHUNK * 4 + ((column ^ (part * 2 + 1)) << 4)));
#pragma unroll
    for (int n = 0; n < 2; n++)
        store_shared(addresses.at(0, block * HALF + n), __float_as_uint(-round_tf32(result[n])));
}

/* Finds the block of F below the diagonal blocks, -F11 Z F00. */
inline __device__ void join_blocks(const Blocks &blocks, float *F) {
    uint32_t lane = thread() % 32, row = lane / 4, part = lane % 4;
    float product[2][4] = {}, result[2][4] = {};
    Tf32Addresses addresses = Tf32Addresses::of_accumulator(F, HALF);
#pragma unroll
    for (int s = 0; s < 2; s++) {
        uint32_t a[4];
#pragma unroll
        for (int n = 0; n < 4; n++) /* as tf32_operand has columns */
            a[n] = load_shared(addresses.at(n % 2 * 8, HALF + s * 8 + n / 2));
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float *b = &blocks.Z[(s * 8 + part * 2) * PADDED + j * 8 + row];
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
            store_shared(addresses.at(n / 2 * 8, j * 8 + n % 2), __float_as_uint(-round_tf32(result[j][n])));
}

/* Makes the rest of a chunk's operands, from [L0; M0]. */
template <int DIM>
__device__ void finish_operands(const float (&d)[CHUNK / 8][4], Tiles<DIM> &tiles, Factors<DIM> &factors,
                                Blocks &blocks, int slot, int inverse_barrier) {
    int warp = thread() % GROUP / 32;
    if (warp < 2) { /* one copy of code is fetched once */
        invert_block(d, warp, blocks, slot, tiles.inverse);
        if (warp == 0) {
            barrier_arrive(inverse_barrier, 64);
        } else {
            barrier_wait(inverse_barrier, 64);
            join_blocks(blocks, tiles.inverse);
        }
    } else
        store_M(d, factors.query_scale, tiles.M);
    fence_shared();
}

} // namespace kda

#endif
