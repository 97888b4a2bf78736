/* SPDX-License-Identifier: MIT */
/* What kernels of plain decode know of a problem beforehand, and what tokens bring to them. */
#ifndef KDA_CUDA_SM80_DECODE_INPUTS_CUH
#define KDA_CUDA_SM80_DECODE_INPUTS_CUH

#include "cuda/sm80/decode.cuh"

#include <limits.h>

namespace kda {
namespace decode {

/* A thread's 16-byte pieces of the state: enough on their way to keep memory busy; or few, which take less time
 * where there are few states. */
constexpr int LARGE = 8, SMALL = 4;

/* ---- What is known beforehand --------------------------------------------------------------------- */

/* What a kernel is made for. GENERAL: any problem. USUAL: the usual one, of which the compiler knows so much
 * that it takes two thirds of the instructions. FEW: that with so few states that the next call's CTAs wait on
 * the same multiprocessors. */
enum Kind { GENERAL, USUAL, FEW };

inline bool near(int64_t stride) { return stride >= 0 && stride <= UINT32_MAX; }

/* Is it bf16, and within 4 GiB? */
inline bool is_near(const Rows &rows, const Decode &d, const kda_decode *full) {
    return rows.dtype == KDA_BF16 && near(rows.position) && near(rows.token) && near(rows.head) &&
           (double)rows.position * (double)(full->tokens.batches * full->tokens.tokens) +
                   (double)rows.token * d.max_tokens + (double)rows.head * (double)full->tokens.value_heads <=
               (double)UINT32_MAX;
}

/* Tensors of tokens as above beside a state of whole tiles, and with one token one for each sequence. */
template <class Tile> bool is_usual(const Decode &d, const kda_decode *full) {
    bool plain = !d.num_accepted_tokens && !d.accepted && !d.cu_seqlens && !d.columns;
    for (const Rows *rows : {&d.q, &d.k, &d.g, &d.v, &d.beta, &d.out})
        if ((rows != &d.out || d.out.data) && !is_near(*rows, d, full))
            return false;
    return (plain || d.max_tokens > 1) && d.key_dim == Tile::KP && d.value_dim % Tile::COLUMNS == 0 &&
           (!d.A_log || d.A_log_dtype == KDA_F32) && (!d.dt_bias || d.dt_bias_dtype == KDA_F32) &&
           near(d.A_log_stride) && near(d.dt_bias_stride) && near(d.index_stride) &&
           near(d.state_head_stride) && near(d.row_stride);
}

inline __device__ void make_near(int64_t &stride) { stride = (uint32_t)stride; }

template <class Tile, int BATCH, Kind kind>
__device__ __forceinline__ Decode what_is_known(const Decode &given) {
    Decode d = given;
    if (BATCH == 1)
        d.max_tokens = 1;
    if (kind == GENERAL)
        return d;
    if (BATCH == 1)
        d.num_accepted_tokens = d.accepted = nullptr, d.cu_seqlens = nullptr, d.columns = 0;
    d.key_dim = Tile::KP, d.value_dim = INT_MAX; /* columns enough */
    d.q.dtype = d.k.dtype = d.g.dtype = d.v.dtype = d.beta.dtype = d.out.dtype = KDA_BF16;
    d.A_log_dtype = d.dt_bias_dtype = KDA_F32;
    make_near(d.A_log_stride), make_near(d.dt_bias_stride), make_near(d.index_stride);
    make_near(d.state_head_stride), make_near(d.row_stride);
    return d;
}

template <Kind kind> __device__ char *find_row_of(const Rows &rows, const Sequence &s, int t, int head) {
    if (kind == GENERAL)
        return find_row(rows, s, t, head);
    return rows.data + ((unsigned)s.position * (unsigned)rows.position + (unsigned)head * (unsigned)rows.head +
                        (unsigned)t * (unsigned)rows.token);
}

/* ---- What tokens bring ---------------------------------------------------------------------------- */

/* A thread's part of what some tokens bring, on its way: channels of g, channels of q and k, a column of v, a
 * token's beta. What does not exist is loaded from where the last one is, so that no load waits for a
 * decision. */
template <class Tile, int BATCH, Kind kind> struct Inputs {
    static constexpr int CHANNELS = (Tile::KP + Tile::THREADS - 1) / Tile::THREADS;
    /* With enough threads, those that have q and k do not have g as well. */
    static constexpr bool SHARED_OUT = Tile::THREADS >= 2 * Tile::KP;
    static constexpr int GATES = SHARED_OUT ? Tile::KP : 0; /* first thread that has channels of g */
    static constexpr int VALUES =
        Tile::COLUMNS > Tile::KP ? Tile::COLUMNS : 0; /* threads that have v, if they do not have q */
    static constexpr bool DECAYS_KEYS = Tile::ONCE && !SHARED_OUT; /* as a thread has both */
    static_assert(Tile::COLUMNS <= Tile::THREADS && BATCH <= Tile::COLUMNS);
    uint32_t q[CHANNELS][BATCH], k[CHANNELS][BATCH], g[CHANNELS][BATCH], v[BATCH];
    uint32_t bias[CHANNELS], beta[1], A_log[1];

    /* If the compiler knew that these are 0, it would convert loaded values at once and wait for them there. */
    __device__ Inputs() {
        uint32_t zero = some_zero();
        beta[0] = A_log[0] = zero;
#pragma unroll
        for (int t = 0; t < BATCH; t++)
            v[t] = zero;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            bias[i] = zero;
#pragma unroll
            for (int t = 0; t < BATCH; t++)
                q[i][t] = k[i][t] = g[i][t] = zero;
        }
    }

    __device__ static int channel(int i) { return threadIdx.x + i * Tile::THREADS; }
    __device__ static int gate(int i) { return threadIdx.x - GATES + i * Tile::THREADS; }
    __device__ static bool has_keys() { return !SHARED_OUT || threadIdx.x < Tile::KP; }
    __device__ static bool has_gates() {
        return !SHARED_OUT || (threadIdx.x >= GATES && threadIdx.x < GATES + Tile::KP);
    }

    /* Loads the tokens from token `begin` of the sequence on; if there is none, one that can be read. columns:
     * how many of v exist from the tile's first on. */
    __device__ void load(const Decode &d, const Sequence &s, int head, int column, int columns, int begin) {
        int count = max(min(BATCH, s.length - begin), 1);
        if (has_gates())
            load_gates(d, s, head, begin, count);
        if (has_keys())
            load_keys(d, s, head, begin, count);
        if (has_keys() || (int)threadIdx.x < VALUES) /* one condition: with two, loads would come later */
            load_values(d, s, head, column, columns, begin, count);
    }

    __device__ void load_gates(const Decode &d, const Sequence &s, int head, int begin, int count) {
        const char *row = find_row_of<kind>(d.g, s, begin, head);
#pragma unroll
        for (int t = 0; t < BATCH; t++) {
            if (t >= count)
                break;
#pragma unroll
            for (int i = 0; i < CHANNELS; i++)
                g[i][t] = load_now(row, d.g.dtype, min(gate(i), d.key_dim - 1));
            row += d.g.token;
        }
        if (d.A_log)
            A_log[0] = load_now(d.A_log + times(head, d.A_log_stride), d.A_log_dtype, 0);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++)
            if (d.dt_bias)
                bias[i] = load_now(d.dt_bias + times(head, d.dt_bias_stride), d.dt_bias_dtype,
                                   min(gate(i), d.key_dim - 1));
    }

    __device__ void load_keys(const Decode &d, const Sequence &s, int head, int begin, int count) {
        int key_head = d.per_group ? (int)__umulhi(head, d.per_group) : head;
        const char *q_row = find_row_of<kind>(d.q, s, begin, key_head),
                   *k_row = find_row_of<kind>(d.k, s, begin, key_head);
#pragma unroll
        for (int t = 0; t < BATCH; t++) {
            if (t >= count)
                break;
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) {
                int c = min(channel(i), d.key_dim - 1);
                k[i][t] = load_now(k_row, d.k.dtype, c);
                q[i][t] = load_now(q_row, d.q.dtype, c);
            }
            q_row += d.q.token, k_row += d.k.token;
        }
    }

    __device__ void load_values(const Decode &d, const Sequence &s, int head, int column, int columns,
                                int begin, int count) {
        const char *row = find_row_of<kind>(d.v, s, begin, head) + times(column, size_of(d.v.dtype));
        int value = min((int)threadIdx.x, min(Tile::COLUMNS, columns) - 1);
#pragma unroll
        for (int t = 0; t < BATCH; t++) {
            if (t >= count)
                break;
            v[t] = load_now(row, d.v.dtype, value);
            row += d.v.token;
        }
        int token = begin + min((int)threadIdx.x, count - 1);
        beta[0] = load_now(find_row_of<kind>(d.beta, s, token, head), d.beta.dtype, 0);
    }

    /* Each thread writes what it has loaded to shared memory. Returns whether rows that it has a part of are to
     * be normalised beforehand. */
    __device__ bool prepare(const Decode &d, int count, typename Tile::Token *tokens) {
        if (has_gates())
            prepare_gates(d, count, tokens);
        if (threadIdx.x < Tile::COLUMNS)
            prepare_values(d, count, tokens);
        return has_keys() && prepare_keys(d, count, tokens);
    }

    __device__ void prepare_gates(const Decode &d, int count, typename Tile::Token *tokens) {
        float biases[CHANNELS], log_A[1];
        from_raw(bias, d.dt_bias_dtype, biases);
        from_raw(A_log, d.A_log_dtype, log_A);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            int c = gate(i);
            float x[BATCH];
            from_raw(g[i], d.g.dtype, x);
            find_decays(d, biases[i], log_A[0], x);
            for_each_token(count, [&](int t) { tokens[t].decay[Tile::index(c)] = c < d.key_dim ? x[t] : 0.f; });
        }
    }

    __device__ void prepare_values(const Decode &d, int count, typename Tile::Token *tokens) {
        float b[1], values[BATCH];
        from_raw(beta, d.beta.dtype, b);
        if (threadIdx.x < count)
            tokens[threadIdx.x].beta = find_step(d, b[0]);
        from_raw(v, d.v.dtype, values);
        for_each_token(count, [&](int t) { tokens[t].v[threadIdx.x] = values[t]; });
    }

    __device__ bool prepare_keys(const Decode &d, int count, typename Tile::Token *tokens) {
        Products products[BATCH] = {};
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            int c = channel(i);
            bool real = c < d.key_dim;
            unsigned at = Tile::index(c);
            float x[BATCH], keys[BATCH];
            from_raw(q[i], d.q.dtype, x);
            from_raw(k[i], d.k.dtype, keys);
#pragma unroll
            for (int t = 0; t < BATCH; t++) {
                x[t] = real ? x[t] : 0.f, keys[t] = real ? keys[t] : 0.f;
                products[t].add(keys[t], x[t]);
            }
            for_each_token(count, [&](int t) {
                tokens[t].q[at] = x[t], tokens[t].k[at] = keys[t];
                if constexpr (DECAYS_KEYS) {
                    float decay = tokens[t].decay[at];
                    tokens[t].dq[at] = fmaf(x[t], decay, x[t]),
                    tokens[t].dk[at] = fmaf(keys[t], decay, keys[t]);
                }
            });
        }
        bool large = false;
#pragma unroll
        for (int t = 0; t < BATCH; t++)
            large = large || are_large(products[t]);
        store_products(products, threadIdx.x / 32, count, tokens);
        return large && d.qk_norm;
    }

    template <class F> __device__ static void for_each_token(int count, F f) {
#pragma unroll
        for (int t = 0; t < BATCH; t++)
            if (t < count)
                f(t);
    }
};

} // namespace decode
} // namespace kda

#endif
