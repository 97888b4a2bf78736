/* SPDX-License-Identifier: MIT */
/*
 * Decode alone. One CTA works some columns of V of one state.
 *
 * With few states the time is that of one CTA from its first instruction to its last: addresses are made of few products,
 * and conditions are on instructions instead of branches around them.
 */
#include "cuda/sm80/decode.cuh"
#include "cuda/sm80/kernels.h"

namespace kda {
namespace decode {
namespace {

/* Pieces of 16 bytes of the state of a thread: enough under way to fill the memory's pipes; or few, for a short way when there
 * are few states. */
constexpr int LARGE = 8, SMALL = 4;

/* A thread's part of what some tokens bring, under way: channels of q, k and g, a column of v, a token of beta. What does
 * not exist is loaded from where the last one is, so that no load waits for a decision. */
template <class Tile, int BATCH> struct Inputs {
    static constexpr int CHANNELS = (Tile::KP + Tile::THREADS - 1) / Tile::THREADS;
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
        if (threadIdx.x < count)
            tokens[threadIdx.x].beta = find_step(d, b[0]);
        float values[BATCH];
        from_raw(v, d.v.dtype, values);
        if (threadIdx.x < Tile::COLUMNS)
            for_each_token(count, [&](int t) { tokens[t].v[threadIdx.x] = values[t]; });
        if (threadIdx.x >= Tile::KP)
            return;
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
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            int c = channel(i);
            float x[BATCH];
            from_raw(g[i], d.g.dtype, x);
            find_decays(d, biases[i], log_A[0], x);
            for_each_token(count, [&](int t) { tokens[t].decay[Tile::place(c)] = c < d.key_dim ? x[t] : 0.f; });
        }
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
 * under way take some too. */
template <class Tile, int BATCH> constexpr int resident() {
    int threads = Tile::PIECES == SMALL ? 1024 : Tile::VEC == 8 || Tile::KP > 128 ? 512 : BATCH > 1 ? 640 : 768;
    return threads / Tile::THREADS;
}

template <class Tile, int BATCH>
__global__ void __launch_bounds__(Tile::THREADS, resident<Tile, BATCH>())
    run(const __grid_constant__ Decode d) {
    extern __shared__ __align__(16) char memory[];
    typename Tile::Token *tokens = reinterpret_cast<typename Tile::Token *>(memory); /* max_tokens of them */
    __shared__ typename Tile::Scratch scratch;
    int head = blockIdx.y, column = blockIdx.x * Tile::COLUMNS, columns = d.value_dim - column;
    char *state = d.state + times(head, d.state_head_stride) + Tile::offset(d, column); /* of slot 0 */
    wait_for_inputs();
    Sequence s = find_sequence(d);
    Tile tile;
    if (!d.state_indices) /* the slot need not be waited for */
        tile.load(d, state + times(s.slot, d.slot_stride), columns);
    Inputs<Tile, BATCH> inputs;
    inputs.load(d, s, head, column, 0); /* before it is known whether there is a state, or a token */
    if (s.slot < 0 || s.length < 1)
        return;
    if (BATCH == 1)
        s.length = 1;
    if (d.state_indices)
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
        tile.step(d, tokens[t], scratch, t, out, d.out.dtype, columns);
        if (slot >= 0)
            tile.store(d, state + times(slot, d.slot_stride), columns);
    }
}

template <class Tile, int BATCH> cudaError_t launch_tile(const kda_decode *d) {
    int bytes = (int)d->max_tokens * (int)sizeof(typename Tile::Token);
    unsigned parts = (unsigned)((d->tokens.value_dim + Tile::COLUMNS - 1) / Tile::COLUMNS);
    return launch(run<Tile, BATCH>, shorten(d), d, dim3(parts, (unsigned)d->tokens.value_heads), Tile::THREADS,
                  bytes, (int)sizeof(typename Tile::Scratch));
}

/* One token, and so few states that all CTAs of small pieces run at once? */
template <class Tile> cudaError_t fit_small(const kda_decode *d, bool *fit) {
    int processors = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, d->tokens.device);
    int64_t parts = (d->tokens.value_dim + Tile::COLUMNS - 1) / Tile::COLUMNS;
    *fit = d->max_tokens == 1 && d->tokens.sequences <= INT_MAX / d->tokens.value_heads / parts &&
           d->tokens.sequences * d->tokens.value_heads * parts <= processors * resident<Tile, 1>();
    return error;
}

/* Small: tiles of small pieces, or void. */
template <class Tile, class Small> cudaError_t launch_batch(const kda_decode *d) {
    if constexpr (!std::is_void_v<Small>) {
        bool fit = false;
        cudaError_t error = fit_small<Small>(d, &fit);
        if (error || fit)
            return error ? error : launch_tile<Small, 1>(d);
    }
    return d->max_tokens == 1 ? launch_tile<Tile, 1>(d) : launch_tile<Tile, 4>(d);
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
