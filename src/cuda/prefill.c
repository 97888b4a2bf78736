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

static int64_t chunks_of(const struct kda_prefill *p) { return kda_first_chunk(p, p->tokens, p->sequences); }

static flash_kda_status check_size(const struct kda_prefill *p) {
    if (chunks_of(p) > INT_MAX || p->sequences > INT_MAX / p->value_heads)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                        "q has %lld tokens in %lld sequences; expected at most %d chunks of %d tokens on CUDA",
                        (long long)(p->batches * p->tokens), (long long)p->sequences, INT_MAX, KDA_CUDA_CHUNK);
    return kda_cuda_check_heads(p);
}

/* The kernels that run a problem: the portable level's; or Hopper's, with operands prepared before, or where they are used,
 * by one multiprocessor to a chain or by two. */
enum way { PORTABLE, CHAIN, FUSED, PAIRS };

/* How a problem is run. */
struct plan {
    enum way way;
    int processors;             /* multiprocessors of the device */
    int segments;               /* of every sequence; 1: not cut */
    int parts;                  /* 0; or of all chains, which is tried before */
    size_t operands, summaries; /* bytes of the workspace */
    size_t spread;              /* and of what parts leave, which uses the same ones again */
};

#ifndef KDA_WITH_SM90
/* Stands for the launchers, which no plan asks for then. */
static cudaError_t absent(const struct kda_prefill *p, ...) {
    (void)p;
    return cudaErrorNotSupported;
}
#define kda_sm90_takes(p)         false
#define kda_sm90_has_tiles(p)     false
#define kda_sm90_parts(columns)   0
#define kda_sm90_look(...)        absent(__VA_ARGS__)
#define kda_sm90_fused_parts(...) absent(__VA_ARGS__)
#define kda_sm90_join(...)        absent(__VA_ARGS__)
#define kda_sm90_fused(...)       absent(__VA_ARGS__)
#define kda_sm90_chain(...)       absent(__VA_ARGS__)
#define kda_sm90_summarise(...)   absent(__VA_ARGS__)
#define kda_sm90_scan(...)        absent(__VA_ARGS__)
#define kda_sm90_resume(...)      absent(__VA_ARGS__)
#define kda_sm90_pairs(...)       absent(__VA_ARGS__)
#define kda_sm90_pairs_cut(...)   absent(__VA_ARGS__)
#define kda_sm90_compose(...)     absent(__VA_ARGS__)
#define kda_sm90_correct(...)     absent(__VA_ARGS__)
#endif

/* Sequences are not cut where a sequence's bits must not depend on the others, nor at checkpoints that fall between
 * whole chunks. */
static bool may_cut(const struct kda_prefill *p) {
    return !p->batch_invariant && p->tokens && p->sequences && !kda_cut_every(p) && !kda_cuts(p) &&
           p->key_dim % 4 == 0; /* the scan copies 16 bytes at a time */
}

/* How Hopper's level runs what it takes. */
static void choose(const struct kda_prefill *p, const struct kda_cuda_wish *wish, struct plan *plan) {
    bool packed = p->cu_seqlens.data;
    int64_t tokens = packed && p->sequences ? p->tokens / p->sequences : p->tokens;
    struct kda_segment_problem problem = {.chains = p->sequences * p->value_heads,
                                          .chunks = kda_chunks_of(tokens),
                                          .packed = packed,
                                          .may_cut = may_cut(p),
                                          .checkpoints = p->checkpoints.data,
                                          .value_parts = kda_sm90_parts(p->value_dim),
                                          .identity_parts = kda_sm90_parts(p->key_dim),
                                          .processors = plan->processors};
    double cost;
    if (!kda_sm90_has_tiles(p) || (wish->segments && !wish->pairs)) {
        plan->way = CHAIN;
        plan->segments = kda_segments(&problem);
    } else if (p->key_dim != KDA_SM90_CUT_DIM) {
        /* A rule, not a model: where nothing would be cut, or enough of the device is used. */
        plan->segments = kda_segments(&problem);
        bool many = plan->segments == 1 || problem.chains >= plan->processors / 3;
        plan->way = wish->fused || many ? FUSED : CHAIN;
    } else {
        double fused = kda_fused_cost(&problem);
        plan->segments = kda_pairs(&problem, &cost);
        /* What is in the batch beside a sequence may not decide. */
        bool in_one = wish->fused || p->batch_invariant || fused < cost;
        plan->way = in_one && !wish->pairs ? FUSED : PAIRS;
        bool may_spread = problem.may_cut && kda_can_spread(p) && !wish->fused && !wish->pairs;
        int parts = may_spread ? kda_parts(&problem) : 0;
        if (parts && (wish->spread || kda_spread_pays(&problem, parts, plan->way == FUSED ? fused : cost)))
            plan->parts = kda_spread(p, parts).parts;
    }
    if (wish->segments)
        plan->segments = problem.may_cut ? wish->segments : 1;
    if (plan->way == FUSED)
        plan->segments = 1;
}

/* A part of the workspace. */
struct piece {
    void **at;
    size_t bytes;
};
#define WORKSPACE_STEP 256

/* Gives pieces their places; returns the bytes of all. */
static size_t lay_out(const struct piece *pieces, size_t count, char *workspace) {
    size_t used = 0;
    for (size_t i = 0; i < count; i++) {
        *pieces[i].at = workspace + used;
        used += (pieces[i].bytes + WORKSPACE_STEP - 1) / WORKSPACE_STEP * WORKSPACE_STEP;
    }
    return used;
}

/* Tokens of every sequence's first segment, where all have as many; else 0. */
static int64_t tokens_of_first(const struct kda_prefill *p, int segments) {
    if (p->cu_seqlens.data)
        return 0;
    int64_t chunks = kda_begin_of_segment((int)kda_chunks_of(p->tokens), segments, 1);
    return kda_min64(chunks * KDA_CUDA_CHUNK, p->tokens - 1);
}

/* Pairs' memory of cut sequences from `workspace` on; returns its bytes. */
static size_t lay_out_cut(const struct kda_prefill *p, int segments, char *workspace,
                          struct kda_sm90_cut *cut) {
    size_t chains = (size_t)(p->sequences * p->value_heads), parts = chains * (size_t)segments;
    size_t others = parts - chains; /* than first segments */
    size_t chunks = (size_t)(chunks_of(p) * p->value_heads), K = (size_t)p->key_dim, V = (size_t)p->value_dim;
    bool given = p->beta_mode == FLASH_KDA_BETA_GIVEN; /* else it is between 0 and 2 */
    struct kda_sm90_cut memory = {.segments = segments, .skipped = tokens_of_first(p, segments)};
    size_t rows = (size_t)(p->batches * (p->tokens - memory.skipped) * p->value_heads);
    const struct piece pieces[] = {
        {(void **)&memory.B, parts * V * K * sizeof *memory.B},
        {(void **)&memory.A, others * K * K * sizeof *memory.A},
        {(void **)&memory.A_units, others * K / KDA_SM90_UNIT_COLUMNS * sizeof *memory.A_units},
        {(void **)&memory.outputs, rows * K * sizeof *memory.outputs},
        {(void **)&memory.output_units, chunks * (K + V) / KDA_SM90_UNIT_COLUMNS * sizeof *memory.output_units},
        {(void **)&memory.state_units, parts * V * sizeof *memory.state_units},
        {(void **)&memory.grown, given ? parts * sizeof *memory.grown : 0}};
    size_t used = lay_out(pieces, sizeof pieces / sizeof *pieces, workspace);
    if (!given)
        memory.grown = NULL;
    *cut = memory;
    return used;
}

/* The memory of parts from `workspace` on; returns the bytes that other kernels must leave as they are, and those that all
 * of it has. */
static size_t lay_out_spread(const struct kda_prefill *p, int parts, char *workspace,
                             struct kda_sm90_spread *spread, size_t *bytes) {
    size_t chains = (size_t)(p->sequences * p->value_heads), count = (size_t)parts;
    size_t K = (size_t)p->key_dim, V = (size_t)p->value_dim;
    struct kda_sm90_spread memory = {.all = kda_spread(p, parts)};
    const struct piece kept[] = {{(void **)&memory.verdict, sizeof *memory.verdict},
                                 {(void **)&memory.left, chains * sizeof *memory.left}};
    size_t used = lay_out(kept, sizeof kept / sizeof *kept, workspace);
    const struct piece pieces[] = {
        {(void **)&memory.looks, count * sizeof *memory.looks},
        {(void **)&memory.firsts, count * sizeof *memory.firsts},
        {(void **)&memory.proofs, count * sizeof *memory.proofs},
        {(void **)&memory.states, count * V * K * sizeof *memory.states},
        {(void **)&memory.outputs, count * KDA_CUDA_CHUNK * K * sizeof *memory.outputs},
        {(void **)&memory.finals,
         (kda_states_by_chain(p, parts) ? chains : count) * V * K * sizeof *memory.finals}};
    char *rest = workspace ? workspace + used : NULL; /* without one only sizes are asked for */
    *bytes = used + lay_out(pieces, sizeof pieces / sizeof *pieces, rest);
    *spread = memory;
    return used;
}

/* Bytes of what the first pass over segments leaves. */
static size_t summaries_of(const struct kda_prefill *p, const struct plan *plan) {
    size_t chains = (size_t)(p->sequences * p->value_heads), K = (size_t)p->key_dim, V = (size_t)p->value_dim;
    return chains * (size_t)plan->segments * (V + K) * K * sizeof(float);
}

static void size_workspace(const struct kda_prefill *p, struct plan *plan) {
    size_t chains = (size_t)(p->sequences * p->value_heads);
    struct kda_sm90_cut cut;
    struct kda_sm90_spread spread;
    plan->operands = plan->summaries = plan->spread = 0;
    if (plan->parts)
        plan->operands = lay_out_spread(p, plan->parts, NULL, &spread, &plan->spread);
    if (plan->way == PAIRS && plan->segments > 1)
        plan->summaries = lay_out_cut(p, plan->segments, NULL, &cut);
    if (plan->way == FUSED || plan->way == PAIRS)
        return;
    plan->operands = (size_t)chunks_of(p) * (size_t)p->value_heads * kda_sm80_operands_size(p->key_dim);
    plan->summaries =
        plan->segments > 1 ? summaries_of(p, plan) + chains * (size_t)plan->segments * sizeof(float) : 0;
}

/* Hopper's level where it can take the problem; what it cannot take goes to the portable one, also if it is forced. */
static flash_kda_status make_plan(const struct kda_prefill *p, struct plan *plan) {
    struct kda_cuda_device device;
    flash_kda_status status = kda_cuda_look_at(p->device, "prefill, device", &device);
    if (status)
        return status;
    plan->processors = device.processors;
    plan->way = PORTABLE;
    plan->segments = 1;
    plan->parts = 0;
    if (device.sm90 && kda_sm90_takes(p))
        choose(p, &device.wish, plan);
    size_workspace(p, plan);
    return FLASH_KDA_OK;
}

static flash_kda_status workspace_size(const struct kda_prefill *p, size_t *bytes) {
    struct plan plan = {.segments = 1};
    flash_kda_status status = check_size(p);
    if (!status)
        status = make_plan(p, &plan);
    if (!status)
        *bytes = plan.operands + plan.summaries > plan.spread ? plan.operands + plan.summaries : plan.spread;
    return status;
}

static flash_kda_status launch_segments(const struct kda_prefill *p, const struct plan *plan, char *workspace) {
    char *summaries = workspace + plan->operands;
    struct kda_sm90_segments segments = {plan->segments, (float *)(void *)summaries,
                                         (float *)(void *)(summaries + summaries_of(p, plan))};
    flash_kda_status status = kda_cuda_status(
        kda_sm90_summarise(p, chunks_of(p), workspace, segments, p->stream), "prefill, kernel summarise");
    if (!status)
        status = kda_cuda_status(kda_sm90_scan(p, segments, p->stream), "prefill, kernel scan");
    if (!status)
        status = kda_cuda_status(kda_sm90_resume(p, chunks_of(p), workspace, segments, p->stream),
                                 "prefill, kernel resume");
    return status;
}

/* Before the kernels of the plan's way, which then leave out what these did. */
static flash_kda_status launch_spread(const struct kda_prefill *p, struct kda_sm90_spread spread) {
    flash_kda_status status = kda_cuda_status(kda_sm90_look(p, spread, p->stream), "prefill, kernel look");
    if (!status)
        status = kda_cuda_status(kda_sm90_fused_parts(p, spread, p->stream), "prefill, kernel fused");
    if (!status)
        status = kda_cuda_status(kda_sm90_join(p, spread, p->stream), "prefill, kernel join");
    return status;
}

static flash_kda_status launch_pairs(const struct kda_prefill *p, const struct plan *plan,
                                     struct kda_sm90_spread spread, char *workspace) {
    flash_kda_status status = FLASH_KDA_OK;
    struct kda_sm90_cut cut = {.segments = 1};
    if (plan->segments > 1) {
        lay_out_cut(p, plan->segments, workspace + plan->operands, &cut);
        status = kda_cuda_status(kda_sm90_pairs_cut(p, spread, chunks_of(p), cut, p->stream),
                                 "prefill, kernel pairs");
        if (!status)
            status = kda_cuda_status(kda_sm90_compose(p, spread, cut, p->stream), "prefill, kernel compose");
    }
    if (status)
        return status;
    if (plan->segments == 1 || p->checkpoints.data) /* which take true states all the way */
        return kda_cuda_status(kda_sm90_pairs(p, spread, cut, p->stream), "prefill, kernel pairs");
    status = kda_cuda_status(kda_sm90_correct(p, spread, chunks_of(p), cut, plan->processors, p->stream),
                             "prefill, kernel correct");
    if (status || !cut.grown)
        return status;
    cut.again = true;
    return kda_cuda_status(kda_sm90_pairs(p, spread, cut, p->stream), "prefill, kernel pairs");
}

static flash_kda_status launch(const struct kda_prefill *p, const struct plan *plan, void *workspace) {
    flash_kda_status status = FLASH_KDA_OK;
    struct kda_sm90_spread spread = {.all = {0, 0}};
    if (plan->parts) {
        size_t bytes;
        lay_out_spread(p, plan->parts, workspace, &spread, &bytes);
        status = launch_spread(p, spread);
    }
    if (status)
        return status;
    if (plan->way == FUSED)
        return kda_cuda_status(kda_sm90_fused(p, spread, plan->processors, p->stream), "prefill, kernel fused");
    if (plan->way == PAIRS)
        return launch_pairs(p, plan, spread, workspace);
    if (p->tokens)
        status =
            kda_cuda_status(kda_sm80_prepare(p, chunks_of(p), workspace, p->stream), "prefill, kernel prepare");
    if (status)
        return status;
    if (plan->segments > 1)
        return launch_segments(p, plan, workspace);
    return kda_cuda_status(plan->way == CHAIN
                               ? kda_sm90_chain(p, chunks_of(p), workspace, plan->processors, p->stream)
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
    int64_t chains = p->sequences * p->value_heads;
    char before[64] = "";
    if (plan.parts)
        snprintf(before, sizeof before, "%d parts where gates are strong, else ", plan.parts);
    if (plan.way == FUSED)
        snprintf(text, size, "cuda: level sm90, %sone kernel, bf16 products, %" PRId64 " chains", before,
                 chains);
    else
        snprintf(text, size,
                 "cuda: level %s, %s%sbf16 products, %" PRId64 " chains, %" PRId64
                 " chunks of up to %d tokens, %d segment%s",
                 plan.way == PORTABLE ? "sm80" : "sm90", before,
                 plan.way == PAIRS ? "pairs of multiprocessors, " : "", chains, chunks_of(p), KDA_CUDA_CHUNK,
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
