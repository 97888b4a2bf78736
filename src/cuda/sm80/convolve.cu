/* SPDX-License-Identifier: MIT */
/*
 * The short convolutions and SiLU before a prefill. Memory is what takes the time: each of q, k and v is read once and
 * written once.
 *
 * A thread has the channels of 16 bytes, their weights in registers, and goes through a CTA's tokens four at a time. The
 * next four are on their way meanwhile. States are only read here: another CTA may yet need the one of its sequence.
 */
#include "cuda/floats.cuh"
#include "cuda/fused.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/sm80.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/sequences.cuh"

namespace kda {
namespace {

constexpr int THREADS = 128, RESIDENT = 4; /* of a CTA; CTAs of a multiprocessor */
constexpr int STEP = 4;                    /* tokens that a thread has on their way */

/* One convolution in short. */
struct Convolution {
    const char *x;                                                  /* [B, T, heads, dim] */
    char *to;                                                       /* the same, compact */
    const char *weight, *bias, *state;                              /* bias, state: NULL: not given */
    int64_t batch, token, head, weight_stride, slot, channel, past; /* strides in bytes */
    kda_dtype dtype, weight_dtype, bias_dtype, state_dtype;
    int heads, dim;
    int groups;         /* a thread's channels are a group */
    bool pieces;        /* rows are whole pieces of 16 bytes */
    bool dense_weights; /* and so are the weights of a group, one channel's after the other's */
};

struct Convolutions {
    Convolution each[KDA_CONVOLUTIONS];
    int ctas[KDA_CONVOLUTIONS]; /* that share out the channels of one */
    int tokens;                 /* of a CTA */
};

/* ---- Elements ------------------------------------------------------------------------------------ */

/* The elements of 16 bytes. */
template <kda_dtype DTYPE> struct Piece {
    static constexpr int VEC = DTYPE == KDA_F32 ? 4 : 8;
    using Raw = uint4;

    __device__ static void unpack(kda_dtype, const Raw &raw, float (&x)[VEC]) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            if constexpr (DTYPE == KDA_F32) {
                x[i] = __uint_as_float(words[i]);
            } else if constexpr (DTYPE == KDA_BF16) {
                float2 pair = unpack_bf16(words[i]);
                x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
            } else {
                x[2 * i] = __half2float(__ushort_as_half((unsigned short)(words[i] & 0xffff)));
                x[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(words[i] >> 16)));
            }
    }
    __device__ static void store(char *to, kda_dtype, const float (&x)[VEC]) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if constexpr (DTYPE == KDA_F32)
                words[i] = __float_as_uint(x[i]);
            else if constexpr (DTYPE == KDA_BF16)
                words[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
            else
                words[i] = pack_half(x[2 * i], x[2 * i + 1]);
        *reinterpret_cast<uint4 *>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
    __device__ static Raw load(const char *from, kda_dtype) { return *reinterpret_cast<const uint4 *>(from); }
};

/* One element of any dtype. */
struct Single {
    static constexpr int VEC = 1;
    using Raw = float;

    __device__ static void unpack(kda_dtype, const Raw &raw, float (&x)[VEC]) { x[0] = raw; }
    __device__ static void store(char *to, kda_dtype dtype, const float (&x)[VEC]) {
        store_float(to, dtype, 0, x[0]);
    }
    __device__ static Raw load(const char *from, kda_dtype dtype) { return load_float(from, dtype, 0); }
};

inline __device__ float silu(float x) { return x * fast_sigmoid(x); }

/* ---- One thread ---------------------------------------------------------------------------------- */

template <class Access> struct Channels {
    static constexpr int VEC = Access::VEC;
    using Raw = typename Access::Raw;
    const Convolution &c;
    int head, first, channel; /* of the group: its head, its first channel there and of all heads */
    float weight[KDA_CONV_WIDTH][VEC], bias[VEC], past[KDA_CONV_PAST][VEC];

    __device__ Channels(const Convolution &c, int group) : c(c) {
        int each = c.dim / VEC;
        head = group / each, first = group % each * VEC, channel = head * c.dim + first;
        const char *row = c.weight + channel * c.weight_stride;
        if (VEC > 1 && c.dense_weights && c.weight_dtype == KDA_F32)
            load_weights<KDA_F32>(row);
        else if (VEC > 1 && c.dense_weights && c.weight_dtype == KDA_BF16)
            load_weights<KDA_BF16>(row);
        else
#pragma unroll
            for (int e = 0; e < VEC; e++)
#pragma unroll
                for (int i = 0; i < KDA_CONV_WIDTH; i++)
                    weight[i][e] = load_float(row + e * c.weight_stride, c.weight_dtype, i);
#pragma unroll
        for (int e = 0; e < VEC; e++)
            bias[e] = c.bias ? load_float(c.bias, c.bias_dtype, channel + e) : 0.f;
    }

    /* Those of all channels in pieces of 16 bytes: one by one they would take longer than all tokens. */
    template <kda_dtype DTYPE> __device__ void load_weights(const char *rows) {
        constexpr int PIECE = Piece<DTYPE>::VEC;
#pragma unroll
        for (int first = 0; first < VEC * KDA_CONV_WIDTH; first += PIECE) {
            float x[PIECE];
            Piece<DTYPE>::unpack(DTYPE, Piece<DTYPE>::load(rows + first / PIECE * 16, DTYPE), x);
#pragma unroll
            for (int e = 0; e < PIECE; e++)
                if (first + e < VEC * KDA_CONV_WIDTH)
                    weight[(first + e) % KDA_CONV_WIDTH][(first + e) / KDA_CONV_WIDTH] = x[e];
        }
    }

    __device__ int size() const { return c.dtype == KDA_F32 ? 4 : 2; }

    /* The inputs before token `begin` of a sequence, whose first token lies at `row`. */
    __device__ void load_past(const struct kda_sequence &s, const char *row, int begin) {
#pragma unroll
        for (int i = 0; i < KDA_CONV_PAST; i++) {
            int t = begin - KDA_CONV_PAST + i;
            if (t >= 0) {
                Access::unpack(c.dtype, Access::load(row + t * c.token, c.dtype), past[i]);
                continue;
            }
            const char *at = c.state + s.slot * c.slot + channel * c.channel + (KDA_CONV_PAST + t) * c.past;
#pragma unroll
            for (int e = 0; e < VEC; e++)
                past[i][e] = c.state && !s.from_zero ? load_float(at + e * c.channel, c.state_dtype, 0) : 0.f;
        }
    }

    /* COUNT tokens that follow each other. */
    template <int COUNT> __device__ void convolve(const Raw (&raw)[COUNT], char *to, int64_t token) {
        float x[KDA_CONV_PAST + COUNT][VEC];
#pragma unroll
        for (int e = 0; e < VEC; e++)
#pragma unroll
            for (int i = 0; i < KDA_CONV_PAST; i++)
                x[i][e] = past[i][e];
#pragma unroll
        for (int t = 0; t < COUNT; t++) {
            float y[VEC];
            Access::unpack(c.dtype, raw[t], x[KDA_CONV_PAST + t]);
#pragma unroll
            for (int e = 0; e < VEC; e++) {
                float sum = bias[e];
#pragma unroll
                for (int i = 0; i < KDA_CONV_WIDTH; i++)
                    sum = fmaf(weight[i][e], x[t + i][e], sum);
                y[e] = silu(sum);
            }
            Access::store(to + t * token, c.dtype, y);
        }
#pragma unroll
        for (int e = 0; e < VEC; e++)
#pragma unroll
            for (int i = 0; i < KDA_CONV_PAST; i++)
                past[i][e] = x[COUNT + i][e];
    }

    /* Tokens begin .. end - 1 of a sequence. */
    __device__ void work(const struct kda_sequence &s, int64_t tokens, int begin, int end) {
        int64_t compact = (int64_t)c.heads * c.dim * size(), offset = (int64_t)channel * size();
        const char *row = c.x + s.batch * c.batch + s.first * c.token + head * c.head + first * size();
        char *to = c.to + (s.batch * tokens + s.first + begin) * compact + offset;
        Raw next[STEP];
        auto load_next = [&](int t) {
#pragma unroll
            for (int i = 0; i < STEP; i++)
                if (t + i < end)
                    next[i] = Access::load(row + (t + i) * c.token, c.dtype);
        };
        load_next(begin);
        load_past(s, row, begin);
        int t = begin;
        for (; t + STEP <= end; t += STEP, to += STEP * compact) {
            Raw now[STEP];
#pragma unroll
            for (int i = 0; i < STEP; i++)
                now[i] = next[i];
            load_next(t + STEP);
            convolve(now, to, compact);
        }
#pragma unroll
        for (int i = 0; i < STEP - 1; i++)
            if (t + i < end) {
                const Raw one[1] = {next[i]};
                convolve(one, to + i * compact, compact);
            }
    }
};

/* ---- The kernel ---------------------------------------------------------------------------------- */

/* A CTA's tokens: of one sequence of a dense batch, or of several packed ones. n: the first of them. */
struct Range {
    int n, begin, end;
};

__device__ Range find_range(const kda_prefill &p, int tokens) {
    Range range;
    int strip = blockIdx.x;
    if (p.cu_seqlens.data) {
        range.begin = strip * tokens;
        range.n = find_sequence_of(p, range.begin);
    } else {
        int each = ((int)p.tokens + tokens - 1) / tokens;
        range.n = strip / each, range.begin = strip % each * tokens;
    }
    range.end = (int)kda_min64(range.begin + tokens, p.tokens);
    return range;
}

template <class Access>
__device__ void convolve_range(const kda_prefill &p, const Convolution &c, const Range &range, int group) {
    Channels<Access> channels(c, group);
    for (int n = range.n; n < p.sequences; n++) {
        struct kda_sequence s = kda_sequence(&p, n);
        int first = p.cu_seqlens.data ? (int)s.first : 0;
        if (first >= range.end)
            break;
        int begin = max(first, range.begin) - first, end = min(first + (int)s.length, range.end) - first;
        if (begin < end && s.slot >= 0)
            channels.work(s, p.tokens, begin, end);
        if (!p.cu_seqlens.data)
            break;
    }
}

__global__ void __launch_bounds__(THREADS, RESIDENT)
    convolve(const __grid_constant__ kda_prefill p, const __grid_constant__ Convolutions all) {
    let_next_begin();
    int cta = blockIdx.y, i = 0;
    while (cta >= all.ctas[i])
        cta -= all.ctas[i++];
    const Convolution &c = all.each[i];
    int group = cta * (int)blockDim.x + (int)threadIdx.x;
    const Range range = find_range(p, all.tokens);
    if (group >= c.groups)
        return;
    if (!c.pieces)
        convolve_range<Single>(p, c, range, group);
    else if (c.dtype == KDA_BF16)
        convolve_range<Piece<KDA_BF16>>(p, c, range, group);
    else if (c.dtype == KDA_F16)
        convolve_range<Piece<KDA_F16>>(p, c, range, group);
    else
        convolve_range<Piece<KDA_F32>>(p, c, range, group);
}

/* ---- Launch -------------------------------------------------------------------------------------- */

Convolution shorten(const kda_convolution &conv, const kda_tensor &x, const kda_tensor &to) {
    constexpr int PIECE = 16;
    Convolution c = {x.data,
                     to.data,
                     conv.weight.data,
                     conv.bias.data,
                     conv.state.data,
                     x.stride[0],
                     x.stride[1],
                     x.stride[2],
                     conv.weight.stride[0],
                     conv.state.stride[0],
                     conv.state.stride[1],
                     conv.state.stride[2],
                     x.dtype,
                     conv.weight.dtype,
                     conv.bias.dtype,
                     conv.state.dtype};
    c.heads = (int)x.shape[2], c.dim = (int)x.shape[3];
    int64_t size = x.dtype == KDA_F32 ? 4 : 2;
    uint64_t all = (uint64_t)(uintptr_t)x.data | (uint64_t)(c.dim * size);
    for (int i = 0; i < 3; i++)
        all |= x.shape[i] > 1 ? (uint64_t)x.stride[i] : 0;
    c.pieces = all % PIECE == 0;
    int64_t weights = KDA_CONV_WIDTH * (int64_t)kda_dtype_size(conv.weight.dtype);
    c.dense_weights = conv.weight.stride[0] == weights && (uintptr_t)c.weight % PIECE == 0;
    c.groups = c.heads * c.dim / (int)(c.pieces ? PIECE / size : 1);
    return c;
}

} // namespace
} // namespace kda

cudaError_t kda_sm80_convolve(const kda_prefill *p, const kda_cuda_fused *fused) {
    using namespace kda;
    const kda_tensor *const inputs[] = {&p->q, &p->k, &p->v}, *const outputs[] = {&fused->inner.q,
                                                                                  &fused->inner.k,
                                                                                  &fused->inner.v};
    Convolutions all = {};
    int threads = 32;
    all.tokens = fused->conv_tokens;
    for (int i = 0; i < KDA_CONVOLUTIONS; i++)
        if (kda_convolution_of(p->fused, i)->weight.data) {
            all.each[i] = shorten(*kda_convolution_of(p->fused, i), *inputs[i], *outputs[i]);
            while (threads < THREADS && threads < all.each[i].groups)
                threads *= 2;
        }
    int64_t strips = (p->tokens + all.tokens - 1) / all.tokens * (p->cu_seqlens.data ? 1 : p->batches);
    unsigned grid[2] = {(unsigned)strips, 0};
    for (int i = 0; i < KDA_CONVOLUTIONS; i++)
        grid[1] += (unsigned)(all.ctas[i] = (all.each[i].groups + threads - 1) / threads);
    return launch_kernel(convolve, grid, threads, 0, p->stream, false, *p, all);
}
