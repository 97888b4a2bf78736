/* SPDX-License-Identifier: MIT */
/*
 * Consumers: a warpgroup takes 64 columns of V of the state, in its accumulators, through a chunk's operands
 * (tiles.cuh).
 *
 * S is in the coordinates of the chunk's middle in between:
 *     [W | Y] = S^T [RK; RQ]^T   U^T = (V^T - W^T diag(rk)) F^T   O^T = (Y^T + U^T M0^T) diag(rq)   S^T <- S^T + U^T CK
 * Everything is transposed, so that an accumulator is, lane for lane, the next product's first operand.
 */
#ifndef KDA_CUDA_SM90_CONSUME_CUH
#define KDA_CUDA_SM90_CONSUME_CUH

#include "cuda/sm90/tiles.cuh"
#include "cuda/sm90/warpgroup.cuh"

namespace kda {

constexpr int EDGE = 4; /* log2: v and S stay below 2^EDGE of the warp's unit */

inline __device__ void decay_state(float (&S)[DIM / 8][4], const float *factors) {
    int part = threadIdx.x % 4 * 4;
#pragma unroll
    for (int c = 0; c < DIM / 8; c += 2) {
        float4 f = *reinterpret_cast<const float4 *>(&factors[c * 8 + part]);
        S[c][0] *= f.x, S[c][1] *= f.y, S[c][2] *= f.x, S[c][3] *= f.y;
        S[c + 1][0] *= f.z, S[c + 1][1] *= f.w, S[c + 1][2] *= f.z, S[c + 1][3] *= f.w;
    }
}

/* rk or rq of the thread's tokens. */
inline __device__ void load_scales(const float *scales, float (&own)[CHUNK / 4]) {
#pragma unroll
    for (int i = 0; i < CHUNK / 4; i += 4)
        *reinterpret_cast<float4 *>(&own[i]) =
            *reinterpret_cast<const float4 *>(&scales[threadIdx.x % 4 * 8 + i]);
}

/*
 * A warp keeps S and v in a unit of its own, 2^unit, in which the largest element is near 1: in the middle of a chunk
 * S is up to 2^115 times smaller, and what is added to it up to 2^115 times larger, than in the end. The unit is raised
 * at once when v needs it, and is measured again, by S, every MEASURED tokens.
 */
constexpr int MEASURED = 512, LEAST_UNIT = -120, GREATEST_UNIT = 120;

/* 0 where fp32 has none so small. */
inline __device__ float power_of_two(int exponent) {
    return exponent < -126 ? 0.f : __int_as_float((exponent + 127) << 23);
}

inline __device__ int unit_of(float largest) {
    int exponent = (int)(__float_as_uint(largest) >> 23) - 127;
    return min(max(exponent, LEAST_UNIT), GREATEST_UNIT);
}

inline __device__ float largest_of_warp(float x) {
#pragma unroll
    for (int n = 16; n; n /= 2)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, n));
    return x;
}

inline __device__ void change_unit(float (&S)[DIM / 8][4], int &unit, int next) {
    float factor = power_of_two(unit - next);
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            S[c][n] *= factor;
    unit = next;
}

/* Goes over to a unit in which S is near 1. */
inline __device__ void measure_unit(float (&S)[DIM / 8][4], int &unit) {
    float largest = 0;
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            largest = fmaxf(largest, fabsf(S[c][n]));
    largest = largest_of_warp(largest);
    if (largest >= 0.25f && largest <= power_of_two(EDGE))
        return;
    int next = min(max(unit_of(largest) + unit, LEAST_UNIT), GREATEST_UNIT);
    next = max(next, unit - 120); /* a factor that fp32 holds */
    change_unit(S, unit, next);
}

/* Raises the unit to that of the chunk's largest value. */
inline __device__ void raise_unit(uint32_t value, float (&S)[DIM / 8][4], int &unit) {
    int next = unit_of(__uint_as_float(value << 16));
    change_unit(S, unit, next);
}

/* One chunk: S goes on, o becomes its outputs before their scale, both in the warp's unit. */
inline __device__ void advance(const Tiles &tiles, const Factors &factors, const __nv_bfloat16 *v_rows,
                               float (&S)[DIM / 8][4], float (&o)[CHUNK / 8][4], int &unit) {
    const Panel(&panels)[PANELS] = tiles.panels;
    uint64_t rows = wgmma_operand(panels[0].keys, 0, 8 * ROW, SWIZZLE_128);
    uint64_t columns = wgmma_operand(panels[0].gates, sizeof(Panel), 8 * ROW, SWIZZLE_128);
    uint64_t inverse = wgmma_operand(tiles.inverse, 0, 8 * CHUNK * 4, SWIZZLE_128);
    uint64_t M = wgmma_operand(tiles.M, 0, 8 * CHUNK * 4, SWIZZLE_128);

    uint32_t value = factors.largest;
    if (value >= (uint32_t)(127 + unit + EDGE) << 7)
        raise_unit(value, S, unit);
    decay_state(S, factors.to_middle);
    float wy[CHUNK / 4][4]; /* W^T, then Y^T */
    uint32_t a[DIM / 16][4];
#pragma unroll
    for (int c = 0; c < DIM / 16; c++)
        pack_operand(S[2 * c], S[2 * c + 1], a[c]);
    pin(wy);
    wgmma_fence();
    wgmma<false, false>(wy, a[0], rows);
#pragma unroll
    for (int c = 1; c < DIM / 16; c++)
        wgmma<false, true>(wy, a[c], advanced(rows, c / 4 * sizeof(Panel) + c % 4 * 32));
    wgmma_commit();

    uint32_t v[CHUNK / 16][4];
    MatrixRow<CHUNK, DIM> values(v_rows, false);
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        ldmatrix_transposed(v[t], values.at(t * 16, threadIdx.x / 32 * 16));
    alignas(16) float rk[CHUNK / 4];
    load_scales(factors.key_scale, rk);
    wgmma_wait<0>();
    pin(wy);
    float in_units = power_of_two(-unit);
    float U[CHUNK / 8][4];
    uint32_t x[CHUNK / 8][4];
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++) {
        float tile[4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float2 pair = unpack_bf16(v[i / 2][i % 2 * 2 + n]);
            tile[2 * n] = fmaf(-rk[2 * i], wy[i][2 * n], pair.x * in_units);
            tile[2 * n + 1] = fmaf(-rk[2 * i + 1], wy[i][2 * n + 1], pair.y * in_units);
        }
        tf32_operand(tile, x[i]);
    }
    pin(U);
    wgmma_fence();
    wgmma_tf32<false>(U, x[0], inverse);
#pragma unroll
    for (int i = 1; i < CHUNK / 8; i++)
        wgmma_tf32<true>(U, x[i], advanced(inverse, i * 32));
    wgmma_commit();
    wgmma_wait<0>();
    pin(U);

    uint32_t u[CHUNK / 16][4];
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        pack_operand(U[2 * t], U[2 * t + 1], u[t]);
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
        tf32_operand(U[i], x[i]);
    pin(S);
    pin(o);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        wgmma<true, true>(S, u[t], advanced(columns, t * 16 * ROW));
    wgmma_tf32<false>(o, x[0], M);
#pragma unroll
    for (int i = 1; i < CHUNK / 8; i++)
        wgmma_tf32<true>(o, x[i], advanced(M, i * 32));
    wgmma_commit();
    wgmma_wait<0>();
    pin(S);
    pin(o);
    decay_state(S, factors.to_end);
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            o[i][n] += wy[CHUNK / 8 + i][n];
}

/* Runs f(two neighbours of S in a row of V, channel, column) over the thread's share of the state. */
template <class S, class F> __device__ void each_pair(S (&state)[DIM / 8][4], F f) {
    int t = threadIdx.x, lane = t % 32, column = t / 32 * 16 + lane / 4;
#pragma unroll
    for (int c = 0; c < DIM / 8; c++)
#pragma unroll
        for (int n = 0; n < 2; n++)
            f(state[c][2 * n], state[c][2 * n + 1], c * 8 + lane % 4 * 2, column + n * 8);
}

/* Where element (column of V, channel) of a state is. */
inline __device__ char *element(const kda_state &state, int column, int channel) {
    int row = state.v_first ? column : channel, i = state.v_first ? channel : column;
    return state.data + row * state.stride + i * (state.dtype == KDA_F32 ? 4 : 2);
}

/* Can a pair be accessed at once? */
inline __device__ bool as_pairs(const kda_state &state) {
    return state.v_first &&
           (reinterpret_cast<uintptr_t>(state.data) | state.stride) % (state.dtype == KDA_F32 ? 8 : 4) == 0;
}

/* As load_float, but states are never fp16: its branch would cost registers that the products need. */
inline __device__ float load_one(const kda_state &state, int column, int channel) {
    const char *at = element(state, column, channel);
    return state.dtype == KDA_F32 ? *reinterpret_cast<const float *>(at)
                                  : kda_from_bf16(*reinterpret_cast<const uint16_t *>(at));
}

inline __device__ void load_whole(const kda_state &state, float (&S)[DIM / 8][4]) {
    if (!state.data)
        each_pair(S, [](float &x, float &y, int, int) { x = y = 0.f; });
    else if (!as_pairs(state))
        each_pair(S, [&](float &x, float &y, int channel, int column) {
            x = load_one(state, column, channel), y = load_one(state, column, channel + 1);
        });
    else if (state.dtype == KDA_F32)
        each_pair(S, [&](float &x, float &y, int channel, int column) {
            float2 pair = *reinterpret_cast<const float2 *>(element(state, column, channel));
            x = pair.x, y = pair.y;
        });
    else
        each_pair(S, [&](float &x, float &y, int channel, int column) {
            float2 pair = unpack_bf16(*reinterpret_cast<const uint32_t *>(element(state, column, channel)));
            x = pair.x, y = pair.y;
        });
}

inline __device__ void store_whole(const kda_state &state, const float (&S)[DIM / 8][4], int unit) {
    float factor = power_of_two(unit);
    if (!as_pairs(state))
        each_pair(S, [&](float x, float y, int channel, int column) {
            store_float(element(state, column, channel), state.dtype, 0, x * factor);
            store_float(element(state, column, channel + 1), state.dtype, 0, y * factor);
        });
    else if (state.dtype == KDA_F32)
        each_pair(S, [&](float x, float y, int channel, int column) {
            *reinterpret_cast<float2 *>(element(state, column, channel)) = make_float2(x * factor, y * factor);
        });
    else
        each_pair(S, [&](float x, float y, int channel, int column) {
            *reinterpret_cast<uint32_t *>(element(state, column, channel)) = pack_bf16(x * factor, y * factor);
        });
}

/* At position 0 the state that the chain starts from, else the one behind that token. */
inline __device__ void store_whole_checkpoints(const kda_prefill &p, int n, int head, int position,
                                               const float (&S)[DIM / 8][4], int unit) {
    int64_t cursor = 0;
    while (p.checkpoints.data) {
        struct kda_state state = kda_checkpoint_at(&p, n, position, head, &cursor);
        if (!state.data)
            return;
        store_whole(state, S, unit);
    }
}

} // namespace kda

#endif
