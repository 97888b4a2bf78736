/* SPDX-License-Identifier: MIT */
/*
 * The CUDA backend's prefill: level, plan, launch.
 *
 * Nothing here reads or allocates device memory, and nothing waits. So a call can be captured in a graph and
 * replayed with other contents, those of cu_seqlens and of every index included.
 */
#include "api/backend.h"
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
    return kda_cuda_check_heads(&p->base);
}

static flash_kda_status make_plan(const struct kda_prefill *p, const struct kda_cuda_level **level,
                                  struct kda_plan *plan) {
    struct kda_cuda_device device;
    flash_kda_status status = check_size(p);
    if (!status)
        status = kda_cuda_query(p->device, "prefill, device", &device);
    if (status)
        return status;
    const struct kda_cuda_level *const *candidate = kda_cuda_levels;
    while (candidate[1] && !(kda_level_allowed(*candidate, &device) && (*candidate)->takes(p)))
        candidate++;
    *level = *candidate;
    *plan = kda_plan_begin(p, (*level)->name);
    (*level)->plan(p, device.multiprocessors, &device.override, plan);
    return FLASH_KDA_OK;
}

static flash_kda_status workspace_size(const struct kda_prefill *p, size_t *bytes) {
    const struct kda_cuda_level *level;
    struct kda_plan plan;
    flash_kda_status status = make_plan(p, &level, &plan);
    if (!status)
        *bytes = plan.workspace;
    return status;
}

/* Launches on q's device and leaves the thread's current device as it was. */
static flash_kda_status prefill(const struct kda_prefill *p, void *workspace) {
    int previous = 0;
    const struct kda_cuda_level *level;
    struct kda_plan plan;
    flash_kda_status status = make_plan(p, &level, &plan);
    if (!status)
        status = kda_cuda_enter(p->device, &previous);
    if (status)
        return status;
    if (p->border.phase == FLASH_KDA_PHASE_BEGIN && p->border.summaries.data)
        status = kda_cuda_status(kda_sm80_clear_summaries(&p->border, p->stream), "prefill, kernel clear_summaries");
    for (int i = 0; p->sequences && i < plan.count && !status; i++) {
        char what[64];
        snprintf(what, sizeof what, "prefill, kernel %s", kda_kernel_name(plan.launches[i].kernel));
        status = kda_cuda_status(level->launch(p, &plan, i, workspace), what);
    }
    kda_cuda_leave(p->device, previous);
    return status;
}

static flash_kda_status describe(const struct kda_prefill *p, char *text, size_t size) {
    const struct kda_cuda_level *level;
    struct kda_plan plan;
    char name[64], kernels[256];
    flash_kda_status status = make_plan(p, &level, &plan);
    if (status)
        return status;
    kda_plan_name(&plan, name, sizeof name);
    kda_plan_kernels(&plan, kernels, sizeof kernels);
    snprintf(text, size,
             "cuda: level %s, plan %s, bf16 products, %" PRId64 " chains in %" PRId64
             " chunks of up to %d tokens a head, kernels and CTAs: %s%s",
             level->name, name, p->sequences * p->value_heads, plan.chunks, KDA_CUDA_CHUNK, kernels,
             kda_phase_text(&p->border));
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
