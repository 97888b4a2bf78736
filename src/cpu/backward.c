/* SPDX-License-Identifier: MIT */
/*
 * The CPU backend's backward: how the work is shared out among threads. Two schedules, with the same bits:
 *   apart     a thread takes a q/k head of a sequence with the value heads that read it, from the first token to
 *             the last and back; for many heads.
 *   together  first the two ways of every value head, states there and their gradients back, each by groups of
 *             columns of V; from what they keep all segments of tokens find their gradients side by side; for few
 *             heads.
 */
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

/* What a value head's tokens cost one thread, in parts: to prepare their chunks, to take the state or its
 * gradient through them, and the gradients from both. */
enum { PREPARE = 1, WAY = 4, GRADIENTS = 9 };

struct plan {
    const struct kda_cpu_level *level;
    int64_t heads; /* q/k heads of all sequences */
    int64_t group; /* value heads of each */
    int64_t slots; /* where the segments of all sequences are, see first_slot */
    int64_t tiles; /* of V */
    int64_t parts; /* groups of columns of the ways; 0: apart */
    int ways;      /* there and back, or back alone where prefill kept the states */
    int threads;
};

enum stage { APART, WAYS, SEGMENTS };

struct call {
    const struct kda_backward *b;
    struct plan plan;
    enum stage stage;
    float *S, *e, *R;       /* see struct kda_backward_head; of a thread, or of every slot and value head */
    float *sums_q, *sums_k; /* of a thread */
    double *sums;           /* [slots][value heads][K + 1] */
    char *scratch;          /* of all threads */
    size_t bytes;           /* of each */
};

/* ---- Plan -------------------------------------------------------------------------------------- */

static int64_t rounds(int64_t pieces, int64_t threads) { return (pieces + threads - 1) / threads; }

/* Parts of cost that pass until all is done; parts 0: apart. */
static double cost_of(const struct plan *plan, int64_t parts) {
    double there = plan->ways == 2 ? PREPARE + WAY : 0, gradients = GRADIENTS * (double)plan->group;
    if (!parts)
        return (double)rounds(plan->heads, plan->threads) * ((double)plan->group * there + gradients);
    double way = PREPARE + WAY * (double)rounds(plan->tiles, parts) / (double)plan->tiles;
    int64_t pieces = plan->heads * plan->group * plan->ways * parts;
    return (double)rounds(pieces, plan->threads) * way +
           (double)rounds(plan->heads * plan->slots, plan->threads) * gradients / (double)plan->slots;
}

static flash_kda_status make_plan(const struct kda_backward *b, struct plan *plan) {
    const struct kda_prefill *p = &b->forward;
    double work =
        (double)p->batches * (double)p->tokens * (double)(p->value_heads * p->key_dim * p->value_dim) * WORK;
    *plan = (struct plan){.level = kda_cpu_level(),
                          .heads = p->sequences * p->heads,
                          .group = p->value_heads / p->heads,
                          .slots = p->batches * p->tokens / KDA_SEGMENT + p->sequences,
                          .tiles = kda_tiles(p->value_dim),
                          .ways = kda_kept_all(p) ? 1 : 2};
    if (!plan->level)
        return FLASH_KDA_ERROR_UNSUPPORTED;
    plan->threads = kda_threads_for(p->num_threads, work / RATE);
    if (!plan->threads)
        return FLASH_KDA_ERROR_UNSUPPORTED;
    double best = cost_of(plan, 0);
    for (int64_t parts = 1; plan->threads > 1 && plan->heads && parts <= plan->tiles; parts++)
        if (cost_of(plan, parts) < best) {
            plan->parts = parts;
            best = cost_of(plan, parts);
        }
    if (!plan->parts)
        plan->threads = (int)kda_min64(plan->threads, plan->heads > 1 ? plan->heads : 1);
    return FLASH_KDA_OK;
}

/* ---- Workspace --------------------------------------------------------------------------------- */

/* Where the segments of sequence n begin among those of all: some slots stay empty, none is in two
 * sequences. */
static int64_t first_slot(const struct kda_prefill *p, int64_t n) {
    struct kda_sequence tokens = kda_tokens_of(&p->base, n);
    return (tokens.batch * p->tokens + tokens.first) / KDA_SEGMENT + n;
}

/* Lays the workspace out; returns its bytes. */
static size_t lay_out(struct call *call, void *workspace) {
    const struct kda_prefill *p = &call->b->forward;
    const struct plan *plan = &call->plan;
    struct kda_arena arena = {workspace, 0}, counter = {NULL, 0};
    plan->level->backward->lay_out(call->b, &counter);
    call->bytes = counter.used;
    size_t kept =
        (size_t)(plan->parts ? plan->slots * p->value_heads : plan->threads * kda_segments(p->tokens));
    size_t state = (size_t)kda_state_floats(p) * sizeof(float),
           values = (size_t)kda_value_floats(p) * sizeof(float);
    int64_t summed = plan->group == 1 ? 0 : plan->parts ? 1 : kda_segments(p->tokens);
    size_t rows = (size_t)(plan->threads * summed * KDA_SEGMENT * kda_padded_key_dim(p));
    call->S = kda_take(&arena, plan->ways == 2 ? kept : 0, state);
    call->e = kda_take(&arena, plan->ways == 2 ? kept : 0, values);
    call->R = kda_take(&arena, plan->parts ? kept : 0, state);
    call->sums_q = kda_take(&arena, rows, sizeof *call->sums_q);
    call->sums_k = kda_take(&arena, rows, sizeof *call->sums_k);
    call->sums =
        kda_take(&arena, (size_t)(plan->slots * p->value_heads * (p->key_dim + 1)), sizeof *call->sums);
    call->scratch = kda_take(&arena, (size_t)plan->threads, call->bytes);
    return arena.used;
}

/* What is kept of a value head of sequence n. */
static struct kda_backward_head head_of(const struct call *call, int64_t n, int64_t head, int member) {
    const struct kda_prefill *p = &call->b->forward;
    const struct plan *plan = &call->plan;
    int64_t first = first_slot(p, n), segments = kda_segments(p->tokens), width = p->key_dim + 1;
    /* Together, a head's slots lie side by side. */
    int64_t kept = plan->parts ? head * plan->slots + first : member * segments;
    int64_t rows = member * (plan->parts ? 1 : segments) * KDA_SEGMENT * kda_padded_key_dim(p);
    struct kda_backward_head h = {.sequence = n,
                                  .head = head,
                                  .first = head % plan->group == 0,
                                  .last = head % plan->group == plan->group - 1,
                                  .sums = call->sums + (first * p->value_heads + head) * width,
                                  .sums_stride = p->value_heads * width};
    if (plan->ways == 2) {
        h.S = call->S + kept * kda_state_floats(p);
        h.e = call->e + kept * kda_value_floats(p);
    }
    if (plan->parts)
        h.R = call->R + kept * kda_state_floats(p);
    if (plan->group > 1) {
        h.sums_q = call->sums_q + rows;
        h.sums_k = call->sums_k + rows;
    }
    return h;
}

/* ---- Work -------------------------------------------------------------------------------------- */

static char *scratch_of(const struct call *call, int member) {
    return call->scratch + (size_t)member * call->bytes;
}

static int64_t segments_of(const struct kda_prefill *p, int64_t n) {
    return kda_segments(kda_tokens_of(&p->base, n).length);
}

static void run_apart(const struct call *call, int64_t i, int member) {
    const struct kda_prefill *p = &call->b->forward;
    const struct plan *plan = &call->plan;
    int64_t n = i / p->heads, first = i % p->heads * plan->group;
    enum kda_work work = kda_work_on(&call->b->border, n);
    for (int64_t head = first; head < first + plan->group; head++) {
        const struct kda_backward_head h = head_of(call, n, head, member);
        if (work == KDA_WORK_SUMMARY)
            plan->level->backward->summarise(call->b, &h, 0, plan->tiles, scratch_of(call, member));
        if (work != KDA_WORK_ALL)
            continue;
        if (plan->ways == 2)
            plan->level->backward->there(call->b, &h, 0, plan->tiles, scratch_of(call, member));
        plan->level->backward->gradients(call->b, &h, 0, segments_of(p, n), scratch_of(call, member));
    }
}

/* One way of a value head, through one group of columns. */
static void run_way(const struct call *call, int64_t i, int member) {
    const struct kda_prefill *p = &call->b->forward;
    const struct plan *plan = &call->plan;
    int64_t part = i % plan->parts, way = i / plan->parts % plan->ways, chain = i / plan->parts / plan->ways;
    int64_t first = part * plan->tiles / plan->parts, end = (part + 1) * plan->tiles / plan->parts;
    const struct kda_backward_head h = head_of(call, chain / p->value_heads, chain % p->value_heads, member);
    enum kda_work work = kda_work_on(&call->b->border, h.sequence);
    if (work == KDA_WORK_SUMMARY && way == 0)
        plan->level->backward->summarise(call->b, &h, first, end, scratch_of(call, member));
    if (work != KDA_WORK_ALL)
        return;
    if (way == 0)
        plan->level->backward->back(call->b, &h, first, end, scratch_of(call, member));
    else
        plan->level->backward->there(call->b, &h, first, end, scratch_of(call, member));
}

/* The sequence that a slot belongs to. */
static int64_t sequence_at(const struct kda_prefill *p, int64_t slot) {
    int64_t low = 0, high = p->sequences;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (first_slot(p, middle) <= slot)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* One segment of a q/k head. An empty sequence has one, too, to hand its state's gradient on. */
static void run_segment(const struct call *call, int64_t i, int member) {
    const struct kda_prefill *p = &call->b->forward;
    const struct plan *plan = &call->plan;
    int64_t slot = i / p->heads, first = i % p->heads * plan->group;
    int64_t n = sequence_at(p, slot), segment = slot - first_slot(p, n), segments = segments_of(p, n);
    if ((segment > 0 && segment >= segments) || kda_work_on(&call->b->border, n) != KDA_WORK_ALL)
        return;
    for (int64_t head = first; head < first + plan->group; head++) {
        const struct kda_backward_head h = head_of(call, n, head, member);
        plan->level->backward->gradients(call->b, &h, segment, kda_min64(segment + 1, segments),
                                         scratch_of(call, member));
    }
}

static int64_t pieces_of(const struct call *call) {
    const struct plan *plan = &call->plan;
    if (call->stage == APART)
        return plan->heads;
    return plan->heads * (call->stage == WAYS ? plan->group * plan->ways * plan->parts : plan->slots);
}

static void work(void *context, uint32_t piece, int member) {
    static void (*const runs[])(const struct call *call, int64_t i,
                                int member) = {[APART] = run_apart, [WAYS] = run_way, [SEGMENTS] = run_segment};
    const struct call *call = context;
    uint64_t mode = kda_flush_denormals();
    for (int64_t i = piece, count = pieces_of(call); i < count; i += MAX_PIECES)
        runs[call->stage](call, i, member);
    kda_set_float_mode(mode);
}

static uint32_t claims(const struct call *call) { return (uint32_t)kda_min64(pieces_of(call), MAX_PIECES); }

static uint32_t next_stage(void *context) {
    struct call *call = context;
    if (call->stage != WAYS)
        return 0;
    call->stage = SEGMENTS;
    return claims(call);
}

/* Element i of a head's sums over all sequences, in their order. */
static float sum_of(const struct call *call, int64_t head, int64_t i) {
    const struct kda_prefill *p = &call->b->forward;
    double sum = 0;
    for (int64_t n = 0; n < p->sequences; n++)
        for (int64_t slot = first_slot(p, n), end = slot + segments_of(p, n); slot < end; slot++)
            sum += call->sums[(slot * p->value_heads + head) * (p->key_dim + 1) + i];
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

/* ---- Entries ----------------------------------------------------------------------------------- */

flash_kda_status kda_cpu_backward(const struct kda_backward *b, void *workspace) {
    struct call call = {.b = b};
    flash_kda_status status = make_plan(b, &call.plan);
    if (status)
        return status;
    lay_out(&call, workspace);
    call.stage = call.plan.parts ? WAYS : APART;
    kda_pool_run(call.plan.threads, claims(&call), work, next_stage, &call);
    if (b->border.phase != FLASH_KDA_PHASE_BEGIN) /* FINISH adds those that BEGIN has left */
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
    snprintf(text, size, "cpu: level %s, fp32 products, %d thread%s for %" PRId64 " head%s, %s to each%s",
             plan.level->name, plan.threads, plan.threads == 1 ? "" : "s", plan.heads,
             plan.heads == 1 ? "" : "s", plan.parts ? "all" : "one", kda_phase_text(&b->border));
    return FLASH_KDA_OK;
}
