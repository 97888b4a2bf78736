/* SPDX-License-Identifier: MIT */
/*
 * Backward on Hopper, for K = V = 128. Letters as in docs/maths.md; R is the gradient of a state.
 *
 * prepare    A CTA makes what some chunks need besides states, and leaves it in the workspace.
 * adjoint    A CTA takes 64 columns of V of R through a chain's chunks, from the last to the first, in the
 *            accumulators of a warpgroup, as R^T [V][K]. It stores R at the end of every chunk, and dX = dv.
 * gradients  A CTA takes S through a segment of 128 tokens from the segment's checkpoint on, and makes all other
 *            gradients of each chunk. Two of them share a multiprocessor: while one waits, the other works.
 *            It begins with the last segments, as soon as the chains have passed them: all CTAs of adjoint run before
 *            the first of gradients begins.
 * sums       Adds what segments leave of dA_log and d_dt_bias, in a fixed order.
 * heads      Adds gradients of q and k over the value heads that share them.
 *
 * Exponents. Pairs of tokens meet around the middles of blocks of 16 tokens, states at the chunk's ends. All references
 * are whole powers of two: with G the log2 decay from the chunk's start to a token, m the rounded G of its block's
 * middle, e that of the chunk's end,
 *     RK = k exp2(G - m)   RQ = q exp2(G - m)   CK = k exp2(m - G)
 *     KT = exp2(m) RK      QT = exp2(m) RQ      KR = exp2(e - m) CK
 * so that KT and QT have the very digits of a pair's tile. With [T1 T2] and T3 the sums of all products with RQ, RK and
 * CK,
 *     dq = exp2(G - m) T1   dk = exp2(G - m) T2 + exp2(m - G) T3
 * and RQ T1 + RK T2 enters the sum over pairs that pass a token's decay with the number that CK T3 takes off again.
 *
 * The diagonals of M and of its gradient, and the step, stay in fp32: with strong gates they are most of the result.
 *
 * For the adjoint chain, which no sum of pairs depends on, prepare multiplies out what does not depend on R: with N =
 * (I + diag(beta) L0)^-1 and M with its diagonal,
 *     dX = diag(beta) N^T (M^T dO + KR exp2(G - e) R) = P^T dO + W R
 *     P = M N diag(beta)   W = diag(beta) N^T KR exp2(G - e)
 * N has two terms of bf16 there. Where keys nearly coincide, what N^T takes from KR is most of it: W is small, and its
 * digits are those of the difference.
 *
 * gradients, for one chunk (M = 10^6 multiply-adds):
 *     S^T KT^T 0.52, X N^T 0.13, U^T KR 0.52; R U^T 0.52, [dO; dX] U^T 0.26, S [dO; dX]^T 1.05,
 *     CK^T [dM; dL]^T 0.26, [RQ RK]^T [dM dL] 0.26
 */
#ifndef KDA_CUDA_SM90_BACKWARD_CONFIG_CUH
#define KDA_CUDA_SM90_BACKWARD_CONFIG_CUH

#include "cuda/launch.cuh"
#include "cuda/segments.h"
#include "cuda/sm90/backward/plan.h"
#include "cuda/sm90/mainloop/consume.cuh"
#include "cuda/sm90/mainloop/produce.cuh"

#include <cstddef>

namespace kda {
namespace {

constexpr int DIM = KDA_SM90_BACKWARD_DIM, SEGMENT = KDA_SM90_BACKWARD_SEGMENT,
              CHUNKS = KDA_SM90_BACKWARD_CHUNKS;
constexpr int TILE = CHUNK * DIM;     /* elements of a tile of a chunk's tokens, in two panels */
constexpr int TOKENS = CHUNK * PANEL; /* of one of its panels */
constexpr int PAIR_ROW = CHUNK * 2;   /* bytes of a row of a tile of pairs of tokens */

/* What a chunk's tokens have for kernel gradients. */
struct alignas(16) TokenScalars {
    float step[CHUNK], diagonal[CHUNK];  /* beta, and M's diagonal, by token_index */
    float rk[CHUNK], rq[CHUNK];          /* k and q are to be multiplied by these */
    float beta[CHUNK], beta_rest[CHUNK]; /* the step, and sigmoid(-beta) or, where it is given, its inverse */
};

/* A chunk's operands: what the adjoint chain needs first, then what kernel gradients does. */
struct alignas(1024) ChunkOperands {
    __nv_bfloat16 W[TILE], QT[TILE], KT[TILE];
    __nv_bfloat16 P[CHUNK * CHUNK]; /* below its diagonal, swizzled by 64 bytes */
    float own[CHUNK];               /* the diagonal, by token_index */
    float decay[DIM];               /* of a state, exp2(G), by channel_index */
    TokenScalars tokens;
    __nv_bfloat16 N[CHUNK * CHUNK]; /* (I + diag(beta) L0)^-1, swizzled by 64 bytes */
};
static_assert(sizeof(ChunkOperands) == KDA_SM90_BACKWARD_OPERANDS, "the plan counts it");
constexpr uint32_t ADJOINT_BYTES = offsetof(ChunkOperands, tokens);

/* R^T lies in 8x8 matrices [V][K], as accumulators have them: 16 channels, 16 columns of V, and a lane's pairs of the
 * four matrices, the second one below the first. */
constexpr int ADJOINT_PIECES = DIM / 16 * (DIM / 16) * 32; /* of 16 bytes, of a chunk */
inline __device__ int64_t adjoint_piece(int64_t chunk, int channels, int columns, int lane) {
    return chunk * ADJOINT_PIECES + (channels * (DIM / 16) + columns) * 32 + lane;
}

constexpr uint32_t HALVES = 2; /* of V: CTAs of kernel adjoint that work a chain */

/* A chunk or a segment in the tensors. */
struct Place {
    int64_t n, head, key_head, batch, token; /* its first token in the tensors */
    int64_t length;                          /* of its sequence */
    int64_t first;                           /* its first token in the sequence */
    int count;                               /* its tokens; 0: it does not exist */
};

/* Segment number `segment` of the batch, of value head `head`. */
inline __device__ Place find_segment(const kda_backward &b, int64_t segment, int64_t head) {
    const kda_tokens &x = b.forward.base;
    Place at;
    at.n = kda_sequence_of_segment(&x, SEGMENT, segment);
    struct kda_sequence s = kda_tokens_of(&x, at.n);
    /* in 32 bits, which all threads divide in a fraction of the time */
    at.head = head, at.key_head = (uint32_t)head / ((uint32_t)x.value_heads / (uint32_t)x.heads);
    at.batch = s.batch, at.length = s.length;
    at.first = (segment - kda_first_segment(&x, SEGMENT, s.first, at.n)) * SEGMENT;
    at.token = s.first + at.first;
    /* cu_seqlens that do not ascend may put it before the sequence. */
    at.count = at.first < 0 ? 0 : (int)kda_clamp(s.length - at.first, 0, SEGMENT);
    return at;
}

/* Chunk `chunk` of it. */
inline __device__ Place chunk_of(Place at, int chunk) {
    at.first += chunk * CHUNK, at.token += chunk * CHUNK;
    /* In this order: for max(0, min(..)) == CHUNK ptxas 13.0 takes a predicate of VIMNMX.RELU, which holds for smaller
     * counts as well. */
    at.count = min(max(at.count - chunk * CHUNK, 0), CHUNK);
    return at;
}

/* Has the copy engine bring a panel of 64 channels of a chunk's rows. */
inline __device__ void bring_panel(void *to, const CUtensorMap &map, int panel, const Place &at, int64_t head,
                                   uint64_t &barrier, uint64_t policy) {
    const int32_t where[4] = {panel * PANEL, (int32_t)head, (int32_t)at.token, (int32_t)at.batch};
    bring_box(to, map, where, barrier, policy);
}

/* Or both panels of a tile, `step` elements apart. */
inline __device__ void bring_tile(__nv_bfloat16 *to, const CUtensorMap &map, const Place &at, int64_t head,
                                  uint64_t &barrier, uint64_t policy, int step = TOKENS) {
    bring_panel(to, map, 0, at, head, barrier, policy);
    bring_panel(to + step, map, 1, at, head, barrier, policy);
}

/* Multiplies columns of a state by factors of their channels, which few registers hold at a time. */
inline __device__ void decay_by(float (&S)[DIM / 8][4], const float *factors) {
    factors += thread() % 4 * 4;
#pragma unroll
    for (int c = 0; c < DIM / 8; c += 2) {
        float4 f = *reinterpret_cast<const float4 *>(&factors[c * 8]);
        S[c][0] *= f.x, S[c][1] *= f.y, S[c][2] *= f.x, S[c][3] *= f.y;
        S[c + 1][0] *= f.z, S[c + 1][1] *= f.w, S[c + 1][2] *= f.z, S[c + 1][3] *= f.w;
    }
}

inline __device__ void expect_bytes(uint64_t &barrier, uint32_t bytes) {
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &barrier, bytes);
}

/* Has the copy engine bring contiguous bytes, a multiple of 16. */
inline __device__ void bring_bytes(void *to, const void *from, uint32_t bytes, uint64_t &barrier) {
    ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, to, from, bytes, &barrier);
}

} // namespace
} // namespace kda

#endif
