/* SPDX-License-Identifier: MIT */
/* The CPU backend's decode: how heads, and parts of them, are shared out among threads. */
#include "api/backend.h"
#include "api/convolution.h"
#include "api/status.h"
#include "cpu/denormals.h"
#include "cpu/level.h"

#include <inttypes.h>
#include <omp.h>
#include <stdio.h>

enum { MIN_BYTES = 128 << 10 }; /* of states that are worth another thread */

struct plan {
    const struct kda_cpu_level *level;
    int threads;
    int64_t parts; /* of a head */
};

static flash_kda_status make_plan(const struct kda_decode *d, struct plan *plan) {
    const struct kda_prefill *p = &d->tokens;
    plan->level = kda_cpu_level();
    if (!plan->level)
        return FLASH_KDA_ERROR_UNSUPPORTED;
    int64_t heads = p->sequences * p->value_heads, pieces = (p->value_dim + KDA_PART - 1) / KDA_PART;
    double bytes = (double)heads * (double)(p->key_dim * p->value_dim) * (double)kda_dtype_size(d->state.dtype);
    int wanted = p->num_threads ? p->num_threads : (int)kda_min64(omp_get_max_threads(), KDA_MAX_THREADS);
    plan->threads = bytes / MIN_BYTES + 1 < wanted ? (int)(bytes / MIN_BYTES) + 1 : wanted;
    bool whole = d->norm_weight.data; /* rows of out */
    plan->parts =
        heads && heads < plan->threads && !whole ? kda_min64((plan->threads + heads - 1) / heads, pieces) : 1;
    return FLASH_KDA_OK;
}

static void run_part(const struct kda_decode *d, const struct plan *plan, int64_t i) {
    const struct kda_prefill *p = &d->tokens;
    int64_t share = (p->value_dim + plan->parts - 1) / plan->parts;
    share = (share + KDA_PART - 1) / KDA_PART * KDA_PART;
    struct kda_part part = {.sequence = i / plan->parts / p->value_heads,
                            .head = i / plan->parts % p->value_heads,
                            .first = i % plan->parts * share};
    part.tokens = kda_decode_sequence(d, part.sequence);
    part.count = kda_min64(share, p->value_dim - part.first);
    if (part.tokens.slot >= 0 && part.tokens.length && part.count > 0)
        plan->level->decode(d, &part);
}

/* A row of a convolution's channels: of one head of one sequence. */
static void advance_convolution(const struct kda_decode *d, const struct kda_tensor *x,
                                const struct kda_convolution *conv, int64_t i) {
    int64_t n = i / x->shape[2], head = i % x->shape[2];
    const struct kda_sequence s = kda_decode_sequence(d, n);
    for (int64_t c = 0; c < x->shape[3] && s.slot >= 0; c++)
        kda_conv_advance(d, x, conv, n, &s, head, c);
}

/* Once all heads are done, for several may read one channel. Called by every thread of a team. */
static void advance_convolutions(const struct kda_decode *d) {
    const struct kda_tensor *const inputs[] = {&d->tokens.q, &d->tokens.k, &d->tokens.v};
    const struct kda_convolution *const convs[] = {&d->q_conv, &d->k_conv, &d->v_conv};
    for (int conv = 0; conv < 3; conv++) {
        if (!convs[conv]->weight.data || d->keep_state)
            continue;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < d->tokens.sequences * inputs[conv]->shape[2]; i++)
            advance_convolution(d, inputs[conv], convs[conv], i);
    }
}

flash_kda_status kda_cpu_decode(const struct kda_decode *d) {
    struct plan plan;
    flash_kda_status status = make_plan(d, &plan);
    if (status)
        return status;
    int64_t parts = d->tokens.sequences * d->tokens.value_heads * plan.parts;
#pragma omp parallel num_threads(plan.threads)
    {
        uint64_t mode = kda_flush_denormals();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < parts; i++)
            run_part(d, &plan, i);
        advance_convolutions(d);
        kda_set_float_mode(mode);
    }
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
