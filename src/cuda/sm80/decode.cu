/* SPDX-License-Identifier: MIT */
/*
 * Decode alone. One CTA works some columns of V of one state.
 *
 * With few states the time is that of one CTA from its first instruction to its last: addresses are made of few products,
 * and conditions are on instructions instead of branches around them.
 */
#include "cuda/sm80/decode.cuh"
#include "cuda/sm80/kernels.h"

#include <limits.h>
#include <string.h>

namespace kda {
namespace decode {
namespace {

/* Pieces of 16 bytes of the state of a thread: enough under way to fill the memory's pipes; or few, for a short way when there
 * are few states. */
constexpr int LARGE = 8, SMALL = 4;

/* ---- What is known beforehand --------------------------------------------------------------------- */

/* What a kernel is made for: any problem; the usual one, of which the compiler knows so much that it takes two thirds of the
 * instructions; that with so few states that the next call's CTAs wait on the same multiprocessors. */
enum Kind { GENERAL, USUAL, FEW };

bool near(int64_t stride) { return stride >= 0 && stride <= UINT32_MAX; }

/* bf16, and within 4 GiB? */
bool is_near(const Rows &rows, const Decode &d, const kda_decode *full) {
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

/* A thread's part of what some tokens bring, under way: channels of g, and of q and k, a column of v, a token of beta. What
 * does not exist is loaded from where the last one is, so that no load waits for a decision. */
template <class Tile, int BATCH, Kind kind> struct Inputs {
    static constexpr int CHANNELS = (Tile::KP + Tile::THREADS - 1) / Tile::THREADS;
    /* With threads enough, those that have q and k do not have g as well. */
    static constexpr bool SHARED_OUT = Tile::THREADS >= 2 * Tile::KP;
    static constexpr int GATES = SHARED_OUT ? Tile::KP : 0; /* first thread that has channels of g */
    static constexpr int VALUES =
        Tile::COLUMNS > Tile::KP ? Tile::COLUMNS : 0; /* threads that have v, if they do not have q */
    static_assert(Tile::COLUMNS <= Tile::THREADS && BATCH <= Tile::COLUMNS);
    uint32_t q[CHANNELS][BATCH], k[CHANNELS][BATCH], g[CHANNELS][BATCH], v[BATCH];
    uint32_t bias[CHANNELS], beta[1], A_log[1];

    /* Were they known to be 0, what is loaded would be converted, and waited for, where it is loaded. */
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

    /* Of the tokens from token `begin` of the sequence on; if there is none, of one that can be read. columns: of v that there
     * are from the tile's first on. */
    __device__ void load(const Decode &d, const Sequence &s, int head, int column, int columns, int begin) {
        int count = max(min(BATCH, s.length - begin), 1);
        if (has_gates())
            load_gates(d, s, head, begin, count);
        if (has_keys())
            load_keys(d, s, head, begin, count);
        if (has_keys() || (int)threadIdx.x < VALUES) /* and not each of them by itself: it would be later */
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
        int value = min((int)threadIdx.x, columns - 1);
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

    /* Writes what has arrived to shared memory; each thread what it has loaded. */
    __device__ void prepare(const Decode &d, int count, typename Tile::Token *tokens) {
        if (has_gates())
            prepare_gates(d, count, tokens);
        if (threadIdx.x < Tile::COLUMNS)
            prepare_values(d, count, tokens);
        if (has_keys())
            prepare_keys(d, count, tokens);
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
            for_each_token(count, [&](int t) { tokens[t].decay[Tile::place(c)] = c < d.key_dim ? x[t] : 0.f; });
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

    __device__ void prepare_keys(const Decode &d, int count, typename Tile::Token *tokens) {
        Products products[BATCH] = {};
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            int c = channel(i);
            bool real = c < d.key_dim;
            unsigned at = Tile::place(c);
            float x[BATCH], keys[BATCH];
            from_raw(q[i], d.q.dtype, x);
            from_raw(k[i], d.k.dtype, keys);
#pragma unroll
            for (int t = 0; t < BATCH; t++) {
                x[t] = real ? x[t] : 0.f, keys[t] = real ? keys[t] : 0.f;
                products[t].add(keys[t], x[t]);
            }
            for_each_token(count, [&](int t) { tokens[t].q[at] = x[t], tokens[t].k[at] = keys[t]; });
        }
        store_products(products, threadIdx.x / 32, count, tokens);
    }

    template <class F> __device__ static void for_each_token(int count, F f) {
#pragma unroll
        for (int t = 0; t < BATCH; t++)
            if (t < count)
                f(t);
    }
};

/* ---- The kernel ----------------------------------------------------------------------------------- */

/* CTAs of a multiprocessor, as registers allow: threads with 16-bit states hold twice as many elements, and several tokens
 * under way take some too. FEW: one, and that of the next call. */
template <class Tile, int BATCH, Kind kind> constexpr int resident() {
    int threads = Tile::PIECES == SMALL ? 1024 : Tile::VEC == 8 || Tile::KP > 128 ? 512 : BATCH > 1 ? 640 : 768;
    return kind == FEW ? 2 : threads / Tile::THREADS;
}

/* FEW: where to read the state is found out before the kernel may know it, while the work before it ends. That is a hint,
 * which brings it into the cache and lets its loads be the first; the slot as it is then is compared with it. */
template <class Tile, int BATCH, Kind kind>
__global__ void __launch_bounds__(Tile::THREADS, resident<Tile, BATCH, kind>())
    run(const __grid_constant__ Decode given) {
    extern __shared__ __align__(16) char memory[];
    typename Tile::Token *tokens = reinterpret_cast<typename Tile::Token *>(memory); /* max_tokens of them */
    __shared__ typename Tile::Scratch scratch;
    constexpr bool HINT = kind == FEW && BEGINS_EARLY;
    const Decode d = what_is_known<Tile, BATCH, kind>(given);
    int n = d.first_sequence + blockIdx.z, head = blockIdx.y, column = blockIdx.x * Tile::COLUMNS;
    int columns = d.value_dim - (kind == GENERAL ? column : 0);
    char *state = d.state + times(head, d.state_head_stride) + Tile::offset(d, column); /* of slot 0 */
    Tile tile;
    Inputs<Tile, BATCH, kind> inputs;
    int hint = 0, index;
    char *at;
    if (HINT) {
        hint = max(in_pool(d, find_read_index(d, n)), 0);
        at = state + times(hint, d.slot_stride);
        Tile::prefetch(d, at);
    }
    wait_for_inputs();
    if (HINT)
        tile.load(d, at, columns);
    else
        index = find_read_index(d, n);
    __syncwarp(); /* or the compiler would ask for it later, and the state waits for it */
    Sequence s = find_sequence(d);
    inputs.load(d, s, head, column, columns, 0); /* before it is known whether there is a state, or a token */
    if (HINT) {
        index = find_read_index(d, n);
    } else {
        /* The warp has asked for all that when it looks at the index: a mere look, at no other lanes', would be moved up. */
        __syncwarp();
        s.slot = in_pool(d, __reduce_max_sync(~0u, index));
        if (s.slot < 0 || s.length < 1)
            return;
        tile.load(d, at = state + times(s.slot, d.slot_stride), columns);
    }
    if (BATCH == 1)
        s.length = 1;
    for (int begin = 0;;) {
        inputs.prepare(d, min(BATCH, s.length - begin), tokens + begin);
        begin += BATCH;
        if (begin >= s.length)
            break;
        inputs.load(d, s, head, column, columns, begin);
    }
    if (HINT) {
        s.slot = in_pool(d, index);
        if (s.slot < 0)
            return;
        if (s.slot != hint)
            tile.load(d, at = state + times(s.slot, d.slot_stride), columns);
    }
    char *out = nullptr;
    if (d.out.data)
        out = find_row_of<kind>(d.out, s, 0, head) + times(column, size_of(d.out.dtype));
    __syncthreads();
    tile.unpack(d);
#pragma unroll 1
    for (int t = 0; t < s.length; t++) {
        tile.step(d, tokens[t], scratch, t, out, d.out.dtype, columns);
        if (out)
            out += d.out.token;
        if (d.columns) { /* a state after every token */
            int slot = find_written_slot(d, s, t);
            if (slot >= 0)
                tile.store(d, state + times(slot, d.slot_stride), columns);
        }
    }
    if (!d.columns && !d.keep_state)
        tile.store(d, at, columns);
}

template <class Tile> int64_t count_parts(const kda_decode *d) {
    return (d->tokens.value_dim + Tile::COLUMNS - 1) / Tile::COLUMNS;
}

template <class Tile, int BATCH, Kind kind> cudaError_t launch_kind(const kda_decode *d, const Decode &s) {
    int bytes = (int)d->max_tokens * (int)sizeof(typename Tile::Token);
    dim3 grid((unsigned)count_parts<Tile>(d), (unsigned)d->tokens.value_heads);
    return launch(run<Tile, BATCH, kind>, s, d, grid, Tile::THREADS, bytes,
                  (int)sizeof(typename Tile::Scratch));
}

/* few: so few states that FEW is wanted, if it is made. */
template <class Tile, int BATCH> cudaError_t launch_tile(const kda_decode *d, bool few) {
    Decode s = shorten(d);
    if constexpr (Tile::KP == 128 && !std::is_same_v<typename Tile::Access, Elementwise>)
        if (is_usual<Tile>(s, d)) {
            if constexpr (Tile::PIECES == SMALL)
                if (few)
                    return launch_kind<Tile, BATCH, FEW>(d, s);
            return launch_kind<Tile, BATCH, USUAL>(d, s);
        }
    return launch_kind<Tile, BATCH, GENERAL>(d, s);
}

/* Small: tiles of small pieces, or void. They are for one token, and so few states that all CTAs run at once. */
template <class Tile, class Small> cudaError_t launch_batch(const kda_decode *d) {
    if constexpr (!std::is_void_v<Small>) {
        int processors = 0;
        cudaError_t error =
            cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, d->tokens.device);
        if (error)
            return error;
        int64_t ctas = count_parts<Small>(d) * d->tokens.value_heads; /* of a sequence; all of them: */
        ctas = d->tokens.sequences > INT_MAX / ctas ? INT_MAX : ctas * d->tokens.sequences;
        if (d->max_tokens == 1 && ctas <= processors * resident<Small, 1, USUAL>())
            return launch_tile<Small, 1>(d, ctas <= processors);
    }
    return d->max_tokens == 1 ? launch_tile<Tile, 1>(d, false) : launch_tile<Tile, 4>(d, false);
}

template <class Access, int KP> cudaError_t launch_layout(const kda_decode *d) {
    constexpr bool HAS_SMALL = KP <= 128 && !std::is_same_v<Access, Elementwise>;
    using SmallVFirst = TileVFirst<Access, HAS_SMALL ? KP : 64, 256, SMALL>;
    using SmallKFirst = TileKFirst<Access, HAS_SMALL ? KP : 64, KP * LANES / SMALL, SMALL>;
    if (d->tokens.state_layout == FLASH_KDA_STATE_V_FIRST)
        return launch_batch<TileVFirst<Access, KP, 128, LARGE>,
                            std::conditional_t<HAS_SMALL, SmallVFirst, void>>(d);
    return launch_batch<TileKFirst<Access, KP, KP * LANES / LARGE, LARGE>,
                        std::conditional_t<HAS_SMALL, SmallKFirst, void>>(d);
}

} // namespace
} // namespace decode
} // namespace kda

cudaError_t kda_sm80_decode(const kda_decode *d, bool aligned) {
    using namespace kda::decode;
    return with_access(d, aligned, [&](auto access, auto key_dim) {
        return launch_layout<decltype(access), decltype(key_dim)::value>(d);
    });
}
