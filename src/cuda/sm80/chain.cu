/* SPDX-License-Identifier: MIT */
/*
 * Takes the state of every sequence and value head through its chunks, on the operands that prepare.cu left.
 *
 * One CTA works a chain for 64 columns of V, one warp for 16 of them; warps never wait for each other but for the
 * copies of operands. Everything is transposed, so that what one product leaves in registers is, lane for lane,
 * the first operand of the next:
 *     [W | Y]^T = S^T [KT; QT]^T    X^T = V^T - W^T    U^T = X^T INV^T    O^T = Y^T + U^T M^T
 *     S^T <- S^T diag(1 + carry) + U^T KR
 */
#include "cuda/ptx/sm80.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/operands.cuh"

#include <cuda_fp16.h>

namespace kda {
namespace {

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int COLUMNS = WARPS * 16; /* of V, of one CTA */
constexpr int STAGES = 3;

template <int KP> struct Stage {
    Operands<KP> operands;
    char values[]; /* v [CHUNK][COLUMNS] in its own dtype; 2-byte elements swizzled */
};

/* Bytes of a stage for elements of v of `size` bytes. */
template <int KP> __host__ __device__ constexpr int stage_bytes(int size) {
    return (int)sizeof(Operands<KP>) + CHUNK * COLUMNS * size;
}

/* What a thread needs to know of its chain. */
struct Chain {
    struct kda_sequence sequence;
    int64_t n, head, first_operands; /* of chunk 0, in Operands */
    int column;                      /* first of the CTA's columns of V */
    int columns;                     /* how many of them exist */
};

__device__ void store_float(char *row, kda_dtype dtype, int64_t i, float x) {
    if (dtype == KDA_F32)
        reinterpret_cast<float *>(row)[i] = x;
    else if (dtype == KDA_BF16)
        reinterpret_cast<__nv_bfloat16 *>(row)[i] = __float2bfloat16_rn(x);
    else
        reinterpret_cast<__half *>(row)[i] = __float2half_rn(x);
}

/* Starts the copies of one chunk's operands and values; nothing behind the end of the sequence. */
template <int KP>
__device__ void fetch(const kda_prefill &p, const Chain &chain, const Operands<KP> *all, int64_t chunk,
                      struct kda_span span, Stage<KP> &stage) {
    if (!span.count)
        return;
    const char *from = reinterpret_cast<const char *>(&all[chain.first_operands + chunk * p.value_heads]);
    char *to = reinterpret_cast<char *>(&stage.operands);
    for (int i = threadIdx.x * 16; i < (int)sizeof(Operands<KP>); i += THREADS * 16)
        copy_async(to + i, from + i);

    int size = p.v.dtype == KDA_F32 ? 4 : 2;
    const char *rows = kda_row(&p.v, chain.sequence.batch, chain.sequence.first + span.first, chain.head) +
                       chain.column * size;
    int64_t left = span.count;
    if (size == 2 && chain.columns == COLUMNS &&
        (reinterpret_cast<uintptr_t>(rows) | p.v.stride[1]) % 16 == 0) {
        uint16_t *values = reinterpret_cast<uint16_t *>(stage.values);
        for (int i = threadIdx.x; i < CHUNK * COLUMNS / 8; i += THREADS) {
            int t = i / (COLUMNS / 8), c = i % (COLUMNS / 8) * 8;
            copy_async(values + swizzled<COLUMNS>(t, c), t < left ? rows + t * p.v.stride[1] + c * 2 : rows,
                       t < left);
        }
        return;
    }
    for (int i = threadIdx.x; i < CHUNK * COLUMNS; i += THREADS) {
        int t = i / COLUMNS, c = i % COLUMNS;
        bool real = t < left && c < chain.columns;
        const char *row = rows + t * p.v.stride[1];
        if (size == 4)
            reinterpret_cast<float *>(stage.values)[t * COLUMNS + c] =
                real ? reinterpret_cast<const float *>(row)[c] : 0.f;
        else
            reinterpret_cast<uint16_t *>(stage.values)[swizzled<COLUMNS>(t, c)] =
                real ? reinterpret_cast<const uint16_t *>(row)[c] : 0;
    }
}

/* The lane's row in an ldmatrix of four neighbouring 8x8 matrices of a swizzled tile: the second lies below the first
 * or, if !below, beside it. The tile's rows and columns are reached by constants, so that an address costs one
 * instruction. */
template <int width> struct MatrixRow {
    uint32_t row, piece; /* in bytes */

    __device__ MatrixRow(const void *tile, bool below) {
        int lane = threadIdx.x % 32, matrix = lane / 8;
        int down = below ? matrix & 1 : matrix >> 1, right = below ? matrix >> 1 : matrix & 1;
        int r = down * 8 + lane % 8;
        row = (uint32_t)__cvta_generic_to_shared(tile) + r * width * 2;
        piece = (uint32_t)((swizzled<width>(r, right * 8) - r * width) * 2);
    }
    /* row a multiple of 16, column a multiple of 16 */
    __device__ uint32_t at(int down, int column) const {
        return row + down * width * 2 + (piece ^ (uint32_t)(column * 2));
    }
};

/* x^T [16 columns of V][16 tokens from t on], as two accumulator tiles, from the values of a stage. */
__device__ void load_values(const kda_prefill &p, const char *values, int t, float (&x)[2][4]) {
    int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16;
    if (p.v.dtype == KDA_F32) {
        for (int i = 0; i < 8; i++)
            x[i / 4][i % 4] = reinterpret_cast<const float *>(
                values)[(t + i / 4 * 8 + lane % 4 * 2 + i % 2) * COLUMNS + column + lane / 4 + i % 4 / 2 * 8];
        return;
    }
    uint32_t r[4];
    ldmatrix_transposed(r, MatrixRow<COLUMNS>(values, false).at(t, column));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair =
            p.v.dtype == KDA_BF16 ? unpack_bf16(r[i]) : __half22float2(*reinterpret_cast<__half2 *>(&r[i]));
        x[i / 2][i % 2 * 2] = pair.x, x[i / 2][i % 2 * 2 + 1] = pair.y;
    }
}

/* What rounding to bf16 leaves of two floats, as a pair again. */
__device__ uint32_t pack_rest(float low, float high, uint32_t rounded) {
    float2 x = unpack_bf16(rounded);
    return pack_bf16(low - x.x, high - x.y);
}

/* A first operand in two terms, together exact to about 2^-17. */
struct Split {
    uint32_t rounded[4], rest[4];
};

/* Two accumulator tiles side by side become a first operand. */
__device__ void pack_operand(const float (&left)[4], const float (&right)[4], uint32_t (&a)[4]) {
    a[0] = pack_bf16(left[0], left[1]), a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]), a[3] = pack_bf16(right[2], right[3]);
}

__device__ void split_operand(const float (&left)[4], const float (&right)[4], Split &a) {
    pack_operand(left, right, a.rounded);
    a.rest[0] = pack_rest(left[0], left[1], a.rounded[0]),
    a.rest[1] = pack_rest(left[2], left[3], a.rounded[1]);
    a.rest[2] = pack_rest(right[0], right[1], a.rounded[2]),
    a.rest[3] = pack_rest(right[2], right[3], a.rounded[3]);
}

/* sum^T [16][CHUNK] += x^T [16][CHUNK] T^T for a lower triangular T [CHUNK][CHUNK]. */
__device__ void multiply_triangle(float (&sum)[CHUNK / 8][4], const Split (&x)[CHUNK / 16],
                                  const __nv_bfloat16 *T, bool rest) {
    MatrixRow<CHUNK> rows(T, false);
#pragma unroll
    for (int j = 0; j < CHUNK / 16; j++)
#pragma unroll
        for (int i = j; i < CHUNK / 16; i++) {
            uint32_t b[4];
            ldmatrix(b, rows.at(i * 16, j * 16));
            mma(sum[2 * i], x[j].rounded, b[0], b[1]);
            mma(sum[2 * i + 1], x[j].rounded, b[2], b[3]);
            if (rest) {
                mma(sum[2 * i], x[j].rest, b[0], b[1]);
                mma(sum[2 * i + 1], x[j].rest, b[2], b[3]);
            }
        }
}

template <int KP>
__device__ void advance(const kda_prefill &p, const Chain &chain, const Stage<KP> &stage, float (&S)[KP / 8][4],
                        float (&o)[CHUNK / 8][4]) {
    const Operands<KP> &operands = stage.operands;
    MatrixRow<KP> queries_keys(operands.queries_keys, false), keys_to_end(operands.keys_to_end, true);
    float w[CHUNK / 8][4] = {};
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
        o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
#pragma unroll
    for (int c = 0; c < KP / 16; c++) {
        uint32_t a[4], b[4];
        pack_operand(S[2 * c], S[2 * c + 1], a);
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++) {
            ldmatrix(b, queries_keys.at(i * 16, c * 16));
            mma(w[2 * i], a, b[0], b[1]);
            mma(w[2 * i + 1], a, b[2], b[3]);
            ldmatrix(b, queries_keys.at(CHUNK + i * 16, c * 16));
            mma(o[2 * i], a, b[0], b[1]);
            mma(o[2 * i + 1], a, b[2], b[3]);
        }
    }
    Split x[CHUNK / 16], u[CHUNK / 16];
#pragma unroll
    for (int i = 0; i < CHUNK / 16; i++) {
        float v[2][4];
        load_values(p, stage.values, i * 16, v);
#pragma unroll
        for (int n = 0; n < 4; n++)
            v[0][n] -= w[2 * i][n], v[1][n] -= w[2 * i + 1][n];
        split_operand(v[0], v[1], x[i]);
    }
    float U[CHUNK / 8][4] = {};
    multiply_triangle(U, x, operands.inverse[0], true);
    multiply_triangle(U, x, operands.inverse[1], false);
#pragma unroll
    for (int i = 0; i < CHUNK / 16; i++)
        split_operand(U[2 * i], U[2 * i + 1], u[i]);
    multiply_triangle(o, u, operands.M, false);
    int part = threadIdx.x % 4 * 2;
#pragma unroll
    for (int c = 0; c < KP / 8; c++) {
        float2 carry = *reinterpret_cast<const float2 *>(&operands.carry[c * 8 + part]);
        S[c][0] = fmaf(S[c][0], carry.x, S[c][0]), S[c][1] = fmaf(S[c][1], carry.y, S[c][1]);
        S[c][2] = fmaf(S[c][2], carry.x, S[c][2]), S[c][3] = fmaf(S[c][3], carry.y, S[c][3]);
    }
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int c = 0; c < KP / 16; c++) {
            uint32_t b[4];
            ldmatrix_transposed(b, keys_to_end.at(t * 16, c * 16));
            mma(S[2 * c], u[t].rounded, b[0], b[1]);
            mma(S[2 * c + 1], u[t].rounded, b[2], b[3]);
            mma(S[2 * c], u[t].rest, b[0], b[1]);
            mma(S[2 * c + 1], u[t].rest, b[2], b[3]);
        }
}

/* Two floats rounded to a 2-byte dtype. */
__device__ uint32_t pack_output(kda_dtype dtype, float low, float high) {
    if (dtype == KDA_BF16)
        return pack_bf16(low, high);
    __half2 halves = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&halves);
}

/* O^T of one chunk to memory. Pairs of 2-byte outputs are transposed first, so that a lane holds neighbours in V. */
__device__ void store_outputs(const kda_prefill &p, const Chain &chain, struct kda_span span,
                              const float (&o)[CHUNK / 8][4]) {
    int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16, left = (int)span.count;
    int size = p.out.dtype == KDA_F32 ? 4 : 2;
    int64_t stride = p.out.stride[1];
    char *rows = kda_row(&p.out, chain.sequence.batch, chain.sequence.first + span.first, chain.head) +
                 chain.column * size;
    if (size == 2 && chain.columns == COLUMNS && (reinterpret_cast<uintptr_t>(rows) | stride) % 4 == 0) {
        char *row = rows + lane / 4 * stride + (column + lane % 4 * 2) * 2;
#pragma unroll
        for (int i = 0; i < CHUNK / 8; i++, row += 8 * stride) {
            uint32_t first = transpose(pack_output(p.out.dtype, o[i][0], o[i][1]));
            uint32_t second = transpose(pack_output(p.out.dtype, o[i][2], o[i][3]));
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
                store_float(rows + t * stride, p.out.dtype, c, o[i][n]);
        }
}

/* Runs f(element of S, channel, column of V) over the thread's share of the state. */
template <int KP, class F>
__device__ void each_element(const kda_prefill &p, const Chain &chain, float (&S)[KP / 8][4], F f) {
    int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int c = 0; c < KP / 8; c++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int channel = c * 8 + lane % 4 * 2 + n % 2, j = column + n / 2 * 8;
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

template <int KP>
__global__ void __launch_bounds__(THREADS)
    run(const __grid_constant__ kda_prefill p, const Operands<KP> *operands) {
    extern __shared__ __align__(16) char memory[];
    int bytes = stage_bytes<KP>(p.v.dtype == KDA_F32 ? 4 : 2);
    auto stage = [&](int64_t i) -> Stage<KP> & {
        return *reinterpret_cast<Stage<KP> *>(memory + i % STAGES * bytes);
    };
    Chain chain;
    chain.n = blockIdx.x / p.value_heads, chain.head = blockIdx.x % p.value_heads;
    chain.sequence = kda_sequence(&p, chain.n);
    chain.column = blockIdx.y * COLUMNS;
    chain.columns = (int)(p.value_dim - chain.column < COLUMNS ? p.value_dim - chain.column : COLUMNS);
    chain.first_operands = kda_first_chunk(&p, chain.sequence.first, chain.n) * p.value_heads + chain.head;
    if (chain.sequence.slot < 0)
        return;

    float S[KP / 8][4], o[CHUNK / 8][4];
    load_state<KP>(p, chain, kda_state_at(&p, &p.initial_state, chain.sequence.slot, chain.head), S);
    store_checkpoints<KP>(p, chain, 0, S);
    int64_t length = chain.sequence.length;
    for (int i = 0; i < STAGES - 1; i++) {
        fetch<KP>(p, chain, operands, i, kda_chunk_span(&p, chain.n, length, i), stage(i));
        copy_async_commit();
    }
    for (int64_t chunk = 0;; chunk++) {
        struct kda_span span = kda_chunk_span(&p, chain.n, length, chunk);
        if (!span.count)
            break;
        copy_async_wait<STAGES - 2>();
        __syncthreads(); /* this chunk has arrived for all; the stage of the last one is free */
        int64_t next = chunk + STAGES - 1;
        fetch<KP>(p, chain, operands, next, kda_chunk_span(&p, chain.n, length, next), stage(next));
        copy_async_commit();
        advance<KP>(p, chain, stage(chunk), S, o);
        store_outputs(p, chain, span, o);
        store_checkpoints<KP>(p, chain, span.first + span.count, S);
    }
    struct kda_state final_state = kda_state_at(&p, &p.final_state, chain.sequence.slot, chain.head);
    if (final_state.data)
        store_state<KP>(p, chain, final_state, S);
}

} // namespace
} // namespace kda

template <int KP> static cudaError_t launch(const kda_prefill *p, const void *operands, cudaStream_t stream) {
    using namespace kda;
    int bytes = STAGES * stage_bytes<KP>(p->v.dtype == KDA_F32 ? 4 : 2);
    cudaError_t error = cudaFuncSetAttribute(run<KP>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error)
        return error;
    dim3 grid((unsigned)(p->sequences * p->value_heads), (unsigned)((p->value_dim + COLUMNS - 1) / COLUMNS));
    run<KP><<<grid, THREADS, bytes, stream>>>(*p, static_cast<const Operands<KP> *>(operands));
    return cudaGetLastError();
}

cudaError_t kda_sm80_chain(const kda_prefill *p, const void *operands, cudaStream_t stream) {
    return p->key_dim <= 64    ? launch<64>(p, operands, stream)
           : p->key_dim <= 128 ? launch<128>(p, operands, stream)
                               : launch<256>(p, operands, stream);
}

size_t kda_sm80_operands_size(int64_t key_dim) {
    return key_dim <= 64    ? sizeof(kda::Operands<64>)
           : key_dim <= 128 ? sizeof(kda::Operands<128>)
                            : sizeof(kda::Operands<256>);
}
