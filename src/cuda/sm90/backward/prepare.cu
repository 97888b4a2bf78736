/* SPDX-License-Identifier: MIT */
/* Makes the operands of chunks of a value head, which do not depend on states (config.cuh). */
#include "cuda/sm90/backward/tiles.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tensor_maps.h"

namespace kda {
namespace {

constexpr int THREADS = 256, BLOCK = CHUNK / 2 /* tokens around a middle */,
              L_ROW = CHUNK + 4; /* floats of a row of L, 16 bytes of which never meet in a bank */

struct alignas(1024) OperandsShared {
    ChunkOperands operands;
    __nv_bfloat16 KR[TILE];
    __nv_bfloat16 keys[TILE], queries[TILE], gates[TILE]; /* k, q and g, then RK, RQ and CK */
    __nv_bfloat16 M[CHUNK * CHUNK];                       /* below its diagonal, swizzled by 64 bytes */
    __nv_bfloat16 N_rest[CHUNK * CHUNK];                  /* what N's rounding left of it, likewise */
    /* diag(beta) L0, its diagonal blocks transposed. These become N's; in the place of the one above them comes the one below times N's first. */
    alignas(16) float L[CHUNK * L_ROW];
    /* bf16 factors of RK and RQ of the second block, and of CK of the first: to the boundary between them. */
    uint16_t from_boundary[DIM], to_boundary[DIM];
    TokenScalars tokens;
    float fraction[DIM]; /* exp2(G - e), by channel_index */
    uint64_t arrived;
};
static_assert(3 * (sizeof(OperandsShared) + 1024) <= 228 * 1024, "three on a multiprocessor");

/* Scales of k and q, and M's diagonal: 8 threads find those of a token. */
__device__ void find_scales(const kda_prefill &p, OperandsShared &shared, int count) {
    int token = threadIdx.x / 8, part = threadIdx.x % 8;
    TokenScalars &tokens = shared.tokens;
    float squares[2] = {}, product = 0;
#pragma unroll
    for (int panel = 0; panel < 2; panel++) {
        int at = panel * TOKENS + token * PANEL + part * 8;
        uint4 words[2] = {*reinterpret_cast<const uint4 *>(&shared.keys[at]),
                          *reinterpret_cast<const uint4 *>(&shared.queries[at])};
        const uint32_t k[4] = {words[0].x, words[0].y, words[0].z, words[0].w};
        const uint32_t q[4] = {words[1].x, words[1].y, words[1].z, words[1].w};
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float2 x = unpack_bf16(k[n]), y = unpack_bf16(q[n]);
            squares[0] = fmaf(x.x, x.x, fmaf(x.y, x.y, squares[0]));
            squares[1] = fmaf(y.x, y.x, fmaf(y.y, y.y, squares[1]));
            product = fmaf(x.x, y.x, fmaf(x.y, y.y, product));
        }
    }
#pragma unroll
    for (int bit = 4; bit; bit /= 2) {
        squares[0] += __shfl_xor_sync(~0u, squares[0], bit),
            squares[1] += __shfl_xor_sync(~0u, squares[1], bit);
        product += __shfl_xor_sync(~0u, product, bit);
    }
    if (part)
        return;
    bool real = token < count;
    float rk = p.qk_norm ? rsqrtf(squares[0] + 1e-6f) : 1.f, rq = p.qk_norm ? rsqrtf(squares[1] + 1e-6f) : 1.f;
    rq *= p.scale;
    tokens.rk[token] = real ? rk : 0.f, tokens.rq[token] = real ? rq : 0.f;
    tokens.diagonal[token_index(token)] = real ? product * rk * rq : 0.f;
}

/* The step of the lane's token, of which `raw` is stored, and what u . du / step is to be multiplied by. A step that is given as 0 becomes
 * so small that nobody sees it, but for the step's own gradient, which needs what the token would have written. */
__device__ void find_steps(const kda_prefill &p, int count, uint32_t raw, TokenScalars &x) {
    constexpr float LEAST = 0x1p-30f;
    int lane = threadIdx.x % 32;
    float given = __uint_as_float(raw << 16), step = find_beta(p, count, raw), rest;
    if (p.beta_mode == FLASH_KDA_BETA_GIVEN) {
        step = lane < count && fabsf(step) < LEAST ? LEAST : step;
        rest = 1 / step;
    } else {
        rest = reciprocal_approximate(1.f + exp2_approximate(min_or_nan(given * LOG2E, 120.f)));
    }
    x.step[token_index(lane)] = x.beta[lane] = step, x.beta_rest[lane] = rest;
}

/* Makes the tiles of the warp's channels. */
template <bool bounded> __device__ void make_tiles(const Gate &gate, int count, OperandsShared &shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    TokenScalars &tokens = shared.tokens;
    Pairs k, q, g;
    load_pairs(shared.keys, warp, k), load_pairs(shared.queries, warp, q), load_pairs(shared.gates, warp, g);
    clear_pairs(k, count), clear_pairs(q, count), fill_gates(g, count);
    Elements x, decayed, grown;
    References found = find_decays<bounded>(gate, g, x);
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            decayed[j][i / 2][i % 2] = exp2_approximate(x[j][i / 2][i % 2]);
            grown[j][i / 2][i % 2] = exp2_approximate(-x[j][i / 2][i % 2]);
        }
    Pairs tile, columns, shifted;
    float whole[2];
    find_whole<bounded>(found, gate, g, whole);
    __syncwarp();
    scale_keys(k, tokens.rk, decayed, grown, tile, columns);
    store_pairs(shared.keys, warp, tile);
    store_pairs(shared.gates, warp, columns);
    shift_pairs<bounded, false>(tile, found, gate, g, shifted);
    store_pairs(shared.operands.KT, warp, shifted);
    scale_pairs(q, tokens.rq, decayed, tile);
    store_pairs(shared.queries, warp, tile);
    shift_pairs<bounded, false>(tile, found, gate, g, shifted);
    store_pairs(shared.operands.QT, warp, shifted);
    shift_pairs<bounded, true>(columns, found, gate, g, shifted);
    store_pairs(shared.KR, warp, shifted);
    if (lane % 4 == 0)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int channel = warp * 16 + lane / 4 + r * 8;
            float fraction = exp2_approximate(found.fraction[r]);
            shared.fraction[channel_index(channel)] = fraction;
            shared.operands.decay[channel_index(channel)] = fraction * whole[r];
            shared.from_boundary[channel] = (uint16_t)power_pair(found.middle[1][r] - found.boundary[r]);
            shared.to_boundary[channel] = (uint16_t)power_pair(found.boundary[r] - found.middle[0][r]);
        }
}

/* Products of 16 rows of RK or RQ and 16 of CK: of the first block, of the second one, or the second's rows with
 * the first's columns. They become rows of beta L0 or of M. */
__device__ void multiply_block(OperandsShared &shared, bool queries, int rows, int columns) {
    int lane = (int)(thread() % 32), part = lane % 4 * 2;
    MatrixRow<CHUNK, DIM> a_rows(queries ? shared.queries : shared.keys, true, lane),
        b_rows(shared.gates, false, lane);
    bool across = rows != columns;
    float d[2][4] = {};
#pragma unroll
    for (int k = 0; k < DIM; k += 16) {
        uint32_t a[4], b[4];
        ldmatrix(a, a_rows.at(rows, k));
        ldmatrix(b, b_rows.at(columns, k));
        if (across)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int channel = k + i * 8 + part;
                uint32_t from = *reinterpret_cast<const uint32_t *>(&shared.from_boundary[channel]);
                uint32_t to = *reinterpret_cast<const uint32_t *>(&shared.to_boundary[channel]);
                a[2 * i] = multiply_pair(a[2 * i], from), a[2 * i + 1] = multiply_pair(a[2 * i + 1], from);
                b[i] = multiply_pair(b[i], to), b[2 + i] = multiply_pair(b[2 + i], to);
            }
        mma(d[0], a, b[0], b[1]);
        mma(d[1], a, b[2], b[3]);
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = rows + lane / 4 + r * 8, column = columns + j * 8 + part;
            float left = d[j][2 * r], right = d[j][2 * r + 1];
            if (queries) { /* from the diagonal on they may be infinite */
                uint32_t pair = pack_bf16(column < row ? left : 0.f, column + 1 < row ? right : 0.f);
                *reinterpret_cast<uint32_t *>(&shared.M[swizzled<CHUNK, CHUNK>(row, column)]) = pair;
            } else {
                float step = shared.tokens.beta[row];
                if (across)
                    *reinterpret_cast<float2 *>(&shared.L[row * L_ROW + column]) =
                        make_float2(left * step, right * step);
                else
                    shared.L[column * L_ROW + row] = left * step,
                                              shared.L[(column + 1) * L_ROW + row] = right * step;
            }
        }
}

/* An element of N, in two terms. */
__device__ void store_N(OperandsShared &shared, int row, int column, float x) {
    int at = swizzled<CHUNK, CHUNK>(row, column);
    __nv_bfloat16 rounded = __float2bfloat16_rn(x);
    shared.operands.N[at] = rounded;
    shared.N_rest[at] = __float2bfloat16_rn(x - __bfloat162float(rounded));
}

/* The diagonal blocks of N in L's places, by forward substitution: a lane has a column. What a row's element takes from the
 * rows below it is taken at once, so that no load waits for it. */
__device__ void invert_blocks(OperandsShared &shared) {
    int lane = threadIdx.x % 32, first = lane / BLOCK * BLOCK, column = lane % BLOCK;
    float *L = &shared.L[first * L_ROW + first], x[BLOCK];
#pragma unroll
    for (int i = 0; i < BLOCK; i++)
        x[i] = i == column ? 1.f : 0.f;
#pragma unroll
    for (int i = 0; i < BLOCK; i++)
#pragma unroll
        for (int j = (i + 1) / 4 * 4; j < BLOCK; j += 4) {
            float4 l = *reinterpret_cast<const float4 *>(&L[i * L_ROW + j]);
            x[j] = j > i ? fmaf(-l.x, x[i], x[j]) : x[j];
            x[j + 1] = j + 1 > i ? fmaf(-l.y, x[i], x[j + 1]) : x[j + 1];
            x[j + 2] = j + 2 > i ? fmaf(-l.z, x[i], x[j + 2]) : x[j + 2];
            x[j + 3] = fmaf(-l.w, x[i], x[j + 3]);
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < BLOCK; i++)
        L[i * L_ROW + column] = x[i];
}

/* An element of a product of two blocks that lie in L. */
__device__ float multiply_blocks(const float *rows, const float *columns) {
    int row = threadIdx.x / BLOCK, column = threadIdx.x % BLOCK;
    float sums[4] = {};
#pragma unroll
    for (int j = 0; j < BLOCK; j += 4) {
        float4 x = *reinterpret_cast<const float4 *>(&rows[row * L_ROW + j]);
        sums[0] = fmaf(x.x, columns[j * L_ROW + column], sums[0]);
        sums[1] = fmaf(x.y, columns[(j + 1) * L_ROW + column], sums[1]);
        sums[2] = fmaf(x.z, columns[(j + 2) * L_ROW + column], sums[2]);
        sums[3] = fmaf(x.w, columns[(j + 3) * L_ROW + column], sums[3]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/* The block of N below them, -N11 L10 N00. */
__device__ void join_blocks(OperandsShared &shared) {
    static_assert(THREADS == BLOCK * BLOCK, "a thread has an element");
    int row = threadIdx.x / BLOCK, column = threadIdx.x % BLOCK;
    float *L00 = shared.L, *L01 = L00 + BLOCK, *L10 = L00 + BLOCK * L_ROW, *L11 = L10 + BLOCK;
    L01[row * L_ROW + column] = multiply_blocks(L10, L00);
    store_N(shared, row, column, L00[row * L_ROW + column]);
    store_N(shared, BLOCK + row, BLOCK + column, L11[row * L_ROW + column]);
    __syncthreads();
    store_N(shared, BLOCK + row, column, -multiply_blocks(L11, L01));
}

/* d [16][8 TILES] += a N, for 16 tokens of a from `rows` on and N's columns from `column` on. */
template <int TILES>
__device__ void multiply_by_N(const OperandsShared &shared, const uint32_t (&a)[4], int rows, int column,
                              float (&d)[TILES][4]) {
    MatrixRow<CHUNK, CHUNK> N(shared.operands.N, true), rest(shared.N_rest, true);
#pragma unroll
    for (int j = 0; j < TILES; j += 2)
#pragma unroll
        for (int term = 0; term < 2; term++) {
            uint32_t b[4];
            ldmatrix_transposed(b, (term ? rest : N).at(rows, column + j * 8));
            mma(d[j], a, b[0], b[1]);
            mma(d[j + 1], a, b[2], b[3]);
        }
}

/* Makes W of the warp's channels. */
__device__ void fold_keys(OperandsShared &shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, channel = warp * 16 + lane / 4;
    const TokenScalars &tokens = shared.tokens;
    float x = shared.fraction[channel_index(channel)], y = shared.fraction[channel_index(channel + 8)];
    Pairs keys, folded;
    load_pairs(shared.KR, warp, keys);
    float d[CHUNK / 8][4] = {};
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        multiply_by_N(shared, keys[t], t * 16, 0, d);
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
        float2 step = *reinterpret_cast<const float2 *>(&tokens.beta[j * 8 + lane % 4 * 2]);
        d[j][0] *= x * step.x, d[j][1] *= x * step.y, d[j][2] *= y * step.x, d[j][3] *= y * step.y;
    }
#pragma unroll
    for (int t = 0; t < CHUNK / 16; t++)
        pack_operand(d[2 * t], d[2 * t + 1], folded[t]);
    store_pairs(shared.operands.W, warp, folded);
}

/* Makes 16 rows and columns of P. On its diagonal N is 1. */
__device__ void fold_queries(OperandsShared &shared, int rows, int columns) {
    int lane = threadIdx.x % 32, part = lane % 4 * 2;
    const TokenScalars &tokens = shared.tokens;
    MatrixRow<CHUNK, CHUNK> M(shared.M, true);
    float d[2][4] = {};
#pragma unroll
    for (int k = 0; k < CHUNK; k += 16) {
        uint32_t a[4];
        ldmatrix(a, M.at(rows, k));
        multiply_by_N(shared, a, k, columns, d);
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = rows + lane / 4 + r * 8, column = columns + j * 8 + part;
            int at = swizzled<CHUNK, CHUNK>(row, column);
            float2 n = unpack_bf16(*reinterpret_cast<const uint32_t *>(&shared.operands.N[at]));
            float2 rest = unpack_bf16(*reinterpret_cast<const uint32_t *>(&shared.N_rest[at]));
            float2 step = *reinterpret_cast<const float2 *>(&tokens.beta[column]);
            float own = tokens.diagonal[token_index(row)];
            float left = fmaf(own, n.x + rest.x, d[j][2 * r]) * step.x;
            float right = fmaf(own, n.y + rest.y, d[j][2 * r + 1]) * step.y;
            if (row == column || row == column + 1)
                shared.operands.own[token_index(row)] = row == column ? left : right;
            *reinterpret_cast<uint32_t *>(&shared.operands.P[at]) =
                pack_bf16(column < row ? left : 0.f, column + 1 < row ? right : 0.f);
        }
}

__device__ void load_inputs(const kda_sm90_backward_maps &maps, const Place &at, OperandsShared &shared) {
    expect_bytes(shared.arrived, 3 * TILE * 2);
    bring_tile(shared.keys, maps.k, at, at.key_head, shared.arrived, read_again());
    bring_tile(shared.queries, maps.q, at, at.key_head, shared.arrived, read_again());
    bring_tile(shared.gates, maps.g, at, at.head, shared.arrived, read_again());
}

/* Blocks of M, N and P above the diagonal ones, where nobody writes. */
__device__ void clear_upper_blocks(OperandsShared &shared) {
    int t = threadIdx.x, at = swizzled<CHUNK, CHUNK>(t / 2 % BLOCK, BLOCK + t % 2 * 8);
    if (t >= 2 * BLOCK)
        return;
    for (__nv_bfloat16 *tile : {shared.M, shared.operands.N, shared.N_rest, shared.operands.P})
        *reinterpret_cast<uint4 *>(&tile[at]) = make_uint4(0, 0, 0, 0);
}

/* A CTA has `chunks` chunks of a segment. */
template <bool bounded>
__global__ void __launch_bounds__(THREADS, bounded ? 3 : 2)
    prepare_chunks(const __grid_constant__ kda_backward b, const __grid_constant__ kda_sm90_backward_maps maps,
                   const __grid_constant__ kda_sm90_backward_memory workspace, int chunks) {
    extern __shared__ __align__(1024) uint8_t memory[];
    OperandsShared &shared = *reinterpret_cast<OperandsShared *>(memory);
    const kda_prefill &p = b.forward;
    let_next_begin();
    uint32_t parts = CHUNKS / chunks, number = blockIdx.x / parts;
    int64_t place = (int64_t)blockIdx.y * (gridDim.x / parts) + number; /* of the segment in the workspace */
    if (threadIdx.x == 0)
        workspace.done[place] = 0;
    int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0), first = (int)(blockIdx.x % parts) * chunks;
    Place segment = find_segment(b, number, blockIdx.y);
    int end = min(first + chunks, (segment.count + CHUNK - 1) / CHUNK);
    if (first >= end)
        return;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.arrived, 1);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
        load_inputs(maps, chunk_of(segment, first), shared);
    }
    clear_upper_blocks(shared);
    Gate gate = find_gates<bounded>(p, (int)segment.head, warp);
    auto load_step = [&](int chunk) {
        Place at = chunk_of(segment, chunk);
        return warp == 1 ? load_beta(p, at.batch, at.token, at.head, at.count) : 0;
    };
    uint32_t step = load_step(first);
    ChunkOperands *to = static_cast<ChunkOperands *>(workspace.operands) + place * CHUNKS;
    __syncthreads();
#pragma unroll 1
    for (int chunk = first; chunk < end; chunk++) {
        int count = chunk_of(segment, chunk).count;
        wait(shared.arrived, (chunk - first) % 2);
        find_scales(p, shared, count);
        if (warp == 1)
            find_steps(p, count, step, shared.tokens);
        step = load_step(chunk + 1);
        if (threadIdx.x == 0) /* the chunk before has left */
            ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
        __syncthreads();
        make_tiles<bounded>(gate, count, shared);
        if (threadIdx.x < sizeof(TokenScalars) / sizeof(float))
            reinterpret_cast<float *>(&shared.operands.tokens)[threadIdx.x] =
                reinterpret_cast<const float *>(&shared.tokens)[threadIdx.x];
        __syncthreads();
        if (warp < 6)
            multiply_block(shared, warp % 2, warp < 2 ? 0 : BLOCK, warp < 4 ? 0 : BLOCK);
        fence_shared();
        __syncthreads();
        if (threadIdx.x == 0 && chunk + 1 < end)
            load_inputs(maps, chunk_of(segment, chunk + 1), shared);
        __syncwarp();
        if (warp == 1)
            invert_blocks(shared);
        __syncthreads();
        join_blocks(shared);
        __syncthreads();
        fold_keys(shared);
        if (warp < 3)
            fold_queries(shared, warp ? BLOCK : 0, warp < 2 ? 0 : BLOCK);
        fence_shared();
        __syncthreads();
        if (threadIdx.x == 0) {
            ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, &to[chunk], &shared.operands,
                               (uint32_t)sizeof shared.operands);
            ptx::cp_async_bulk_commit_group();
        }
    }
    if (threadIdx.x == 0)
        ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
}

} // namespace
} // namespace kda

extern "C" cudaError_t kda_sm90_backward_prepare(const struct kda_backward *b,
                                                 const struct kda_backward_plan *plan,
                                                 const struct kda_launch *launch,
                                                 const struct kda_sm90_backward_memory *memory) {
    using namespace kda;
    auto *kernel = &prepare_chunks<true>;
    if (!is_bounded(&b->forward))
        kernel = &prepare_chunks<false>;
    kda_sm90_backward_maps maps;
    cudaError_t error = kda_sm90_map_backward(b, &maps);
    return error ? error
                 : launch_kernel(kernel, *launch, THREADS, sizeof(OperandsShared), b->forward.stream, *b, maps,
                                 *memory, (int)(CHUNKS * plan->segments / launch->grid[0]));
}
