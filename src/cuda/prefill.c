/* SPDX-License-Identifier: MIT */
/*
 * The CUDA backend's prefill: level, plan, launch.
 *
 * Nothing here reads or allocates device memory, and nothing waits. So a call can be captured in a graph and
 * replayed with other contents, those of cu_seqlens and of every index included.
 */
#include "api/backend.h"
#include "cuda/fused.h"
#include "cuda/level.h"
#include "cuda/sm80/kernels.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>

static flash_kda_status check_size(const struct kda_prefill *p) {
    if (kda_first_chunk(p, p->tokens, p->sequences) > INT_MAX || p->sequences > INT_MAX / p->value_heads)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                        "q has %lld tokens in %lld sequences; expected at most %d chunks of %d tokens on CUDA",
                        (long long)(p->batches * p->tokens), (long long)p->sequences, INT_MAX, KDA_CUDA_CHUNK);
    if (p->fused && p->batches * p->tokens > INT_MAX / p->value_heads)
        return kda_fail(
            FLASH_KDA_ERROR_INVALID_ARGUMENT,
            "v has %lld tokens of %lld heads; expected at most %d rows on CUDA with convolutions or a norm",
            (long long)(p->batches * p->tokens), (long long)p->value_heads, INT_MAX);
    return kda_cuda_check_heads(&p->base);
}

/* A call: what stands around the prefill, its level, and the level's plan. */
struct prefill_plan {
    struct kda_cuda_fused fused;
    const struct kda_cuda_level *level;
    struct kda_plan plan;
};

/* workspace: NULL where only the plan counts. */
static flash_kda_status make_plan(const struct kda_prefill *p, void *workspace, struct prefill_plan *call) {
    struct kda_cuda_device device;
    flash_kda_status status = check_size(p);
    if (!status)
        status = kda_cuda_query(p->device, "prefill, device", &device);
    if (status)
        return status;
    kda_cuda_plan_fused(p, &device, workspace, &call->fused);
    const struct kda_prefill *inner = &call->fused.inner;
    const struct kda_cuda_level *const *candidate = kda_cuda_levels;
    while (candidate[1] && !(kda_level_allowed(*candidate, &device) && (*candidate)->takes(inner)))
        candidate++;
    call->level = *candidate;
    call->plan = kda_plan_begin(inner, call->level->name);
    call->level->plan(inner, device.multiprocessors, &device.override, &call->plan);
    return FLASH_KDA_OK;
}

static flash_kda_status workspace_size(const struct kda_prefill *p, size_t *bytes) {
    struct prefill_plan call;
    flash_kda_status status = make_plan(p, NULL, &call);
    if (!status)
        *bytes = call.fused.bytes + call.plan.workspace;
    return status;
}

static flash_kda_status launch_all(const struct kda_prefill *p, const struct prefill_plan *call,
                                   char *workspace) {
    flash_kda_status status = FLASH_KDA_OK;
    if (call->fused.conv_tokens)
        status = kda_cuda_status(kda_sm80_convolve(p, &call->fused), "prefill, kernel convolve");
    for (int i = 0; i < call->plan.count && !status; i++) {
        char what[64];
        snprintf(what, sizeof what, "prefill, kernel %s", kda_kernel_name(call->plan.launches[i].kernel));
        status = kda_cuda_status(
            call->level->launch(&call->fused.inner, &call->plan, i, workspace + call->fused.bytes), what);
    }
    if (call->fused.finishes && !status)
        status = kda_cuda_status(kda_sm80_finish(p, &call->fused), "prefill, kernel finish");
    return status;
}

/* Launches on q's device and leaves the thread's current device as it was. */
static flash_kda_status prefill(const struct kda_prefill *p, void *workspace) {
    int previous = 0;
    struct prefill_plan call;
    flash_kda_status status = make_plan(p, workspace, &call);
    if (!status)
        status = kda_cuda_enter(p->device, &previous);
    if (status)
        return status;
    if (p->border.phase == FLASH_KDA_PHASE_BEGIN && p->border.summaries.data)
        status =
            kda_cuda_status(kda_sm80_clear_summaries(&p->border, p->stream), "prefill, kernel clear_summaries");
    if (!status && p->sequences)
        status = launch_all(p, &call, workspace);
    kda_cuda_leave(p->device, previous);
    return status;
}

static flash_kda_status describe(const struct kda_prefill *p, char *text, size_t size) {
    struct prefill_plan call;
    char name[64], kernels[256];
    flash_kda_status status = make_plan(p, NULL, &call);
    if (status)
        return status;
    kda_plan_name(&call.plan, name, sizeof name);
    kda_plan_kernels(&call.plan, kernels, sizeof kernels);
    snprintf(text, size,
             "cuda: level %s, plan %s%s, bf16 products, %" PRId64 " chains in %" PRId64
             " chunks of up to %d tokens a head, kernels and CTAs: %s%s%s%s",
             call.level->name, name, kda_fused_words(p->fused), p->sequences * p->value_heads, call.plan.chunks,
             KDA_CUDA_CHUNK, call.fused.conv_tokens ? "convolve, " : "", kernels,
             call.fused.finishes ? ", finish" : "", kda_phase_text(&p->border));
    return FLASH_KDA_OK;
}

/* Is there a device that the kernels run on? */
static bool available(void) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices))
        return false;
    for (int i = 0; i < devices; i++) {
        int major = 0;
        if (!cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i) && major >= 8)
            return true;
    }
    return false;
}

const struct kda_backend kda_cuda_backend = {.name = "cuda",
                                             .on_host = false,
                                             .available = available,
                                             .prefill_workspace_size = workspace_size,
                                             .prefill = prefill,
                                             .prefill_describe = describe,
                                             .decode = kda_cuda_decode,
                                             .decode_describe = kda_cuda_decode_describe,
                                             .backward_workspace_size = kda_cuda_backward_workspace_size,
                                             .backward = kda_cuda_backward,
                                             .backward_describe = kda_cuda_backward_describe,
                                             .fold = kda_cuda_fold,
                                             .fold_describe = kda_cuda_fold_describe};
