/* SPDX-License-Identifier: MIT */
/* Whole sequences through decode, in several ways: outputs and last states are what prefill makes of them. */
#include "arguments.h"
#include "decode_case.h"
#include "decode_families.h"
#include "prefill_compare.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum way { ONE_BY_ONE, IN_PIECES, VERIFIED, COMMITTED };

static const struct {
    enum way way;
    const char *name;
} ways[] = {{ONE_BY_ONE, "token by token"},
            {IN_PIECES, "in pieces of 1 to 16 tokens"},
            {VERIFIED, "drafts verified, the state after each kept"},
            {COMMITTED, "drafts verified, accepted ones committed"}};

enum { DRAFTS = 5, SPARE = 3 };

/* Dense sequences on their way through decode. */
struct chain {
    const struct prefill_problem *p;
    flash_kda_backend backend;
    struct tensor state, out;
    int64_t columns, slot[MAX_SEQUENCES][DRAFTS]; /* columns 0: one slot a sequence */
    int64_t accepted;                             /* of the last drafts, of every sequence */
    int calls;
};

static void chain_make(struct chain *c, const struct prefill_problem *p, DLDataType type, int64_t columns,
                       struct random *r) {
    int64_t width = columns ? columns : 1, slots = p->N * width + SPARE,
            order[MAX_SEQUENCES * DRAFTS + SPARE] = {0};
    int64_t matrix = p->HV * p->c.K * p->c.V, shape[4];
    c->columns = columns;
    c->accepted = 1;
    memcpy(shape, p->initial_state.shape, sizeof shape);
    shape[0] = slots;
    tensor_make(&c->state, type, 4, shape, (struct tensor_layout){SPACING_FUSED, 0, false});
    tensor_make(&c->out, p->c.out_type, 4, p->out.shape, (struct tensor_layout){SPACING_FUSED, 0, false});
    for (int64_t i = 0; i < slots; i++) {
        int64_t j = random_below(r, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (int64_t n = 0; n < p->N; n++) {
        for (int64_t t = 0; t < width; t++)
            c->slot[n][t] = order[n * width + t];
        for (int64_t i = 0; i < matrix; i++)
            tensor_set(&c->state, c->slot[n][0] * matrix + i, tensor_get(&p->initial_state, n * matrix + i));
    }
}

/* An int32 tensor of one or two dimensions for a call. */
struct indices {
    DLTensor dl;
    int64_t shape[2];
    int32_t value[MAX_SEQUENCES * DRAFTS];
};

static const DLTensor *indices_make(struct indices *x, int64_t N, int64_t columns) {
    x->shape[0] = N;
    x->shape[1] = columns;
    x->dl = (DLTensor){.data = x->value,
                       .device = {kDLCPU, 0},
                       .ndim = columns ? 2 : 1,
                       .dtype = TYPE_INT32,
                       .shape = x->shape};
    return &x->dl;
}

/* Tokens first .. first + count - 1 of every sequence; accepted: how many of them to process, or -1: all. */
static const char *call(struct chain *c, int64_t first, int64_t count, uint32_t flags, int64_t accepted) {
    const struct prefill_problem *p = c->p;
    struct tensor views[TOKEN_ARGUMENTS];
    struct indices slots, read, some;
    for (int64_t n = 0; n < p->N; n++) {
        read.value[n] = (int32_t)c->accepted;
        some.value[n] = (int32_t)accepted;
        for (int64_t t = 0; t < DRAFTS && (t == 0 || t < c->columns); t++)
            slots.value[n * (c->columns ? c->columns : 1) + t] = (int32_t)c->slot[n][t];
    }
    flash_kda_decode_args args = decode_of_prefill(&p->args);
    args.out = accepted < 0 ? &c->out.dl : NULL;
    args.flags |= flags;
    decode_narrow(&args, views, 1, first, count);
    args.state = &c->state.dl;
    args.state_indices = indices_make(&slots, p->N, c->columns);
    args.num_accepted_tokens = c->columns ? indices_make(&read, p->N, 0) : NULL;
    args.accepted = accepted < 0 ? NULL : indices_make(&some, p->N, 0);
    args.backend = c->backend;
    c->calls++;
    return decode_call(&args);
}

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* One call, or two, from token `at` on; returns how many tokens that was. */
static int64_t advance(struct chain *c, enum way way, int64_t at, struct random *r, const char **wrong) {
    int64_t left = c->p->T - at, count = 1, accepted;
    if (way == IN_PIECES)
        count = min64(left, 1 + random_below(r, FLASH_KDA_MAX_DECODE_TOKENS));
    if (way == ONE_BY_ONE || way == IN_PIECES) {
        *wrong = call(c, at, count, 0, -1);
        return count;
    }
    count = min64(left, 1 + random_below(r, DRAFTS));
    accepted = 1 + random_below(r, count);
    *wrong = call(c, at, count, way == COMMITTED ? FLASH_KDA_KEEP_STATE : 0, -1);
    if (way == COMMITTED && !*wrong)
        *wrong = call(c, at, count, 0, accepted);
    c->accepted = accepted;
    return accepted;
}

/* Every state, where its chain left it, in the order of the sequences. */
static void gather_states(const struct chain *c, struct tensor *states) {
    int64_t matrix = c->p->HV * c->p->c.K * c->p->c.V;
    tensor_make(states, c->state.dl.dtype, 4, c->p->initial_state.shape,
                (struct tensor_layout){SPACING_COMPACT, 0, false});
    for (int64_t n = 0; n < c->p->N; n++) {
        int64_t slot = c->slot[n][c->columns ? c->accepted - 1 : 0];
        for (int64_t i = 0; i < matrix; i++)
            tensor_set(states, n * matrix + i, tensor_get(&c->state, slot * matrix + i));
    }
}

/* What storing the state in 16 bits after every call may cost: errors of `calls` roundings, that add up as in a random walk. */
static double allowed(const struct chain *c) {
    double rounding = type_equal(c->state.dl.dtype, TYPE_BF16)   ? ROUNDING_BF16_RMS
                      : type_equal(c->state.dl.dtype, TYPE_FP16) ? ROUNDING_BF16_RMS / 8
                                                                 : 0;
    return TOLERANCE_FP32 + rounding * sqrt((double)c->calls);
}

struct chain_kind {
    DLDataType type;
    enum way way;
};

static void run_chain(struct check *check, struct prefill_problem *p, const struct prefill_results *exact,
                      const char *level, const void *context) {
    const struct chain_kind *kind = context;
    struct chain c = {.p = p, .backend = level_backend(level)};
    struct random r = random_named(check->seed, p->c.name);
    struct tensor states;
    char text[200];
    const char *wrong = NULL;
    chain_make(&c, p, kind->type, kind->way == VERIFIED ? DRAFTS : 0, &r);
    for (int64_t at = 0; at < p->T && !wrong;)
        at += advance(&c, kind->way, at, &r, &wrong);
    gather_states(&c, &states);
    double out = prefill_error(&c.out, &exact->out, &p->out, true);
    double state = prefill_error(&states, &exact->final, &p->final, true);
    snprintf(text, sizeof text, "out %.1e, state %.1e, at most %.1e, in %d calls", out, state, allowed(&c),
             c.calls);
    check_report(check, !wrong && out <= allowed(&c) && state <= allowed(&c), level, p->c.name,
                 wrong ? wrong : text);
    tensor_free(&states);
    tensor_free(&c.state);
    tensor_free(&c.out);
}

static void compare_chain(struct check *check, struct prefill_case *c, DLDataType type, int way) {
    const struct chain_kind kind = {type, ways[way].way};
    snprintf(c->name, sizeof c->name, "%s is prefill, gate %s, %s state, %s", ways[way].name,
             prefill_gate_names[c->gate], type_name(type),
             c->layout == FLASH_KDA_STATE_V_FIRST ? "V first" : "K first");
    prefill_examine(check, c, run_chain, &kind);
}

/* What is carried wrongly must show in the end. But a decay nearer to 1 than bf16 states are exact is rounded away by every call,
 * and errors of one sign add up faster than allowed() knows: without a gate decay would be so. */
static void fill_lasting(struct prefill_problem *p, struct random *r) {
    fill_remembering(p, r);
    if (p->c.gate == FLASH_KDA_GATE_NONE)
        fill_uniform(&p->g, r, -0.05, 0);
}

void decode_properties(struct check *check) {
    const DLDataType types[] = {TYPE_FP32, TYPE_BF16, TYPE_FP16};
    struct prefill_case c = prefill_case_plain();
    c.sequences = 3;
    for (int n = 0; n < c.sequences; n++)
        c.lengths[n] = 50;
    c.group = 2;
    c.K = 40;
    c.V = 72;
    c.inputs = SPACING_FUSED;
    c.fill = fill_lasting;
    for (int gate = 0; gate < 3; gate++) {
        prefill_case_set_gate(&c, (flash_kda_gate)gate);
        for (size_t way = 0; way < sizeof ways / sizeof *ways; way++)
            for (size_t t = 0; t < sizeof types / sizeof *types; t++)
                for (int layout = 0; layout < 2; layout++) {
                    c.layout = (flash_kda_state_layout)layout;
                    compare_chain(check, &c, types[t], (int)way);
                }
    }
}
