/* SPDX-License-Identifier: MIT */
/*
 * Decode between short convolutions and a gated norm, in one kernel.
 *
 * A norm needs a head's whole row. A convolution's state may be written only when all have read it, and value
 * heads that share a key head share it. So one CTA works all columns of a head, tile by tile. With a
 * convolution of q or k it works all value heads of a key head, one after the other. A channel belongs to one
 * thread, which alone reads and writes its state.
 */
#include "cuda/sm80/decode.cuh"
#include "cuda/sm80/kernels.h"

namespace kda {
namespace decode {
namespace {

/* Threads of a CTA, at most. Few states get many threads each. Where there are many, several share a
 * multiprocessor, so that one loads while another computes. */
constexpr int WIDE = 512, NARROW = 256;
constexpr int PIECES = 8;       /* of 16 bytes of the state, of one thread */
constexpr int BATCH = 2;        /* tokens that a thread loads at a time */
constexpr int NORM_LANES = 128; /* threads that share a row of out */

/* ---- The problem in short ------------------------------------------------------------------------- */

struct Convolution {
    const char *weight, *bias; /* NULL: not given */
    char *state;
    int64_t weight_stride, slot_stride, channel_stride, past_stride;
    kda_dtype weight_dtype, bias_dtype, state_dtype;
};

struct Fused : Decode {
    Convolution q_conv, k_conv, v_conv;
    const char *norm_weight; /* NULL: not given; nor a gate if its data is NULL */
    Rows norm_gate;
    kda_dtype norm_dtype;
    float norm_eps;
    bool norm_silu;
    int heads; /* value heads of a CTA */
};

/* ---- Before --------------------------------------------------------------------------------------- */

/* Calls f(i) for every i < count. The threads from `first` on share them out. */
template <int THREADS, class F> __device__ void share_out(int first, int count, F f) {
    for (int i = ((int)threadIdx.x - first) & (THREADS - 1); i < count; i += THREADS)
        f(i);
}

/* Calls f(t, element c of token t of a head). */
template <class F> __device__ void each_token(const Rows &rows, const Sequence &s, int head, int c, F f) {
    const char *row = find_row(rows, s, 0, head);
    for (int begin = 0; begin < s.length; begin += BATCH) {
        uint32_t raw[BATCH] = {};
        float x[BATCH];
#pragma unroll
        for (int t = 0; t < BATCH; t++)
            if (begin + t < s.length)
                raw[t] = load_raw(row + times(begin + t, rows.token), rows.dtype, c);
        from_raw(raw, rows.dtype, x);
#pragma unroll
        for (int t = 0; t < BATCH; t++)
            if (begin + t < s.length)
                f(begin + t, x[t]);
    }
}

/* The same after the convolution, if there is one, and SiLU. The convolution's state goes on with the
 * tokens. */
template <class F>
__device__ void each_input(const Decode &d, const Convolution &conv, const Rows &rows, int dim,
                           const Sequence &s, int head, int c, F f) {
    if (!conv.weight) {
        each_token(rows, s, head, c, f);
        return;
    }
    int channel = head * dim + c;
    char *state = conv.state + times(channel, conv.channel_stride);
    const char *past = state + times(s.slot, conv.slot_stride);
    const char *weights = conv.weight + times(channel, conv.weight_stride);
    float x[KDA_CONV_PAST], weight[KDA_CONV_WIDTH], bias = 0;
#pragma unroll
    for (int i = 0; i < KDA_CONV_PAST; i++)
        x[i] = s.from_zero ? 0.f : load_float(past + i * conv.past_stride, conv.state_dtype, 0);
#pragma unroll
    for (int i = 0; i < KDA_CONV_WIDTH; i++)
        weight[i] = load_float(weights, conv.weight_dtype, i);
    if (conv.bias)
        bias = load_float(conv.bias, conv.bias_dtype, channel);
    each_token(rows, s, head, c, [&](int t, float now) {
        float sum = bias;
#pragma unroll
        for (int i = 0; i < KDA_CONV_PAST; i++)
            sum = fmaf(weight[i], x[i], sum);
        sum = fmaf(weight[KDA_CONV_PAST], now, sum);
        f(t, sum * logistic(sum));
#pragma unroll
        for (int i = 0; i < KDA_CONV_PAST; i++)
            x[i] = i + 1 < KDA_CONV_PAST ? x[i + 1] : now;
        int slot = find_written_slot(d, s, t);
        if (slot >= 0)
#pragma unroll
            for (int i = 0; i < KDA_CONV_PAST; i++)
                store_float(state + times(slot, conv.slot_stride) + i * conv.past_stride, conv.state_dtype, 0,
                            x[i]);
    });
}

/* Loads q and k of a key head. */
template <class Tile>
__device__ void prepare_keys(const Fused &d, const Sequence &s, int key_head, typename Tile::Token *tokens) {
    share_out<Tile::THREADS>(0, Tile::KP, [&](int c) {
        unsigned at = Tile::index(c);
        if (c < d.key_dim)
            each_input(d, d.q_conv, d.q, d.key_dim, s, key_head, c,
                       [&](int t, float x) { tokens[t].q[at] = x; });
        else
            for (int t = 0; t < s.length; t++)
                tokens[t].q[at] = tokens[t].k[at] = 0;
    });
    share_out<Tile::THREADS>(Tile::KP, d.key_dim, [&](int c) {
        unsigned at = Tile::index(c);
        each_input(d, d.k_conv, d.k, d.key_dim, s, key_head, c, [&](int t, float x) { tokens[t].k[at] = x; });
    });
}

/* Called after a barrier, when all of q and k is there. Returns whether rows are to be normalised beforehand,
 * by what the thread has seen. */
template <class Tile> __device__ bool multiply_keys(const Sequence &s, typename Tile::Token *tokens) {
    bool large = false;
    constexpr int WARPS = Tile::THREADS / 32;
    static_assert(Tile::PARTS * 32 == Tile::KP);
    for (int i = threadIdx.x / 32; i < s.length * Tile::PARTS; i += WARPS) {
        typename Tile::Token &token = tokens[i / Tile::PARTS];
        int part = i % Tile::PARTS, at = part * 32 + threadIdx.x % 32;
        Products own[1] = {};
        own[0].add(token.k[at], token.q[at]);
        large = large || are_large(own[0]);
        store_products(own, part, 1, &token);
    }
    return large;
}

/* Loads decays and betas of a value head. */
template <class Tile>
__device__ void prepare_gates(const Fused &d, const Sequence &s, int head, typename Tile::Token *tokens) {
    share_out<Tile::THREADS>(2 * Tile::KP, Tile::KP, [&](int c) {
        unsigned at = Tile::index(c);
        float A_log = 0, bias = 0;
        if (c >= d.key_dim) {
            for (int t = 0; t < s.length; t++)
                tokens[t].decay[at] = 0;
            return;
        }
        if (d.A_log)
            A_log = load_float(d.A_log + times(head, d.A_log_stride), d.A_log_dtype, 0);
        if (d.dt_bias)
            bias = load_float(d.dt_bias + times(head, d.dt_bias_stride), d.dt_bias_dtype, c);
        each_token(d.g, s, head, c, [&](int t, float x) {
            float decay[1] = {x};
            find_decays(d, bias, A_log, decay);
            tokens[t].decay[at] = decay[0];
        });
    });
    if (threadIdx.x < s.length)
        tokens[threadIdx.x].beta =
            find_step(d, load_float(find_row(d.beta, s, threadIdx.x, head), d.beta.dtype, 0));
}

/* Loads v for the columns of a tile. */
template <class Tile>
__device__ void prepare_values(const Fused &d, const Sequence &s, int head, int column,
                               typename Tile::Token *tokens) {
    share_out<Tile::THREADS>(3 * Tile::KP, Tile::COLUMNS, [&](int i) {
        if (column + i < d.value_dim)
            each_input(d, d.v_conv, d.v, d.value_dim, s, head, column + i,
                       [&](int t, float x) { tokens[t].v[i] = x; });
        else
            for (int t = 0; t < s.length; t++)
                tokens[t].v[i] = 0;
    });
}

/* ---- After ---------------------------------------------------------------------------------------- */

/* The sum of squares of a row times `size`. Every warp sums all of the row. */
__device__ float sum_squares(const float *row, int dim, float size) {
    float squares = 0;
    for (int j = threadIdx.x % 32; j < dim; j += 32) {
        float x = row[j] * size;
        squares = fmaf(x, x, squares);
    }
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2)
        squares += __shfl_xor_sync(~0u, squares, bit);
    return squares;
}

/* Applies the norm and its gate to outputs [length][V] of a head, and stores them. */
template <int THREADS>
__device__ void normalise(const Fused &d, const Sequence &s, int head, const float *outputs) {
    for (int t = threadIdx.x / NORM_LANES; t < s.length; t += THREADS / NORM_LANES) {
        const float *o = outputs + t * d.value_dim;
        float size = 1, squares = sum_squares(o, d.value_dim, size);
        if (!(squares < LARGE_SQUARE))
            squares = sum_squares(o, d.value_dim, size = SMALLER);
        float factor = rsqrtf(squares / (float)d.value_dim + d.norm_eps * size * size);
        char *out = find_row(d.out, s, t, head);
        for (int j = threadIdx.x % NORM_LANES; j < d.value_dim; j += NORM_LANES) {
            float y = o[j] * size * factor * load_float(d.norm_weight, d.norm_dtype, j);
            if (d.norm_gate.data) {
                float z = load_float(find_row(d.norm_gate, s, t, head), d.norm_gate.dtype, j);
                y *= logistic(z) * (d.norm_silu ? z : 1.f);
            }
            store_float(out, d.out.dtype, j, y);
        }
    }
}

/* ---- The kernel ----------------------------------------------------------------------------------- */

template <class Tile> constexpr int resident() {
    return Tile::THREADS > NARROW ? 1 : (Tile::VEC == 4 && Tile::KP <= 128 ? 3 : 2) * NARROW / Tile::THREADS;
}

template <class Tile>
__global__ void __launch_bounds__(Tile::THREADS, resident<Tile>())
    decode_fused(const __grid_constant__ Fused d) {
    extern __shared__ __align__(16) char memory[];
    typename Tile::Token *tokens = reinterpret_cast<typename Tile::Token *>(memory); /* [max_tokens] */
    float *outputs = reinterpret_cast<float *>(tokens + d.max_tokens); /* [max_tokens][V], with a norm */
    __shared__ typename Tile::Scratch scratch;
    wait_for_inputs();
    int index = find_read_index(d, d.first_sequence + blockIdx.z);
    Sequence s = find_sequence(d);
    s.slot = in_pool(d, index), s.from_zero = starts_from_zero(d, s.n);
    if (s.slot < 0 || s.length < 1)
        return;
    bool normed = d.norm_weight && d.out.data;
    for (int i = 0; i < d.heads; i++) {
        int head = blockIdx.y * d.heads + i;
        for (int column = 0; column < d.value_dim; column += Tile::COLUMNS) {
            int columns = d.value_dim - column;
            char *state = d.state + times(head, d.state_head_stride) + Tile::offset(d, column); /* of slot 0 */
            Tile tile;
            tile.load(d, state + times(s.slot, d.slot_stride), s.from_zero ? 0 : columns);
            if (i == 0 && column == 0)
                prepare_keys<Tile>(d, s, d.per_group ? (int)__umulhi(head, d.per_group) : head, tokens);
            if (column == 0)
                prepare_gates<Tile>(d, s, head, tokens);
            prepare_values<Tile>(d, s, head, column, tokens);
            __syncthreads();
            if (i == 0 && column == 0 && any_of_cta(multiply_keys<Tile>(s, tokens) && d.qk_norm))
                normalise_large<Tile::THREADS>(tokens, s.length);
            if (column == 0)
                decay_keys<Tile>(tokens, s.length);
            tile.unpack(d);
#pragma unroll 1
            for (int t = 0; t < s.length; t++) {
                int slot = find_written_slot(d, s, t);
                char *out = nullptr;
                if (normed)
                    out = reinterpret_cast<char *>(outputs + t * d.value_dim + column);
                else if (d.out.data)
                    out = find_row(d.out, s, t, head) + times(column, size_of(d.out.dtype));
                tile.step(d, tokens[t], scratch, t, out, normed ? KDA_F32 : d.out.dtype, columns);
                if (slot >= 0)
                    tile.store(d, state + times(slot, d.slot_stride), columns);
            }
            __syncthreads();
        }
        if (normed)
            normalise<Tile::THREADS>(d, s, head, outputs);
    }
}

/* ---- Launch --------------------------------------------------------------------------------------- */

Convolution shorten(const kda_convolution &c) {
    return {c.weight.data,     c.bias.data,       c.state.data,   c.weight.stride[0], c.state.stride[0],
            c.state.stride[1], c.state.stride[2], c.weight.dtype, c.bias.dtype,       c.state.dtype};
}

/* Value heads that one CTA works: those that share a convolution of q or k. */
int heads_of_cta(const kda_decode *d) {
    bool shared = d->q_conv.weight.data || d->k_conv.weight.data;
    return shared ? (int)(d->tokens.value_heads / d->tokens.heads) : 1;
}

template <class Tile> cudaError_t launch_tile(const kda_decode *d) {
    Fused s = {};
    static_cast<Decode &>(s) = decode::shorten(d);
    s.q_conv = shorten(d->q_conv), s.k_conv = shorten(d->k_conv), s.v_conv = shorten(d->v_conv);
    s.norm_weight = d->norm_weight.data, s.norm_dtype = d->norm_weight.dtype;
    s.norm_gate = rows_of(d, d->norm_gate);
    s.norm_eps = d->norm_eps, s.norm_silu = d->norm_activation == FLASH_KDA_NORM_SILU;
    s.heads = heads_of_cta(d);
    int bytes = (int)sizeof(typename Tile::Token) + (s.norm_weight ? s.value_dim * (int)sizeof(float) : 0);
    return launch(decode_fused<Tile>, s, d, dim3(1, (unsigned)(d->tokens.value_heads / s.heads)), Tile::THREADS,
                  s.max_tokens * bytes, (int)sizeof(typename Tile::Scratch));
}

template <class Access, int KP, int THREADS> cudaError_t launch_layout(const kda_decode *d) {
    return d->tokens.state_layout == FLASH_KDA_STATE_V_FIRST
               ? launch_tile<TileVFirst<Access, KP, THREADS, PIECES>>(d)
               : launch_tile<TileKFirst<Access, KP, THREADS, PIECES>>(d);
}

template <class Access, int KP> cudaError_t launch_threads(const kda_decode *d) {
    constexpr int WANTED = 16 * KP / Access::VEC; /* for 128 columns */
    if constexpr (WANTED > NARROW) {
        int processors = 0;
        cudaError_t error =
            cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, d->tokens.device);
        if (error)
            return error;
        if (d->tokens.sequences <= processors / (d->tokens.value_heads / heads_of_cta(d)))
            return launch_layout<Access, KP, WIDE>(d);
    }
    return launch_layout < Access, KP, WANTED < NARROW ? WANTED : NARROW > (d);
}

} // namespace
} // namespace decode
} // namespace kda

cudaError_t kda_sm80_decode_fused(const kda_decode *d, bool aligned) {
    using namespace kda::decode;
    return with_access(d, aligned, [&](auto access, auto key_dim) {
        return launch_threads<decltype(access), decltype(key_dim)::value>(d);
    });
}
