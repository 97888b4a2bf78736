/* SPDX-License-Identifier: MIT */
/* The CUDA backend's backward: level, plan, launches, by the rules of prefill.c. */
#include "api/backend.h"
#include "cuda/level.h"
#include "cuda/sm80/kernels.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>

static flash_kda_status check_size(const struct kda_backward *b) {
    const struct kda_prefill *p = &b->forward;
    if (p->batches * p->tokens > INT_MAX || p->sequences > INT_MAX / p->value_heads)
        return kda_fail(
            FLASH_KDA_ERROR_INVALID_ARGUMENT,
            "q has %lld tokens in %lld sequences; expected at most %d tokens, and %d sequences times "
            "value heads, on CUDA",
            (long long)(p->batches * p->tokens), (long long)p->sequences, INT_MAX, INT_MAX);
    return kda_cuda_check_heads(&p->base);
}

static flash_kda_status make_plan(const struct kda_backward *b, const struct kda_cuda_level **level,
                                  struct kda_backward_plan *plan) {
    struct kda_cuda_device device;
    flash_kda_status status = check_size(b);
    if (!status)
        status = kda_cuda_query(b->forward.device, "backward, device", &device);
    if (status)
        return status;
    const struct kda_cuda_level *const *candidate = kda_cuda_levels;
    while (candidate[1] && !((*candidate)->backward_takes && kda_level_allowed(*candidate, &device) &&
                             (*candidate)->backward_takes(b)))
        candidate++;
    *level = *candidate;
    *plan = kda_backward_plan_begin(b, (*level)->name, device.multiprocessors,
                                    kda_cuda_can_overlap(b->forward.device));
    (*level)->backward_plan(b, plan);
    return FLASH_KDA_OK;
}

flash_kda_status kda_cuda_backward_workspace_size(const struct kda_backward *b, size_t *bytes) {
    const struct kda_cuda_level *level;
    struct kda_backward_plan plan;
    flash_kda_status status = make_plan(b, &level, &plan);
    if (!status)
        *bytes = plan.workspace;
    return status;
}

flash_kda_status kda_cuda_backward(const struct kda_backward *b, void *workspace) {
    int previous = 0;
    const struct kda_cuda_level *level;
    struct kda_backward_plan plan;
    flash_kda_status status = make_plan(b, &level, &plan);
    if (!status)
        status = kda_cuda_enter(b->forward.device, &previous);
    if (status)
        return status;
    for (int i = 0; i < plan.count && !status; i++) {
        char what[64];
        struct kda_backward_launch launch = level->backward_launch_at(b, &plan, i);
        snprintf(what, sizeof what, "backward, kernel %s", launch.name);
        status = kda_cuda_status(level->backward_launch(b, &plan, &launch, workspace), what);
    }
    kda_cuda_leave(b->forward.device, previous);
    return status;
}

flash_kda_status kda_cuda_backward_describe(const struct kda_backward *b, char *text, size_t size) {
    const struct kda_cuda_level *level;
    struct kda_backward_plan plan;
    flash_kda_status status = make_plan(b, &level, &plan);
    if (!status)
        snprintf(text, size,
                 "cuda: level %s, bf16 products, %" PRId64 " chains in %" PRId64 " segments of up to %" PRId64
                 " tokens a head, %" PRId64 " at a time, states %s, launches: %d",
                 level->name, b->forward.sequences * b->forward.value_heads, plan.segments, plan.segment,
                 plan.slab_segments,
                 plan.finds_states      ? "found again"
                 : plan.needs_gradients ? "as they were kept"
                                        : "not needed",
                 plan.count);
    return status;
}
