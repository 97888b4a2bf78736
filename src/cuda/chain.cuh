/* SPDX-License-Identifier: MIT */
/*
 * What kernel general of both levels shares: how a warp's share of a state lies in registers and in memory.
 *
 * A warp works 16 columns of V of one chain, transposed. Accumulator tiles of mma and wgmma are alike: S^T
 * [16][K] is S[K / 8][4], and outputs O^T [16][CHUNK] are o[CHUNK / 8][4].
 */
#ifndef KDA_CUDA_CHAIN_CUH
#define KDA_CUDA_CHAIN_CUH

#include "cuda/floats.cuh"
#include "cuda/operands.cuh"
#include "cuda/ptx/sm80.cuh"

#include <cuda_fp16.h>

namespace kda {

/* What a thread needs to know of its chain and its CTA's columns. */
struct Chain {
    struct kda_sequence sequence;
    int64_t n, head, first_operands; /* of chunk 0, in Operands [HV][chunks] */
    int column;                      /* first of the CTA's columns of V */
    int columns;                     /* how many of them exist */
    int share_column, share_channel; /* where the warp's share of a state begins; the column, of the CTA's */
};

/* Chain number `number`. The CTA's second index tells which columns of V it works. */
template <int COLUMNS> __device__ Chain find_chain(const kda_prefill &p, int64_t number, int64_t chunks) {
    Chain chain;
    chain.n = number / p.value_heads, chain.head = number % p.value_heads;
    chain.sequence = kda_sequence(&p, chain.n);
    chain.column = blockIdx.y * COLUMNS;
    chain.columns = (int)(p.value_dim - chain.column < COLUMNS ? p.value_dim - chain.column : COLUMNS);
    chain.first_operands = chain.head * chunks + kda_first_chunk(&p, chain.sequence.first, chain.n);
    chain.share_column = threadIdx.x / 32 * 16, chain.share_channel = 0;
    return chain;
}

/* Two accumulator tiles side by side become a first operand. */
inline __device__ void pack_operand(const float (&left)[4], const float (&right)[4], uint32_t (&a)[4]) {
    a[0] = pack_bf16(left[0], left[1]), a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]), a[3] = pack_bf16(right[2], right[3]);
}

/* A first operand in two terms, together exact to about 2^-17. */
struct Split {
    uint32_t rounded[4], rest[4];
};

inline __device__ void split_operand(const float (&left)[4], const float (&right)[4], Split &a) {
    pack_operand(left, right, a.rounded);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float(&tile)[4] = i < 2 ? left : right;
        float2 x = unpack_bf16(a.rounded[i]);
        a.rest[i] = pack_bf16(tile[i % 2 * 2] - x.x, tile[i % 2 * 2 + 1] - x.y);
    }
}

/* An accumulator tile becomes a first operand of tf32, its columns in the order of tf32_index. */
inline __device__ void tf32_operand(const float (&tile)[4], uint32_t (&a)[4]) {
    a[0] = __float_as_uint(tile[0]), a[1] = __float_as_uint(tile[2]);
    a[2] = __float_as_uint(tile[1]), a[3] = __float_as_uint(tile[3]);
}

/* Two floats rounded to a 2-byte dtype. */
inline __device__ uint32_t pack_output(kda_dtype dtype, float low, float high) {
    return dtype == KDA_BF16 ? pack_bf16(low, high) : pack_half(low, high);
}

inline __device__ float2 unpack_output(kda_dtype dtype, uint32_t pair) {
    return dtype == KDA_BF16 ? unpack_bf16(pair) : __half22float2(*reinterpret_cast<__half2 *>(&pair));
}

/* Stores O^T of one chunk, rows of `out` for its tokens. Pairs of 2-byte outputs are transposed first, so that a lane holds neighbours in
 * V. */
template <int COLUMNS>
__device__ void store_outputs(const kda_tensor &out, const Chain &chain, struct kda_span span,
                              const float (&o)[CHUNK / 8][4]) {
    int lane = threadIdx.x % 32, column = chain.share_column, left = (int)span.count;
    int size = out.dtype == KDA_F32 ? 4 : 2;
    int64_t stride = out.stride[1];
    char *rows = kda_row(&out, chain.sequence.batch, chain.sequence.first + span.first, chain.head) +
                 chain.column * size;
    if (size == 2 && chain.columns == COLUMNS && (reinterpret_cast<uintptr_t>(rows) | stride) % 4 == 0) {
        char *row = rows + lane / 4 * stride + (column + lane % 4 * 2) * 2;
#pragma unroll
        for (int i = 0; i < CHUNK / 8; i++, row += 8 * stride) {
            uint32_t first = transpose(pack_output(out.dtype, o[i][0], o[i][1]));
            uint32_t second = transpose(pack_output(out.dtype, o[i][2], o[i][3]));
            if (i * 8 + lane / 4 < left) {
                reinterpret_cast<uint32_t *>(row)[0] = first;
                reinterpret_cast<uint32_t *>(row)[4] = second;
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int t = i * 8 + lane % 4 * 2 + n % 2, c = column + lane / 4 + n / 2 * 8;
            if (t < left && c < chain.columns)
                store_float(rows + t * stride, out.dtype, c, o[i][n]);
        }
}

/* Runs f(element of S, channel, column of V) over the thread's share of the state. */
template <int KP, class F>
__device__ void each_element(const kda_prefill &p, const Chain &chain, float (&S)[KP / 8][4], F f) {
    int lane = threadIdx.x % 32, column = chain.share_column + lane / 4;
#pragma unroll
    for (int c = 0; c < KP / 8; c++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int channel = chain.share_channel + c * 8 + lane % 4 * 2 + n % 2, j = column + n / 2 * 8;
            if (channel < p.key_dim && j < chain.columns)
                f(S[c][n], channel, chain.column + j);
        }
}

template <int KP>
__device__ void load_state(const kda_prefill &p, const Chain &chain, struct kda_state state,
                           float (&S)[KP / 8][4]) {
#pragma unroll
    for (int c = 0; c < KP / 8; c++)
        S[c][0] = S[c][1] = S[c][2] = S[c][3] = 0;
    if (!state.data)
        return;
    each_element<KP>(p, chain, S, [&](float &s, int channel, int column) {
        int64_t row = state.v_first ? column : channel, i = state.v_first ? channel : column;
        const char *from = state.data + row * state.stride;
        s = state.dtype == KDA_F32 ? reinterpret_cast<const float *>(from)[i]
                                   : kda_from_bf16(reinterpret_cast<const uint16_t *>(from)[i]);
    });
}

template <int KP>
__device__ void store_state(const kda_prefill &p, const Chain &chain, struct kda_state state,
                            float (&S)[KP / 8][4]) {
    each_element<KP>(p, chain, S, [&](float &s, int channel, int column) {
        int64_t row = state.v_first ? column : channel, i = state.v_first ? channel : column;
        store_float(state.data + row * state.stride, state.dtype, i, s);
    });
}

template <int KP>
__device__ void store_checkpoints(const kda_prefill &p, const Chain &chain, int64_t position,
                                  float (&S)[KP / 8][4]) {
    int64_t cursor = 0;
    while (p.checkpoints.data) {
        struct kda_state state = kda_checkpoint_at(&p, chain.n, position, chain.head, &cursor);
        if (!state.data)
            return;
        store_state<KP>(p, chain, state, S);
    }
}

} // namespace kda

#endif
