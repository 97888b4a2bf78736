/* SPDX-License-Identifier: MIT */
/*
 * How eight warps turn a chunk's k, q and g into tiles (config.cuh). A warp has 16 channels of all tokens, as an
 * accumulator [channels][tokens] has them: tile j of 8 tokens, channels lane / 4 + 8 r, tokens lane % 4 * 2 + e.
 */
#ifndef KDA_CUDA_SM90_BACKWARD_TILES_CUH
#define KDA_CUDA_SM90_BACKWARD_TILES_CUH

#include "cuda/sm90/backward/config.cuh"
#include "cuda/sm90/mainloop/unbounded.cuh"

namespace kda {
namespace {

/* Pairs of a warp's tokens: of tile j and channels r, pairs[j / 2][j % 2 * 2 + r]. */
using Pairs = uint32_t[CHUNK / 16][4];
using Elements = float[CHUNK / 8][2][2]; /* [j][r][e] */

/* Of 16 tokens. */
inline __device__ void load_half(const __nv_bfloat16 *tile, int warp, int half, uint32_t (&x)[4]) {
    ldmatrix_transposed(x, MatrixRow<CHUNK, DIM>(tile, false, thread() % 32).at(half * 16, warp * 16));
}

/* Of a tile [CHUNK][DIM]. */
inline __device__ void load_pairs(const __nv_bfloat16 *tile, int warp, Pairs &x) {
    MatrixRow<CHUNK, DIM> rows(tile, false, thread() % 32);
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        ldmatrix_transposed(x[t], rows.at(t * 16, warp * 16));
}

inline __device__ void store_pairs(__nv_bfloat16 *tile, int warp, const Pairs &x) {
    MatrixRow<CHUNK, DIM> rows(tile, false, thread() % 32);
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        stmatrix_transposed(rows.at(t * 16, warp * 16), x[t]);
}

/* Tokens that do not exist become 0. */
inline __device__ void clear_pairs(Pairs &x, int count) {
    if (__builtin_expect(count == CHUNK, 1))
        return;
    int part = (int)(thread() % 4) * 2;
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int token = t * 16 + n / 2 * 8 + part;
            x[t][n] &= token + 1 < count ? ~0u : token < count ? 0xffff : 0;
        }
}

/* Where they are gates, they come to decay nothing. */
inline __device__ void fill_gates(Pairs &x, int count) {
    if (__builtin_expect(count == CHUNK, 1))
        return;
    int part = (int)(thread() % 4) * 2;
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int token = t * 16 + n / 2 * 8 + part;
            uint32_t own = token + 1 < count ? ~0u : token < count ? 0xffff : 0;
            x[t][n] = (x[t][n] & own) | (NO_DECAY & ~own);
        }
}

/* The gates of the thread's channels, 8 apart. */
template <bool bounded> __device__ Gate find_gates(const kda_prefill &p, int head, int warp) {
    int channel = warp * 16 + threadIdx.x % 32 / 4;
    Gate gate = find_gate<bounded>(p, head, channel);
    gate.offset.y = find_gate<bounded>(p, head, channel + 8).offset.x;
    return gate;
}

/* log2 decays from the chunk's start, rounded, of the thread's two channels: to the middles of both blocks, to the
 * boundary between them, and through the chunk. */
struct References {
    float middle[2][2], boundary[2], end[2]; /* [block][r] */
    float fraction[2];                       /* what `end` leaves of the decay */
    bool cut;                                /* is some decay of the warp cut off */
};

/* Sums over the lanes of a quad before a lane, by 0 and 1 as factors: they take fewer instructions than choices. */
struct QuadSums {
    float odd, upper; /* is the lane the second of its pair, or in the second pair */

    __device__ QuadSums() {
        uint32_t lane = thread();
        odd = lane & 1 ? 1.f : 0.f, upper = lane & 2 ? 1.f : 0.f;
    }
    /* `sum` and x of the lanes before this one; `sum` becomes that of all four. */
    __device__ float before(float &sum, float x) const {
        float neighbour = __shfl_xor_sync(~0u, x, 1), pair = x + neighbour,
              other = __shfl_xor_sync(~0u, pair, 2);
        float earlier = fmaf(upper, other, fmaf(odd, neighbour, sum));
        sum += pair + other;
        return earlier;
    }
};

/* Without a bound the factors of a block could leave bf16's range. Within a chunk a token's log2 decay then counts
 * for no less than DEEPEST, as in unbounded.cuh. What is cut off, the rest, is a whole number: states get it, in KT,
 * QT and KR, by powers of two. */
inline __device__ float rest_of(float decay) {
    return decay < DEEPEST ? floorf(max_or_nan(decay, -0x1p20f) - DEEPEST) : 0.f;
}

/* x becomes the log2 decay from the middle of a token's block to the token. */
template <bool bounded> __device__ References find_decays(const Gate &gate, const Pairs &g, Elements &x) {
    References found;
    found.cut = false;
    QuadSums quad;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = 0, offset = r ? gate.offset.y : gate.offset.x;
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++) {
            float2 raw = unpack_bf16(g[j / 2][j % 2 * 2 + r]);
            float first = log2_decay<bounded>(gate, raw.x, offset),
                  second = log2_decay<bounded>(gate, raw.y, offset);
            if constexpr (!bounded) {
                found.cut |= first < DEEPEST || second < DEEPEST;
                first = max_or_nan(first, -0x1p20f), second = max_or_nan(second, -0x1p20f);
                first -= rest_of(first), second -= rest_of(second);
            }
            float before = quad.before(sum, first + second);
            x[j][r][0] = before + first, x[j][r][1] = before + first + second;
            if (j % 2 == 0)
                found.middle[j / 2][r] = rintf(sum);
            if (j == 1)
                found.boundary[r] = rintf(sum);
        }
        found.end[r] = rintf(sum), found.fraction[r] = sum - found.end[r];
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++)
            x[j][r][0] -= found.middle[j / 2][r], x[j][r][1] -= found.middle[j / 2][r];
    }
    if constexpr (!bounded)
        found.cut = __any_sync(~0u, found.cut);
    return found;
}

/* The sums of the rests up to each token, itself included, and over the chunk. */
inline __device__ void find_rests(const Gate &gate, const Pairs &g, Elements &rests, float (&all)[2]) {
    QuadSums quad;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = 0, offset = r ? gate.offset.y : gate.offset.x;
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++) {
            float2 raw = unpack_bf16(g[j / 2][j % 2 * 2 + r]);
            float first = rest_of(log2_decay<false>(gate, raw.x, offset));
            float second = rest_of(log2_decay<false>(gate, raw.y, offset));
            float before = quad.before(sum, first + second);
            rests[j][r][0] = before + first, rests[j][r][1] = before + first + second;
        }
        all[r] = sum;
    }
}

/* 2^exponent as bf16, twice. */
inline __device__ uint32_t power_pair(float exponent) {
    return (__float_as_uint(power_of_two((int)exponent)) >> 16) * 0x10001;
}

/* Takes RK or RQ to the chunk's start or, to_end, CK to its end. */
template <bool bounded, bool to_end>
__device__ void shift_pairs(const Pairs &x, const References &found, const Gate &gate, const Pairs &g,
                            Pairs &shifted) {
    auto exponent = [&](int t, int r) {
        return to_end ? found.end[r] - found.middle[t][r] : found.middle[t][r];
    };
    if constexpr (!bounded)
        if (__builtin_expect(found.cut, 0)) {
            Elements rests;
            float all[2];
            find_rests(gate, g, rests, all);
#pragma unroll
            for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    int j = t * 2 + n / 2, r = n % 2;
                    uint32_t powers[2];
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        powers[e] =
                            power_pair(exponent(t, r) + (to_end ? all[r] - rests[j][r][e] : rests[j][r][e]));
                    shifted[t][n] = multiply_pair(x[t][n], (powers[0] & 0xffff) | (powers[1] & 0xffff0000));
                }
            return;
        }
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int n = 0; n < 4; n++)
            shifted[t][n] = multiply_pair(x[t][n], power_pair(exponent(t, n % 2)));
}

/* The thread's channels' decay through the chunk, which is to be multiplied by exp2(fraction), too. */
template <bool bounded>
__device__ void find_whole(const References &found, const Gate &gate, const Pairs &g, float (&whole)[2]) {
    float all[2] = {};
    if constexpr (!bounded)
        if (__builtin_expect(found.cut, 0)) {
            Elements rests;
            find_rests(gate, g, rests, all);
        }
    whole[0] = power_of_two((int)(found.end[0] + all[0])),
    whole[1] = power_of_two((int)(found.end[1] + all[1]));
}

/* A row's tokens times their scales and the elements' factors. */
inline __device__ void scale_pairs(const Pairs &x, const float *scales, const Elements &factors,
                                   Pairs &scaled) {
    int part = (int)(thread() % 4) * 2;
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int j = t * 2 + n / 2, r = n % 2;
            float2 scale = *reinterpret_cast<const float2 *>(&scales[j * 8 + part]);
            float2 y = unpack_bf16(x[t][n]);
            scaled[t][n] = pack_bf16(y.x * scale.x * factors[j][r][0], y.y * scale.y * factors[j][r][1]);
        }
}

/* The same of k, as rows and as columns of pairs of tokens. */
inline __device__ void scale_keys(const Pairs &x, const float *scales, const Elements &decayed,
                                  const Elements &grown, Pairs &rows, Pairs &columns) {
    int part = (int)(thread() % 4) * 2;
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int j = t * 2 + n / 2, r = n % 2;
            float2 scale = *reinterpret_cast<const float2 *>(&scales[j * 8 + part]);
            float2 y = unpack_bf16(x[t][n]);
            y.x *= scale.x, y.y *= scale.y;
            rows[t][n] = pack_bf16(y.x * decayed[j][r][0], y.y * decayed[j][r][1]);
            columns[t][n] = pack_bf16(y.x * grown[j][r][0], y.y * grown[j][r][1]);
        }
}

} // namespace
} // namespace kda

#endif
