/* SPDX-License-Identifier: MIT */
/*
 * The part of a chunk that does not depend on the state, for every chunk of every value head at once: gate, norms,
 * KT, QT, KR, M and the inverse of I + L (docs/maths.md). One CTA a chunk and value head.
 *
 * No exponent is ever positive: decays between two tokens are products of the tokens' own exp(a) <= 1. Pairs of
 * tokens in one block of 8 are multiplied out in fp32; pairs in different blocks meet in tensor-core products
 * whose rows are decayed from the start of their block and whose columns to the start of that block.
 */
#include "cuda/ptx/sm80.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/operands.cuh"

namespace kda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int BLOCK = 8, BLOCKS = CHUNK / BLOCK;
constexpr float LOG2E = 1.4426950408889634f;

template <int KP> struct Shared {
    float k[CHUNK][KP];                /* normalised */
    float q[CHUNK][KP];                /* normalised, times scale */
    float decay[CHUNK][KP];            /* exp(a); a log2 decay until the gate is applied */
    __nv_bfloat16 rows[2][CHUNK * KP]; /* k, then q, decayed from the start of their block; swizzled */
    __nv_bfloat16 columns[CHUNK * KP]; /* k decayed to the end of its block; swizzled */
    float through[BLOCKS][KP];         /* decay through a block */
    float log_through[BLOCKS][KP];
    float beta[CHUNK];
    float L[CHUNK][CHUNK + 1], M[CHUNK][CHUNK + 1];
};

__device__ float load_float(const char *row, kda_dtype dtype, int64_t i) {
    if (dtype == KDA_F32)
        return reinterpret_cast<const float *>(row)[i];
    uint16_t x = reinterpret_cast<const uint16_t *>(row)[i];
    return dtype == KDA_BF16 ? kda_from_bf16(x) : __half2float(__ushort_as_half(x));
}

__device__ float warp_sum(float x) {
    for (int lane = 16; lane; lane /= 2)
        x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

__device__ float sigmoid(float x) { return __fdividef(1.f, 1.f + exp2_approximate(-x * LOG2E)); }

/* log2 of the decay of one channel. A is exp(A_log). */
template <flash_kda_gate gate> __device__ float log2_decay(float g, float dt_bias, float A, float lower_bound) {
    if (gate == FLASH_KDA_GATE_SOFTPLUS) {
        float x = g + dt_bias, y = exp2_approximate(-fabsf(x) * LOG2E);
        /* log2(1 + y): the series where 1 + y would lose y */
        float tail = y < 0x1p-10f ? y * (LOG2E - y * (0.5f * LOG2E)) : __log2f(1.f + y);
        return -A * (fmaxf(x, 0.f) * LOG2E + tail);
    }
    if (gate == FLASH_KDA_GATE_SIGMOID)
        return lower_bound * LOG2E * sigmoid(A * (g + dt_bias));
    return g * LOG2E;
}

/* One lane's share of a warp's rows: four neighbouring channels of each of its tokens. */
constexpr int TOKENS = CHUNK / WARPS;

/* Rows of q, k or g of this warp's tokens; missing ones and channels behind K are 0. All loads are under way before
 * the first is used. */
__device__ void load_rows(const kda_prefill &p, const kda_tensor &t, int64_t batch, int64_t first, int64_t head,
                          int count, int c, float4 (&x)[TOKENS]) {
    int warp = threadIdx.x / 32;
    const char *row = kda_row(&t, batch, first + warp, head) + (t.dtype == KDA_F32 ? 4 : 2) * c;
    int64_t stride = WARPS * t.stride[1];
    bool whole =
        c + 4 <= p.key_dim && t.dtype != KDA_F32 && (reinterpret_cast<uintptr_t>(row) | stride) % 8 == 0;
    if (whole) {
        uint2 raw[TOKENS];
#pragma unroll
        for (int i = 0; i < TOKENS; i++)
            raw[i] = warp + i * WARPS < count ? *reinterpret_cast<const uint2 *>(row + i * stride)
                                              : make_uint2(0, 0);
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            float2 low = t.dtype == KDA_BF16 ? unpack_bf16(raw[i].x)
                                             : __half22float2(*reinterpret_cast<__half2 *>(&raw[i].x));
            float2 high = t.dtype == KDA_BF16 ? unpack_bf16(raw[i].y)
                                              : __half22float2(*reinterpret_cast<__half2 *>(&raw[i].y));
            x[i] = make_float4(low.x, low.y, high.x, high.y);
        }
        return;
    }
    int real = p.key_dim - c < 4 ? (int)p.key_dim - c : 4;
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        float f[4] = {0, 0, 0, 0};
        for (int n = 0; n < real && warp + i * WARPS < count; n++)
            f[n] = load_float(row + i * stride, t.dtype, n);
        x[i] = make_float4(f[0], f[1], f[2], f[3]);
    }
}

template <int KP> constexpr int PASSES = (KP + 127) / 128; /* over the channels of a row, 128 at a time */

/* This warp's rows of q or k to shared memory, normalised if asked for, times factor. */
template <int KP>
__device__ void store_keys(const kda_prefill &p, float factor, const float4 (&x)[PASSES<KP>][TOKENS],
                           float (&to)[CHUNK][KP]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        float squares = 0, scale = factor;
        for (int n = 0; n < PASSES<KP>; n++)
            squares +=
                x[n][i].x * x[n][i].x + x[n][i].y * x[n][i].y + x[n][i].z * x[n][i].z + x[n][i].w * x[n][i].w;
        if (p.qk_norm)
            scale /= sqrtf(warp_sum(squares) + 1e-6f);
        for (int n = 0; n < PASSES<KP>; n++)
            if (n * 128 + lane * 4 < KP)
                *reinterpret_cast<float4 *>(&to[warp + i * WARPS][n * 128 + lane * 4]) =
                    make_float4(x[n][i].x * scale, x[n][i].y * scale, x[n][i].z * scale, x[n][i].w * scale);
    }
}

/* g of this warp's tokens becomes log2 decays; channels behind K and missing tokens do not decay. */
template <int KP, flash_kda_gate gate>
__device__ void store_decays(const kda_prefill &p, int64_t head, int count,
                             const float4 (&g)[PASSES<KP>][TOKENS], float (&to)[CHUNK][KP]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, K = (int)p.key_dim;
    const char *bias = p.dt_bias.data ? p.dt_bias.data + head * p.dt_bias.stride[0] : nullptr;
    float A = p.A_log.data
                  ? fminf(expf(load_float(p.A_log.data + head * p.A_log.stride[0], p.A_log.dtype, 0)), 3e38f)
                  : 1.f;
#pragma unroll
    for (int n = 0; n < PASSES<KP>; n++) {
        int c = n * 128 + lane * 4;
        float b[4];
        for (int e = 0; e < 4; e++)
            b[e] = bias && c + e < K ? load_float(bias, p.dt_bias.dtype, c + e) : 0.f;
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            float x[4] = {g[n][i].x, g[n][i].y, g[n][i].z, g[n][i].w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float a = log2_decay<gate>(x[e], b[e], A, p.lower_bound);
                x[e] = warp + i * WARPS < count && c + e < K ? a : 0.f;
            }
            if (c < KP)
                *reinterpret_cast<float4 *>(&to[warp + i * WARPS][c]) = make_float4(x[0], x[1], x[2], x[3]);
        }
    }
}

template <int KP>
__device__ void load_chunk(const kda_prefill &p, const struct kda_sequence &s, int64_t first, int count,
                           int64_t head, Shared<KP> &shared) {
    int64_t key_head = head / (p.value_heads / p.heads), token = s.first + first;
    float4 k[PASSES<KP>][TOKENS], q[PASSES<KP>][TOKENS], g[PASSES<KP>][TOKENS];
#pragma unroll
    for (int n = 0; n < PASSES<KP>; n++) {
        int c = n * 128 + threadIdx.x % 32 * 4;
        load_rows(p, p.k, s.batch, token, key_head, count, c, k[n]);
        load_rows(p, p.q, s.batch, token, key_head, count, c, q[n]);
        load_rows(p, p.g, s.batch, token, head, count, c, g[n]);
    }
    if (threadIdx.x < CHUNK) {
        int t = threadIdx.x;
        float beta = t < count ? load_float(kda_row(&p.beta, s.batch, token + t, head), p.beta.dtype, 0) : 0.f;
        if (p.beta_mode != FLASH_KDA_BETA_GIVEN)
            beta = sigmoid(beta) * (p.beta_mode == FLASH_KDA_BETA_TWICE_SIGMOID ? 2.f : 1.f);
        shared.beta[t] = t < count ? beta : 0.f;
    }
    store_keys<KP>(p, 1.f, k, shared.k);
    store_keys<KP>(p, p.scale, q, shared.q);
    switch (p.gate) {
    case FLASH_KDA_GATE_SOFTPLUS:
        return store_decays<KP, FLASH_KDA_GATE_SOFTPLUS>(p, head, count, g, shared.decay);
    case FLASH_KDA_GATE_SIGMOID:
        return store_decays<KP, FLASH_KDA_GATE_SIGMOID>(p, head, count, g, shared.decay);
    default:
        return store_decays<KP, FLASH_KDA_GATE_NONE>(p, head, count, g, shared.decay);
    }
}

/* Two channels of one block a thread: decays, and the operands of the pairs across blocks. */
template <int KP> __device__ void decay_blocks(Shared<KP> &shared) {
    for (int i = threadIdx.x; i < BLOCKS * KP / 2; i += THREADS) {
        int block = i / (KP / 2), c = i % (KP / 2) * 2;
        float2 product = make_float2(1, 1), sum = make_float2(0, 0), decay[BLOCK];
#pragma unroll
        for (int t = 0; t < BLOCK; t++) {
            int row = block * BLOCK + t;
            float2 a = *reinterpret_cast<float2 *>(&shared.decay[row][c]);
            sum.x += a.x, sum.y += a.y;
            decay[t] = make_float2(exp2_approximate(a.x), exp2_approximate(a.y));
            *reinterpret_cast<float2 *>(&shared.decay[row][c]) = decay[t];
            product.x *= decay[t].x, product.y *= decay[t].y;
            float2 k = *reinterpret_cast<float2 *>(&shared.k[row][c]),
                   q = *reinterpret_cast<float2 *>(&shared.q[row][c]);
            int at = swizzled<KP>(row, c);
            *reinterpret_cast<uint32_t *>(&shared.rows[0][at]) = pack_bf16(k.x * product.x, k.y * product.y);
            *reinterpret_cast<uint32_t *>(&shared.rows[1][at]) = pack_bf16(q.x * product.x, q.y * product.y);
        }
        *reinterpret_cast<float2 *>(&shared.through[block][c]) = product;
        *reinterpret_cast<float2 *>(&shared.log_through[block][c]) = sum;
        product = make_float2(1, 1);
#pragma unroll
        for (int t = BLOCK - 1; t >= 0; t--) {
            int row = block * BLOCK + t;
            float2 k = *reinterpret_cast<float2 *>(&shared.k[row][c]);
            *reinterpret_cast<uint32_t *>(&shared.columns[swizzled<KP>(row, c)]) =
                pack_bf16(k.x * product.x, k.y * product.y);
            product.x *= decay[t].x, product.y *= decay[t].y;
        }
    }
}

/* Lane l ends with the sum of value l over the warp: halves of the values are exchanged for halves of the lanes. */
template <int half> __device__ void sum_by_lane(float (&x)[32]) {
    bool high = threadIdx.x & half;
#pragma unroll
    for (int i = 0; i < half; i++) {
        float keep = high ? x[i + half] : x[i], give = high ? x[i] : x[i + half];
        x[i] = keep + __shfl_xor_sync(~0u, give, half);
    }
    if constexpr (half > 1)
        sum_by_lane<half / 2>(x);
}

/* Pairs inside a block, two warps a block: one for L, one for M. Lane n holds the n-th pair i > j, column by column. */
template <int KP> __device__ void block_pairs(Shared<KP> &shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = warp / 2 * BLOCK;
    bool queries = warp % 2;
    float pair[32] = {}, own[BLOCK] = {};
#pragma unroll 1
    for (int c = lane * 2; c < KP; c += 64) {
        float2 row[BLOCK], decay[BLOCK];
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            row[i] = *reinterpret_cast<float2 *>(queries ? &shared.q[block + i][c] : &shared.k[block + i][c]);
            decay[i] = *reinterpret_cast<float2 *>(&shared.decay[block + i][c]);
        }
        int n = 0;
#pragma unroll
        for (int j = 0; j < BLOCK; j++) {
            float2 x = *reinterpret_cast<float2 *>(&shared.k[block + j][c]);
            own[j] += row[j].x * x.x + row[j].y * x.y;
#pragma unroll
            for (int i = j + 1; i < BLOCK; i++, n++) {
                x.x *= decay[i].x, x.y *= decay[i].y;
                pair[n] += row[i].x * x.x + row[i].y * x.y;
            }
        }
    }
    sum_by_lane<16>(pair);
    float sum = pair[0];
    int j = 0, n = lane;
    for (; j < BLOCK && n >= BLOCK - 1 - j; j++)
        n -= BLOCK - 1 - j;
    int i = block + j + 1 + n;
    if (lane < BLOCK * (BLOCK - 1) / 2) {
        if (queries)
            shared.M[i][block + j] = sum;
        else
            shared.L[i][block + j] = sum * shared.beta[i];
    }
#pragma unroll
    for (int t = 0; t < BLOCK; t++) {
        float diagonal = warp_sum(own[t]);
        if (queries && lane == t)
            shared.M[block + t][block + t] = diagonal;
    }
}

/* Pairs across blocks: rows of block `later` (k, then q) against columns of block `earlier`, one warp each. */
template <int KP> __device__ void cross_pairs(Shared<KP> &shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int pair = warp; pair < BLOCKS * (BLOCKS - 1) / 2; pair += WARPS) {
        int later = pair < 1 ? 1 : pair < 3 ? 2 : 3, earlier = pair - later * (later - 1) / 2;
        int row = lane / 4, part = lane % 4 * 2;
        float sum[4] = {};
        for (int c = 0; c < KP; c += 16) {
            uint32_t a[4], b[2];
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[i] = *reinterpret_cast<uint32_t *>(
                    &shared.rows[i % 2][swizzled<KP>(later * BLOCK + row, c + part + i / 2 * 8)]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int at = c + part + i * 8;
                b[i] = *reinterpret_cast<uint32_t *>(&shared.columns[swizzled<KP>(earlier * BLOCK + row, at)]);
                if (later - earlier > 1) {
                    float2 x = unpack_bf16(b[i]);
                    for (int between = earlier + 1; between < later; between++) {
                        float2 decay = *reinterpret_cast<float2 *>(&shared.through[between][at]);
                        x.x *= decay.x, x.y *= decay.y;
                    }
                    b[i] = pack_bf16(x.x, x.y);
                }
            }
            mma(sum, a, b[0], b[1]);
        }
        /* sum[0..1]: row of k, sum[2..3]: the same row of q */
        int i = later * BLOCK + row, j = earlier * BLOCK + part;
        float beta = shared.beta[i];
        shared.L[i][j] = sum[0] * beta, shared.L[i][j + 1] = sum[1] * beta;
        shared.M[i][j] = sum[2], shared.M[i][j + 1] = sum[3];
    }
}

/* One warp: column `lane` of (I + L)^-1 by forward substitution, times beta. */
template <int KP> __device__ void invert(const Shared<KP> &shared, __nv_bfloat16 (&inverse)[2][CHUNK * CHUNK]) {
    int lane = threadIdx.x % 32;
    float x[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        float sum = i == lane ? 1.f : 0.f;
#pragma unroll
        for (int j = 0; j < i; j++)
            sum -= shared.L[i][j] * x[j];
        x[i] = sum;
    }
    float beta = shared.beta[lane];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        float value = i < lane ? 0.f : x[i] * beta;
        __nv_bfloat16 rounded = __float2bfloat16_rn(value);
        inverse[0][swizzled<CHUNK>(i, lane)] = rounded;
        inverse[1][swizzled<CHUNK>(i, lane)] = __float2bfloat16_rn(value - __bfloat162float(rounded));
    }
}

/* The other warps: KT, QT, KR, M and the carry. */
template <int KP>
__device__ void store_operands(const Shared<KP> &shared, int thread, int threads, Operands<KP> &out) {
    for (int i = thread; i < BLOCKS * KP / 2; i += threads) {
        int block = i / (KP / 2), c = i % (KP / 2) * 2;
        float2 before = make_float2(1, 1), after = make_float2(1, 1), decay[BLOCK];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            float2 through = *reinterpret_cast<const float2 *>(&shared.through[b][c]);
            if (b < block)
                before.x *= through.x, before.y *= through.y;
            if (b > block)
                after.x *= through.x, after.y *= through.y;
        }
#pragma unroll
        for (int t = 0; t < BLOCK; t++) {
            int row = block * BLOCK + t, at = swizzled<KP>(row, c);
            decay[t] = *reinterpret_cast<const float2 *>(&shared.decay[row][c]);
            before.x *= decay[t].x, before.y *= decay[t].y;
            float2 k = *reinterpret_cast<const float2 *>(&shared.k[row][c]);
            float2 q = *reinterpret_cast<const float2 *>(&shared.q[row][c]);
            *reinterpret_cast<uint32_t *>(&out.queries_keys[at]) = pack_bf16(k.x * before.x, k.y * before.y);
            *reinterpret_cast<uint32_t *>(&out.queries_keys[CHUNK * KP + at]) =
                pack_bf16(q.x * before.x, q.y * before.y);
        }
#pragma unroll
        for (int t = BLOCK - 1; t >= 0; t--) {
            int row = block * BLOCK + t;
            float2 k = *reinterpret_cast<const float2 *>(&shared.k[row][c]);
            *reinterpret_cast<uint32_t *>(&out.keys_to_end[swizzled<KP>(row, c)]) =
                pack_bf16(k.x * after.x, k.y * after.y);
            after.x *= decay[t].x, after.y *= decay[t].y;
        }
    }
    for (int i = thread; i < CHUNK * CHUNK; i += threads) {
        int row = i / CHUNK, column = i % CHUNK;
        out.M[swizzled<CHUNK>(row, column)] = __float2bfloat16_rn(column <= row ? shared.M[row][column] : 0.f);
    }
    for (int c = thread; c < KP; c += threads) {
        float sum = 0;
        for (int b = 0; b < BLOCKS; b++)
            sum += shared.log_through[b][c];
        out.carry[c] = expm1f(sum * 0.6931471805599453f);
    }
}

template <int KP>
__global__ void __launch_bounds__(THREADS) prepare(const __grid_constant__ kda_prefill p, void *operands) {
    extern __shared__ __align__(16) char memory[];
    Shared<KP> &shared = *reinterpret_cast<Shared<KP> *>(memory);
    int64_t chunk = blockIdx.x, head = blockIdx.y;
    /* The last sequence whose chunks begin at or before this one. */
    int64_t low = 0, high = p.sequences - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (kda_first_chunk(&p, kda_sequence(&p, middle).first, middle) <= chunk)
            low = middle;
        else
            high = middle - 1;
    }
    struct kda_sequence s = kda_sequence(&p, low);
    struct kda_span span = kda_chunk_span(&p, low, s.length, chunk - kda_first_chunk(&p, s.first, low));
    if (s.slot < 0 || span.count == 0)
        return;
    int64_t first = span.first;
    int count = (int)span.count;

    load_chunk<KP>(p, s, first, count, head, shared);
    __syncthreads();
    decay_blocks<KP>(shared);
    __syncthreads();
    block_pairs<KP>(shared);
    cross_pairs<KP>(shared);
    __syncthreads();
    Operands<KP> &out = static_cast<Operands<KP> *>(operands)[chunk * p.value_heads + head];
    if (threadIdx.x < 32)
        invert<KP>(shared, out.inverse);
    else
        store_operands<KP>(shared, threadIdx.x - 32, THREADS - 32, out);
}

} // namespace
} // namespace kda

template <int KP>
static cudaError_t launch(const kda_prefill *p, int64_t chunks, void *operands, cudaStream_t stream) {
    using namespace kda;
    cudaError_t error =
        cudaFuncSetAttribute(prepare<KP>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<KP>));
    if (error)
        return error;
    prepare<KP><<<dim3((unsigned)chunks, (unsigned)p->value_heads), THREADS, sizeof(Shared<KP>), stream>>>(
        *p, operands);
    return cudaGetLastError();
}

cudaError_t kda_sm80_prepare(const kda_prefill *p, int64_t chunks, void *operands, cudaStream_t stream) {
    return p->key_dim <= 64    ? launch<64>(p, chunks, operands, stream)
           : p->key_dim <= 128 ? launch<128>(p, chunks, operands, stream)
                               : launch<256>(p, chunks, operands, stream);
}
