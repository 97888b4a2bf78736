/* SPDX-License-Identifier: MIT */
/* The CUDA backend's decode: one kernel a call, by the rules of prefill.c. */
#include "api/backend.h"
#include "api/status.h"
#include "cuda/call.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm90/kernels.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>

#ifndef KDA_WITH_SM90
#define kda_sm90_decode_takes(d, n) false
#define kda_sm90_decode(d, n)       cudaErrorNotSupported
#endif

/* Can the state be read in pieces of 16 bytes, each within a row? */
static bool aligned(const struct kda_decode *d) {
    const struct kda_tensor *t = &d->state;
    uint64_t all = (uint64_t)(uintptr_t)t->data | (uint64_t)(t->shape[3] * (int64_t)kda_dtype_size(t->dtype));
    for (int i = 0; i < 3; i++)
        all |= t->shape[i] > 1 ? (uint64_t)t->stride[i] : 0;
    return all % 16 == 0;
}

static bool fused(const struct kda_decode *d) {
    return d->q_conv.weight.data || d->k_conv.weight.data || d->v_conv.weight.data || d->norm_weight.data;
}

static flash_kda_status check_size(const struct kda_decode *d) {
    const struct kda_prefill *p = &d->tokens;
    if (p->sequences > INT_MAX || p->tokens > INT_MAX)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                        "q has %lld tokens in %lld sequences; expected at most %d on CUDA",
                        (long long)(p->batches * p->tokens), (long long)p->sequences, INT_MAX);
    return kda_cuda_check_heads(p);
}

/* The kernels that run a call: the portable level's, alone or with what stands before and after; or Hopper's. */
enum way { PORTABLE, PORTABLE_FUSED, STAGED };

struct plan {
    enum way way;
    int processors;
};

static flash_kda_status make_plan(const struct kda_decode *d, struct plan *plan) {
    struct kda_cuda_device device;
    flash_kda_status status = check_size(d);
    if (!status)
        status = kda_cuda_look_at(d->tokens.device, "decode, device", &device);
    if (status)
        return status;
    plan->processors = device.processors;
    plan->way = fused(d) ? PORTABLE_FUSED : PORTABLE;
    if (plan->way == PORTABLE && device.sm90 && aligned(d) && kda_sm90_decode_takes(d, device.processors))
        plan->way = STAGED;
    return FLASH_KDA_OK;
}

static flash_kda_status launch(const struct kda_decode *d, const struct plan *plan) {
    switch (plan->way) {
    case STAGED:
        return kda_cuda_status(kda_sm90_decode(d, plan->processors), "decode, kernel decode of Hopper's level");
    case PORTABLE_FUSED:
        return kda_cuda_status(kda_sm80_decode_fused(d, aligned(d)), "decode, kernel decode_fused");
    case PORTABLE:
        break;
    }
    return kda_cuda_status(kda_sm80_decode(d, aligned(d)), "decode, kernel decode");
}

flash_kda_status kda_cuda_decode(const struct kda_decode *d) {
    struct plan plan;
    int previous = 0;
    flash_kda_status status = make_plan(d, &plan);
    if (!status)
        status = kda_cuda_enter(d->tokens.device, &previous);
    if (status)
        return status;
    status = launch(d, &plan);
    kda_cuda_leave(d->tokens.device, previous);
    return status;
}

/* How the states are read. */
static const char *reading(const struct kda_decode *d, const struct plan *plan) {
    if (plan->way == STAGED)
        return "by the copy engine";
    return aligned(d) ? "16 bytes at a time" : "by elements (16 bytes at a time need their alignment)";
}

flash_kda_status kda_cuda_decode_describe(const struct kda_decode *d, char *text, size_t size) {
    struct plan plan;
    flash_kda_status status = make_plan(d, &plan);
    if (!status)
        snprintf(text, size,
                 "cuda: level %s, one kernel%s, fp32 arithmetic, %" PRId64 " chains of up to %" PRId64
                 " token%s, states read %s",
                 plan.way == STAGED ? "sm90" : "sm80",
                 plan.way == PORTABLE_FUSED ? " with what stands before and after" : "",
                 d->tokens.sequences * d->tokens.value_heads, d->max_tokens, d->max_tokens == 1 ? "" : "s",
                 reading(d, &plan));
    return status;
}
