/* SPDX-License-Identifier: MIT */
/* Prefill after all checks: what every backend receives, and the one reading of its index tensors. */
#ifndef KDA_API_PROBLEM_H
#define KDA_API_PROBLEM_H

#include "api/tensor.h"

enum { KDA_MAX_THREADS = 1024 };

struct kda_prefill {
    int64_t batches, tokens, sequences;             /* B, T, N */
    int64_t heads, value_heads, key_dim, value_dim; /* H, HV, K, V */
    struct kda_tensor q, k, v, g, beta, A_log, dt_bias, out;
    struct kda_tensor cu_seqlens;
    struct kda_tensor initial_state, final_state, state_indices;
    struct kda_tensor checkpoints, checkpoint_cu_starts, checkpoint_indices, checkpoint_offsets;
    int64_t checkpoint_every;
    flash_kda_gate gate;
    flash_kda_beta beta_mode;
    flash_kda_state_layout state_layout;
    flash_kda_backend backend;
    float lower_bound, scale;
    bool qk_norm, batch_invariant;
    bool on_host; /* the host can read the index tensors */
    int device;   /* DLPack's device id */
    int num_threads;
    void *stream;
};

/* Where the tokens of a sequence are. */
struct kda_sequence {
    int64_t batch, first, length;
    int64_t slot; /* in initial_state and final_state; -1: padding, not to be touched */
};

/* Address of row (b, t, h) of a tensor [B, T, heads, dim], or of element (b, t, h) of beta. */
KDA_INLINE char *kda_row(const struct kda_tensor *t, int64_t batch, int64_t token, int64_t head) {
    return t->data + batch * t->stride[0] + token * t->stride[1] + head * t->stride[2];
}

/* One head's state matrix in memory. */
struct kda_state {
    char *data; /* NULL: none */
    enum kda_dtype dtype;
    int64_t stride; /* bytes between rows */
    bool v_first;   /* rows are [V][K], else [K][V] */
};

KDA_INLINE int64_t kda_min64(int64_t a, int64_t b) { return a < b ? a : b; }

KDA_INLINE int64_t kda_clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : kda_min64(x, high);
}

/* Where the tokens and the state of sequence n are. Indices in device memory are not checked before a call: here
 * they are kept within the tensors. */
KDA_INLINE struct kda_sequence kda_sequence(const struct kda_prefill *p, int64_t n) {
    struct kda_sequence s = {n, 0, p->tokens, n};
    if (p->cu_seqlens.data) {
        int64_t end = kda_clamp(kda_index(&p->cu_seqlens, n + 1, 0), 0, p->tokens);
        s.batch = 0;
        s.first = kda_clamp(kda_index(&p->cu_seqlens, n, 0), 0, end);
        s.length = end - s.first;
    }
    if (p->state_indices.data) {
        int64_t slots = p->initial_state.data ? p->initial_state.shape[0] : p->final_state.shape[0];
        s.slot = kda_index(&p->state_indices, n, 0);
        s.slot = s.slot < slots ? s.slot : -1;
    }
    return s;
}

/* State of a slot of initial_state or final_state; data is NULL if t was not given. */
KDA_INLINE struct kda_state kda_state_at(const struct kda_prefill *p, const struct kda_tensor *t, int64_t slot,
                                         int64_t head) {
    struct kda_state s = {NULL, KDA_F32, 0, false};
    if (t->data) {
        int outer = t->rank - 3;
        s.data = t->data + slot * t->stride[0] + head * t->stride[outer];
        s.dtype = t->dtype;
        s.stride = t->stride[outer + 1];
        s.v_first = p->state_layout == FLASH_KDA_STATE_V_FIRST;
    }
    return s;
}

/* checkpoint_cu_starts[n], kept within the rows that there are: indices in device memory are not checked before. */
KDA_INLINE int64_t kda_checkpoint_start(const struct kda_prefill *p, int64_t n) {
    int64_t rows = p->checkpoint_indices.data ? p->checkpoint_indices.shape[0] : p->checkpoints.shape[0];
    return kda_clamp(kda_index(&p->checkpoint_cu_starts, n, 0), 0, rows);
}

/* Rows of checkpoints that sequence n has. */
KDA_INLINE int64_t kda_checkpoint_count(const struct kda_prefill *p, int64_t n) {
    if (p->checkpoint_offsets.data)
        return p->checkpoint_offsets.rank > 1 ? p->checkpoint_offsets.shape[1] : 1;
    if (p->checkpoint_cu_starts.data)
        return kda_checkpoint_start(p, n + 1) - kda_checkpoint_start(p, n);
    return p->checkpoints.shape[1];
}

/* The smallest checkpoint position of sequence n behind token `position`, or INT64_MAX. */
KDA_INLINE int64_t kda_next_checkpoint(const struct kda_prefill *p, int64_t n, int64_t position) {
    int64_t next = INT64_MAX;
    if (!p->checkpoints.data)
        return next;
    int64_t count = kda_checkpoint_count(p, n);
    if (p->checkpoint_offsets.data) {
        for (int64_t j = 0; j < count; j++) {
            int64_t offset = kda_index(&p->checkpoint_offsets, n, j);
            if (offset > position)
                next = kda_min64(next, offset);
        }
        return next;
    }
    int64_t length = kda_sequence(p, n).length, row = position / p->checkpoint_every;
    if (row < count && position < length)
        next = length / p->checkpoint_every > row ? (row + 1) * p->checkpoint_every : length;
    return next;
}

/* Row j of sequence n of checkpoints. */
KDA_INLINE struct kda_state kda_checkpoint_row(const struct kda_prefill *p, int64_t n, int64_t j,
                                               int64_t head) {
    struct kda_state s = kda_state_at(p, &p->checkpoints, 0, head);
    if (p->checkpoint_cu_starts.data) {
        int64_t row = kda_checkpoint_start(p, n) + j;
        if (p->checkpoint_indices.data)
            row = row >= 0 && row < p->checkpoint_indices.shape[0] ? kda_index(&p->checkpoint_indices, row, 0)
                                                                   : -1;
        if (row < 0 || row >= p->checkpoints.shape[0])
            s.data = NULL;
        else
            s.data += row * p->checkpoints.stride[0];
    } else {
        s.data += n * p->checkpoints.stride[0] + (p->checkpoints.rank > 4 ? j * p->checkpoints.stride[1] : 0);
    }
    return s;
}

/* Checkpoints of sequence n at `position`, one after another: start with *cursor = 0; data is NULL when there
 * is no further one. */
KDA_INLINE struct kda_state kda_checkpoint_at(const struct kda_prefill *p, int64_t n, int64_t position,
                                              int64_t head, int64_t *cursor) {
    struct kda_state none = {NULL, KDA_F32, 0, false};
    if (!p->checkpoints.data)
        return none;
    int64_t count = kda_checkpoint_count(p, n);
    if (p->checkpoint_offsets.data) {
        while (*cursor < count) {
            int64_t j = (*cursor)++;
            if (kda_index(&p->checkpoint_offsets, n, j) == position)
                return kda_checkpoint_row(p, n, j, head);
        }
        return none;
    }
    if (*cursor || position == 0)
        return none;
    *cursor = 1;
    int64_t row = (position - 1) / p->checkpoint_every;
    bool here = position % p->checkpoint_every == 0 || position == kda_sequence(p, n).length;
    return here && row < count ? kda_checkpoint_row(p, n, row, head) : none;
}

#endif
