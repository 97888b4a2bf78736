/* SPDX-License-Identifier: MIT */
/* Backward after all checks: what every backend receives. */
#ifndef KDA_API_BACKWARD_PROBLEM_H
#define KDA_API_BACKWARD_PROBLEM_H

#include "api/problem.h"

struct kda_backward {
    /* The prefill whose gradients these are. Its out, final_state and indices are not given; its checkpoints, where
     * given, are read. */
    struct kda_prefill forward;
    struct kda_tensor d_out, d_final_state; /* each may not be given: 0 */
    /* Written; each may not be given. */
    struct kda_tensor dq, dk, dv, dg, dbeta, dA_log, d_dt_bias, d_initial_state;
    struct kda_border border; /* forward's own is not used */
};

/* The state that prefill kept of sequence n after `position` tokens; data is NULL if it kept none. */
KDA_INLINE struct kda_state kda_kept_state(const struct kda_backward *b, int64_t n, int64_t position,
                                           int64_t head) {
    int64_t cursor = 0;
    return kda_checkpoint_at(&b->forward, n, position, head, &cursor);
}

#endif
