/* SPDX-License-Identifier: MIT */
/*
 * The CUDA backend's prefill: sizes the grids from what the host knows and launches the kernels of a level.
 *
 * Device memory is neither read nor allocated here and nothing waits, so that a call can be captured in a graph and
 * replayed with other contents, those of cu_seqlens and of every index included.
 */
#include "api/backend.h"
#include "api/status.h"
#include "cuda/call.h"
#include "cuda/chunks.h"
#include "cuda/segments.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm90/kernels.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The name of the environment variable that forces a level. */
#define LEVEL_VARIABLE "FLASH_KDA_CUDA"

static int64_t chunks_of(const struct kda_prefill *p) { return kda_first_chunk(p, p->tokens, p->sequences); }

static flash_kda_status check_size(const struct kda_prefill *p) {
    if (chunks_of(p) > INT_MAX || p->sequences > INT_MAX / p->value_heads)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                        "q has %lld tokens in %lld sequences; expected at most %d chunks of %d tokens on CUDA",
                        (long long)(p->batches * p->tokens), (long long)p->sequences, INT_MAX, KDA_CUDA_CHUNK);
    return kda_cuda_check_heads(p);
}

/* How a problem is run, and what its workspace holds: operands, then summaries of segments. */
struct plan {
    bool sm90;                  /* the chains run on Hopper's level, else on the portable one */
    bool tiles;                 /* operands in the form of three tiles */
    bool fused;                 /* these in one kernel, without a workspace */
    int processors;             /* multiprocessors of the device */
    int segments;               /* of every sequence; 1: not cut */
    size_t operands, summaries; /* bytes */
};

#ifdef KDA_WITH_SM90
enum { HAS_SM90 = true };
#else
enum { HAS_SM90 = false };
#define kda_sm90_takes(p)             false
#define kda_sm90_has_tiles(p)         false
#define kda_sm90_parts(columns)       0
#define kda_sm90_tiles_size()         0
#define kda_sm90_fused(...)           cudaErrorNotSupported
#define kda_sm90_chain(...)           cudaErrorNotSupported
#define kda_sm90_summarise(...)       cudaErrorNotSupported
#define kda_sm90_scan(...)            cudaErrorNotSupported
#define kda_sm90_resume(...)          cudaErrorNotSupported
#define kda_sm90_tiles_prepare(...)   cudaErrorNotSupported
#define kda_sm90_tiles_chain(...)     cudaErrorNotSupported
#define kda_sm90_tiles_summarise(...) cudaErrorNotSupported
#define kda_sm90_tiles_resume(...)    cudaErrorNotSupported
#endif

/* What the environment asks for. */
struct wish {
    bool sm80, sm90, fused;
    int segments; /* 0: as is fastest */
};

static flash_kda_status read_wish(struct wish *wish) {
    const char *forced = getenv(LEVEL_VARIABLE);
    *wish = (struct wish){.sm80 = false};
    if (!forced || !*forced)
        return FLASH_KDA_OK;
    wish->sm80 = !strcmp(forced, "sm80");
    wish->sm90 = !strcmp(forced, "sm90");
    wish->fused = !strcmp(forced, "sm90/fused");
    if (wish->fused) {
        wish->sm90 = true;
    } else if (!strncmp(forced, "sm90/", 5)) {
        char *end = NULL;
        long count = strtol(forced + 5, &end, 10);
        wish->sm90 = !*end && count >= 1 && count <= KDA_CUDA_MAX_SEGMENTS;
        wish->segments = wish->sm90 ? (int)count : 0;
    }
    if (wish->sm80 || wish->sm90)
        return FLASH_KDA_OK;
    return kda_fail(FLASH_KDA_ERROR_UNSUPPORTED,
                    "the environment variable " LEVEL_VARIABLE
                    " is %.40s; expected sm80, sm90, sm90/fused or, for N segments, sm90/N with N from 1 to %d",
                    forced, KDA_CUDA_MAX_SEGMENTS);
}

/* Sequences are not cut where a sequence's bits must not depend on the others, nor at checkpoints that fall between
 * whole chunks. */
static bool may_cut(const struct kda_prefill *p) {
    return !p->batch_invariant && p->tokens && p->sequences && !kda_cut_every(p) && !kda_cuts(p) &&
           p->key_dim % 4 == 0; /* the scan copies 16 bytes at a time */
}

/* How Hopper's level runs what it takes. */
static void choose(const struct kda_prefill *p, const struct wish *wish, struct plan *plan) {
    double microseconds;
    bool packed = p->cu_seqlens.data;
    int64_t tokens = packed && p->sequences ? p->tokens / p->sequences : p->tokens;
    struct kda_segment_problem problem = {.chains = p->sequences * p->value_heads,
                                          .chunks = kda_chunks_of(tokens),
                                          .packed = packed,
                                          .may_cut = may_cut(p),
                                          .tiles = kda_sm90_has_tiles(p),
                                          .value_parts = kda_sm90_parts(p->value_dim),
                                          .identity_parts = kda_sm90_parts(p->key_dim),
                                          .processors = plan->processors};
    plan->tiles = problem.tiles;
    plan->segments = kda_segments(&problem, &microseconds);
    if (wish->segments)
        plan->segments = problem.may_cut ? wish->segments : 1;
    else /* what is in the batch beside a sequence may not decide */
        plan->fused =
            plan->tiles && (wish->fused || p->batch_invariant || kda_fused_cost(&problem) < microseconds);
    if (plan->fused)
        plan->segments = 1;
}

static void size_workspace(const struct kda_prefill *p, struct plan *plan) {
    size_t chains = (size_t)(p->sequences * p->value_heads), K = (size_t)p->key_dim, V = (size_t)p->value_dim;
    if (plan->fused)
        return;
    plan->operands = (size_t)chunks_of(p) * (size_t)p->value_heads *
                     (plan->tiles ? kda_sm90_tiles_size() : kda_sm80_operands_size(p->key_dim));
    plan->summaries = plan->segments > 1 ? chains * (size_t)plan->segments * (V + K) * K * sizeof(float) : 0;
}

/* Hopper's level where it can take the problem; what it cannot take goes to the portable one, also if it is forced. */
static flash_kda_status make_plan(const struct kda_prefill *p, struct plan *plan) {
    struct wish wish;
    int major = 0;
    flash_kda_status status = read_wish(&wish);
    if (!status)
        status = kda_cuda_status(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, p->device),
                                 "prefill, device");
    if (!status)
        status = kda_cuda_status(
            cudaDeviceGetAttribute(&plan->processors, cudaDevAttrMultiProcessorCount, p->device),
            "prefill, device");
    if (status)
        return status;
    bool runs = HAS_SM90 && major == 9;
    if (wish.sm90 && !runs)
        return kda_fail(FLASH_KDA_ERROR_UNSUPPORTED,
                        "the environment variable " LEVEL_VARIABLE " is %.40s, which %s; expected sm80",
                        getenv(LEVEL_VARIABLE), HAS_SM90 ? "this device cannot run" : "this build lacks");
    plan->sm90 = runs && !wish.sm80 && kda_sm90_takes(p);
    plan->tiles = plan->fused = false;
    plan->segments = 1;
    if (plan->sm90)
        choose(p, &wish, plan);
    size_workspace(p, plan);
    return FLASH_KDA_OK;
}

static flash_kda_status workspace_size(const struct kda_prefill *p, size_t *bytes) {
    struct plan plan = {.segments = 1};
    flash_kda_status status = check_size(p);
    if (!status)
        status = make_plan(p, &plan);
    if (!status)
        *bytes = plan.operands + plan.summaries;
    return status;
}

static flash_kda_status launch_segments(const struct kda_prefill *p, const struct plan *plan, char *workspace) {
    struct kda_sm90_segments segments = {plan->segments, (float *)(void *)(workspace + plan->operands)};
    int processors = plan->processors;
    flash_kda_status status = kda_cuda_status(
        plan->tiles ? kda_sm90_tiles_summarise(p, chunks_of(p), workspace, segments, processors, p->stream)
                    : kda_sm90_summarise(p, chunks_of(p), workspace, segments, p->stream),
        "prefill, kernel summarise");
    if (!status)
        status = kda_cuda_status(kda_sm90_scan(p, segments, p->stream), "prefill, kernel scan");
    if (!status)
        status = kda_cuda_status(
            plan->tiles ? kda_sm90_tiles_resume(p, chunks_of(p), workspace, segments, processors, p->stream)
                        : kda_sm90_resume(p, chunks_of(p), workspace, segments, p->stream),
            "prefill, kernel resume");
    return status;
}

static flash_kda_status launch(const struct kda_prefill *p, const struct plan *plan, void *workspace) {
    flash_kda_status status = FLASH_KDA_OK;
    if (plan->fused)
        return kda_cuda_status(kda_sm90_fused(p, plan->processors, p->stream), "prefill, kernel fused");
    if (p->tokens)
        status = kda_cuda_status(
            plan->tiles ? kda_sm90_tiles_prepare(p, chunks_of(p), workspace, plan->processors, p->stream)
                        : kda_sm80_prepare(p, chunks_of(p), workspace, p->stream),
            "prefill, kernel prepare");
    if (status)
        return status;
    if (plan->segments > 1)
        return launch_segments(p, plan, workspace);
    return kda_cuda_status(
        plan->tiles  ? kda_sm90_tiles_chain(p, chunks_of(p), workspace, plan->processors, p->stream)
        : plan->sm90 ? kda_sm90_chain(p, chunks_of(p), workspace, plan->processors, p->stream)
                     : kda_sm80_chain(p, chunks_of(p), workspace, p->stream),
        "prefill, kernel chain");
}

/* Launches on q's device and leaves the thread's current device as it was. */
static flash_kda_status prefill(const struct kda_prefill *p, void *workspace) {
    int previous = 0;
    struct plan plan;
    flash_kda_status status = check_size(p);
    if (!status)
        status = make_plan(p, &plan);
    if (!status)
        status = kda_cuda_enter(p->device, &previous);
    if (status)
        return status;
    status = launch(p, &plan, workspace);
    kda_cuda_leave(p->device, previous);
    return status;
}

static flash_kda_status describe(const struct kda_prefill *p, char *text, size_t size) {
    struct plan plan;
    flash_kda_status status = check_size(p);
    if (!status)
        status = make_plan(p, &plan);
    if (status)
        return status;
    if (plan.fused) {
        snprintf(text, size, "cuda: level sm90, one kernel, bf16 products, %" PRId64 " chains",
                 p->sequences * p->value_heads);
        return FLASH_KDA_OK;
    }
    snprintf(text, size,
             "cuda: level %s, bf16 products, %" PRId64 " chains, %" PRId64
             " chunks of up to %d tokens, %d segment%s",
             plan.sm90 ? "sm90" : "sm80", p->sequences * p->value_heads, chunks_of(p), KDA_CUDA_CHUNK,
             plan.segments, plan.segments == 1 ? "" : "s");
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
                                             .decode_describe = kda_cuda_decode_describe};
