/* SPDX-License-Identifier: MIT */
/* Prefill after all checks: what every backend receives. */
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
    int num_threads;
};

/* Where the tokens of a sequence are. */
struct kda_sequence {
    int64_t batch, first, length;
    int64_t slot; /* in initial_state and final_state; -1: padding, not to be touched */
};

struct kda_sequence kda_sequence(const struct kda_prefill *p, int64_t n);

/* Address of row (b, t, h) of a tensor [B, T, heads, dim], or of element (b, t, h) of beta. */
static inline char *kda_row(const struct kda_tensor *t, int64_t batch, int64_t token, int64_t head) {
    return t->data + batch * t->stride[0] + token * t->stride[1] + head * t->stride[2];
}

/* One head's state matrix in memory. */
struct kda_state {
    char *data; /* NULL: none */
    enum kda_dtype dtype;
    int64_t stride; /* bytes between rows */
    bool v_first;   /* rows are [V][K], else [K][V] */
};

/* State of a slot of initial_state or final_state; data is NULL if t was not given. */
struct kda_state kda_state_at(const struct kda_prefill *p, const struct kda_tensor *t, int64_t slot,
                              int64_t head);

/* The smallest checkpoint position of sequence n behind token `position`, or INT64_MAX. */
int64_t kda_next_checkpoint(const struct kda_prefill *p, int64_t n, int64_t position);

/* Checkpoints of sequence n at `position`, one after another: start with *cursor = 0; data is NULL when there
 * is no further one. */
struct kda_state kda_checkpoint_at(const struct kda_prefill *p, int64_t n, int64_t position, int64_t head,
                                   int64_t *cursor);

#endif
