/* SPDX-License-Identifier: MIT */
/*
 * Decode: a state is read once, taken through the few tokens of its sequence in registers, and written back. Nothing
 * but the speed of memory should matter, so a thread has PIECES loads of 16 bytes under way before it waits, and eight
 * lanes share a line of 128 bytes.
 *
 * One CTA works some columns of V of one state. What tokens bring is prepared once for all of its threads, while the
 * state is on its way: every channel's decay, and k and q as given. Their norms are sums over the channels, which are
 * not waited for: with rk = 1 / |k| and rq = scale / |q|,
 *     S <- diag(exp(a)) S     u = rk beta (v - rk S^T k)     o = rq (S^T q + (k . q) u)     S <- S + k u^T
 *
 * With few states the time is that of one CTA from its first instruction to its last: addresses are made of few products,
 * and conditions are on instructions instead of branches around them.
 */
#include "cuda/chain.cuh"
#include "cuda/ptx/stream.cuh"
#include "cuda/sm80/kernels.h"

namespace kda {
namespace {

constexpr int PIECES = 8; /* of 16 bytes of the state, of one thread */
constexpr int LANES = 8;  /* that share a line of 128 bytes */
constexpr int MAX_GRID_Z = 65535;
constexpr int DEFAULT_SHARED = 48 << 10; /* bytes of shared memory that need no leave */

/* ---- The problem in short ------------------------------------------------------------------------- */

/* Row (t, h) of a sequence lies at data + position * stride + t * token + h * head. */
struct Rows {
    char *data;
    int64_t position, token, head; /* strides */
    kda_dtype dtype;
};

/* What struct kda_decode says, in a fifth of its bytes: a CTA's first steps wait for them. */
struct Decode {
    const int32_t *state_indices, *num_accepted_tokens, *accepted; /* NULL: not given; strides in elements */
    int64_t index_stride, column_stride, num_accepted_stride, accepted_stride;
    const char *cu_seqlens;
    int64_t cu_stride;
    char *state;
    int64_t slot_stride, state_head_stride, row_stride;
    int first_sequence; /* of this launch */
    int slots, tokens, max_tokens;
    int columns; /* of state_indices, if a state is written after every token */
    int key_dim, value_dim;
    uint32_t per_group; /* 2^32 / (value heads of a head), rounded up; 0: 2^32 */
    kda_dtype state_dtype;
    bool wide_cu, keep_state, qk_norm;
    flash_kda_gate gate;
    flash_kda_beta beta_mode;
    float lower_bound, scale;
    Rows q, k, g, v, beta, out;
    const char *A_log, *dt_bias; /* of head 0 */
    int64_t A_log_stride, dt_bias_stride;
    kda_dtype A_log_dtype, dt_bias_dtype;
};

__device__ int size_of(kda_dtype dtype) { return dtype == KDA_F32 ? 4 : 2; }

__device__ int64_t times(int index, int64_t stride) {
    return (int64_t)((uint64_t)(unsigned)index * (uint64_t)stride);
}

struct Sequence {
    int n, position; /* position: n or, where sequences are packed, its first token */
    int length, slot;
};

__device__ int find_slot(const Decode &d, int n, int column) {
    int slot = n;
    if (d.state_indices)
        slot = d.state_indices[times(n, d.index_stride) + times(column, d.column_stride)];
    return slot < d.slots ? slot : -1;
}

__device__ int token_offset(const Decode &d, int n) {
    const char *at = d.cu_seqlens + times(n, d.cu_stride);
    int64_t token = d.wide_cu ? *reinterpret_cast<const int64_t *>(at) : *reinterpret_cast<const int32_t *>(at);
    return (int)kda_clamp(token, 0, d.tokens);
}

/* kda_decode_sequence. */
__device__ Sequence find_sequence(const Decode &d) {
    Sequence s;
    s.n = s.position = d.first_sequence + blockIdx.z, s.length = d.max_tokens;
    int column = 0;
    if (d.num_accepted_tokens)
        column = max(min(d.num_accepted_tokens[times(s.n, d.num_accepted_stride)], d.columns), 1) - 1;
    s.slot = find_slot(d, s.n, column);
    __syncwarp(); /* or the compiler would ask for the slot later, and the state waits for it */
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
__device__ int find_written_slot(const Decode &d, const Sequence &s, int t) {
    if (d.keep_state)
        return -1;
    if (d.columns)
        return t < d.columns ? find_slot(d, s.n, t) : -1;
    return t + 1 == s.length ? s.slot : -1;
}

__device__ char *find_row(const Rows &rows, const Sequence &s, int t, int head) {
    return rows.data + times(s.position, rows.position) + times(head, rows.head) + times(t, rows.token);
}

/* An element as its bits, so that many are under way before the first is looked at. */
__device__ uint32_t load_raw(const char *row, kda_dtype dtype, int i) {
    const char *at = row + (unsigned)(i * size_of(dtype));
    return dtype == KDA_F32 ? *reinterpret_cast<const uint32_t *>(at) : *reinterpret_cast<const uint16_t *>(at);
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

/* VEC neighbours in memory: 16 bytes, aligned; rows end at a whole piece. What is loaded stays packed in the first
 * registers of its piece until it is unpacked there, so that nothing waits for it before. */
template <kda_dtype DTYPE> struct Aligned {
    static constexpr int VEC = DTYPE == KDA_F32 ? 4 : 8;

    __device__ static int bytes(kda_dtype) { return 16; }
    /* Elements i .. i + VEC - 1, at `at`, of a row of `end` elements; 0 behind its end. */
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

/* What a token brings, in shared memory. k and q are as given; channels that do not exist are 0. */
template <int KP, int COLUMNS> struct Token {
    alignas(16) float decay[KP]; /* exp(a) - 1: decay close to 1 would lose its digits otherwise */
    alignas(16) float k[KP];
    alignas(16) float q[KP];
    alignas(16) float v[COLUMNS];
    float beta;
};

/* Sums over channels: k . k, q . q, k . q. */
struct Products {
    float kk, qq, kq;

    __device__ void add(float k, float q) { kk = fmaf(k, k, kk), qq = fmaf(q, q, qq), kq = fmaf(k, q, kq); }
};

/* 1 / |k| and scale / |q|. */
struct Factors {
    float k, q;

    __device__ Factors(const Decode &d, Products sums)
        : k(d.qk_norm ? rsqrtf(sums.kk + 1e-6f) : 1.f),
          q(d.qk_norm ? rsqrtf(sums.qq + 1e-6f) * d.scale : d.scale) {}
};

/* Sums COUNT values over the lanes that differ in bits BIT .. LAST: halves of the values are exchanged for halves of the
 * lanes while there are any, so that a lane ends with the values that its bits name, the highest first. */
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

__device__ float logistic(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

/* A channel's log decays of some tokens, in place of g. A is exp(A_log). */
template <flash_kda_gate gate, int N>
__device__ void find_log_decays(const Decode &d, float dt_bias, float A, float (&g)[N]) {
#pragma unroll
    for (int t = 0; t < N; t++) {
        float x = g[t] + dt_bias;
        g[t] = gate == FLASH_KDA_GATE_SOFTPLUS ? -A * (fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))))
                                               : d.lower_bound * logistic(A * x);
    }
}

/* A thread's part of what some tokens bring, under way: channels of q, k and g, a column of v, a token of beta. What does
 * not exist is loaded from where the last one is, so that no load waits for a decision. */
template <class Tile> struct Inputs {
    static constexpr int BATCH = Tile::BATCH, CHANNELS = (Tile::KP + Tile::THREADS - 1) / Tile::THREADS;
    static_assert(Tile::COLUMNS <= Tile::THREADS && BATCH <= Tile::THREADS);
    uint32_t q[CHANNELS][BATCH] = {}, k[CHANNELS][BATCH] = {}, g[CHANNELS][BATCH] = {}, v[BATCH] = {};
    uint32_t bias[CHANNELS] = {}, beta[1], A_log[1] = {};

    __device__ static int channel(int i) { return threadIdx.x + i * Tile::THREADS; }

    /* Of the tokens from token `begin` of the sequence on; if there is none, of one that can be read. */
    __device__ void load(const Decode &d, const Sequence &s, int head, int column, int begin) {
        int count = max(min(BATCH, s.length - begin), 1);
        int value = min((int)threadIdx.x, d.value_dim - column - 1);
        int key_head = d.per_group ? (int)__umulhi(head, d.per_group) : head;
        const char *q_row = find_row(d.q, s, begin, key_head), *k_row = find_row(d.k, s, begin, key_head);
        const char *g_row = find_row(d.g, s, begin, head);
        const char *v_row = find_row(d.v, s, begin, head) + times(column, size_of(d.v.dtype));
#pragma unroll
        for (int t = 0; t < BATCH; t++) {
            if (t >= count)
                break;
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) {
                int c = min(channel(i), d.key_dim - 1);
                g[i][t] = load_raw(g_row, d.g.dtype, c);
                k[i][t] = load_raw(k_row, d.k.dtype, c);
                q[i][t] = load_raw(q_row, d.q.dtype, c);
            }
            v[t] = load_raw(v_row, d.v.dtype, value);
            q_row += d.q.token, k_row += d.k.token, g_row += d.g.token, v_row += d.v.token;
        }
        beta[0] =
            load_raw(find_row(d.beta, s, begin + min((int)threadIdx.x, count - 1), head), d.beta.dtype, 0);
        if (d.A_log)
            A_log[0] = load_raw(d.A_log + times(head, d.A_log_stride), d.A_log_dtype, 0);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++)
            if (d.dt_bias)
                bias[i] = load_raw(d.dt_bias + times(head, d.dt_bias_stride), d.dt_bias_dtype,
                                   min(channel(i), d.key_dim - 1));
    }

    /* Writes what has arrived to shared memory; each thread what it has loaded. */
    __device__ void prepare(const Decode &d, int count, typename Tile::Token *tokens) {
        float b[1], biases[CHANNELS], log_A[1];
        from_raw(beta, d.beta.dtype, b);
        from_raw(bias, d.dt_bias_dtype, biases);
        from_raw(A_log, d.A_log_dtype, log_A);
        if (threadIdx.x < count) {
            if (d.beta_mode != FLASH_KDA_BETA_GIVEN)
                b[0] = logistic(b[0]) * (d.beta_mode == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.f : 1.f);
            tokens[threadIdx.x].beta = b[0];
        }
        float values[BATCH];
        from_raw(v, d.v.dtype, values);
        if (threadIdx.x < Tile::COLUMNS)
            for_each_token(count, [&](int t) { tokens[t].v[threadIdx.x] = values[t]; });
        float A = fminf(fmaxf(expf(log_A[0]), 1e-30f), 1e38f); /* within what makes no NaN of any g */
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            int c = channel(i);
            bool real = c < d.key_dim;
            if (c >= Tile::KP)
                break;
            unsigned at = Tile::place(c);
            float x[BATCH];
            from_raw(q[i], d.q.dtype, x);
            for_each_token(count, [&](int t) { tokens[t].q[at] = real ? x[t] : 0.f; });
            from_raw(k[i], d.k.dtype, x);
            for_each_token(count, [&](int t) { tokens[t].k[at] = real ? x[t] : 0.f; });
            from_raw(g[i], d.g.dtype, x);
            if (d.gate == FLASH_KDA_GATE_SOFTPLUS)
                find_log_decays<FLASH_KDA_GATE_SOFTPLUS>(d, biases[i], A, x);
            else if (d.gate == FLASH_KDA_GATE_SIGMOID)
                find_log_decays<FLASH_KDA_GATE_SIGMOID>(d, biases[i], A, x);
#pragma unroll
            for (int t = 0; t < BATCH; t++)
                x[t] = real ? expm1f(x[t]) : 0.f;
            for_each_token(count, [&](int t) { tokens[t].decay[at] = x[t]; });
        }
    }

    template <class F> __device__ static void for_each_token(int count, F f) {
#pragma unroll
        for (int t = 0; t < BATCH; t++)
            if (t < count)
                f(t);
    }
};

template <int N> __device__ void load_shared(const float *from, float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
        *reinterpret_cast<float4 *>(&x[i]) = *reinterpret_cast<const float4 *>(from + i);
}

/* ---- Tiles ---------------------------------------------------------------------------------------- */

/* V first: eight lanes share a row of K channels, a thread has ROWS rows. */
template <class Access, int KP_, int BATCH_> struct TileVFirst {
    static constexpr int KP = KP_, BATCH = BATCH_, VEC = Access::VEC, WARPS = 4, THREADS = WARPS * 32;
    static constexpr int ACROSS = KP / (LANES * VEC); /* pieces of a row that a thread has */
    static constexpr int ROWS = PIECES / ACROSS, COLUMNS = ROWS * THREADS / LANES;
    static constexpr int STEP = 32 / LANES; /* rows from one of a thread's rows to the next */
    using Token = kda::Token<KP, COLUMNS>;
    struct Scratch {};
    float S[ROWS][ACROSS][VEC];

    /* Where channel c stands in shared memory: what eight lanes read at once is neighbours. */
    __device__ static unsigned place(unsigned c) {
        return (c / (LANES * VEC) * (VEC / 4) + c % VEC / 4) * (LANES * 4) + c / VEC % LANES * 4 + c % 4;
    }
    __device__ static int row(int i) {
        return threadIdx.x / 32 * (STEP * ROWS) + i * STEP + threadIdx.x % 32 / LANES;
    }
    __device__ static int channel(int j) { return (j * LANES + threadIdx.x % LANES) * VEC; }

    /* Bytes from a state to the thread's first piece of the tile that begins at a column. */
    __device__ static int64_t offset(const Decode &d, int column) {
        return times(column + row(0), d.row_stride) + threadIdx.x % LANES * Access::bytes(d.state_dtype);
    }
    /* state: at its offset, with `columns` columns from the tile's first on. */
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

    /* One token; out: its row from the tile's first column on, or NULL. */
    __device__ void step(const Decode &d, const Token &token, Scratch &, int, char *out, int columns) {
        float w[ROWS] = {}, y[ROWS] = {}, k[ACROSS][VEC];
        Products sums = {};
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int part = 0; part < VEC; part += 4) {
                unsigned at = place(channel(j) + part);
                float decay[4], keys[4], q[4];
                load_shared(&token.decay[at], decay);
                load_shared(&token.k[at], keys);
                load_shared(&token.q[at], q);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    k[j][part + e] = keys[e];
                    sums.add(keys[e], q[e]);
#pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        float &s = S[i][j][part + e];
                        s = fmaf(s, decay[e], s);
                        w[i] = fmaf(s, keys[e], w[i]);
                        y[i] = fmaf(s, q[e], y[i]);
                    }
                }
            }
#pragma unroll
        for (int bit = LANES / 2; bit > 0; bit /= 2) {
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                w[i] += __shfl_xor_sync(~0u, w[i], bit);
            sums.kk += __shfl_xor_sync(~0u, sums.kk, bit);
            sums.qq += __shfl_xor_sync(~0u, sums.qq, bit);
            sums.kq += __shfl_xor_sync(~0u, sums.kq, bit);
        }
        sum_over_lanes<ROWS, LANES / 2, 1>(y);
        Factors factor(d, sums);
        constexpr int SHARE = LANES / ROWS; /* lanes that end with the same row of y */
        int own = threadIdx.x % LANES / SHARE;
        float own_u = 0;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            float u = factor.k * token.beta * (token.v[row(i)] - factor.k * w[i]);
            own_u = own == i ? u : own_u;
#pragma unroll
            for (int j = 0; j < ACROSS; j++)
#pragma unroll
                for (int e = 0; e < VEC; e++)
                    S[i][j][e] = fmaf(k[j][e], u, S[i][j][e]);
        }
        if (out && threadIdx.x % SHARE == 0 && row(own) < columns)
            store_float(out, d.out.dtype, row(own), factor.q * fmaf(sums.kq, own_u, y[0]));
    }
};

/* K first: eight lanes share a line of columns, a thread has VEC columns of PIECES channels. */
template <class Access, int KP_, int BATCH_> struct TileKFirst {
    static constexpr int KP = KP_, BATCH = BATCH_, VEC = Access::VEC;
    static constexpr int THREADS = KP / PIECES * LANES, WARPS = THREADS / 32, COLUMNS = LANES * VEC;
    using Token = kda::Token<KP, COLUMNS>;
    /* Sums over a warp's channels. Every other token has its own, so that a step waits only once. */
    struct Scratch {
        alignas(16) float sums[2][2][WARPS][COLUMNS]; /* S^T k, then S^T q */
        float4 products[2][WARPS];
    };
    float S[PIECES][VEC];

    __device__ static unsigned place(unsigned c) { return c; }
    __device__ static int channel(int i) { return (int)threadIdx.x / LANES * PIECES + i; }
    __device__ static int first_column() { return threadIdx.x % LANES * VEC; }

    __device__ static int64_t offset(const Decode &d, int column) {
        return times(channel(0), d.row_stride) + times(column + first_column(), size_of(d.state_dtype));
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

    __device__ void step(const Decode &d, const Token &token, Scratch &scratch, int t, char *out, int columns) {
        float decay[PIECES], k[PIECES], q[PIECES], sums[2 * VEC] = {};
        load_shared(&token.decay[channel(0)], decay);
        load_shared(&token.k[channel(0)], k);
        load_shared(&token.q[channel(0)], q);
#pragma unroll
        for (int i = 0; i < PIECES; i++)
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                float &s = S[i][e];
                s = fmaf(s, decay[i], s);
                sums[e] = fmaf(s, k[i], sums[e]);
                sums[VEC + e] = fmaf(s, q[i], sums[VEC + e]);
            }
        sum_over_lanes<2 * VEC, 16, LANES>(sums);
        Products own = {};
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            own.add(k[i], q[i]);
        float products[4] = {own.kk, own.qq, own.kq, 0};
        sum_over_lanes<4, 16, LANES>(products);
        auto &all = scratch.sums[t % 2];
        auto &all_products = scratch.products[t % 2];
        int lane = threadIdx.x % 32, part = first_column() + lane / 8 % 2 * (VEC / 2);
#pragma unroll
        for (int i = 0; i < VEC / 2; i += 2)
            *reinterpret_cast<float2 *>(&all[lane / 16][threadIdx.x / 32][part + i]) =
                make_float2(sums[i], sums[i + 1]);
        if (lane % LANES == 0)
            reinterpret_cast<float *>(&all_products[threadIdx.x / 32])[lane / LANES] = products[0];
        __syncthreads();
        own = {};
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++)
            own.kk += all_products[warp].x, own.qq += all_products[warp].y, own.kq += all_products[warp].z;
        Factors factor(d, own);
        float w[VEC] = {}, v[VEC];
        load_shared(&token.v[first_column()], v);
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
            float more[VEC];
            load_shared(&all[0][warp][first_column()], more);
#pragma unroll
            for (int e = 0; e < VEC; e++)
                w[e] += more[e];
        }
#pragma unroll
        for (int e = 0; e < VEC; e++) {
            float u = factor.k * token.beta * (v[e] - factor.k * w[e]);
#pragma unroll
            for (int i = 0; i < PIECES; i++)
                S[i][e] = fmaf(k[i], u, S[i][e]);
        }
        int column = threadIdx.x;
        if (out && column < COLUMNS && column < columns) {
            float sum = 0, y = 0;
#pragma unroll
            for (int warp = 0; warp < WARPS; warp++)
                sum += all[0][warp][column], y += all[1][warp][column];
            float u = factor.k * token.beta * (token.v[column] - factor.k * sum);
            store_float(out, d.out.dtype, column, factor.q * fmaf(own.kq, u, y));
        }
    }
};

/* ---- The kernel ----------------------------------------------------------------------------------- */

/* CTAs of a multiprocessor, as registers allow: threads with 16-bit states hold twice as many elements. */
template <class Tile> constexpr int resident() {
    return (Tile::VEC == 4 && Tile::KP <= 128 ? 768 : 512) / Tile::THREADS;
}

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, resident<Tile>()) run(const __grid_constant__ Decode d) {
    constexpr int BATCH = Tile::BATCH;
    extern __shared__ __align__(16) char memory[];
    typename Tile::Token *tokens = reinterpret_cast<typename Tile::Token *>(memory); /* max_tokens of them */
    __shared__ typename Tile::Scratch scratch;
    int head = blockIdx.y, column = blockIdx.x * Tile::COLUMNS, columns = d.value_dim - column;
    Sequence s = find_sequence(d);
    Inputs<Tile> inputs;
    inputs.load(d, s, head, column, 0); /* before it is known whether there is a state, or a token */
    if (s.slot < 0 || s.length < 1)
        return;
    if (BATCH == 1)
        s.length = 1;
    char *state = d.state + times(head, d.state_head_stride) + Tile::offset(d, column); /* of slot 0 */
    Tile tile;
    tile.load(d, state + times(s.slot, d.slot_stride), columns);
    for (int begin = 0;;) {
        inputs.prepare(d, min(BATCH, s.length - begin), tokens + begin);
        begin += BATCH;
        if (begin >= s.length)
            break;
        inputs.load(d, s, head, column, begin);
    }
    __syncthreads();
    tile.unpack(d);
#pragma unroll 1
    for (int t = 0; t < s.length; t++) {
        int slot = find_written_slot(d, s, t);
        char *out = nullptr;
        if (d.out.data)
            out = find_row(d.out, s, t, head) + times(column, size_of(d.out.dtype));
        tile.step(d, tokens[t], scratch, t, out, columns);
        if (slot >= 0)
            tile.store(d, state + times(slot, d.slot_stride), columns);
    }
}

/* ---- Launch --------------------------------------------------------------------------------------- */

Rows rows_of(const kda_decode *d, const kda_tensor &t) {
    return {t.data, d->tokens.cu_seqlens.data ? t.stride[1] : t.stride[0], t.stride[1], t.stride[2], t.dtype};
}

const int32_t *elements(const kda_tensor &t) { return reinterpret_cast<const int32_t *>(t.data); }

Decode shorten(const kda_decode *d) {
    const kda_prefill &p = d->tokens;
    int64_t group = p.value_heads / p.heads;
    Decode s = {};
    s.state_indices = elements(d->state_indices);
    s.index_stride = d->state_indices.stride[0] / 4, s.column_stride = d->state_indices.stride[1] / 4;
    s.num_accepted_tokens = elements(d->num_accepted_tokens);
    s.num_accepted_stride = d->num_accepted_tokens.stride[0] / 4;
    s.accepted = elements(d->accepted), s.accepted_stride = d->accepted.stride[0] / 4;
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

template <class Tile> cudaError_t launch(const kda_decode *d, cudaStream_t stream) {
    Decode s = shorten(d);
    int bytes = s.max_tokens * (int)sizeof(typename Tile::Token);
    unsigned parts = (unsigned)((d->tokens.value_dim + Tile::COLUMNS - 1) / Tile::COLUMNS);
    cudaError_t error = cudaSuccess;
    if (bytes + (int)sizeof(typename Tile::Scratch) > DEFAULT_SHARED)
        error = cudaFuncSetAttribute(run<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    for (int64_t n = 0; !error && n < d->tokens.sequences; n += MAX_GRID_Z) {
        dim3 grid(parts, (unsigned)d->tokens.value_heads,
                  (unsigned)kda_min64(d->tokens.sequences - n, MAX_GRID_Z));
        s.first_sequence = (int)n;
        run<Tile><<<grid, Tile::THREADS, bytes, stream>>>(s);
        error = cudaGetLastError();
    }
    return error;
}

template <class Access, int KP, int BATCH> cudaError_t launch_layout(const kda_decode *d, cudaStream_t stream) {
    return d->tokens.state_layout == FLASH_KDA_STATE_V_FIRST ? launch<TileVFirst<Access, KP, BATCH>>(d, stream)
                                                             : launch<TileKFirst<Access, KP, BATCH>>(d, stream);
}

template <class Access, int KP> cudaError_t launch_batch(const kda_decode *d, cudaStream_t stream) {
    return d->max_tokens == 1 ? launch_layout<Access, KP, 1>(d, stream)
                              : launch_layout<Access, KP, 4>(d, stream);
}

template <class Access> cudaError_t launch_key_dim(const kda_decode *d, cudaStream_t stream) {
    return d->tokens.key_dim <= 64    ? launch_batch<Access, 64>(d, stream)
           : d->tokens.key_dim <= 128 ? launch_batch<Access, 128>(d, stream)
                                      : launch_batch<Access, 256>(d, stream);
}

} // namespace
} // namespace kda

cudaError_t kda_sm80_decode(const kda_decode *d, bool aligned, cudaStream_t stream) {
    using namespace kda;
    if (!aligned)
        return launch_key_dim<Elementwise>(d, stream);
    return d->state.dtype == KDA_F32    ? launch_key_dim<Aligned<KDA_F32>>(d, stream)
           : d->state.dtype == KDA_BF16 ? launch_key_dim<Aligned<KDA_BF16>>(d, stream)
                                        : launch_key_dim<Aligned<KDA_F16>>(d, stream);
}
