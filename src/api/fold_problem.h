/* SPDX-License-Identifier: MIT */
/* Fold after all checks: what every backend receives. */
#ifndef KDA_API_FOLD_PROBLEM_H
#define KDA_API_FOLD_PROBLEM_H

#include "api/tokens.h"

struct kda_fold {
    int64_t rows, links, summaries;          /* R, L, J */
    int64_t value_heads, key_dim, value_dim; /* HV, K, V */
    struct kda_tensor bias, transitions, chains;
    struct kda_tensor initial_state, state_indices, states, prefixes; /* each may not be given */
    flash_kda_state_layout state_layout;
    bool adjoint;
    bool on_host;
    int device;
    int num_threads;
    void *stream;
};

/* A matrix in memory of which element (i, j) is at data + i * row + j * column. */
struct kda_matrix {
    char *data; /* NULL: none */
    enum kda_dtype dtype;
    int64_t row, column; /* bytes */
};

/* Row n's slot in the states; -1: padding. Indices in device memory are not checked before. */
KDA_INLINE int64_t kda_fold_slot(const struct kda_fold *f, int64_t n) {
    const struct kda_tensor *states = f->states.data ? &f->states : &f->initial_state;
    if (!f->state_indices.data)
        return n;
    int64_t slot = kda_index(&f->state_indices, n, 0);
    return slot >= 0 && slot < states->shape[0] ? slot : -1;
}

/* The summary that is row n's link number i; -1: none. */
KDA_INLINE int64_t kda_fold_link(const struct kda_fold *f, int64_t n, int64_t i) {
    int64_t j = kda_index(&f->chains, n, i);
    return j >= 0 && j < f->summaries ? j : -1;
}

/* Matrix `outer` (or, of prefixes, (outer, inner)) of a head, whose element (i, j) is that of [V, K] or [K, K], whatever the
 * layout in memory. */
KDA_INLINE struct kda_matrix kda_fold_matrix(const struct kda_fold *f, const struct kda_tensor *t,
                                             int64_t outer, int64_t inner, int64_t head) {
    struct kda_matrix m = {0, KDA_F32, 0, 0};
    if (t->data) {
        int last = t->rank - 1;
        bool v_first = f->state_layout == FLASH_KDA_STATE_V_FIRST;
        m.data = t->data + outer * t->stride[0] + (t->rank > 4 ? inner * t->stride[1] : 0) +
                 head * t->stride[last - 2];
        m.dtype = t->dtype;
        m.row = v_first ? t->stride[last - 1] : t->stride[last];
        m.column = v_first ? t->stride[last] : t->stride[last - 1];
    }
    return m;
}

/* Element (from, to) of what follows takes channel `from` of a state to channel `to`. */
KDA_INLINE struct kda_matrix kda_fold_transition(const struct kda_fold *f, int64_t summary, int64_t head) {
    struct kda_matrix m = kda_fold_matrix(f, &f->transitions, summary, 0, head);
    if (f->adjoint) {
        int64_t row = m.row;
        m.row = m.column;
        m.column = row;
    }
    return m;
}

KDA_INLINE float *kda_at(const struct kda_matrix *m, int64_t i, int64_t j) {
    return (float *)(void *)(m->data + i * m->row + j * m->column);
}

#endif
