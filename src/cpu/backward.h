/* SPDX-License-Identifier: MIT */
/* Backward on the CPU: what its driver (backward.c) and the kernel of each level (backward_tmpl.h) share. */
#ifndef KDA_CPU_BACKWARD_H
#define KDA_CPU_BACKWARD_H

#include "api/backward_problem.h"
#include "api/workspace.h"

/* Sums over a sequence of one value head, [K + 1]: of every channel's dt_bias, then of A_log. */
static inline double *kda_sums_of(const struct kda_backward *b, double *sums, int64_t n, int64_t head) {
    return sums + (n * b->forward.value_heads + head) * (b->forward.key_dim + 1);
}

/* The kernel of one level. */
struct kda_backward_kernels {
    /* Memory that `run` needs, from an arena; it counts the same. */
    void (*lay_out)(const struct kda_backward *b, struct kda_arena *arena);
    /* A q/k head of sequence n with all value heads that read it; writes their sums. */
    void (*run)(const struct kda_backward *b, int64_t n, int64_t key_head, void *scratch, double *sums);
};

#endif
