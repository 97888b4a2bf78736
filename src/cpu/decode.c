/* SPDX-License-Identifier: MIT */
/* The CPU backend's decode: how heads, and parts of them, are shared out among threads. */
#include "api/backend.h"
#include "api/convolution.h"
#include "api/status.h"
#include "cpu/denormals.h"
#include "cpu/level.h"
#include "cpu/pool.h"
#include "cpu/threads.h"

#include <inttypes.h>
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    RATE = 12500, /* bytes of states a microsecond, of one thread from memory */
    MAX_PIECES = 1 << 30,
    SMALL = 12 << 10, /* bytes of scratch that are on the stack: enough for a token or some, if V lies first */
};

struct plan {
    const struct kda_cpu_level *level;
    int threads;
    int64_t parts; /* of a head */
};

static flash_kda_status make_plan(const struct kda_decode *d, struct plan *plan) {
    const struct kda_tokens *p = &d->tokens;
    plan->level = kda_cpu_level();
    if (!plan->level)
        return FLASH_KDA_ERROR_UNSUPPORTED;
    int64_t heads = p->sequences * p->value_heads, pieces = (p->value_dim + KDA_PART - 1) / KDA_PART;
    double bytes = (double)heads * (double)(p->key_dim * p->value_dim) * (double)kda_dtype_size(d->state.dtype);
    plan->threads = kda_threads_for(p->num_threads, bytes / RATE);
    if (!plan->threads)
        return FLASH_KDA_ERROR_UNSUPPORTED;
    bool whole = d->norm_weight.data; /* rows of out */
    plan->parts =
        heads && heads < plan->threads && !whole ? kda_min64((plan->threads + heads - 1) / heads, pieces) : 1;
    return FLASH_KDA_OK;
}

static void run_part(const struct kda_decode *d, const struct plan *plan, int64_t i, void *scratch) {
    const struct kda_tokens *p = &d->tokens;
    int64_t share = (p->value_dim + plan->parts - 1) / plan->parts;
    share = (share + KDA_PART - 1) / KDA_PART * KDA_PART;
    struct kda_part part = {.sequence = i / plan->parts / p->value_heads,
                            .head = i / plan->parts % p->value_heads,
                            .first = i % plan->parts * share};
    part.tokens = kda_decode_sequence(d, part.sequence);
    part.count = kda_min64(share, p->value_dim - part.first);
    if (part.tokens.slot >= 0 && part.tokens.length && part.count > 0)
        plan->level->decode->run(d, &part, scratch);
}

/* A row of a convolution's channels: of one head of one sequence. */
static void advance_convolution(const struct kda_decode *d, const struct kda_tensor *x,
                                const struct kda_convolution *conv, int64_t i) {
    int64_t n = i / x->shape[2], head = i % x->shape[2];
    const struct kda_sequence s = kda_decode_sequence(d, n);
    for (int64_t c = 0; c < x->shape[3] && s.slot >= 0; c++)
        kda_conv_advance(d, x, conv, n, &s, head, c);
}

enum { CONVOLUTIONS = 3 };

static const struct kda_tensor *input_of(const struct kda_decode *d, int conv) {
    const struct kda_tensor *const inputs[CONVOLUTIONS] = {&d->tokens.q, &d->tokens.k, &d->tokens.v};
    return inputs[conv];
}

static const struct kda_convolution *convolution_of(const struct kda_decode *d, int conv) {
    const struct kda_convolution *const convs[CONVOLUTIONS] = {&d->q_conv, &d->k_conv, &d->v_conv};
    return convs[conv];
}

struct call {
    const struct kda_decode *d;
    const struct plan *plan;
    int conv; /* whose state goes on; -1 while heads are worked: all of them first, for several may read a channel */
    int64_t count; /* of what the step at hand goes through */
    char *scratch; /* of all members; NULL: what is small is on the stack */
    size_t bytes;  /* of each member */
};

static void work(void *context, uint32_t piece, int member) {
    const struct call *call = context;
    alignas(64) char small[SMALL];
    void *scratch = call->scratch ? call->scratch + (size_t)member * call->bytes : small;
    uint64_t mode = kda_flush_denormals();
    for (int64_t i = piece; i < call->count; i += MAX_PIECES)
        if (call->conv < 0)
            run_part(call->d, call->plan, i, scratch);
        else
            advance_convolution(call->d, input_of(call->d, call->conv), convolution_of(call->d, call->conv), i);
    kda_set_float_mode(mode);
}

static uint32_t begin_step(struct call *call, int64_t count) {
    call->count = count;
    return (uint32_t)kda_min64(count, MAX_PIECES);
}

static uint32_t next_step(void *context) {
    struct call *call = context;
    const struct kda_decode *d = call->d;
    while (++call->conv < CONVOLUTIONS)
        if (convolution_of(d, call->conv)->weight.data && !d->keep_state)
            return begin_step(call, d->tokens.sequences * input_of(d, call->conv)->shape[2]);
    return 0;
}

flash_kda_status kda_cpu_decode(const struct kda_decode *d) {
    struct plan plan;
    flash_kda_status status = make_plan(d, &plan);
    if (status)
        return status;
    struct call call = {.d = d, .plan = &plan, .conv = -1, .bytes = plan.level->decode->scratch(d)};
    size_t all = call.bytes * (size_t)plan.threads;
    if (call.bytes > SMALL && !(call.scratch = aligned_alloc(64, all)))
        return kda_fail(FLASH_KDA_ERROR_OUT_OF_MEMORY,
                        "decode could not allocate %zu bytes of scratch for %d threads", all, plan.threads);
    bool convolved = d->q_conv.weight.data || d->k_conv.weight.data || d->v_conv.weight.data;
    int64_t parts = d->tokens.sequences * d->tokens.value_heads * plan.parts;
    kda_pool_run(plan.threads, begin_step(&call, parts), work, convolved ? next_step : NULL, &call);
    free(call.scratch);
    return FLASH_KDA_OK;
}

flash_kda_status kda_cpu_decode_describe(const struct kda_decode *d, char *text, size_t size) {
    struct plan plan;
    flash_kda_status status = make_plan(d, &plan);
    if (status)
        return status;
    snprintf(text, size, "cpu: level %s, %" PRId64 " heads in %" PRId64 " part%s on %d thread%s",
             plan.level->name, d->tokens.sequences * d->tokens.value_heads, plan.parts,
             plan.parts == 1 ? "" : "s each", plan.threads, plan.threads == 1 ? "" : "s");
    return FLASH_KDA_OK;
}
