/* SPDX-License-Identifier: MIT */
/* The CPU backend's backward: q/k heads of sequences shared out among threads, each with the value heads that read
 * it. */
#include "cpu/backward.h"

#include "api/backend.h"
#include "api/status.h"
#include "cpu/denormals.h"
#include "cpu/level.h"
#include "cpu/pool.h"
#include "cpu/threads.h"

#include <inttypes.h>
#include <stdio.h>

enum {
    MAX_PIECES = 1 << 30,
    RATE = 80000, /* multiply-adds a microsecond, of one thread on the fastest level */
    WORK = 12,    /* of them a token, for each element of a state */
};

struct plan {
    const struct kda_cpu_level *level;
    int64_t heads; /* q/k heads of all sequences */
    int threads;
};

struct call {
    const struct kda_backward *b;
    struct plan plan;
    double *sums;  /* of every value head of every sequence, see kda_sums_of */
    char *scratch; /* of all threads */
    size_t bytes;  /* of each */
};

static flash_kda_status make_plan(const struct kda_backward *b, struct plan *plan) {
    const struct kda_prefill *p = &b->forward;
    double work =
        (double)p->batches * (double)p->tokens * (double)(p->value_heads * p->key_dim * p->value_dim) * WORK;
    *plan = (struct plan){.level = kda_cpu_level(), .heads = p->sequences * p->heads};
    if (!plan->level)
        return FLASH_KDA_ERROR_UNSUPPORTED;
    plan->threads =
        (int)kda_min64(kda_threads_for(p->num_threads, work / RATE), plan->heads > 1 ? plan->heads : 1);
    return plan->threads ? FLASH_KDA_OK : FLASH_KDA_ERROR_UNSUPPORTED;
}

/* Lays the workspace out; returns its bytes. */
static size_t lay_out(struct call *call, void *workspace) {
    const struct kda_prefill *p = &call->b->forward;
    struct kda_arena arena = {workspace, 0}, counter = {NULL, 0};
    call->plan.level->backward->lay_out(call->b, &counter);
    call->bytes = counter.used;
    call->sums =
        kda_take(&arena, (size_t)(p->sequences * p->value_heads * (p->key_dim + 1)), sizeof *call->sums);
    call->scratch = kda_take(&arena, (size_t)call->plan.threads, call->bytes);
    return arena.used;
}

static void work(void *context, uint32_t piece, int member) {
    const struct call *call = context;
    int64_t heads = call->b->forward.heads;
    uint64_t mode = kda_flush_denormals();
    for (int64_t i = piece; i < call->plan.heads; i += MAX_PIECES)
        call->plan.level->backward->run(call->b, i / heads, i % heads,
                                        call->scratch + (size_t)member * call->bytes, call->sums);
    kda_set_float_mode(mode);
}

/* Element i of a head's sums over all sequences, in their order. */
static float sum_of(const struct call *call, int64_t head, int64_t i) {
    double sum = 0;
    for (int64_t n = 0; n < call->b->forward.sequences; n++)
        sum += kda_sums_of(call->b, call->sums, n, head)[i];
    return (float)sum;
}

static void store_sums(const struct call *call) {
    const struct kda_tensor *A = &call->b->dA_log, *bias = &call->b->d_dt_bias;
    int64_t K = call->b->forward.key_dim;
    for (int64_t head = 0; head < call->b->forward.value_heads; head++) {
        if (A->data)
            kda_store(A->data + head * A->stride[0], A->dtype, 0, sum_of(call, head, K));
        for (int64_t i = 0; bias->data && i < K; i++)
            kda_store(bias->data + head * bias->stride[0], bias->dtype, i, sum_of(call, head, i));
    }
}

flash_kda_status kda_cpu_backward(const struct kda_backward *b, void *workspace) {
    struct call call = {.b = b};
    flash_kda_status status = make_plan(b, &call.plan);
    if (status)
        return status;
    lay_out(&call, workspace);
    kda_pool_run(call.plan.threads, (uint32_t)kda_min64(call.plan.heads, MAX_PIECES), work, NULL, &call);
    store_sums(&call);
    return FLASH_KDA_OK;
}

flash_kda_status kda_cpu_backward_workspace_size(const struct kda_backward *b, size_t *bytes) {
    struct call call = {.b = b};
    flash_kda_status status = make_plan(b, &call.plan);
    if (status)
        return status;
    *bytes = lay_out(&call, NULL);
    return FLASH_KDA_OK;
}

flash_kda_status kda_cpu_backward_describe(const struct kda_backward *b, char *text, size_t size) {
    struct plan plan;
    flash_kda_status status = make_plan(b, &plan);
    if (status)
        return status;
    snprintf(text, size, "cpu: level %s, fp32 products, %" PRId64 " q/k heads on %d thread%s", plan.level->name,
             plan.heads, plan.threads, plan.threads == 1 ? "" : "s");
    return FLASH_KDA_OK;
}
