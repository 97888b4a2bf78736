/* SPDX-License-Identifier: MIT */
/* From a case of decode to its tensors, and what the oracle makes of them. */
#include "decode_case.h"
#include "device.h"

#include <stdio.h>
#include <stdlib.h>

struct decode_case decode_case_plain(void) {
    struct decode_case c = {.tokens = prefill_case_plain(), .state_type = TYPE_FP32};
    c.tokens.sequences = 2;
    c.tokens.lengths[0] = c.tokens.lengths[1] = 3;
    c.tokens.pool = true;
    return c;
}

/* ---- Slots ------------------------------------------------------------------------------------- */

static void *allocate(int64_t count, size_t size) {
    void *memory = calloc(count > 0 ? (size_t)count : 1, size);
    if (!memory) {
        fprintf(stderr, "out of memory for a test problem\n");
        exit(2);
    }
    return memory;
}

static struct tensor_layout index_layout(const struct decode_problem *d) {
    enum spacing spacing = d->c.tokens.inputs == SPACING_COMPACT ? SPACING_COMPACT : SPACING_FUSED;
    return (struct tensor_layout){spacing, 0, true};
}

static int64_t columns_of(const struct decode_problem *d) { return d->c.columns ? d->c.columns : 1; }

/* A slot of its own for every column, in random order, with gaps between them. */
static void shuffle_slots(struct decode_problem *d, struct random *r) {
    enum { SPARE = 3 };
    int64_t order[MAX_SEQUENCES * MAX_COLUMNS + SPARE], columns = columns_of(d);
    d->slots = d->p.N * columns + SPARE;
    for (int64_t i = 0; i < d->slots; i++) {
        int64_t j = random_below(r, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (int64_t n = 0; n < d->p.N; n++)
        for (int64_t t = 0; t < columns; t++)
            d->slot[n][t] = order[n * columns + t];
}

/* Padding has -1 where its state would be read; in other columns, of any sequence, it means: not written. */
static void make_state_indices(struct decode_problem *d, const int64_t *column, struct random *r) {
    int64_t columns = columns_of(d), shape[2] = {d->p.N, columns};
    shuffle_slots(d, r);
    for (int64_t n = 0; n < d->p.N; n++)
        for (int64_t t = 0; t < columns; t++)
            if (t == column[n] ? d->p.slot[n] < 0 : random_below(r, 5) == 0)
                d->slot[n][t] = -1;
    tensor_make(&d->state_indices, TYPE_INT32, d->c.columns ? 2 : 1, shape, index_layout(d));
    for (int64_t i = 0; i < d->p.N * columns; i++)
        tensor_set(&d->state_indices, i, (double)d->slot[i / columns][i % columns]);
    d->args.state_indices = &d->state_indices.dl;
}

/* column [N]: becomes that which each state is read from. */
static void choose_columns(struct decode_problem *d, int64_t *column, struct random *r) {
    if (d->c.num_accepted) {
        tensor_make(&d->num_accepted_tokens, TYPE_INT32, 1, &d->p.N, index_layout(d));
        d->args.num_accepted_tokens = &d->num_accepted_tokens.dl;
    }
    for (int64_t n = 0; n < d->p.N; n++) {
        column[n] = d->c.num_accepted ? random_below(r, d->c.columns) : 0;
        if (d->c.num_accepted)
            tensor_set(&d->num_accepted_tokens, n, (double)(column[n] + 1));
    }
}

static void choose_accepted(struct decode_problem *d, struct random *r) {
    if (d->c.accepted) {
        tensor_make(&d->accepted, TYPE_INT32, 1, &d->p.N, index_layout(d));
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
static void make_state(struct decode_problem *d, const int64_t *column) {
    const struct prefill_problem *p = &d->p;
    bool v_first = d->c.tokens.layout == FLASH_KDA_STATE_V_FIRST;
    int64_t matrix = p->HV * p->c.K * p->c.V;
    int64_t shape[4] = {d->slots, p->HV, v_first ? p->c.V : p->c.K, v_first ? p->c.K : p->c.V};
    tensor_make(&d->state, d->c.state_type, 4, shape, (struct tensor_layout){d->c.tokens.outputs, 0, false});
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t i = 0; i < matrix && p->slot[n] >= 0; i++) {
            int64_t place = d->slot[n][column[n]] * matrix + i, given = p->slot[n] * matrix + i;
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
    d->out_written = allocate(d->p.B * d->p.T, sizeof *d->out_written);
    d->state_written = allocate(d->slots, sizeof *d->state_written);
    for (int64_t n = 0; n < d->p.N; n++)
        for (int64_t t = 0; t < d->processed[n]; t++) {
            int64_t slot = decode_target(d, n, t);
            d->out_written[decode_place(d, n, t)] = true;
            if (slot >= 0)
                d->state_written[slot] = true;
        }
}

/* ---- A problem --------------------------------------------------------------------------------- */

static void make_args(struct decode_problem *d) {
    const flash_kda_prefill_args *p = &d->p.args;
    flash_kda_decode_args *a = &d->args;
    a->struct_size = sizeof *a;
    a->q = p->q;
    a->k = p->k;
    a->v = p->v;
    a->g = p->g;
    a->beta = p->beta;
    a->A_log = p->A_log;
    a->dt_bias = p->dt_bias;
    a->gate = p->gate;
    a->lower_bound = p->lower_bound;
    a->beta_mode = p->beta_mode;
    a->scale = p->scale;
    a->flags = p->flags | (d->c.keep_state ? FLASH_KDA_KEEP_STATE : 0);
    a->cu_seqlens = p->cu_seqlens;
    a->state_layout = p->state_layout;
    a->num_threads = p->num_threads;
}

const char *decode_problem_make(struct decode_problem *d, const struct decode_case *c, bool formula,
                                struct random *r) {
    struct prefill_case tokens = c->tokens;
    int64_t column[MAX_SEQUENCES];
    tokens.initial = STORAGE_FP32;
    tokens.final = STORAGE_NONE;
    tokens.checkpoints = CHECKPOINTS_EVERY;
    tokens.every = 1;
    *d = (struct decode_problem){.c = *c};
    prefill_problem_make(&d->p, &tokens, r);
    d->slots = d->p.N;
    choose_columns(d, column, r);
    choose_accepted(d, r);
    if (tokens.pool)
        make_state_indices(d, column, r);
    for (int64_t n = 0; n < d->p.N && !tokens.pool; n++)
        d->slot[n][0] = n;
    make_state(d, column);
    mark_written(d);
    make_args(d);
    prefill_results_make_exact(&d->exact, &d->p);
    if (!formula)
        return prefill_run(&d->p, &d->exact, FLASH_KDA_BACKEND_REFERENCE, 0);
    formula_prefill(&d->p, &d->exact);
    return NULL;
}

void decode_problem_free(struct decode_problem *d) {
    struct tensor *const tensors[] = {&d->state, &d->state_indices, &d->num_accepted_tokens, &d->accepted};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        tensor_free(tensors[i]);
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
}

void decode_results_free(struct decode_results *r) {
    tensor_free(&r->out);
    tensor_free(&r->state);
}

flash_kda_decode_args decode_bind(const struct decode_problem *d, struct decode_results *r,
                                  flash_kda_backend backend) {
    flash_kda_decode_args args = d->args;
    args.backend = backend;
    args.out = d->c.no_out ? NULL : &r->out.dl;
    args.state = &r->state.dl;
    return args;
}

const char *decode_call(const flash_kda_decode_args *args) {
    static char text[700];
#ifdef CHECK_CUDA
    if (args->backend == FLASH_KDA_BACKEND_CUDA)
        return device_decode(args, DEVICE_MEMORY);
#endif
    if (!flash_kda_decode(args))
        return NULL;
    snprintf(text, sizeof text, "decode: %s", flash_kda_last_error());
    return text;
}
