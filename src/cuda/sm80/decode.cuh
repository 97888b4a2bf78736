/* SPDX-License-Identifier: MIT */
/*
 * What the kernels of decode share: a short form of the problem, a state's layout in registers, a token's step,
 * the launch.
 *
 * A state is read once, taken through the few tokens of its sequence in registers, and written back. Only the
 * speed of memory should matter. So a thread issues PIECES loads of 16 bytes before it waits, and eight lanes
 * share a line of 128 bytes.
 *
 * What tokens bring is prepared once for all threads of a CTA, while the state is on its way: every channel's
 * decay, and k and q as given. Their norms are sums over the channels, which are not waited for: with rk = 1 /
 * |k| and rq = scale / |q|,
 *     S <- diag(exp(a)) S     u = rk beta (v - rk S^T k)     o = rq (S^T q + (k . q) u)     S <- S + k u^T
 *
 * A state in fp32 becomes S + ((D - 1) S + k u^T) with D = diag(exp(a)), rounded once. Two roundings a token
 * would drift, as the rounding of a slow decay goes the same way for thousands of tokens. For this k and q are
 * decayed instead, S^T D k. In 16 bits storing a state costs more than either.
 */
#ifndef KDA_CUDA_SM80_DECODE_CUH
#define KDA_CUDA_SM80_DECODE_CUH

#include "api/decode_problem.h"
#include "cuda/chain.cuh"
#include "cuda/ptx/stream.cuh"

#include <type_traits>

namespace kda {
namespace decode {

constexpr int LANES = 8; /* that share a line of 128 bytes */
constexpr int MAX_GRID_Z = 65535;
constexpr int DEFAULT_SHARED = 48 << 10; /* bytes of shared memory that need no permission */

/* ---- The problem in short ------------------------------------------------------------------------- */

/* Row (t, h) of a sequence lies at data + position * stride + t * token + h * head. */
struct Rows {
    char *data;
    int64_t position, token, head; /* strides */
    kda_dtype dtype;
};

/* What struct kda_decode says, in a fifth of its bytes: the first steps of a CTA wait for them. */
struct Decode {
    /* NULL: not given; strides in elements. Of int64 the lower half is read, at the higher stride: what does not fit
     * in that is no slot and no number of tokens. */
    const int32_t *state_indices, *num_accepted_tokens, *accepted;
    int64_t index_stride, column_stride, num_accepted_stride, accepted_stride;
    const char *cu_seqlens;
    int64_t cu_stride;
    const char *has_initial_state; /* NULL: not given */
    int64_t has_initial_stride;
    char *state;
    int64_t slot_stride, state_head_stride, row_stride;
    int first_sequence; /* of this launch */
    int slots, tokens, max_tokens;
    int padding_slot; /* -1: none beside -1 */
    int columns;      /* of state_indices, if a state is written after every token */
    int key_dim, value_dim;
    uint32_t per_group; /* 2^32 / (value heads of a head), rounded up; 0: 2^32 */
    kda_dtype state_dtype;
    bool wide_cu, wide_has_initial, keep_state, qk_norm;
    flash_kda_gate gate;
    flash_kda_beta beta_mode;
    float lower_bound, scale;
    Rows q, k, g, v, beta, out;
    const char *A_log, *dt_bias; /* of head 0 */
    int64_t A_log_stride, dt_bias_stride;
    kda_dtype A_log_dtype, dt_bias_dtype;
};

inline __device__ int size_of(kda_dtype dtype) { return dtype == KDA_F32 ? 4 : 2; }

inline __device__ int64_t times(int index, int64_t stride) {
    return (int64_t)((uint64_t)(unsigned)index * (uint64_t)stride);
}

struct Sequence {
    int n, position; /* position: n or, where sequences are packed, its first token */
    int length, slot;
    bool from_zero; /* only fused */
};

/* What state_indices say. in_pool has yet to check it, and waits for it. */
inline __device__ int find_index(const Decode &d, int n, int column) {
    if (!d.state_indices)
        return n;
    return load_index(d.state_indices + times(n, d.index_stride) + times(column, d.column_stride));
}

inline __device__ int in_pool(const Decode &d, int index) {
    return index < d.slots && index != d.padding_slot ? index : -1;
}

/* Does sequence n start from zero? */
inline __device__ bool starts_from_zero(const Decode &d, int n) {
    return d.has_initial_state &&
           !load_flag(d.has_initial_state + times(n, d.has_initial_stride), d.wide_has_initial);
}

/* The index of the state of sequence n that is read. */
inline __device__ int find_read_index(const Decode &d, int n) {
    int column = 0;
    if (d.num_accepted_tokens)
        column = max(min(d.num_accepted_tokens[times(n, d.num_accepted_stride)], d.columns), 1) - 1;
    return find_index(d, n, column);
}

inline __device__ int token_offset(const Decode &d, int n) {
    const char *at = d.cu_seqlens + times(n, d.cu_stride);
    int64_t token = d.wide_cu ? *reinterpret_cast<const int64_t *>(at) : *reinterpret_cast<const int32_t *>(at);
    return (int)kda_clamp(token, 0, d.tokens);
}

/* kda_decode_sequence, without the slot. */
inline __device__ Sequence find_sequence(const Decode &d) {
    Sequence s;
    s.n = s.position = d.first_sequence + blockIdx.z, s.length = d.max_tokens, s.slot = -1;
    s.from_zero = false;
    if (d.cu_seqlens) {
        int end = token_offset(d, s.n + 1);
        int begin = min(token_offset(d, s.n), end);
        s.length = min(end - begin, d.max_tokens);
        s.position = min(begin, d.tokens - 1);
    }
    if (d.accepted)
        s.length = min(d.accepted[times(s.n, d.accepted_stride)], s.length);
    return s;
}

/* kda_decode_written_slot. */
inline __device__ int find_written_slot(const Decode &d, const Sequence &s, int t) {
    if (d.keep_state)
        return -1;
    if (d.columns)
        return t < d.columns ? in_pool(d, find_index(d, s.n, t)) : -1;
    return t + 1 == s.length ? s.slot : -1;
}

inline __device__ char *find_row(const Rows &rows, const Sequence &s, int t, int head) {
    return rows.data + times(s.position, rows.position) + times(head, rows.head) + times(t, rows.token);
}

/* An element as its bits, so that many are on their way before the first is used. */
inline __device__ uint32_t load_raw(const char *row, kda_dtype dtype, int i) {
    const char *at = row + (unsigned)(i * size_of(dtype));
    return dtype == KDA_F32 ? *reinterpret_cast<const uint32_t *>(at) : *reinterpret_cast<const uint16_t *>(at);
}

/* The same with a load that stays here: a plain load is put off until its result is used. */
inline __device__ uint32_t load_now(const char *row, kda_dtype dtype, int i) {
    return load_here(row + (unsigned)(i * size_of(dtype)), dtype == KDA_F32);
}

template <int N> __device__ void from_raw(const uint32_t (&raw)[N], kda_dtype dtype, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = __uint_as_float(dtype == KDA_F32 ? raw[i] : raw[i] << 16);
    if (dtype == KDA_F16)
#pragma unroll
        for (int i = 0; i < N; i++)
            x[i] = __half2float(__ushort_as_half((uint16_t)raw[i]));
}

/* ---- Pieces of a state ---------------------------------------------------------------------------- */

/* VEC neighbours in memory: 16 bytes, aligned; rows end at a whole piece. A loaded piece stays packed in its
 * first registers until it is unpacked, so that nothing waits for it before. */
template <kda_dtype DTYPE> struct Aligned {
    static constexpr int VEC = DTYPE == KDA_F32 ? 4 : 8;

    __device__ static int bytes(kda_dtype) { return 16; }
    /* Elements i .. i + VEC - 1, at `at`, of a row of `end` elements; 0 after its end. */
    __device__ static void load(const char *at, int i, int end, kda_dtype, float (&x)[VEC]) {
        x[0] = x[1] = x[2] = x[3] = 0;
        load_streaming(x[0], x[1], x[2], x[3], at, i < end);
    }
    __device__ static void unpack(kda_dtype, float (&x)[VEC]) {
        if constexpr (DTYPE != KDA_F32)
#pragma unroll
            for (int i = 3; i >= 0; i--) {
                uint32_t word = __float_as_uint(x[i]);
                float2 pair =
                    DTYPE == KDA_BF16 ? unpack_bf16(word) : __half22float2(*reinterpret_cast<__half2 *>(&word));
                x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
            }
    }
    __device__ static void store(char *at, int i, int end, kda_dtype, const float (&x)[VEC]) {
        float words[4];
#pragma unroll
        for (int n = 0; n < 4; n++)
            if constexpr (DTYPE == KDA_F32)
                words[n] = x[n];
            else
                words[n] = __uint_as_float(pack_output(DTYPE, x[2 * n], x[2 * n + 1]));
        store_streaming(at, words[0], words[1], words[2], words[3], i < end);
    }
};

/* Any dtype at any address, element by element. */
struct Elementwise {
    static constexpr int VEC = 4;

    __device__ static int bytes(kda_dtype dtype) { return VEC * size_of(dtype); }
    __device__ static void load(const char *at, int i, int end, kda_dtype dtype, float (&x)[VEC]) {
#pragma unroll
        for (int n = 0; n < VEC; n++)
            x[n] = i + n < end ? __uint_as_float(load_raw(at, dtype, n)) : 0.f;
    }
    __device__ static void unpack(kda_dtype dtype, float (&x)[VEC]) {
        uint32_t raw[VEC];
#pragma unroll
        for (int n = 0; n < VEC; n++)
            raw[n] = __float_as_uint(x[n]);
        from_raw(raw, dtype, x);
    }
    __device__ static void store(char *at, int i, int end, kda_dtype dtype, const float (&x)[VEC]) {
#pragma unroll
        for (int n = 0; n < VEC; n++)
            if (i + n < end)
                store_float(at, dtype, n, x[n]);
    }
};

/* ---- Tokens --------------------------------------------------------------------------------------- */

/* Sums over channels. */
struct Products {
    float kk, qq, kq;

    __device__ void add(float k, float q) { kk = fmaf(k, k, kk), qq = fmaf(q, q, qq), kq = fmaf(k, q, kq); }
};

/* What a token brings, in shared memory. k and q are as given; channels that do not exist are 0. once: k and q
 * are wanted decayed, too. */
template <int KP, int COLUMNS, int PARTS, bool once> struct Token {
    alignas(16) float decay[KP]; /* exp(a) - 1: decay close to 1 would lose its digits otherwise */
    alignas(16) float k[KP];
    alignas(16) float q[KP];
    alignas(16) float dk[once ? KP : 4]; /* by decay_keys */
    alignas(16) float dq[once ? KP : 4];
    alignas(16) float v[COLUMNS];
    float4 products[PARTS]; /* a warp's part of the Products */
    float beta;

    __device__ Products all_products() const {
        Products all = {};
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            all.kk += products[i].x, all.qq += products[i].y, all.kq += products[i].z;
        return all;
    }
};

/* 1 / |k| and scale / |q|. */
constexpr float EPSILON = 1e-6f;
struct Factors {
    float k, q;

    __device__ Factors(const Decode &d, Products sums)
        : k(d.qk_norm ? rsqrtf(sums.kk + EPSILON) : 1.f),
          q(d.qk_norm ? rsqrtf(sums.qq + EPSILON) * d.scale : d.scale) {}
};

/* Rows of q and k whose square is at least so large, or not finite, are normalised beforehand, as the square or
 * products with S could leave fp32. SMALLER first brings them near 1. */
constexpr float LARGE_SQUARE = 0x1p92f, SMALLER = 0x1p-96f;

/* Is one of 256 parts of such a row so large? */
inline __device__ bool are_large(const Products &part) { return !(part.kk + part.qq < LARGE_SQUARE / 256); }

/* Is it so for any thread of the CTA? This is a barrier; the vote tells the compiler that all of a warp
 * agree. */
inline __device__ bool any_of_cta(bool x) { return __any_sync(~0u, __syncthreads_or(x)); }

/* Normalises such rows. All threads of a CTA call it, after a barrier. */
template <int THREADS, class Token> __device__ __noinline__ void normalise_large(Token *tokens, int count) {
    constexpr int KP = sizeof Token::k / sizeof(float), PARTS = sizeof Token::products / sizeof(float4);
#pragma unroll 1
    for (int t = 0; t < count; t++) {
        Token &token = tokens[t];
        Products given = token.all_products();
        bool large_k = !(given.kk < LARGE_SQUARE), large_q = !(given.qq < LARGE_SQUARE);
        if (!large_k && !large_q)
            continue;
        float by_k = large_k ? SMALLER : 1.f, by_q = large_q ? SMALLER : 1.f;
        Products sums = {};
#pragma unroll 1
        for (int c = 0; c < KP; c++)
            sums.add(token.k[c] * by_k, token.q[c] * by_q);
        float rk = large_k ? rsqrtf(sums.kk) : 1.f, rq = large_q ? rsqrtf(sums.qq) : 1.f;
        __syncthreads(); /* all have read it */
        for (int c = threadIdx.x; c < KP; c += THREADS)
            token.k[c] = token.k[c] * by_k * rk, token.q[c] = token.q[c] * by_q * rq;
        for (int i = threadIdx.x; i < PARTS; i += THREADS)
            token.products[i] = i ? make_float4(0, 0, 0, 0)
                                  : make_float4(large_k ? 1 - EPSILON : given.kk,
                                                large_q ? 1 - EPSILON : given.qq, sums.kq * rk * rq, 0);
        __syncthreads();
    }
}

/* Decays keys and queries as S is to meet them. Called likewise. */
template <class Tile> __device__ void decay_keys(typename Tile::Token *tokens, int count) {
    if constexpr (Tile::ONCE) {
        for (int i = threadIdx.x; i < count * Tile::KP; i += Tile::THREADS) {
            typename Tile::Token &token = tokens[i / Tile::KP];
            int c = i % Tile::KP;
            float decay = token.decay[c];
            token.dk[c] = fmaf(token.k[c], decay, token.k[c]);
            token.dq[c] = fmaf(token.q[c], decay, token.q[c]);
        }
        __syncthreads();
    }
}

/* Sums COUNT values over the lanes that differ in bits BIT .. LAST. In each step lanes exchange half of their
 * values while there are several, so that a lane ends with the values that its bits name, the highest first. */
template <int COUNT, int BIT, int LAST, int N> __device__ void sum_over_lanes(float (&x)[N]) {
    if constexpr (COUNT > 1) {
        bool high = threadIdx.x & BIT;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            float keep = high ? x[i + COUNT / 2] : x[i], give = high ? x[i] : x[i + COUNT / 2];
            x[i] = keep + __shfl_xor_sync(~0u, give, BIT);
        }
    } else {
        x[0] += __shfl_xor_sync(~0u, x[0], BIT);
    }
    if constexpr (BIT > LAST)
        sum_over_lanes<(COUNT > 1 ? COUNT / 2 : 1), BIT / 2, LAST>(x);
}

/* Finds a warp's part of the products of tokens 0 .. count - 1, of which each lane has a part. */
template <int N, class Token>
__device__ void store_products(const Products (&own)[N], int part, int count, Token *tokens) {
    float x[4 * N];
#pragma unroll
    for (int t = 0; t < N; t++)
        x[4 * t] = own[t].kk, x[4 * t + 1] = own[t].qq, x[4 * t + 2] = own[t].kq, x[4 * t + 3] = 0;
    sum_over_lanes<4 * N, 16, 1>(x);
    int value = threadIdx.x % 32 * N / 8;
    if (threadIdx.x * N % 8 == 0 && value / 4 < count)
        reinterpret_cast<float *>(&tokens[value / 4].products[part])[value % 4] = x[0];
}

inline __device__ float logistic(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

/* Turns g of some tokens into a channel's log decays. A is exp(A_log). */
template <flash_kda_gate gate, int N>
__device__ void find_log_decays(const Decode &d, float dt_bias, float A, float (&g)[N]) {
#pragma unroll
    for (int t = 0; t < N; t++) {
        float x = g[t] + dt_bias;
        g[t] = gate == FLASH_KDA_GATE_SOFTPLUS ? -A * (fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))))
                                               : d.lower_bound * logistic(A * x);
    }
}

/* Turns g of some tokens into a channel's decays, less 1. */
template <int N> __device__ void find_decays(const Decode &d, float dt_bias, float A_log, float (&g)[N]) {
    float A = min_or_nan(max_or_nan(expf(A_log), 1e-30f), 1e38f); /* clamped so that no g makes a NaN of it */
    if (d.gate == FLASH_KDA_GATE_SOFTPLUS)
        find_log_decays<FLASH_KDA_GATE_SOFTPLUS>(d, dt_bias, A, g);
    else if (d.gate == FLASH_KDA_GATE_SIGMOID)
        find_log_decays<FLASH_KDA_GATE_SIGMOID>(d, dt_bias, A, g);
#pragma unroll
    for (int t = 0; t < N; t++)
        g[t] = expm1f(g[t]);
}

inline __device__ float find_step(const Decode &d, float beta) {
    return d.beta_mode == FLASH_KDA_BETA_GIVEN
               ? beta
               : logistic(beta) * (d.beta_mode == FLASH_KDA_BETA_SIGMOID ? 1.f : 2.f);
}

template <int N> __device__ void load_shared(const float *from, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
        *reinterpret_cast<float4 *>(&x[i]) = *reinterpret_cast<const float4 *>(from + i);
}

/* ---- Tiles ---------------------------------------------------------------------------------------- */

/* V first: eight lanes share a row of K channels, and a thread has ROWS rows. PIECES: a thread's 16-byte pieces
 * of the state. */
template <class Access_, int KP_, int THREADS_, int PIECES_> struct TileVFirst {
    using Access = Access_;
    static constexpr int KP = KP_, THREADS = THREADS_, PIECES = PIECES_, VEC = Access::VEC;
    static constexpr int PARTS = (KP < THREADS ? KP : THREADS) / 32; /* warps that prepare channels */
    static constexpr int ACROSS = KP / (LANES * VEC);                /* pieces of a row that a thread has */
    static constexpr int ROWS = PIECES / ACROSS, COLUMNS = ROWS * THREADS / LANES;
    static constexpr int STEP = 32 / LANES; /* rows from one of a thread's rows to the next */
    static constexpr int CHAINS =
        ROWS < 4 ? 4 / ROWS : 1; /* sums of a row, so that an addition need not wait for the one before */
    static constexpr bool ONCE = VEC == 4; /* fp32, decayed and written in one step */
    using Token = decode::Token<KP, COLUMNS, PARTS, ONCE>;
    struct Scratch {};
    float S[ROWS][ACROSS][VEC];

    /* Where channel c lies in shared memory: what eight lanes read at once are neighbours. */
    __device__ static unsigned index(unsigned c) {
        return (c / (LANES * VEC) * (VEC / 4) + c % VEC / 4) * (LANES * 4) + c / VEC % LANES * 4 + c % 4;
    }
    __device__ static int row(int i) {
        return threadIdx.x / 32 * (STEP * ROWS) + i * STEP + threadIdx.x % 32 / LANES;
    }
    __device__ static int channel(int j) { return (j * LANES + threadIdx.x % LANES) * VEC; }
    /* Prefetches the state's lines, which lanes of a row share out. state: at its offset. */
    __device__ static void prefetch(const Decode &d, const char *state) {
#pragma unroll
        for (int i = 0; i < ROWS; i++, state += STEP * d.row_stride)
            prefetch_line(state + threadIdx.x % ACROSS * (LANES * 16));
    }

    /* Bytes from a state to the thread's first piece of the tile that begins at a column. */
    __device__ static int64_t offset(const Decode &d, int column) {
        return times(column + row(0), d.row_stride) + threadIdx.x % LANES * Access::bytes(d.state_dtype);
    }
    /* Loads the tile. state: at its offset, with `columns` columns from the tile's first on. */
    __device__ void load(const Decode &d, const char *state, int columns) {
#pragma unroll
        for (int i = 0; i < ROWS; i++, state += STEP * d.row_stride)
#pragma unroll
            for (int j = 0; j < ACROSS; j++)
                Access::load(state + j * LANES * Access::bytes(d.state_dtype), channel(j),
                             row(i) < columns ? d.key_dim : 0, d.state_dtype, S[i][j]);
    }
    __device__ void unpack(const Decode &d) {
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            Access::unpack(d.state_dtype, S[i / ACROSS][i % ACROSS]);
    }
    __device__ void store(const Decode &d, char *state, int columns) const {
#pragma unroll
        for (int i = 0; i < ROWS; i++, state += STEP * d.row_stride)
#pragma unroll
            for (int j = 0; j < ACROSS; j++)
                Access::store(state + j * LANES * Access::bytes(d.state_dtype), channel(j),
                              row(i) < columns ? d.key_dim : 0, d.state_dtype, S[i][j]);
    }

    /* Takes the tile through token t. out: the token's row from the tile's first column on, or NULL. */
    __device__ void step(const Decode &d, const Token &token, Scratch &, int, char *out, kda_dtype dtype,
                         int columns) {
        Products sums = token.all_products();
        step_columns(SharedChannels{token}, sums, Factors(d, sums), token.beta, token.v, out, dtype, columns);
    }

    /* A thread's channels of a token, four at a time, read from shared memory whenever they are needed. */
    struct SharedChannels {
        const Token &token;

        __device__ void load(int j, int part, float (&decay)[4], float (&k)[4], float (&q)[4]) const {
            load_channels(token, j, part, decay, k, q);
        }
        __device__ void load_decayed(int j, int part, float (&dk)[4], float (&dq)[4]) const {
            load_shared(&token.dk[index(channel(j) + part)], dk);
            load_shared(&token.dq[index(channel(j) + part)], dq);
        }
        __device__ void load_change(int j, int part, float (&decay)[4], float (&k)[4]) const {
            load_shared(&token.decay[index(channel(j) + part)], decay);
            load_shared(&token.k[index(channel(j) + part)], k);
        }
    };

    template <class AnyToken>
    __device__ static void load_channels(const AnyToken &token, int j, int part, float (&decay)[4],
                                         float (&k)[4], float (&q)[4]) {
        unsigned at = index(channel(j) + part);
        load_shared(&token.decay[at], decay);
        load_shared(&token.k[at], k);
        load_shared(&token.q[at], q);
    }

    /* A step, with channels as above; v: of the tile's columns. */
    template <class Channels>
    __device__ __forceinline__ void step_columns(const Channels &channels, const Products &sums,
                                                 const Factors &factor, float beta, const float *v, char *out,
                                                 kda_dtype dtype, int columns) {
        float w[ROWS][CHAINS] = {}, y[CHAINS][ROWS] = {}, k[ACROSS][VEC];
        float step = beta * factor.k;
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int part = 0; part < VEC; part += 4) {
                int chain = (j * VEC + part) / 4 % CHAINS;
                float decay[4], keys[4], q[4];
                if constexpr (ONCE)
                    channels.load_decayed(j, part, keys, q);
                else
                    channels.load(j, part, decay, keys, q);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    k[j][part + e] = keys[e];
#pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        float &s = S[i][j][part + e];
                        if constexpr (!ONCE)
                            s = fmaf(s, decay[e], s);
                        w[i][chain] = fmaf(s, keys[e], w[i][chain]);
                        y[chain][i] = fmaf(s, q[e], y[chain][i]);
                    }
                }
            }
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int chain = 1; chain < CHAINS; chain++)
                w[i][0] += w[i][chain], y[0][i] += y[chain][i];
#pragma unroll
        for (int bit = LANES / 2; bit > 0; bit /= 2)
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                w[i][0] += __shfl_xor_sync(~0u, w[i][0], bit);
        sum_over_lanes<ROWS, LANES / 2, 1>(y[0]);
        constexpr int SHARE = LANES / ROWS; /* lanes that end with the same row of y */
        int own = threadIdx.x % LANES / SHARE;
        float u[ROWS], own_u = 0;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            u[i] = step * (v[row(i)] - factor.k * w[i][0]);
            own_u = own == i ? u[i] : own_u;
        }
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int part = 0; part < VEC; part += 4) {
                float decay[4], keys[4];
                if constexpr (ONCE)
                    channels.load_change(j, part, decay, keys);
#pragma unroll
                for (int e = 0; e < 4; e++)
#pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        float &s = S[i][j][part + e];
                        if constexpr (ONCE)
                            s += fmaf(keys[e], u[i], s * decay[e]);
                        else
                            s = fmaf(k[j][part + e], u[i], s);
                    }
            }
        if (out && threadIdx.x % SHARE == 0 && row(own) < columns)
            store_float(out, dtype, row(own), factor.q * fmaf(sums.kq, own_u, y[0][0]));
    }
};

/* K first: eight lanes share a line of columns, and a thread has VEC columns of PIECES channels. */
template <class Access_, int KP_, int THREADS_, int PIECES_> struct TileKFirst {
    using Access = Access_;
    static constexpr int KP = KP_, THREADS = THREADS_, PIECES = PIECES_, VEC = Access::VEC;
    static constexpr int PARTS = (KP < THREADS ? KP : THREADS) / 32; /* warps that prepare channels */
    static constexpr int LINE = KP / PIECES * LANES; /* threads that share the columns of a line */
    static constexpr int WARPS = LINE / 32, COLUMNS = THREADS / LINE * LANES * VEC;
    static constexpr bool ONCE = VEC == 4; /* as above */
    using Token = decode::Token<KP, COLUMNS, PARTS, ONCE>;
    /* Sums over a warp's channels, for the WARPS that share a line. There are two for alternate tokens, so that
     * a step waits only once. */
    struct Scratch {
        alignas(16) float sums[2][2][WARPS][COLUMNS]; /* S^T k, then S^T q */
    };
    float S[PIECES][VEC];

    __device__ static unsigned index(unsigned c) { return c; }
    __device__ static int channel(int i) { return (int)threadIdx.x % LINE / LANES * PIECES + i; }
    __device__ static int first_column() {
        return (int)threadIdx.x / LINE * (LANES * VEC) + threadIdx.x % LANES * VEC;
    }

    __device__ static int64_t offset(const Decode &d, int column) {
        return times(channel(0), d.row_stride) + times(column + first_column(), size_of(d.state_dtype));
    }
    __device__ static void prefetch(const Decode &d, const char *state) {
        prefetch_line(state + times(threadIdx.x % PIECES, d.row_stride));
    }
    __device__ void load(const Decode &d, const char *state, int columns) {
#pragma unroll
        for (int i = 0; i < PIECES; i++, state += d.row_stride)
            Access::load(state, first_column(), channel(i) < d.key_dim ? columns : 0, d.state_dtype, S[i]);
    }
    __device__ void unpack(const Decode &d) {
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            Access::unpack(d.state_dtype, S[i]);
    }
    __device__ void store(const Decode &d, char *state, int columns) const {
#pragma unroll
        for (int i = 0; i < PIECES; i++, state += d.row_stride)
            Access::store(state, first_column(), channel(i) < d.key_dim ? columns : 0, d.state_dtype, S[i]);
    }

    __device__ void step(const Decode &d, const Token &token, Scratch &scratch, int t, char *out,
                         kda_dtype dtype, int columns) {
        float decay[PIECES], k[PIECES], q[PIECES], sums[2 * VEC] = {};
        load_shared(&token.decay[channel(0)], decay);
        load_shared(ONCE ? &token.dk[channel(0)] : &token.k[channel(0)], k);
        load_shared(ONCE ? &token.dq[channel(0)] : &token.q[channel(0)], q);
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                float &s = S[i][e];
                if constexpr (!ONCE)
                    s = fmaf(s, decay[i], s);
                sums[e] = fmaf(s, k[i], sums[e]);
                sums[VEC + e] = fmaf(s, q[i], sums[VEC + e]);
            }
        sum_over_lanes<2 * VEC, 16, LANES>(sums);
        auto &all = scratch.sums[t % 2];
        int lane = threadIdx.x % 32, warp = threadIdx.x % LINE / 32;
        int part = first_column() + lane / 8 % 2 * (VEC / 2);
#pragma unroll
        for (int i = 0; i < VEC / 2; i += 2)
            *reinterpret_cast<float2 *>(&all[lane / 16][warp][part + i]) = make_float2(sums[i], sums[i + 1]);
        __syncthreads();
        Products products = token.all_products();
        Factors factor(d, products);
        float w[VEC] = {}, v[VEC];
        load_shared(&token.v[first_column()], v);
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            float more[VEC];
            load_shared(&all[0][i][first_column()], more);
#pragma unroll
            for (int e = 0; e < VEC; e++)
                w[e] += more[e];
        }
        if constexpr (ONCE)
            load_shared(&token.k[channel(0)], k);
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            float u = factor.k * token.beta * (v[e] - factor.k * w[e]);
#pragma unroll
            for (int i = 0; i < PIECES; i++)
                if constexpr (ONCE)
                    S[i][e] += fmaf(k[i], u, S[i][e] * decay[i]);
                else
                    S[i][e] = fmaf(k[i], u, S[i][e]);
        }
        int column = threadIdx.x;
        if (out && column < COLUMNS && column < columns) {
            float sum = 0, y = 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++)
                sum += all[0][i][column], y += all[1][i][column];
            float u = factor.k * token.beta * (token.v[column] - factor.k * sum);
            store_float(out, dtype, column, factor.q * fmaf(products.kq, u, y));
        }
    }
};

/* ---- Launch --------------------------------------------------------------------------------------- */

inline Rows rows_of(const kda_decode *d, const kda_tensor &t) {
    return {t.data, d->tokens.cu_seqlens.data ? t.stride[1] : t.stride[0], t.stride[1], t.stride[2], t.dtype};
}

inline const int32_t *elements(const kda_tensor &t) { return reinterpret_cast<const int32_t *>(t.data); }

inline Decode shorten(const kda_decode *d) {
    const kda_tokens &p = d->tokens;
    int64_t group = p.value_heads / p.heads;
    Decode s = {};
    s.state_indices = elements(d->state_indices);
    s.index_stride = d->state_indices.stride[0] / 4, s.column_stride = d->state_indices.stride[1] / 4;
    s.num_accepted_tokens = elements(d->num_accepted_tokens);
    s.num_accepted_stride = d->num_accepted_tokens.stride[0] / 4;
    s.accepted = elements(d->accepted), s.accepted_stride = d->accepted.stride[0] / 4;
    s.has_initial_state = d->has_initial_state.data, s.has_initial_stride = d->has_initial_state.stride[0];
    s.wide_has_initial = d->has_initial_state.dtype == KDA_I32;
    s.padding_slot = d->has_padding_slot && d->padding_slot <= INT32_MAX ? (int)d->padding_slot : -1;
    s.cu_seqlens = p.cu_seqlens.data, s.cu_stride = p.cu_seqlens.stride[0];
    s.wide_cu = p.cu_seqlens.dtype == KDA_I64;
    s.state = d->state.data, s.state_dtype = d->state.dtype;
    s.slot_stride = d->state.stride[0], s.state_head_stride = d->state.stride[1];
    s.row_stride = d->state.stride[2], s.slots = (int)kda_min64(d->state.shape[0], INT32_MAX);
    s.tokens = (int)p.tokens, s.max_tokens = (int)d->max_tokens;
    s.columns = kda_decode_writes_each(d) ? (int)d->state_indices.shape[1] : 0;
    s.key_dim = (int)p.key_dim, s.value_dim = (int)p.value_dim;
    s.per_group = group > 1 ? (uint32_t)(((INT64_C(1) << 32) + group - 1) / group) : 0;
    s.keep_state = d->keep_state, s.qk_norm = p.qk_norm;
    s.gate = p.gate, s.beta_mode = p.beta_mode, s.lower_bound = p.lower_bound, s.scale = p.scale;
    s.q = rows_of(d, p.q), s.k = rows_of(d, p.k), s.g = rows_of(d, p.g), s.v = rows_of(d, p.v);
    s.beta = rows_of(d, p.beta), s.out = rows_of(d, p.out);
    s.A_log = p.A_log.data, s.A_log_stride = p.A_log.stride[0], s.A_log_dtype = p.A_log.dtype;
    s.dt_bias = p.dt_bias.data, s.dt_bias_stride = p.dt_bias.stride[0], s.dt_bias_dtype = p.dt_bias.dtype;
    return s;
}

/* Calls f(Access(), std::integral_constant<int, KP>()) with what suits the state. */
template <class F> cudaError_t with_access(const kda_decode *d, bool aligned, F f) {
    auto with_key_dim = [&](auto access) {
        return d->tokens.key_dim <= 64    ? f(access, std::integral_constant<int, 64>())
               : d->tokens.key_dim <= 128 ? f(access, std::integral_constant<int, 128>())
                                          : f(access, std::integral_constant<int, 256>());
    };
    if (!aligned)
        return with_key_dim(Elementwise());
    return d->state.dtype == KDA_F32    ? with_key_dim(Aligned<KDA_F32>())
           : d->state.dtype == KDA_BF16 ? with_key_dim(Aligned<KDA_BF16>())
                                        : with_key_dim(Aligned<KDA_F16>());
}

/* May the kernel begin while the work before it in its stream ends? Until wait_for_inputs() it then uses
 * nothing of what memory holds except for hints. wait_for_inputs() lets the next kernel begin as early. */
#if __CUDA_ARCH__ >= 900
constexpr bool BEGINS_EARLY = true;
#else
constexpr bool BEGINS_EARLY = false;
#endif

inline __device__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/* Launches a kernel for all sequences, grid.z of them at once; s is its argument. fixed: bytes of its static
 * shared memory. */
template <class Problem>
cudaError_t launch(void (*kernel)(Problem), Problem s, const kda_decode *d, dim3 grid, int threads, int bytes,
                   int fixed) {
    int major = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d->tokens.device);
    if (!error && bytes + fixed > DEFAULT_SHARED)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    for (int64_t n = 0; !error && n < d->tokens.sequences; n += MAX_GRID_Z) {
        cudaLaunchConfig_t config = {};
        config.gridDim = grid;
        config.gridDim.z = (unsigned)kda_min64(d->tokens.sequences - n, MAX_GRID_Z);
        config.blockDim = (unsigned)threads, config.dynamicSmemBytes = (size_t)bytes;
        config.stream = (cudaStream_t)d->tokens.stream;
        config.attrs = &early, config.numAttrs = major >= 9;
        s.first_sequence = (int)n;
        error = cudaLaunchKernelEx(&config, kernel, s);
    }
    return error;
}

} // namespace decode
} // namespace kda

#endif
