/* SPDX-License-Identifier: MIT */
/* Backward on the CPU: what its driver (backward.c) and the kernels of each level (backward_tmpl.h) share. */
#ifndef KDA_CPU_BACKWARD_H
#define KDA_CPU_BACKWARD_H

#include "api/backward_problem.h"
#include "api/workspace.h"
#include "cpu/prefill.h"

enum {
    KDA_SEGMENT = 128
}; /* tokens between states that are kept over a whole sequence, a multiple of KDA_CHUNK */

/* One value head of one sequence, and what is kept of its way there and of its way back. */
struct kda_backward_head {
    int64_t sequence, head;
    float *
        S; /* [segments][kda_state_floats()]: before each segment but the first; NULL where prefill kept them */
    float *e; /* [segments][kda_value_floats()]: e of the delta rule; NULL: it is found again */
    float *
        R; /* [segments][kda_state_floats()]: gradient after each segment; NULL: each follows from the one after it */
    float *sums_q,
        *sums_k;      /* [tokens of the segments at hand][Kp]: over the value heads of a q/k head; or NULL */
    bool first, last; /* of these value heads */
    double *sums;     /* [segments][stride]: sums of every channel's dt_bias, [K], then of A_log */
    int64_t sums_stride;
};

/* The kernels of one level. scratch: what lay_out counts. */
struct kda_backward_kernels {
    void (*lay_out)(const struct kda_backward *b, struct kda_arena *arena);
    /* The two ways, through the same columns of V: tiles `first` to end - 1. They write h->S and h->e, and h->R. */
    void (*there)(const struct kda_backward *b, const struct kda_backward_head *h, int64_t first, int64_t end,
                  void *scratch);
    void (*back)(const struct kda_backward *b, const struct kda_backward_head *h, int64_t first, int64_t end,
                 void *scratch);
    /* The way back from 0, through all tokens, to the summary. */
    void (*summarise)(const struct kda_backward *b, const struct kda_backward_head *h, int64_t first,
                      int64_t end, void *scratch);
    /* Gradients of segments `first` to end - 1, the last first. */
    void (*gradients)(const struct kda_backward *b, const struct kda_backward_head *h, int64_t first,
                      int64_t end, void *scratch);
};

static inline int64_t kda_state_floats(const struct kda_prefill *p) {
    return kda_padded_key_dim(p) * kda_tiles(p->value_dim) * KDA_TILE;
}

static inline int64_t kda_value_floats(const struct kda_prefill *p) {
    return KDA_SEGMENT * kda_tiles(p->value_dim) * KDA_TILE;
}

static inline int64_t kda_segments(int64_t tokens) { return (tokens + KDA_SEGMENT - 1) / KDA_SEGMENT; }

/* Did prefill keep the state before every segment? */
static inline bool kda_kept_all(const struct kda_prefill *p) {
    return p->checkpoints.data && KDA_SEGMENT % p->checkpoint_every == 0;
}

#endif
