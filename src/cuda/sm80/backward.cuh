/* SPDX-License-Identifier: MIT */
/* What backward's kernels leave for each other in the workspace. */
#ifndef KDA_CUDA_SM80_BACKWARD_CUH
#define KDA_CUDA_SM80_BACKWARD_CUH

#include "cuda/operands.cuh"
#include "cuda/sm80/backward_plan.h"

namespace kda {

constexpr int COLUMNS = KDA_SM80_COLUMNS; /* of V, of one CTA of a chain, and of a tile of what is kept */

/* What kernel backward_prepare leaves of one chunk of one value head, as it lies in shared memory. Kernels that take
 * chains read the part from `inverse` or from `keys` on. */
template <int KP> struct alignas(16) BackwardOperands {
    float inverse[CHUNK * CHUNK];          /* (I + L0 diag(beta))^-1, tf32, by tf32_index */
    __nv_bfloat16 keys[CHUNK * KP];        /* KT = k exp(G) */
    __nv_bfloat16 keys_to_end[CHUNK * KP]; /* KR = k exp(G_C - G) */
    float carry[KP];                       /* exp(G_C) - 1 */
    float steps[CHUNK];                    /* beta as it is used; 0 after the last token */
    __nv_bfloat16 queries[CHUNK * KP];     /* QT = scale q exp(G) */
    __nv_bfloat16 M[CHUNK * CHUNK];
    float adjoint_inverse[CHUNK * CHUNK]; /* (I + diag(beta) L0)^-1 transposed, likewise */
    /* Of k, then q: what takes a row to that of KT or QT before any decay, and to its unit row (prepare.cuh). */
    float factors[2][CHUNK], units[2][CHUNK];

    __device__ __nv_bfloat16 *key(int row, int c) { return &keys[swizzled<CHUNK, KP>(row, c)]; }
    __device__ __nv_bfloat16 *query(int row, int c) { return &queries[swizzled<CHUNK, KP>(row, c)]; }
};

/* A chunk's rows of e or Z, and a state or a gradient of one, at the columns of a tile; swizzled. In the latter each group
 * of 32 channels lies as accumulators hold it: a lane's four pairs, 8 channels apart, are one piece. */
constexpr int ROWS_ELEMENTS = CHUNK * COLUMNS;
template <int KP> constexpr int STATE_ELEMENTS = COLUMNS *KP; /* [COLUMNS][KP] */

/* The channel that stands at place `place` of a state's row. */
__host__ __device__ constexpr int channel_at(int place) {
    return place / 32 * 32 + place % 8 / 2 * 8 + place % 32 / 8 * 2 + place % 2;
}

/* The workspace of a call, its pointers to the slab that is worked where there is one memory for all. Chunks are
 * numbered in a slab: [HV][slab's segments][chunks of a segment]. */
template <int KP> struct BackwardMemory {
    BackwardOperands<KP> *operands; /* [chunks] */
    __nv_bfloat16 *e, *Z;           /* [chunks][tiles]: u = beta e, and the gradient of u */
    __nv_bfloat16 *S, *R; /* [chunks][tiles]: the state before a chunk, and the gradient of that after it */
    __nv_bfloat16 *kept;  /* [HV][segments][tiles]: the state before each segment */
    float *carried_S, *carried_R; /* [2][HV][tiles]: between slabs, by turns */
    float *sums;                  /* [chunks of all slabs][KP + 1]: over a chunk, of dt_bias and of A_log */
};

/* What a kernel needs to know of the slab that it works. */
struct Slab {
    int64_t segment;    /* tokens */
    int64_t segments;   /* of all slabs */
    int64_t begin, end; /* its segments */
    int64_t room;       /* segments that there is memory for */
    int chunks;         /* of a segment */
    int tiles;          /* of V */
    int turn;           /* of the carried states */
    bool finds_states;  /* `kept` holds the states before segments */

    /* The number of a chunk in the slab; segment: of all. */
    __device__ int64_t chunk(int64_t head, int64_t segment_number, int64_t chunk_number) const {
        return (head * room + segment_number - begin) * chunks + chunk_number;
    }
};

/* A segment of a slab. */
struct SlabSegment {
    struct kda_sequence sequence;
    int64_t n, within; /* the sequence's number; the segment's, counted within it, and negative in a gap */
};

inline __device__ SlabSegment find_segment(const kda_backward &b, const Slab &slab, int64_t number) {
    SlabSegment s;
    s.n = kda_sequence_of_segment(&b.forward.base, slab.segment, number);
    s.sequence = kda_tokens_of(&b.forward.base, s.n);
    s.within = number - kda_first_segment(&b.forward.base, slab.segment, s.sequence.first, s.n);
    return s;
}

/* ---- Host: what a launch gets ------------------------------------------------------------------- */

inline Slab make_slab(const kda_backward *b, const kda_backward_plan *plan, const kda_backward_launch *launch) {
    Slab slab = {};
    slab.segment = plan->segment, slab.segments = plan->segments, slab.room = plan->slab_segments;
    slab.begin = launch->slab * plan->slab_segments;
    slab.end = kda_min64(slab.begin + plan->slab_segments, plan->segments);
    slab.chunks = (int)(plan->segment / CHUNK), slab.tiles = (int)kda_sm80_tiles(b);
    slab.turn = (int)(launch->slab % 2), slab.finds_states = plan->finds_states;
    return slab;
}

template <int KP>
BackwardMemory<KP> make_memory(const kda_backward *b, const kda_backward_plan *plan,
                               const kda_backward_launch *launch, void *workspace) {
    static_assert(sizeof(BackwardOperands<KP>) == KDA_SM80_BACKWARD_OPERANDS(KP),
                  "what the plan makes room for");
    kda_sm80_backward_memory m;
    kda_sm80_backward_lay_out(b, plan, workspace, &m);
    int64_t chunks = kda_sm80_chunks_of_slab(b, plan), tiles = chunks * kda_sm80_tiles(b);
    int64_t states = launch->slab % kda_sm80_slabs_of_states(plan) * tiles;
    int64_t operands = launch->slab % kda_sm80_slabs_of_operands(plan) * chunks;
    auto elements = [](void *memory) { return static_cast<__nv_bfloat16 *>(memory); };
    return {static_cast<BackwardOperands<KP> *>(m.operands) + operands,
            elements(m.e) + states * ROWS_ELEMENTS,
            elements(m.Z) + states * ROWS_ELEMENTS,
            elements(m.S) + states * STATE_ELEMENTS<KP>,
            elements(m.R) + states * STATE_ELEMENTS<KP>,
            elements(m.kept),
            static_cast<float *>(m.carried_S),
            static_cast<float *>(m.carried_R),
            static_cast<float *>(m.sums)};
}

} // namespace kda

#endif
