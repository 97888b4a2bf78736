/* SPDX-License-Identifier: MIT */
#include "cuda/backward_plan.h"

/* Tokens from one state that is kept to the next, and the most of them. */
enum { SEGMENT = 128, MAX_SEGMENT = 512 };

/* Long segments are fewer that run side by side, and more of what their chunks need at a time. */
static int64_t segment_of(const struct kda_backward *b, bool *finds_states) {
    int64_t every = b->forward.checkpoint_every, whole = kda_chunks_of(b->forward.tokens) * KDA_CUDA_CHUNK;
    bool kept = b->forward.checkpoints.data;
    int64_t segment = kept && SEGMENT % every != 0 && every <= MAX_SEGMENT ? every : SEGMENT;
    *finds_states = !(kept && segment % every == 0) && whole > segment;
    return whole && whole < segment ? whole : segment;
}

struct kda_backward_plan kda_backward_plan_begin(const struct kda_backward *b, const char *level,
                                                 int multiprocessors, bool overlaps) {
    struct kda_backward_plan plan = {.level = level, .multiprocessors = multiprocessors, .overlaps = overlaps};
    const struct kda_tokens *x = &b->forward.base;
    plan.segment = segment_of(b, &plan.finds_states);
    plan.segments = kda_first_segment(x, plan.segment, x->tokens, x->sequences);
    plan.needs_sums = b->dA_log.data || b->d_dt_bias.data;
    plan.needs_gradients = plan.needs_sums || b->dq.data || b->dk.data || b->dg.data || b->dbeta.data;
    plan.finds_states = plan.finds_states && plan.needs_gradients;
    return plan;
}
