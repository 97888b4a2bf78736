/* SPDX-License-Identifier: MIT */
/* The CUDA backend's decode: one kernel a call, by the rules of prefill.c. */
#include "api/backend.h"
#include "cuda/level.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>

/* Can the state be read in pieces of 16 bytes, each within a row? */
static bool aligned(const struct kda_decode *d) {
    const struct kda_tensor *t = &d->state;
    uint64_t all = (uint64_t)(uintptr_t)t->data | (uint64_t)(t->shape[3] * (int64_t)kda_dtype_size(t->dtype));
    for (int i = 0; i < 3; i++)
        all |= t->shape[i] > 1 ? (uint64_t)t->stride[i] : 0;
    return all % 16 == 0;
}

static flash_kda_status check_size(const struct kda_decode *d) {
    const struct kda_tokens *p = &d->tokens;
    if (p->sequences > INT_MAX || p->tokens > INT_MAX)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                        "q has %lld tokens in %lld sequences; expected at most %d on CUDA",
                        (long long)(p->batches * p->tokens), (long long)p->sequences, INT_MAX);
    return kda_cuda_check_heads(p);
}

static flash_kda_status make_plan(const struct kda_decode *d, const struct kda_cuda_level **level,
                                  struct kda_decode_plan *plan) {
    struct kda_cuda_device device;
    flash_kda_status status = check_size(d);
    if (!status)
        status = kda_cuda_query(d->tokens.device, "decode, device", &device);
    if (status)
        return status;
    *plan = (struct kda_decode_plan){.multiprocessors = device.multiprocessors, .aligned = aligned(d)};
    const struct kda_cuda_level *const *candidate = kda_cuda_levels;
    while (candidate[1] && !(kda_level_allowed(*candidate, &device) && (*candidate)->decode_takes(d, plan)))
        candidate++;
    *level = *candidate;
    (*level)->decode_plan(d, plan);
    return FLASH_KDA_OK;
}

flash_kda_status kda_cuda_decode(const struct kda_decode *d) {
    const struct kda_cuda_level *level;
    struct kda_decode_plan plan;
    char what[64];
    int previous = 0;
    flash_kda_status status = make_plan(d, &level, &plan);
    if (!status)
        status = kda_cuda_enter(d->tokens.device, &previous);
    if (status)
        return status;
    snprintf(what, sizeof what, "decode, kernel %s", plan.kernel);
    status = kda_cuda_status(level->decode(d, &plan), what);
    kda_cuda_leave(d->tokens.device, previous);
    return status;
}

flash_kda_status kda_cuda_decode_describe(const struct kda_decode *d, char *text, size_t size) {
    const struct kda_cuda_level *level;
    struct kda_decode_plan plan;
    flash_kda_status status = make_plan(d, &level, &plan);
    if (!status)
        snprintf(text, size,
                 "cuda: level %s, fp32 arithmetic, %" PRId64 " chains of up to %" PRId64
                 " token%s, one kernel, %s: %s",
                 level->name, d->tokens.sequences * d->tokens.value_heads, d->max_tokens,
                 d->max_tokens == 1 ? "" : "s", plan.kernel, plan.does);
    return status;
}
