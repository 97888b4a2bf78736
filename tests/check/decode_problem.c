/* SPDX-License-Identifier: MIT */
/* From a case of decode to its tensors, and what the oracle makes of them. */
#include "calls.h"
#include "decode_case.h"

#include <stdlib.h>

struct decode_case decode_case_plain(void) {
    struct decode_case c = {.tokens = prefill_case_plain(), .state_type = TYPE_FP32};
    c.tokens.sequences = 2;
    c.tokens.lengths[0] = c.tokens.lengths[1] = 3;
    c.tokens.pool = true;
    return c;
}

/* ---- Slots ------------------------------------------------------------------------------------- */

static struct tensor_layout index_layout(const struct decode_problem *d) {
    enum spacing spacing = d->c.tokens.inputs == SPACING_COMPACT ? SPACING_COMPACT : SPACING_FUSED;
    return (struct tensor_layout){spacing, 0, true};
}

static DLDataType index_type(const struct decode_problem *d) {
    return d->c.tokens.wide_indices ? TYPE_INT64 : TYPE_INT32;
}

static int64_t columns_of(const struct decode_problem *d) { return d->c.columns ? d->c.columns : 1; }

/* A slot of its own for every column, in random order, with gaps between them. */
static void shuffle_slots(struct decode_problem *d, struct random *r) {
    enum { SPARE = 3 };
    int64_t order[MAX_SEQUENCES * MAX_COLUMNS + SPARE] = {0}, columns = columns_of(d);
    d->slots = d->p.N * columns + SPARE;
    for (int64_t i = 0; i < d->slots; i++) {
        int64_t j = random_below(r, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    if (d->c.tokens.padding_slot)
        prefill_spare_padding(order, d->slots);
    for (int64_t n = 0; n < d->p.N; n++)
        for (int64_t t = 0; t < columns; t++)
            d->slot[n][t] = order[n * columns + t];
    d->args.padding_slot = d->c.tokens.padding_slot ? PADDING_SLOT : 0;
}

/* Padding has -1, or the slot for it, where its state would be read; in other columns, of any sequence, it means: not written. */
static void make_state_indices(struct decode_problem *d, struct random *r) {
    int64_t columns = columns_of(d), shape[2] = {d->p.N, columns};
    shuffle_slots(d, r);
    for (int64_t n = 0; n < d->p.N; n++)
        for (int64_t t = 0; t < columns; t++)
            if (t == d->column[n] ? d->p.slot[n] < 0 : random_below(r, 5) == 0)
                d->slot[n][t] = -1;
    tensor_make(&d->state_indices, index_type(d), d->c.columns ? 2 : 1, shape, index_layout(d));
    for (int64_t n = 0; n < d->p.N; n++)
        for (int64_t t = 0; t < columns; t++)
            tensor_set(&d->state_indices, n * columns + t,
                       (double)(d->slot[n][t] < 0 && d->c.tokens.padding_slot && (n + t) % 3
                                    ? d->args.padding_slot
                                    : d->slot[n][t]));
    d->args.state_indices = &d->state_indices.dl;
}

static void choose_columns(struct decode_problem *d, struct random *r) {
    if (d->c.num_accepted) {
        tensor_make(&d->num_accepted_tokens, index_type(d), 1, &d->p.N, index_layout(d));
        d->args.num_accepted_tokens = &d->num_accepted_tokens.dl;
    }
    for (int64_t n = 0; n < d->p.N; n++) {
        d->column[n] = d->c.num_accepted ? random_below(r, d->c.columns) : 0;
        if (d->c.num_accepted)
            tensor_set(&d->num_accepted_tokens, n, (double)(d->column[n] + 1));
    }
}

static void choose_accepted(struct decode_problem *d, struct random *r) {
    if (d->c.accepted) {
        tensor_make(&d->accepted, index_type(d), 1, &d->p.N, index_layout(d));
        d->args.accepted = &d->accepted.dl;
    }
    for (int64_t n = 0; n < d->p.N; n++) {
        int64_t length = d->c.tokens.lengths[n];
        d->processed[n] = d->c.accepted ? random_below(r, length + 1) : length;
        if (d->c.accepted)
            tensor_set(&d->accepted, n, (double)d->processed[n]);
        if (d->p.slot[n] < 0)
            d->processed[n] = 0;
    }
}

/* ---- States ------------------------------------------------------------------------------------ */

/* The initial states, rounded to how they are stored, where each sequence reads its own. */
static void make_state(struct decode_problem *d) {
    const struct prefill_problem *p = &d->p;
    bool v_first = d->c.tokens.layout == FLASH_KDA_STATE_V_FIRST;
    int64_t matrix = p->HV * p->c.K * p->c.V;
    int64_t shape[4] = {d->slots, p->HV, v_first ? p->c.V : p->c.K, v_first ? p->c.K : p->c.V};
    tensor_make(&d->state, d->c.state_type, 4, shape, (struct tensor_layout){d->c.tokens.outputs, 0, false});
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t i = 0; i < matrix && p->slot[n] >= 0 && !p->fresh[n]; i++) {
            int64_t place = d->slot[n][d->column[n]] * matrix + i, given = p->slot[n] * matrix + i;
            tensor_set(&d->state, place, tensor_get(&p->initial_state, given));
            tensor_set(&d->p.initial_state, given, tensor_get(&d->state, place));
        }
}

int64_t decode_place(const struct decode_problem *d, int64_t n, int64_t t) {
    return d->c.tokens.packing == PACKING_DENSE ? n * d->p.T + t : d->p.starts[n] + t;
}

int64_t decode_target(const struct decode_problem *d, int64_t n, int64_t t) {
    if (d->c.keep_state)
        return -1;
    if (d->c.columns)
        return d->slot[n][t];
    return t + 1 == d->processed[n] ? d->slot[n][0] : -1;
}

static void mark_written(struct decode_problem *d) {
    d->out_written = must_allocate(d->p.B * d->p.T, sizeof *d->out_written);
    d->state_written = must_allocate(d->slots, sizeof *d->state_written);
    for (int64_t n = 0; n < d->p.N; n++)
        for (int64_t t = 0; t < d->processed[n]; t++) {
            int64_t slot = decode_target(d, n, t);
            d->out_written[decode_place(d, n, t)] = true;
            if (slot >= 0)
                d->state_written[slot] = true;
        }
}

/* ---- A problem --------------------------------------------------------------------------------- */

static const DLTensor *optional(const struct tensor *t) { return t->block ? &t->dl : NULL; }

static void make_args(struct decode_problem *d) {
    flash_kda_decode_args *a = &d->args, indices = *a;
    *a = decode_of_prefill(&d->p.args);
    a->state_indices = indices.state_indices;
    a->num_accepted_tokens = indices.num_accepted_tokens;
    a->accepted = indices.accepted;
    a->padding_slot = indices.padding_slot;
    a->flags |= d->c.keep_state ? FLASH_KDA_KEEP_STATE : 0;
    if (d->c.fused.conv[0])
        a->q = &d->conv[0].raw.dl;
    if (d->c.fused.conv[1])
        a->k = &d->conv[1].raw.dl;
    if (d->c.fused.conv[2])
        a->v = &d->conv[2].raw.dl;
    a->q_conv_weight = optional(&d->conv[0].weight);
    a->q_conv_bias = optional(&d->conv[0].bias);
    a->k_conv_weight = optional(&d->conv[1].weight);
    a->k_conv_bias = optional(&d->conv[1].bias);
    a->v_conv_weight = optional(&d->conv[2].weight);
    a->v_conv_bias = optional(&d->conv[2].bias);
    a->norm_weight = optional(&d->norm_weight);
    a->norm_gate = optional(&d->norm_gate);
    a->norm_activation = d->c.fused.norm_activation;
    a->norm_eps = FUSED_NORM_EPS;
}

const char *decode_problem_make(struct decode_problem *d, const struct decode_case *c, bool formula,
                                struct random *r) {
    struct prefill_case tokens = c->tokens;
    tokens.initial = STORAGE_FP32;
    tokens.final = STORAGE_NONE;
    tokens.checkpoints = CHECKPOINTS_EVERY;
    tokens.every = 1;
    *d = (struct decode_problem){.c = *c};
    prefill_problem_make(&d->p, &tokens, r);
    d->slots = d->p.N;
    choose_columns(d, r);
    choose_accepted(d, r);
    if (tokens.pool)
        make_state_indices(d, r);
    for (int64_t n = 0; n < d->p.N && !tokens.pool; n++)
        d->slot[n][0] = n;
    make_state(d);
    decode_fuse_inputs(d, r);
    mark_written(d);
    prefill_results_make_exact(&d->exact, &d->p);
    const char *wrong = NULL;
    if (formula)
        formula_prefill(&d->p, &d->exact);
    else
        wrong = prefill_run(&d->p, &d->exact, FLASH_KDA_BACKEND_REFERENCE, 0);
    decode_fuse_outputs(d, r);
    make_args(d);
    return wrong;
}

void decode_problem_free(struct decode_problem *d) {
    const struct arguments args = arguments_of_decode(&d->args);
    arguments_free(&args);
    tensor_free(&d->state);
    for (int i = 0; i < 3; i++)
        tensor_free(&d->conv[i].state);
    free(d->out_written);
    free(d->state_written);
    prefill_results_free(&d->exact);
    prefill_problem_free(&d->p);
}

/* ---- A call ------------------------------------------------------------------------------------ */

void decode_results_make(struct decode_results *r, const struct decode_problem *d) {
    *r = (struct decode_results){.out = {.block = NULL}};
    tensor_make(&r->out, d->p.out.type, 4, d->p.out.shape,
                (struct tensor_layout){d->c.tokens.outputs, 0, false});
    tensor_clone(&r->state, &d->state);
    for (int i = 0; i < 3; i++)
        if (d->c.fused.conv[i])
            tensor_clone(&r->conv_state[i], &d->conv[i].state);
}

void decode_results_free(struct decode_results *r) {
    tensor_free(&r->out);
    tensor_free(&r->state);
    for (int i = 0; i < 3; i++)
        tensor_free(&r->conv_state[i]);
}

flash_kda_decode_args decode_bind(const struct decode_problem *d, struct decode_results *r,
                                  flash_kda_backend backend) {
    flash_kda_decode_args args = d->args;
    args.backend = backend;
    args.out = d->c.no_out ? NULL : &r->out.dl;
    args.state = &r->state.dl;
    args.q_conv_state = optional(&r->conv_state[0]);
    args.k_conv_state = optional(&r->conv_state[1]);
    args.v_conv_state = optional(&r->conv_state[2]);
    return args;
}

const char *decode_call(const flash_kda_decode_args *args) {
    const struct arguments all = arguments_of_decode(args);
    return call_run(&all, memory_of(args->backend), FILL_NONE);
}
