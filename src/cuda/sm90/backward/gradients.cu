/* SPDX-License-Identifier: MIT */
/*
 * Makes the gradients of a segment's q, k, g and beta, from S at its start, R at the end of each chunk and dX (config.cuh).
 *
 * A chunk takes these steps, and all warps take part in each; between two of them they wait for one another.
 *
 *     keys    RK, CK, KT, KR
 *     values  RQ; X = V - KT S, U = N diag(beta) X
 *     states  T3 = R U^T, [T1 T2] = S [dO; dX]^T, dM = dO U^T, dL = dX U^T
 *     rows    [T1 T2] += CK^T [dM; dL]^T, T3 += RQ^T dM - RK^T dL; what enters and leaves decays
 *     sums    those along rows are added; meanwhile the gradient of g
 *     ends    gradients of q and k
 *     next    S <- exp2(G) S + KR^T U, while the gradients leave
 *
 * dL and T2 have the other sign here, as dX is positive. A product that passes from one block of 16 tokens to the other
 * is taken from the one middle to the other in between. A warp has 16 channels of tiles and of T1, T2 and T3, and 16
 * columns of V of U and S.
 */
#include "cuda/sm90/backward/tiles.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tensor_maps.h"

namespace kda {
namespace {

constexpr int GRADIENT_THREADS = 2 * GROUP, WARPS = GRADIENT_THREADS / 32;

/* Of a chunk's three tiles: k becomes RK, then dk; g becomes CK, then dg; q becomes RQ, then dq. While they are used, the
 * next chunk's k and g come to its own, whose third one has KT, then KR. */
enum Role { KEYS, GATES, QUERIES, ROLES };

/* A CTA's segment. It lies in shared memory, as registers are short. */
struct Work {
    Place segment;
    const ChunkOperands *operands; /* of its first chunk */
    const uint4 *adjoints;         /* likewise */
    float *gate_sums;
    int chunks;
};

struct alignas(1024) GradientsShared {
    __nv_bfloat16 S[DIM * DIM]; /* rows of V, in two panels of 64 channels */
    __nv_bfloat16 tiles[2][ROLES][TILE];
    union {
        __nv_bfloat16 values[2][2 * TOKENS]; /* rows of dO, then of dX, in two panels of 64 columns of V */
        __nv_bfloat16 raw[2][TILE];          /* then q and k once more */
    };
    __nv_bfloat16 U[TILE]; /* before it v */
    union {
        __nv_bfloat16 N[CHUNK * CHUNK];
        __nv_bfloat16 pairs[2 * CHUNK * CHUNK]; /* then rows of dM and of dL, swizzled by 64 bytes */
    };
    TokenScalars tokens[2]; /* of one chunk and the next one */
    float decay[DIM];       /* of S through the chunk, by channel_index */
    float partial[WARPS]
                 [2 * CHUNK]; /* a warp's sums: of U dO by token; then q . dq and k . dk over its channels */
    float along[2 * CHUNK];   /* of all warps and of M's diagonal; then what the norm takes of q and k */
    float more[2 * CHUNK];    /* of q's tokens, then of k's: how much of the other M's diagonal adds */
    float diagonals[CHUNK];   /* of dX U^T */
    Work work;
    uint64_t keys_in[2], queries_in, values_in, raw_in;
};
static_assert(2 * (sizeof(GradientsShared) + 1024) <= 228 * 1024, "two on a multiprocessor");

/* Two neighbouring channels of a state, rounded. */
inline __device__ uint32_t load_state_pair(const kda_state &state, int column, int channel) {
    if (!state.data)
        return 0;
    if (as_pairs(state)) {
        const char *at = element(state, column, channel);
        if (state.dtype == KDA_BF16)
            return *reinterpret_cast<const uint32_t *>(at);
        float2 x = *reinterpret_cast<const float2 *>(at);
        return pack_bf16(x.x, x.y);
    }
    return pack_bf16(load_one(state, column, channel), load_one(state, column, channel + 1));
}

/* Waits until kernel adjoint has stored all of a segment, or, should that take long, until it has ended: no count can
 * make a CTA wait for ever. */
inline __device__ void wait_for_adjoint(const uint32_t *done) {
    constexpr int LOOKS = 400;
    if (!wait_for_count(done, HALVES, LOOKS))
        wait_for_kernel_before();
    ptx::fence_proxy_async(ptx::space_global);
}

/* The warp's number, found anew: what follows from it is not kept in registers through all of a chunk. */
inline __device__ int own_warp() { return __shfl_sync(~0u, (int)(thread() / 32), 0); }

/* What a CTA works with. */
struct Context {
    const kda_backward &b;
    const kda_sm90_backward_maps &maps;
    GradientsShared &shared;
};

/* ---- Loads, each by one thread -------------------------------------------------------------------- */

inline __device__ void load_keys(const Context &c, int chunk) {
    auto &to = c.shared.tiles[chunk % 2];
    uint64_t &barrier = c.shared.keys_in[chunk % 2];
    Place at = chunk_of(c.shared.work.segment, chunk);
    expect_bytes(barrier, 2 * TILE * 2 + sizeof(TokenScalars));
    bring_tile(to[KEYS], c.maps.k, at, at.key_head, barrier, read_again());
    bring_tile(to[GATES], c.maps.g, at, at.head, barrier, read_once());
    bring_bytes(&c.shared.tokens[chunk % 2], &c.shared.work.operands[chunk].tokens, sizeof(TokenScalars),
                barrier);
}

inline __device__ void load_queries(const Context &c, int chunk) {
    uint64_t &barrier = c.shared.queries_in;
    Place at = chunk_of(c.shared.work.segment, chunk);
    expect_bytes(barrier, 2 * TILE * 2 + sizeof c.shared.N);
    bring_tile(c.shared.tiles[chunk % 2][QUERIES], c.maps.q, at, at.key_head, barrier, read_again());
    bring_tile(c.shared.U, c.maps.v, at, at.head, barrier, read_once());
    bring_bytes(c.shared.N, c.shared.work.operands[chunk].N, sizeof c.shared.N, barrier);
    bring_to_cache(&c.shared.work.adjoints[adjoint_piece(chunk, 0, 0, 0)], ADJOINT_PIECES * sizeof(uint4));
}

/* dO and dX. */
inline __device__ void load_values(const Context &c, int chunk) {
    uint64_t &barrier = c.shared.values_in;
    Place at = chunk_of(c.shared.work.segment, chunk);
    expect_bytes(barrier, 2 * TILE * 2);
    bring_tile(c.shared.values[0], c.maps.d_out, at, at.head, barrier, read_once(), 2 * TOKENS);
    bring_tile(c.shared.values[0] + TOKENS, c.maps.dv, at, at.head, barrier, read_once(), 2 * TOKENS);
}

/* q and k once more, where dO and dX were. */
inline __device__ void load_raw(const Context &c, int chunk) {
    uint64_t &barrier = c.shared.raw_in;
    Place at = chunk_of(c.shared.work.segment, chunk);
    expect_bytes(barrier, 2 * TILE * 2);
    bring_tile(c.shared.raw[0], c.maps.q, at, at.key_head, barrier, read_again());
    bring_tile(c.shared.raw[1], c.maps.k, at, at.key_head, barrier, read_again());
}

/* Keeps S at the segment's start. */
inline __device__ void keep_first_state(const Context &c, const kda_state &first) {
    int t = (int)thread(), warp = own_warp(), row = warp * 16 + t % 32 / 4;
    MatrixRow<DIM, DIM> kept(c.shared.S, true, t % 32);
    if (first.data && first.dtype == KDA_BF16 && as_pairs(first)) {
        const char *rows[2] = {element(first, row, t % 4 * 2), element(first, row + 8, t % 4 * 2)};
        uint32_t x[DIM / 16][4];
#pragma unroll
        for (int i = 0; i < DIM / 16; i++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                x[i][n] = *reinterpret_cast<const uint32_t *>(rows[n % 2] + (i * 16 + n / 2 * 8) * 2);
#pragma unroll
        for (int i = 0; i < DIM / 16; i++)
            stmatrix(kept.at(warp * 16, i * 16), x[i]);
    } else {
#pragma unroll 1
        for (int channel = 0; channel < DIM; channel += 16) {
            uint32_t x[4];
#pragma unroll
            for (int n = 0; n < 4; n++)
                x[n] = load_state_pair(first, row + n % 2 * 8, channel + n / 2 * 8 + t % 4 * 2);
            stmatrix(kept.at(warp * 16, channel), x);
        }
    }
    fence_shared();
}

/* ---- Tiles ---------------------------------------------------------------------------------------- */

/* What a chunk's steps keep of the decays of the thread's two channels: factors that take sums from one reference to the
 * next, but for the elements' own. */
struct Decays {
    float from_start[2]; /* from the chunk's start to the first middle */
    float across[2][2];  /* from there to the second middle, in two steps where a gate has no bound */
    float to_end[2];     /* from there to the chunk's end */
    float whole[2];      /* from its start to its end */
    bool cut;            /* is a decay of the warp's channels cut off (tiles.cuh) */
};

/* Makes RK, CK and KT of the warp's channels, and KR, which is stored when KT has been read. `decayed` are RK's factors. */
template <bool bounded>
__device__ void make_keys(const Context &c, int chunk, const Gate &gate, int count, Pairs &g, Elements &decayed,
                          Pairs &KR, Decays &decays) {
    GradientsShared &shared = c.shared;
    auto &tiles = shared.tiles[chunk % 2];
    int warp = own_warp(), part = (int)(thread() % 4) * 2;
    Pairs k, rows, columns, KT;
    load_pairs(tiles[GATES], warp, g);
    fill_gates(g, count);
    References found = find_decays<bounded>(gate, g, decayed);
    Elements grown;
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = decayed[j][i / 2][i % 2];
            decayed[j][i / 2][i % 2] = exp2_approximate(x), grown[j][i / 2][i % 2] = exp2_approximate(-x);
        }
    load_pairs(tiles[KEYS], warp, k);
    clear_pairs(k, count);
    scale_keys(k, shared.tokens[chunk % 2].rk, decayed, grown, rows, columns);
    __syncwarp();
    store_pairs(tiles[KEYS], warp, rows);
    store_pairs(tiles[GATES], warp, columns);
    shift_pairs<bounded, false>(rows, found, gate, g, KT);
    store_pairs(shared.tiles[(chunk + 1) % 2][QUERIES], warp, KT);
    float fraction[2], factors[2][2];
    find_whole<bounded>(found, gate, g, decays.whole);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        fraction[r] = exp2_approximate(found.fraction[r]);
        decays.whole[r] *= fraction[r];
        decays.from_start[r] = power_of_two((int)found.middle[0][r]);
        int across = (int)(found.middle[1][r] - found.middle[0][r]), step = bounded ? across : across / 2;
        decays.across[0][r] = power_of_two(step), decays.across[1][r] = power_of_two(across - step);
        factors[0][r] = power_of_two((int)(found.end[r] - found.middle[0][r])) * fraction[r];
        factors[1][r] = power_of_two((int)(found.end[r] - found.middle[1][r])) * fraction[r];
        decays.to_end[r] = factors[1][r];
        if (part == 0)
            shared.decay[channel_index(warp * 16 + (int)(thread() % 32) / 4 + r * 8)] = decays.whole[r];
    }
    decays.cut = found.cut;
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        float2 scale = *reinterpret_cast<const float2 *>(&shared.tokens[chunk % 2].rk[j * 8 + part]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float2 y = unpack_bf16(k[j / 2][j % 2 * 2 + r]);
            KR[j / 2][j % 2 * 2 + r] = pack_bf16(y.x * scale.x * grown[j][r][0] * factors[j / 2][r],
                                                 y.y * scale.y * grown[j][r][1] * factors[j / 2][r]);
        }
    }
    if constexpr (!bounded)
        if (__builtin_expect(found.cut, 0)) {
            Elements rests;
            float all[2];
            find_rests(gate, g, rests, all);
#pragma unroll
            for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    uint32_t &x = KR[j / 2][j % 2 * 2 + r];
                    x = multiply_pair(x, (power_pair(all[r] - rests[j][r][0]) & 0xffff) |
                                             (power_pair(all[r] - rests[j][r][1]) & 0xffff0000));
                }
        }
    fence_shared();
}

/* Makes RQ of the warp's channels. */
inline __device__ void make_queries(const Context &c, int chunk, int count, const Elements &decayed) {
    __nv_bfloat16 *tile = c.shared.tiles[chunk % 2][QUERIES];
    Pairs q, rows;
    int warp = own_warp();
    load_pairs(tile, warp, q);
    clear_pairs(q, count);
    scale_pairs(q, c.shared.tokens[chunk % 2].rq, decayed, rows);
    __syncwarp();
    store_pairs(tile, warp, rows);
}

/* Rows of dO and dX from `count` on become 0: they may be another sequence's. */
inline __device__ void clear_value_rows(GradientsShared &shared, int count) {
    for (int i = (int)thread(); i < 4 * (CHUNK - count) * (ROW / 16); i += GRADIENT_THREADS) {
        int piece = i % (ROW / 16), row = count + i / (ROW / 16) % (CHUNK - count);
        int tile = i / (ROW / 16) / (CHUNK - count);
        reinterpret_cast<uint4 *>(shared.values[0] + tile * TOKENS + row * PANEL)[piece] =
            make_uint4(0, 0, 0, 0);
    }
    fence_shared();
}

/* ---- U -------------------------------------------------------------------------------------------- */

/* The lanes with the same tokens share 2 N values each: a lane ends with two sums, those of index lane / 4 % N * 2
 * over as many as N lanes. */
template <int N> __device__ void sum_over_channels(float *x) {
    constexpr int BIT = 2 * N; /* of the lane's number: 16, 8, 4 */
    bool high = thread() & BIT;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float keep = high ? x[i + N] : x[i], give = high ? x[i] : x[i + N];
        x[i] = keep + __shfl_xor_sync(~0u, give, BIT);
    }
    if constexpr (N > 2)
        sum_over_channels<N / 2>(x);
}

/* Sums U dO over the warp's 16 columns of V, token by token. */
inline __device__ void multiply_diagonal(const float (&U)[CHUNK / 8][4], const __nv_bfloat16 *values, int warp,
                                         float *sums) {
    MatrixRow<2 * CHUNK, DIM> rows(values, false, thread() % 32);
    Values o;
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        ldmatrix_transposed(o[t], rows.at(t * 16, warp * 16));
    float x[CHUNK / 4];
#pragma unroll
    for (int i = 0; i < CHUNK / 8; i++) {
        float2 upper = unpack_bf16(o[i / 2][i % 2 * 2]), lower = unpack_bf16(o[i / 2][i % 2 * 2 + 1]);
        x[2 * i] = fmaf(U[i][0], upper.x, U[i][2] * lower.x);
        x[2 * i + 1] = fmaf(U[i][1], upper.y, U[i][3] * lower.y);
    }
    sum_over_channels<CHUNK / 8>(x);
    x[0] += __shfl_xor_sync(~0u, x[0], 16), x[1] += __shfl_xor_sync(~0u, x[1], 16);
    int lane = (int)(thread() % 32);
    if (lane < 16)
        *reinterpret_cast<float2 *>(&sums[lane * 2]) = make_float2(x[0], x[1]);
}

/* Makes U of the chunk, where v is; meanwhile RQ. */
inline __device__ void make_values(const Context &c, int chunk, int count, const Elements &decayed) {
    GradientsShared &shared = c.shared;
    int warp = own_warp();
    uint64_t S = wgmma_operand(shared.S + warp / 4 * 64 * PANEL, 0, 8 * ROW, SWIZZLE_128);
    uint64_t KT = wgmma_operand(shared.tiles[(chunk + 1) % 2][QUERIES], 0, 8 * ROW, SWIZZLE_128);
    uint64_t N = wgmma_operand(shared.N, 0, 8 * PAIR_ROW, SWIZZLE_64);
    float W[CHUNK / 8][4], U[CHUNK / 8][4];
    pin(W);
    wgmma_fence();
    wgmma_both<false, false, false>(W, S, KT);
#pragma unroll
    for (int i = 1; i < DIM / 16; i++)
        wgmma_both<false, false, true>(W, advanced(S, i / 4 * DIM * PANEL * 2 + i % 4 * 32),
                                       advanced(KT, i / 4 * TOKENS * 2 + i % 4 * 32));
    wgmma_commit();
    wait(shared.queries_in, chunk % 2);
    make_queries(c, chunk, count, decayed);
    Values v;
    load_pairs(shared.U, warp, v);
    clear_pairs(v, count);
    alignas(16) float steps[CHUNK / 4];
#pragma unroll
    for (int i = 0; i < CHUNK / 4; i += 4)
        *reinterpret_cast<float4 *>(&steps[i]) =
            *reinterpret_cast<const float4 *>(&shared.tokens[chunk % 2].step[thread() % 4 * 8 + i]);
    wgmma_wait<0>();
    pin(W);
    uint32_t x[CHUNK / 16][4];
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float2 value = unpack_bf16(v[t][n]);
            const float *w = &W[2 * t + n / 2][n % 2 * 2];
            int i = 4 * t + n / 2 * 2;
            x[t][n] = pack_bf16((value.x - w[0]) * steps[i], (value.y - w[1]) * steps[i + 1]);
        }
    pin(U);
    wgmma_fence();
    wgmma<false, false>(U, x[0], N);
    wgmma<false, true>(U, x[1], advanced(N, 32));
    wgmma_commit();
    wait(shared.values_in, chunk % 2);
    if (__builtin_expect(count < CHUNK, 0))
        clear_value_rows(shared, count);
    wgmma_wait<0>();
    pin(U);
    uint32_t u[CHUNK / 16][4];
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        pack_operand(U[2 * t], U[2 * t + 1], u[t]);
    store_pairs(shared.U, warp, u);
    multiply_diagonal(U, shared.values[0], warp, shared.partial[warp]);
    fence_shared();
}

/* ---- Products with states, and of pairs ----------------------------------------------------------- */

/* Multiplies rows of an accumulator by factors of the thread's two channels. */
template <int TILES> __device__ void scale_rows(float (&d)[TILES][4], const float (&factors)[2]) {
    float x = factors[0], y = factors[1];
#pragma unroll
    for (int i = 0; i < TILES; i++)
        d[i][0] *= x, d[i][1] *= x, d[i][2] *= y, d[i][3] *= y;
}

/* As scale_rows, for one of the blocks of tokens: the first or, if `later`, the second. The others are multiplied by 1:
 * were they left alone, the compiler would run all the kernel's products one by one. */
template <bool later, int TILES> __device__ void scale_block(float (&d)[TILES][4], const float (&factors)[2]) {
    float x = factors[0], y = factors[1], one = some_one();
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        bool own = i % (CHUNK / 8) >= CHUNK / 16 == later;
        d[i][0] *= own ? x : one, d[i][1] *= own ? x : one, d[i][2] *= own ? y : one, d[i][3] *= own ? y : one;
    }
}

/* Multiplies sums with states, of channels and tokens, by what was cut off of decays from the chunk's start or,
 * to_end, to its end. Of d, tiles i and i + CHUNK / 8 are of the same tokens. */
template <bool bounded, bool to_end, int TILES>
__device__ void apply_rests(const Gate &gate, const Pairs &g, bool cut, float (&d)[TILES][4]) {
    if constexpr (!bounded) {
        if (__builtin_expect(!cut, 1))
            return;
        Elements rests;
        float all[2];
        find_rests(gate, g, rests, all);
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float rest = rests[i % (CHUNK / 8)][n / 2][n % 2];
                d[i][n] *= power_of_two((int)(to_end ? all[n / 2] - rest : rest));
            }
    }
}

/* Sums R S over V, for the thread's two channels: the diagonal of the warp's rows of R times S. */
inline __device__ void find_passing(const __nv_bfloat16 *S, int warp, const uint32_t (&R)[DIM / 16][4],
                                    float (&sums)[2]) {
    MatrixRow<DIM, DIM> rows(S, false, thread() % 32);
    float d[2][4] = {};
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        uint32_t s[4];
        ldmatrix_transposed(s, rows.at(i * 16, warp * 16));
        mma(d[0], R[i], s[0], s[2]);
        mma(d[1], R[i], s[1], s[3]);
    }
    /* Element (r, r) of 8x8 is in lane r * 4 + r / 2. */
    uint32_t lane = thread() % 32, row = lane / 4, source = row * 4 + row / 2;
    sums[0] = __shfl_sync(~0u, row % 2 ? d[0][1] : d[0][0], source);
    sums[1] = __shfl_sync(~0u, row % 2 ? d[1][3] : d[1][2], source);
}

/* What enters decays from the state: sums of RQ T1 + RK T2 over the lane's tokens, of each block. */
inline __device__ void find_entering(const GradientsShared &shared, int chunk, int warp,
                                     const float (&T)[2 * CHUNK / 8][4], float (&sums)[2][2]) {
    const auto &tiles = shared.tiles[chunk % 2];
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++) {
        uint32_t RQ[4], RK[4];
        load_half(tiles[QUERIES], warp, t, RQ), load_half(tiles[KEYS], warp, t, RK);
        sums[t][0] = sums[t][1] = 0;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const float *T1 = &T[t * 2 + n / 2][n % 2 * 2], *T2 = &T[CHUNK / 8 + t * 2 + n / 2][n % 2 * 2];
            float2 q = unpack_bf16(RQ[n]), k = unpack_bf16(RK[n]);
            float &sum = sums[t][n % 2];
            sum = fmaf(q.x, T1[0], fmaf(q.y, T1[1], fmaf(-k.x, T2[0], fmaf(-k.y, T2[1], sum))));
        }
    }
}

/* Rounds the warp's rows of [dO; dX] U^T below the diagonal, for 16 tokens of U, into pairs. The diagonals are kept
 * apart. */
inline __device__ void store_pair_products(GradientsShared &shared, const float (&d)[2][4], int warp) {
    int lane = (int)(thread() % 32), row = lane / 4, column = lane % 4 * 2; /* in an 8x8 matrix */
    int block = warp % 2, of_U = warp / 4;
    bool below = block > of_U, own = block == of_U;
    bool left = below || (own && row > column), right = below || (own && row > column + 1);
    const uint32_t x[4] = {
        pack_bf16(left ? d[0][0] : 0.f, right ? d[0][1] : 0.f), below || own ? pack_bf16(d[0][2], d[0][3]) : 0,
        below ? pack_bf16(d[1][0], d[1][1]) : 0, pack_bf16(left ? d[1][2] : 0.f, right ? d[1][3] : 0.f)};
    stmatrix(MatrixRow<2 * CHUNK, CHUNK>(shared.pairs, true, thread() % 32).at(warp % 4 * 16, of_U * 16), x);
    if (warp % 4 >= 2 && own && row / 2 == column / 2) {
        shared.diagonals[block * 16 + row] = row % 2 ? d[0][1] : d[0][0];
        shared.diagonals[block * 16 + 8 + row] = row % 2 ? d[1][3] : d[1][2];
    }
    fence_shared();
}

/* Makes the products with S and R. `h` is the gradient of the first token's log decay: what passes the chunk, and what
 * enters its tokens from S. The latter is summed from the very products that the sum over tokens takes off again. */
template <bool bounded>
__device__ void multiply_states(const Context &c, int chunk, const Gate &gate, const Pairs &g,
                                const Decays &decays, float (&T)[2 * CHUNK / 8][4], float (&T3)[CHUNK / 8][4],
                                float (&h)[2]) {
    GradientsShared &shared = c.shared;
    int warp = own_warp(), panel = warp / 4;
    uint64_t S = wgmma_operand(shared.S + panel * DIM * PANEL, 0, 8 * ROW, SWIZZLE_128);
    uint64_t values = wgmma_operand(shared.values[0], 0, 8 * ROW, SWIZZLE_128);
    uint64_t U = wgmma_operand(shared.U, 0, 8 * ROW, SWIZZLE_128);
    {
        uint32_t R[DIM / 16][4];
        const uint4 *from = &c.shared.work.adjoints[adjoint_piece(chunk, warp, 0, (int)(thread() % 32))];
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) {
            uint4 x =
                __ldcg(&from[i * 32]); /* past the L1 cache, as other multiprocessors have just written it */
            R[i][0] = x.x, R[i][1] = x.z, R[i][2] = x.y, R[i][3] = x.w;
        }
#pragma unroll
        for (int i = 0; i < DIM / 16; i++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                R[i][n] = transpose(R[i][n]);
        find_passing(shared.S, warp, R, h);
        pin(T3);
        wgmma_fence();
        wgmma<false, false>(T3, R[0], U);
#pragma unroll
        for (int i = 1; i < DIM / 16; i++)
            wgmma<false, true>(T3, R[i], advanced(U, i / 4 * TOKENS * 2 + i % 4 * 32));
        wgmma_commit();
        wgmma_wait<0>();
        pin(T3);
    }
    float d[2][4];
    uint64_t some_U = advanced(U, panel * 16 * ROW);
    pin(d);
    pin(T);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        uint32_t further = i / 4 * 2 * TOKENS * 2 + i % 4 * 32, of_U = i / 4 * TOKENS * 2 + i % 4 * 32;
        if (i == 0)
            wgmma_both<false, false, false>(d, values, some_U);
        else
            wgmma_both<false, false, true>(d, advanced(values, further), advanced(some_U, of_U));
    }
    wgmma_commit();
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        uint32_t further = i / 4 * 2 * TOKENS * 2 + i % 4 * 32;
        if (i == 0)
            wgmma_both<true, false, false>(T, S, values);
        else
            wgmma_both<true, false, true>(T, advanced(S, i * 16 * ROW), advanced(values, further));
    }
    wgmma_commit();
    wgmma_wait<1>();
    pin(d);
    store_pair_products(shared, d, warp);
    wgmma_wait<0>();
    pin(T);
    scale_rows(T, decays.from_start);
    apply_rests<bounded, false>(gate, g, decays.cut, T);
    float entering[2][2];
    find_entering(shared, chunk, warp, T, entering);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum =
            fmaf(entering[1][r] * decays.across[0][r], bounded ? 1.f : decays.across[1][r], entering[0][r]);
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        h[r] = fmaf(h[r], decays.whole[r], sum);
    }
    scale_rows(T3, decays.to_end);
    apply_rests<bounded, true>(gate, g, decays.cut, T3);
}

/* Adds the products with pairs of tokens. */
template <bool bounded>
__device__ void multiply_pairs_of_tokens(const Context &c, int chunk, const Decays &decays,
                                         float (&T)[2 * CHUNK / 8][4], float (&T3)[CHUNK / 8][4]) {
    GradientsShared &shared = c.shared;
    const auto &tiles = shared.tiles[chunk % 2];
    int panel = own_warp() / 4;
    uint64_t CK = wgmma_operand(tiles[GATES] + panel * TOKENS, 0, 8 * ROW, SWIZZLE_128);
    uint64_t RQ = wgmma_operand(tiles[QUERIES] + panel * TOKENS, 0, 8 * ROW, SWIZZLE_128);
    uint64_t RK = wgmma_operand(tiles[KEYS] + panel * TOKENS, 0, 8 * ROW, SWIZZLE_128);
    uint64_t dM = wgmma_operand(shared.pairs, 0, 8 * PAIR_ROW, SWIZZLE_64);
    uint64_t dL = advanced(dM, CHUNK * PAIR_ROW);
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++) {
        int later = CHUNK / 16 - 1 - t; /* T3's tokens go the other way */
        pin(T);
        pin(T3);
        wgmma_fence();
        wgmma_both<true, false, true>(T, advanced(CK, t * 16 * ROW), advanced(dM, t * 32));
        wgmma_both<true, true, true>(T3, advanced(RQ, later * 16 * ROW), advanced(dM, later * 16 * PAIR_ROW));
        wgmma_both<true, true, true, true>(T3, advanced(RK, later * 16 * ROW),
                                           advanced(dL, later * 16 * PAIR_ROW));
        wgmma_commit();
        wgmma_wait<0>();
        pin(T);
        pin(T3);
        if (t == 0)
#pragma unroll
            for (int i = 0; i < (bounded ? 1 : 2); i++) {
                scale_block<true>(T, decays.across[i]);
                scale_block<false>(T3, decays.across[i]);
            }
    }
}

/* ---- The gradients ---------------------------------------------------------------------------------- */

/* Sums of the thread's channels over a segment: what it adds to dA_log and to d_dt_bias, but for factors that are the
 * same for all tokens. */
struct GateSums {
    float A[2], bias[2];
};

/* x is the gradient of a token's log decay a, and becomes g's. With z = g + dt_bias, a = lower_bound sigmoid(A z)
 * or -A softplus(z). What does not exist is 0. */
template <bool bounded>
__device__ void gate_backward(const Gate &gate, const Pairs &g, float (&x)[CHUNK / 8][4], GateSums &sums) {
    float to_g = gate.bound * gate.slope * (-1 / (LOG2E * LOG2E));
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float2 raw = unpack_bf16(g[j / 2][j % 2 * 2 + r]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float one = e ? raw.y : raw.x, offset = r ? gate.offset.y : gate.offset.x, dg;
                if constexpr (bounded) {
                    /* -A z log2(e); beyond these limits its gradient is nothing, and the product with it is 0 */
                    float y = fmaxf(fminf(fmaf(one, gate.slope, offset), 120.f), -150.f);
                    float grown = exp2_approximate(y), s = reciprocal_approximate(1.f + grown);
                    float dy = s * (grown * s) * x[j][2 * r + e];
                    dg = dy * to_g, sums.A[r] = fmaf(y, dy, sums.A[r]), sums.bias[r] += dy;
                } else {
                    float decay = log2_decay<false>(gate, one, offset), rest = rest_of(decay);
                    float da = rest == 0 ? x[j][2 * r + e] : x[j][2 * r + e] * power_of_two((int)rest);
                    float s = reciprocal_approximate(1.f + exp2_approximate(-fmaf(one, gate.slope, offset)));
                    dg = gate.bound * s * da, sums.A[r] += da == 0 ? 0.f : decay * da, sums.bias[r] += dg;
                }
                x[j][2 * r + e] = dg;
            }
        }
}

/* Rounds an accumulator's tiles into a tile of a chunk. */
inline __device__ void store_rows(__nv_bfloat16 *tile, int warp, const float (*x)[4]) {
    Pairs pairs;
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        pack_operand(x[2 * t], x[2 * t + 1], pairs[t]);
    store_pairs(tile, warp, pairs);
}

/* T1 and T2 become dq and dk, but for M's diagonal and the norms. T3 becomes what leaves at a token, less what
 * enters. The warp's sums along rows go to `partial`. */
inline __device__ void finish_products(GradientsShared &shared, int chunk, int warp, const Elements &decayed,
                                       float (&T)[2 * CHUNK / 8][4], float (&T3)[CHUNK / 8][4]) {
    const auto &tiles = shared.tiles[chunk % 2];
    int lane = (int)(thread() % 32), part = lane % 4 * 2;
    float along[2 * CHUNK / 4]; /* of q's tokens, then of k's: two of each tile */
    uint32_t RQ[4], RK[4], CK[4];
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        if (j % 2 == 0) {
            load_half(tiles[QUERIES], warp, j / 2, RQ);
            load_half(tiles[KEYS], warp, j / 2, RK);
            load_half(tiles[GATES], warp, j / 2, CK);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int n = j % 2 * 2 + r;
            float2 rq = unpack_bf16(RQ[n]), rk = unpack_bf16(RK[n]), ck = unpack_bf16(CK[n]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &T1 = T[j][2 * r + e], &T2 = T[CHUNK / 8 + j][2 * r + e], &own = T3[j][2 * r + e];
                float of_q = (e ? rq.y : rq.x) * T1;
                float of_row = (e ? rk.y : rk.x) * -T2;
                float of_column = (e ? ck.y : ck.x) * own;
                float x = decayed[j][r][e];
                float &along_q = along[2 * j + e], &along_k = along[CHUNK / 4 + 2 * j + e];
                along_q = r ? along_q + of_q : of_q;
                along_k = r ? along_k + (of_row + of_column) : of_row + of_column;
                T1 *= x;
                T2 = fmaf(-x, T2, reciprocal_approximate(x) * own);
                own = of_column - of_q - of_row;
            }
        }
    }
    /* along: index 2 j + e of q, 8 + 2 j + e of k; a lane ends with two neighbours. */
    sum_over_channels<CHUNK / 4>(along);
    int first = lane / 4 * 2, tile = first / 2 % (CHUNK / 8), of_k = first / (CHUNK / 4);
    *reinterpret_cast<float2 *>(&shared.partial[warp][of_k * CHUNK + tile * 8 + part]) =
        make_float2(along[0], along[1]);
}

/* Makes the gradient of g. That of a token's log decay is h, and `da`, what leaves less what enters, at all tokens before
 * it. */
template <bool bounded>
__device__ void finish_gates(const Context &c, int chunk, int count, const Gate &gate, const Pairs &g,
                             const float (&h)[2], float (&da)[CHUNK / 8][4], GateSums &sums) {
    int part = (int)(thread() % 4);
    QuadSums quad;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = h[r];
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++) {
            float first = da[j][2 * r], before = quad.before(sum, first + da[j][2 * r + 1]);
            da[j][2 * r] = before, da[j][2 * r + 1] = before + first;
        }
    }
    if (__builtin_expect(count < CHUNK, 0))
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                da[j][n] = j * 8 + part * 2 + n % 2 < count ? da[j][n] : 0.f;
    gate_backward<bounded>(gate, g, da, sums);
    store_rows(c.shared.tiles[chunk % 2][GATES], own_warp(), da);
}

/* Adds a thread's sums over its tokens to those of its quad and stores them. */
template <bool bounded>
__device__ void store_gate_sums(const Gate &gate, const GateSums &sums, int warp, float *to) {
    int lane = (int)(thread() % 32);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float A = sums.A[r] / LOG2E, bias = sums.bias[r];
        if constexpr (bounded)
            A *= -gate.bound / LOG2E, bias *= gate.bound * gate.slope * (-1 / (LOG2E * LOG2E));
#pragma unroll
        for (int bit = 1; bit < 4; bit *= 2)
            A += __shfl_xor_sync(~0u, A, bit), bias += __shfl_xor_sync(~0u, bias, bit);
        int channel = warp * 16 + lane / 4 + r * 8;
        if (lane % 4 == 0)
            to[channel] = A, to[DIM + channel] = bias;
    }
}

/* Stores gradients of q or k by value head, in fp32. */
inline __device__ void store_by_head(const kda_prefill &p, float *to, const Place &at, int warp,
                                     const float (*x)[4]) {
    int lane = (int)(thread() % 32), left = at.count - lane % 4 * 2; /* tokens from the thread's first one on */
    int64_t step = p.value_heads * DIM;
    float *row =
        to + (at.batch * p.tokens + at.token + lane % 4 * 2) * step + at.head * DIM + warp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++, row += 8 * step) {
        if (j * 8 < left)
            row[0] = x[j][0], row[8] = x[j][2];
        if (j * 8 + 1 < left)
            row[step] = x[j][1], row[step + 8] = x[j][3];
    }
}

/* The gradient of k or q, from d without what M's diagonal adds: that is `more` times the other one. Rows of x are
 * multiplied by `scales` to be normalised, and `less` times x leaves for that. The gradient goes to by_head or, if
 * that is NULL, to the tile. */
inline __device__ void finish_rows(const kda_prefill &p, __nv_bfloat16 *tile, const Place &at, int warp,
                                   const Pairs &x, const Pairs &other, const float *scales, const float *more,
                                   const float *less, float (*d)[4], float *by_head) {
    int part = (int)(thread() % 4) * 2;
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        auto of_tokens = [&](const float *values) {
            return *reinterpret_cast<const float2 *>(&values[j * 8 + part]);
        };
        float2 scale = of_tokens(scales), gain = of_tokens(more), loss = of_tokens(less);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float2 y = unpack_bf16(x[j / 2][j % 2 * 2 + r]), z = unpack_bf16(other[j / 2][j % 2 * 2 + r]);
            d[j][2 * r] = fmaf(fmaf(z.x, gain.x, d[j][2 * r]), scale.x, -y.x * loss.x);
            d[j][2 * r + 1] = fmaf(fmaf(z.y, gain.y, d[j][2 * r + 1]), scale.y, -y.y * loss.y);
        }
    }
    if (by_head) {
        store_by_head(p, by_head, at, warp, d);
        return;
    }
    store_rows(tile, warp, d);
}

/* Sends a chunk's gradients to memory. */
inline __device__ void send_gradients(const Context &c, int chunk, const Place &at, bool by_head) {
    const auto &tiles = c.shared.tiles[chunk % 2];
    auto is_left_out = [&](int role) { return by_head && role != GATES; };
    int t = (int)thread();
    if (at.count == CHUNK) {
        if (t)
            return;
#pragma unroll
        for (int role = 0; role < ROLES; role++) {
            if (is_left_out(role))
                continue;
            const CUtensorMap &map = role == QUERIES ? c.maps.dq : role == KEYS ? c.maps.dk : c.maps.dg;
#pragma unroll
            for (int panel = 0; panel < 2; panel++) {
                const int32_t where[4] = {panel * PANEL, (int32_t)(role == GATES ? at.head : at.key_head),
                                          (int32_t)at.token, (int32_t)at.batch};
                ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, where,
                                          tiles[role] + panel * TOKENS);
            }
        }
        ptx::cp_async_bulk_commit_group();
        return;
    }
    int token = t / 8, part = t % 8;
    for (int role = 0; role < ROLES && token < at.count; role++) { /* what lies after is another sequence's */
        if (is_left_out(role))
            continue;
        const kda_tensor &to = role == QUERIES ? c.b.dq : role == KEYS ? c.b.dk : c.b.dg;
        char *row = kda_row(&to, at.batch, at.token + token, role == GATES ? at.head : at.key_head);
        for (int n = 0; n < 2; n++) {
            int column = n * PANEL + part * 8;
            reinterpret_cast<uint4 *>(row)[column / 8] =
                *reinterpret_cast<const uint4 *>(&tiles[role][swizzled<CHUNK, DIM>(token, column)]);
        }
    }
    __syncwarp(); /* what follows is done by whole warps */
}

/* Takes the warp's columns of S through the chunk. */
inline __device__ void advance_state(const Context &c, int chunk) {
    GradientsShared &shared = c.shared;
    int warp = own_warp();
    uint64_t KR = wgmma_operand(shared.tiles[(chunk + 1) % 2][QUERIES], TOKENS * 2, 8 * ROW, SWIZZLE_128);
    MatrixRow<DIM, DIM> kept(shared.S, true, thread() % 32);
    float S[DIM / 8][4];
    Pairs u;
    load_pairs(shared.U, warp, u);
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        uint32_t a[4];
        ldmatrix(a, kept.at(warp * 16, i * 16));
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float2 pair = unpack_bf16(a[n]);
            S[2 * i + n / 2][n % 2 * 2] = pair.x, S[2 * i + n / 2][n % 2 * 2 + 1] = pair.y;
        }
    }
    decay_by(S, shared.decay);
    pin(S);
    wgmma_fence();
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        wgmma<true, true>(S, u[t], advanced(KR, t * 16 * ROW));
    wgmma_commit();
    wgmma_wait<0>();
    pin(S);
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) {
        uint32_t a[4];
        pack_operand(S[2 * i], S[2 * i + 1], a);
        stmatrix(kept.at(warp * 16, i * 16), a);
    }
    fence_shared();
}

/* Makes a chunk's gradients and takes S through it. */
template <bool bounded>
__device__ void work_chunk(const Context &c, int chunk, const Gate &gate, GateSums &sums, float *dq_heads,
                           float *dk_heads) {
    GradientsShared &shared = c.shared;
    const kda_prefill &p = c.b.forward;
    const TokenScalars &tokens = shared.tokens[chunk % 2];
    auto place = [&] { return chunk_of(shared.work.segment, chunk); };
    Elements decayed;
    Pairs g, KR;
    Decays decays;
    float T[2 * CHUNK / 8][4], T3[CHUNK / 8][4], h[2];
    wait(shared.keys_in[chunk % 2], chunk / 2 % 2);
    make_keys<bounded>(c, chunk, gate, place().count, g, decayed, KR, decays);
    __syncthreads(); /* all have made their keys */
    make_values(c, chunk, place().count, decayed);
    __syncthreads(); /* U is there, and KT has been read */
    store_pairs(shared.tiles[(chunk + 1) % 2][QUERIES], own_warp(), KR);
    if (int t = (int)thread(), lane = t % 32; t < 2 * CHUNK) {
        float with_U = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            with_U += shared.partial[i][lane];
        shared.more[t] = with_U * (t < CHUNK ? tokens.rk : tokens.rq)[lane];
        shared.along[t] = with_U * tokens.diagonal[token_index(lane)];
    }
    multiply_states<bounded>(c, chunk, gate, g, decays, T, T3, h);
    __syncthreads(); /* the pairs are there, KR is, and dO and dX have been read */
    if (thread() == 0)
        load_raw(c, chunk);
    multiply_pairs_of_tokens<bounded>(c, chunk, decays, T, T3);
    finish_products(shared, chunk, own_warp(), decayed, T, T3);
    __syncthreads(); /* sums of all warps are there, and tiles have been read */
    if (int t = (int)thread(), lane = t % 32; t < 2 * CHUNK) {
        float sum = shared.along[t];
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            sum += shared.partial[i][t];
        float scale = t < CHUNK ? tokens.rq[lane] / p.scale : tokens.rk[lane];
        shared.along[t] = p.qk_norm ? sum * scale * scale : 0.f;
    } else if (Place at = place(); t < 3 * CHUNK && lane < at.count) {
        float step = tokens.beta[lane];
        float d = step != 0 ? shared.diagonals[lane] / step * tokens.beta_rest[lane] : 0.f;
        store_float(kda_row(&c.b.dbeta, at.batch, at.token + lane, at.head), c.b.dbeta.dtype, 0, d);
    }
    __syncwarp();
    finish_gates<bounded>(c, chunk, place().count, gate, g, h, T3, sums);
    __syncthreads(); /* sums along rows are there */
    wait(shared.raw_in, chunk % 2);
    Pairs q, k;
    Place at = place();
    int warp = own_warp();
    load_pairs(shared.raw[0], warp, q), load_pairs(shared.raw[1], warp, k);
    finish_rows(p, shared.tiles[chunk % 2][QUERIES], at, warp, q, k, tokens.rq, shared.more, shared.along, T,
                dq_heads);
    finish_rows(p, shared.tiles[chunk % 2][KEYS], at, warp, k, q, tokens.rk, shared.more + CHUNK,
                shared.along + CHUNK, T + CHUNK / 8, dk_heads);
    fence_shared();
    __syncthreads(); /* the gradients are there */
    send_gradients(c, chunk, at, dq_heads);
    if (chunk + 1 == shared.work.chunks)
        return;
    advance_state(c, chunk);
    if (thread() == 0)
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    __syncthreads(); /* S is there, and all places of the chunk are free */
    if (thread() == 0) {
        load_queries(c, chunk + 1);
        load_values(c, chunk + 1);
        if (chunk + 2 < shared.work.chunks)
            load_keys(c, chunk + 2);
    }
}

/* The state at the segment's start. */
inline __device__ kda_state first_state(const kda_backward &b, const Place &at) {
    return at.first ? kda_kept_state(&b, at.n, at.first, at.head)
                    : kda_state_in(&b.forward.base, &b.forward.initial_state, at.n, at.head);
}

template <bool bounded>
__global__ void __launch_bounds__(GRADIENT_THREADS, 2)
    make_gradients(const __grid_constant__ kda_backward b, const __grid_constant__ kda_sm90_backward_maps maps,
                   const __grid_constant__ kda_sm90_backward_memory memory) {
    extern __shared__ __align__(1024) uint8_t bytes[];
    GradientsShared &shared = *reinterpret_cast<GradientsShared *>(bytes);
    let_next_begin();
    /* The last segments first. */
    int64_t heads = b.forward.value_heads, segments = gridDim.x / (uint32_t)heads;
    int64_t head = blockIdx.x % (uint32_t)heads, segment = segments - 1 - blockIdx.x / (uint32_t)heads;
    int64_t number = head * segments + segment;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++)
            ptx::mbarrier_init(&shared.keys_in[i], 1);
        ptx::mbarrier_init(&shared.queries_in, 1), ptx::mbarrier_init(&shared.values_in, 1),
            ptx::mbarrier_init(&shared.raw_in, 1);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
        Place at = find_segment(b, segment, head);
        shared.work = {at, static_cast<const ChunkOperands *>(memory.operands) + number * CHUNKS,
                       reinterpret_cast<const uint4 *>(memory.adjoints) +
                           adjoint_piece(number * CHUNKS, 0, 0, 0),
                       memory.sums + number * (2 * DIM), (at.count + CHUNK - 1) / CHUNK};
    }
    __syncthreads();
    Context c = {b, maps, shared};
    if (shared.work.chunks == 0) { /* a gap in the numbering: the sums are taken over all numbers */
        shared.work.gate_sums[threadIdx.x] = 0;
        end_after_kernel_before();
        return;
    }
    if (threadIdx.x == 0) {
        load_keys(c, 0);
        load_queries(c, 0);
        if (shared.work.chunks > 1)
            load_keys(c, 1);
        wait_for_adjoint(&memory.done[number]);
        load_values(c, 0);
    }
    __syncwarp();
    keep_first_state(c, first_state(b, shared.work.segment));
    Gate gate = find_gates<bounded>(b.forward, (int)head, own_warp());
    GateSums sums = {};
#pragma unroll 1
    for (int chunk = 0; chunk < shared.work.chunks; chunk++)
        work_chunk<bounded>(c, chunk, gate, sums, memory.queries, memory.keys);
    store_gate_sums<bounded>(gate, sums, own_warp(), shared.work.gate_sums);
    if (threadIdx.x == 0)
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    end_after_kernel_before();
}

} // namespace
} // namespace kda

extern "C" cudaError_t kda_sm90_backward_gradients(const struct kda_backward *b,
                                                   const struct kda_backward_plan *,
                                                   const struct kda_launch *launch,
                                                   const struct kda_sm90_backward_memory *memory) {
    using namespace kda;
    auto *kernel = &make_gradients<true>;
    if (!is_bounded(&b->forward))
        kernel = &make_gradients<false>;
    kda_sm90_backward_maps maps;
    cudaError_t error = kda_sm90_map_backward(b, &maps);
    return error ? error
                 : launch_kernel(kernel, *launch, GRADIENT_THREADS, sizeof(GradientsShared), b->forward.stream,
                                 *b, maps, *memory);
}
