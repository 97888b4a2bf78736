/* SPDX-License-Identifier: MIT */
/*
 * Prefill on the CPU: what its driver (prefill.c) and the kernels of each level (prefill_tmpl.h) share.
 *
 * A chunk of KDA_CHUNK tokens of one head is worked in two steps (names as in docs/maths.md):
 *   prepare  all that does not depend on the state: gate, norms, KT, QT, KR, L, M;
 *   apply    for KDA_TILE columns of the state:  U = (I + L)^-1 (beta V - beta KT S),  O = QT S + M U,
 *            S <- diag(carry) S + KR^T U.
 * Columns of the state never meet, so tiles of one head run on different threads with the same bits.
 */
#ifndef KDA_CPU_PREFILL_H
#define KDA_CPU_PREFILL_H

#include "api/problem.h"
#include "cpu/fused.h"

enum {
    KDA_CHUNK = 16,        /* tokens */
    KDA_TILE = 32,         /* columns of the state that are worked together */
    KDA_KEY_MULTIPLE = 16, /* K is padded with zeros to a multiple of this */
    KDA_MAX_PADDED_K = 256,
};

/* One prepared chunk. Kp is K padded. */
struct kda_chunk {
    int64_t first;      /* token within its sequence */
    int64_t count;      /* 1 .. KDA_CHUNK; the missing tokens change nothing (k = q = 0, no decay) */
    float *carry;       /* [Kp]: exp(sum of log decays) - 1, exact where decay is slow */
    float *beta;        /* [KDA_CHUNK] */
    float *L, *M;       /* [KDA_CHUNK][KDA_CHUNK]; L strictly lower and times beta, M lower and times scale */
    void *queries_keys; /* [2 KDA_CHUNK][Kp]: rows of KT = k exp(G), then of QT = scale q exp(G) */
    void *keys_to_end;  /* KR = k exp(G_C - G) in the order that the kernels' update reads */
    float growth; /* if asked for, a bound of the log of what the chunk can make of a state's norm; or NaN */
};

/* KDA_TILE columns of the state of one head. */
struct kda_tile {
    float *S; /* [Kp][KDA_TILE] */
    void *
        products; /* the kernels' own copy for matrix products, in their operand type; NULL if they need none */
};

/* A range of tokens of one sequence and value head that is worked from its first to its last token. */
struct kda_chain {
    int64_t sequence, head;
    struct kda_sequence tokens;
    int64_t begin, end;                /* tokens within the sequence */
    bool prepares_next;                /* the thread that applies a chunk will also prepare the next one */
    bool bounds_growth;                /* prepare finds kda_chunk.growth */
    const struct kda_cpu_fused *fused; /* NULL: nothing stands around */
};

/* Where a tile's values come from and its outputs go. */
struct kda_tile_io {
    int64_t column, columns; /* first column of V, and how many, 1 .. KDA_TILE */
    bool has_values;         /* false: v = 0 (the identity run of a segment) */
    bool has_outputs;
    float *
        outputs; /* of the chunk, [KDA_CHUNK][kda_cpu_fused.padded[2]], where a norm follows; NULL: they go to out */
};

/* The kernels of one level for one choice of arithmetic. */
struct kda_cpu_kernels {
    size_t operand_size;  /* bytes of an element of queries_keys and keys_to_end */
    size_t products_size; /* bytes of an element of kda_tile.products, or 0 */
    /* scratch: kda_prepare_scratch() bytes, aligned to 64. */
    void (*prepare)(const struct kda_prefill *p, const struct kda_chain *chain, struct kda_chunk *chunk,
                    void *scratch);
    void (*apply)(const struct kda_prefill *p, const struct kda_chain *chain, const struct kda_chunk *chunk,
                  const struct kda_tile_io *io, struct kda_tile *tile);
    /* Takes whole rows of outputs of a chunk through the norm to out. */
    void (*norm)(const struct kda_prefill *p, const struct kda_chain *chain, const struct kda_chunk *chunk,
                 float *outputs);
    /* Fills a tile from columns of a state in memory (zero if state.data is NULL). */
    void (*load_state)(const struct kda_prefill *p, struct kda_state state, const struct kda_tile_io *io,
                       struct kda_tile *tile);
    /* Makes tile->products follow tile->S. */
    void (*refresh)(const struct kda_prefill *p, struct kda_tile *tile);
    void (*store_state)(const struct kda_prefill *p, struct kda_state state, const struct kda_tile_io *io,
                        const struct kda_tile *tile);
    /* to += A from, for one tile of columns; A is given as tiles of its own columns. */
    void (*compose)(int64_t key_dim, const struct kda_tile *A, const struct kda_tile *from,
                    struct kda_tile *to);
};

static inline int64_t kda_pad_key_dim(int64_t key_dim) {
    return (key_dim + KDA_KEY_MULTIPLE - 1) / KDA_KEY_MULTIPLE * KDA_KEY_MULTIPLE;
}

static inline int64_t kda_padded_key_dim(const struct kda_prefill *p) { return kda_pad_key_dim(p->key_dim); }

/* Four fp32 rows for each token of a chunk, and what a convolution reads. */
static inline size_t kda_prepare_scratch(const struct kda_prefill *p) {
    size_t rows = 4 * KDA_CHUNK + (p->fused ? KDA_CONV_PAST + KDA_CHUNK : 0);
    return rows * (size_t)kda_padded_key_dim(p) * sizeof(float);
}

static inline int64_t kda_tiles(int64_t columns) { return (columns + KDA_TILE - 1) / KDA_TILE; }

#endif
