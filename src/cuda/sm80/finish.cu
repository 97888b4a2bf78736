/* SPDX-License-Identifier: MIT */
/*
 * After a prefill: the gated norm of every row of out, and the states of the convolutions, which by now nobody reads any
 * more. A CTA has some rows, or some channels of one sequence.
 *
 * Lanes share a row, in pieces of 16 bytes, and have several rows on their way. Rows and their gates are asked for before
 * it is known whether they are of a sequence.
 */
#include "cuda/floats.cuh"
#include "cuda/fused.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/sm80.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/sequences.cuh"

namespace kda {
namespace {

constexpr int THREADS = 128;
constexpr int ROWS = 4; /* of a group of lanes, on their way together */
constexpr int VEC = 8;  /* elements of 16 bits in a piece */

/* Squares beyond this may leave fp32; SMALLER first brings such rows near 1. */
constexpr float LARGE_SQUARE = 0x1p92f, SMALLER = 0x1p-96f;

struct State {
    const char *x;
    char *state;                                     /* NULL: none */
    int64_t batch, token, head, slot, channel, past; /* strides in bytes */
    kda_dtype dtype, state_dtype;
    int dim, channels;
};

struct Finish {
    State states[KDA_CONVOLUTIONS];
    int channels;              /* of them all */
    int norm_ctas, state_ctas; /* state_ctas: of a sequence */
    kda_tensor raw, gate;      /* gate.data: NULL: not given */
    const char *weight;
    kda_dtype weight_dtype;
    float eps;
    bool silu;
    int lanes; /* that share a row; 0: rows are not whole pieces, and each element is loaded by itself */
};

/* ---- Rows ---------------------------------------------------------------------------------------- */

/* A row of [B, T, HV, V]. */
struct Place {
    unsigned token; /* counted over all batches */
    int head;
};

/* Row number first + index, in 32 bits: a division in 64 would take longer than the row. */
struct Rows {
    unsigned token, head; /* of `first` */

    __device__ Rows(const kda_prefill &p, unsigned first)
        : token(first / (unsigned)p.value_heads), head(first % (unsigned)p.value_heads) {}
    __device__ Place at(const kda_prefill &p, unsigned index) const {
        unsigned heads = (unsigned)p.value_heads, all = head + index;
        return {token + all / heads, (int)(all % heads)};
    }
};

__device__ char *row_of(const kda_tensor &t, const kda_prefill &p, const Place &place) {
    unsigned batch = p.batches > 1 ? place.token / (unsigned)p.tokens : 0;
    return kda_row(&t, batch, place.token - batch * (unsigned)p.tokens, place.head);
}

/* Is a token of a sequence that is not padding? Tokens are asked for from the first on. */
struct Worked {
    int n;          /* a sequence that does not begin after the token */
    unsigned token; /* that `worked` is of */
    bool worked;

    __device__ Worked(const kda_prefill &p, unsigned first)
        : n(p.cu_seqlens.data ? find_sequence_of(p, first) : 0), token(first), worked(look(p, first)) {}
    __device__ bool look(const kda_prefill &p, unsigned t) {
        if (!p.cu_seqlens.data)
            return kda_sequence(&p, p.batches > 1 ? t / (unsigned)p.tokens : 0).slot >= 0;
        while (n + 1 < p.sequences && kda_index(&p.cu_seqlens, n + 1, 0) <= t)
            n++;
        struct kda_sequence s = kda_sequence(&p, n);
        return s.slot >= 0 && s.first <= t && t < s.first + s.length;
    }
    __device__ bool has(const kda_prefill &p, unsigned t) {
        if (t != token)
            token = t, worked = look(p, t);
        return worked;
    }
};

__device__ float activation(const Finish &f, float z) { return fast_sigmoid(z) * (f.silu ? z : 1.f); }

__device__ float sum_over(float x, int lanes) {
    for (int bit = lanes / 2; bit > 0; bit /= 2)
        x += __shfl_xor_sync(~0u, x, bit);
    return x;
}

/* What a row is multiplied by: its size, which keeps squares in range, and the factor of what is left. */
template <class SumOfSquares> __device__ float find_factor(const Finish &f, int dim, SumOfSquares sum) {
    float size = 1, squares = sum(size);
    if (__any_sync(~0u, !(squares < LARGE_SQUARE))) {
        float small = sum(SMALLER);
        if (!(squares < LARGE_SQUARE))
            squares = small, size = SMALLER;
    }
    return size * rsqrtf(squares / (float)dim + f.eps * size * size);
}

/* Rows in 16 bits, of pieces; each lane has one of them. */
__device__ float2 unpack(kda_dtype dtype, uint32_t word) {
    if (dtype == KDA_BF16)
        return unpack_bf16(word);
    return make_float2(__half2float(__ushort_as_half((unsigned short)(word & 0xffff))),
                       __half2float(__ushort_as_half((unsigned short)(word >> 16))));
}

__device__ void unpack_piece(kda_dtype dtype, const uint4 &raw, float (&x)[VEC]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = unpack(dtype, words[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
}

__device__ void norm_pieces(const kda_prefill &p, const Finish &f, unsigned first, unsigned rows) {
    int lane = threadIdx.x % f.lanes, groups = THREADS / f.lanes, dim = (int)p.value_dim;
    bool has_piece = lane * VEC < dim, real[ROWS];
    uint4 gates[ROWS] = {}, outputs[ROWS] = {};
    float weight[VEC];
    Place places[ROWS];
    const Rows all(p, first);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        unsigned index = threadIdx.x / f.lanes + i * groups;
        places[i] = all.at(p, index);
        real[i] = has_piece && first + index < rows;
        if (f.gate.data && real[i])
            gates[i] = reinterpret_cast<const uint4 *>(row_of(f.gate, p, places[i]))[lane];
    }
#pragma unroll
    for (int e = 0; e < VEC; e++)
        weight[e] = has_piece ? load_float(f.weight, f.weight_dtype, lane * VEC + e) : 0.f;
    Worked worked(p, all.token);
    wait_for_kernel_before();
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        if (real[i])
            outputs[i] = reinterpret_cast<const uint4 *>(row_of(f.raw, p, places[i]))[lane];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        float o[VEC], z[VEC];
        unpack_piece(f.raw.dtype, outputs[i], o);
        unpack_piece(f.gate.dtype, gates[i], z);
        float factor = find_factor(f, dim, [&](float size) {
            float squares = 0;
#pragma unroll
            for (int e = 0; e < VEC; e++)
                squares = fmaf(o[e] * size, o[e] * size, squares);
            return sum_over(squares, f.lanes);
        });
        if (!real[i] || !worked.has(p, places[i].token))
            continue;
        uint32_t words[4];
#pragma unroll
        for (int e = 0; e < VEC; e++)
            o[e] = o[e] * factor * weight[e] * (f.gate.data ? activation(f, z[e]) : 1.f);
#pragma unroll
        for (int e = 0; e < 4; e++)
            words[e] =
                p.out.dtype == KDA_BF16 ? pack_bf16(o[2 * e], o[2 * e + 1]) : pack_half(o[2 * e], o[2 * e + 1]);
        reinterpret_cast<uint4 *>(row_of(p.out, p, places[i]))[lane] =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
}

/* Any other rows: a warp has one, and reads it twice. */
__device__ void norm_elements(const kda_prefill &p, const Finish &f, unsigned first, unsigned rows) {
    int lane = threadIdx.x % 32, dim = (int)p.value_dim;
    const Rows all(p, first);
    Worked worked(p, all.token);
    wait_for_kernel_before();
    for (int i = 0; i < ROWS; i++) {
        unsigned index = threadIdx.x / 32 + i * (THREADS / 32);
        const Place place = all.at(p, index);
        if (first + index >= rows || !worked.has(p, place.token))
            continue;
        const char *raw = row_of(f.raw, p, place), *gate = f.gate.data ? row_of(f.gate, p, place) : nullptr;
        char *out = row_of(p.out, p, place);
        float factor = find_factor(f, dim, [&](float size) {
            float squares = 0;
            for (int j = lane; j < dim; j += 32) {
                float x = load_float(raw, f.raw.dtype, j) * size;
                squares = fmaf(x, x, squares);
            }
            return sum_over(squares, 32);
        });
        for (int j = lane; j < dim; j += 32) {
            float y = load_float(raw, f.raw.dtype, j) * factor * load_float(f.weight, f.weight_dtype, j);
            store_float(out, p.out.dtype, j, gate ? y * activation(f, load_float(gate, f.gate.dtype, j)) : y);
        }
    }
}

/* ---- States -------------------------------------------------------------------------------------- */

__device__ void write_state(const State &c, const struct kda_sequence &s, int channel) {
    const char *x = c.x + s.batch * c.batch + s.first * c.token + channel / c.dim * c.head;
    char *state = c.state + s.slot * c.slot + channel * c.channel;
    float inputs[KDA_CONV_PAST];
#pragma unroll
    for (int i = 0; i < KDA_CONV_PAST; i++) {
        int64_t t = s.length - KDA_CONV_PAST + i;
        inputs[i] = t >= 0        ? load_float(x + t * c.token, c.dtype, channel % c.dim)
                    : s.from_zero ? 0.f
                                  : load_float(state + (KDA_CONV_PAST + t) * c.past, c.state_dtype, 0);
    }
#pragma unroll
    for (int i = 0; i < KDA_CONV_PAST; i++)
        store_float(state + i * c.past, c.state_dtype, 0, inputs[i]);
}

__device__ void write_states(const kda_prefill &p, const Finish &f, int cta) {
    int channel = cta % f.state_ctas * THREADS + (int)threadIdx.x, i = 0;
    const struct kda_sequence s = kda_sequence(&p, cta / f.state_ctas);
    wait_for_kernel_before();
    if (channel >= f.channels || s.slot < 0)
        return;
    while (channel >= f.states[i].channels)
        channel -= f.states[i++].channels;
    write_state(f.states[i], s, channel);
}

__global__ void __launch_bounds__(THREADS)
    finish(const __grid_constant__ kda_prefill p, const __grid_constant__ Finish f) {
    let_next_begin();
    int cta = blockIdx.x;
    if (cta >= f.norm_ctas) {
        write_states(p, f, cta - f.norm_ctas);
        return;
    }
    unsigned rows = (unsigned)(p.batches * p.tokens * p.value_heads); /* at most INT_MAX, as prefill.c checks */
    if (f.lanes)
        norm_pieces(p, f, (unsigned)cta * (unsigned)(THREADS / f.lanes * ROWS), rows);
    else
        norm_elements(p, f, (unsigned)cta * (THREADS / 32 * ROWS), rows);
}

/* ---- Launch -------------------------------------------------------------------------------------- */

/* Is every row of t whole pieces of 16 bits' elements? */
bool has_pieces(const kda_tensor &t) {
    uint64_t all = (uint64_t)(uintptr_t)t.data | (uint64_t)(t.shape[3] * 2);
    for (int i = 0; i < 3; i++)
        all |= t.shape[i] > 1 ? (uint64_t)t.stride[i] : 0;
    return (t.dtype == KDA_BF16 || t.dtype == KDA_F16) && all % (2 * VEC) == 0;
}

/* Lanes that share a row of pieces, or 0. */
int choose_lanes(const kda_prefill *p, const Finish &f) {
    int lanes = 4;
    if (!has_pieces(f.raw) || !has_pieces(p->out) || (f.gate.data && !has_pieces(f.gate)))
        return 0;
    while (lanes * VEC < p->value_dim)
        lanes *= 2;
    return lanes <= 32 ? lanes : 0;
}

State shorten(const kda_convolution &conv, const kda_tensor &x) {
    State c = {x.data,      conv.state.data,      x.stride[0],          x.stride[1],
               x.stride[2], conv.state.stride[0], conv.state.stride[1], conv.state.stride[2],
               x.dtype,     conv.state.dtype,     (int)x.shape[3],      0};
    c.channels = c.state ? (int)(x.shape[2] * x.shape[3]) : 0;
    return c;
}

} // namespace
} // namespace kda

cudaError_t kda_sm80_finish(const kda_prefill *p, const kda_cuda_fused *fused) {
    using namespace kda;
    const kda_fused *around = p->fused;
    const kda_tensor *const inputs[] = {&p->q, &p->k, &p->v};
    Finish f = {};
    for (int i = 0; i < KDA_CONVOLUTIONS; i++) {
        f.states[i] = shorten(*kda_convolution_of(around, i), *inputs[i]);
        f.channels += f.states[i].channels;
    }
    f.state_ctas = (f.channels + THREADS - 1) / THREADS;
    if (around->norm_weight.data) {
        f.raw = fused->inner.out, f.gate = around->norm_gate;
        f.weight = around->norm_weight.data, f.weight_dtype = around->norm_weight.dtype;
        f.eps = around->norm_eps, f.silu = around->norm_activation == FLASH_KDA_NORM_SILU;
        f.lanes = choose_lanes(p, f);
        int64_t each = THREADS / (f.lanes ? f.lanes : 32) * ROWS;
        f.norm_ctas = (int)((p->batches * p->tokens * p->value_heads + each - 1) / each);
    }
    int64_t ctas = f.norm_ctas + p->sequences * f.state_ctas;
    if (ctas > INT32_MAX)
        return cudaErrorInvalidConfiguration;
    const unsigned grid[2] = {(unsigned)ctas, 1};
    return ctas ? launch_kernel(finish, grid, THREADS, 0, p->stream, fused->overlaps, *p, f) : cudaSuccess;
}
