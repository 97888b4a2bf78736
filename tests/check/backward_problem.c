/* SPDX-License-Identifier: MIT */
/* From a case of backward to its tensors, and its runs through the public API. */
#include "backward_case.h"
#include "calls.h"
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

const char *const gradient_names[GRADIENTS] = {"dq",    "dk",     "dv",        "dg",
                                               "dbeta", "dA_log", "d_dt_bias", "d_initial_state"};

struct backward_case backward_case_plain(void) {
    struct backward_case c = {.forward = prefill_case_plain(),
                              .d_out = true,
                              .d_final = STORAGE_FP32,
                              .d_initial = STORAGE_FP32,
                              .size = 1,
                              .bf16 = BF16_GRADIENTS_ANY};
    c.forward.final = STORAGE_NONE;
    c.forward.every = 64;
    for (int i = 0; i < D_INITIAL_STATE; i++)
        c.types[i] = TYPE_FP32;
    return c;
}

/* ---- Tensors ----------------------------------------------------------------------------------- */

static DLDataType state_type(enum storage s) { return s == STORAGE_BF16 ? TYPE_BF16 : TYPE_FP32; }

static void describe(struct prefill_output *o, DLDataType type, int ndim, const int64_t *shape) {
    *o = (struct prefill_output){.type = type, .ndim = ndim, .rows = 1};
    for (int d = 0; d < ndim; d++)
        o->shape[d] = shape[d];
    o->written = calloc(1, sizeof *o->written);
    if (!o->written) {
        fprintf(stderr, "out of memory for a test problem\n");
        exit(2);
    }
    o->written[0] = true;
}

static void state_shape(const struct prefill_problem *p, int64_t *shape) {
    bool v_first = p->c.layout == FLASH_KDA_STATE_V_FIRST;
    shape[0] = p->N;
    shape[1] = p->HV;
    shape[2] = v_first ? p->c.V : p->c.K;
    shape[3] = v_first ? p->c.K : p->c.V;
}

static void describe_outputs(struct backward_problem *b) {
    const struct prefill_problem *p = &b->p;
    const int64_t like_q[4] = {p->B, p->T, p->c.H, p->c.K}, like_v[4] = {p->B, p->T, p->HV, p->c.V};
    const int64_t like_g[4] = {p->B, p->T, p->HV, p->c.K};
    int64_t states[4];
    state_shape(p, states);
    const struct {
        int ndim;
        const int64_t *shape;
    } shapes[GRADIENTS] = {{4, like_q}, {4, like_q},     {4, like_v},     {4, like_g},
                           {3, like_g}, {1, like_g + 2}, {2, like_g + 2}, {4, states}};
    for (int i = 0; i < GRADIENTS; i++) {
        bool absent = (i == DA_LOG && !p->c.A_log) || (i == D_DT_BIAS && !p->c.dt_bias) ||
                      (i == D_INITIAL_STATE && !b->c.d_initial);
        enum storage kept = b->c.d_initial == STORAGE_IN_PLACE ? b->c.d_final : b->c.d_initial;
        if (!absent)
            describe(&b->outputs[i], i == D_INITIAL_STATE ? state_type(kept) : b->c.types[i], shapes[i].ndim,
                     shapes[i].shape);
    }
}

static struct tensor_layout layout_of(enum spacing spacing, bool loose_last) {
    return (struct tensor_layout){spacing, 2, loose_last};
}

static void make_given(struct backward_problem *b, struct random *r) {
    const struct prefill_problem *p = &b->p;
    const int64_t values[4] = {p->B, p->T, p->HV, p->c.V};
    int64_t states[4];
    state_shape(p, states);
    if (b->c.d_out) {
        tensor_make(&b->d_out, p->c.out_type, 4, values, layout_of(p->c.inputs, false));
        fill_normal(&b->d_out, r, 0, b->c.size);
        b->args.d_out = &b->d_out.dl;
    }
    if (b->c.d_final) {
        enum spacing spacing = p->c.inputs == SPACING_COMPACT ? SPACING_COMPACT : SPACING_FUSED;
        tensor_make(&b->d_final_state, state_type(b->c.d_final), 4, states, layout_of(spacing, false));
        fill_normal(&b->d_final_state, r, 0, b->c.size / sqrt((double)p->c.K));
        b->args.d_final_state = &b->d_final_state.dl;
    }
}

/* The states that prefill keeps, by the oracle. */
static const char *make_checkpoints(struct backward_problem *b) {
    struct prefill_results r;
    if (!b->p.checkpoints.ndim)
        return NULL;
    prefill_results_make(&r, &b->p);
    const char *wrong = prefill_run(&b->p, &r, FLASH_KDA_BACKEND_REFERENCE, 0);
    tensor_clone(&b->checkpoints, &r.checkpoints);
    prefill_results_free(&r);
    b->args.checkpoints = &b->checkpoints.dl;
    b->args.checkpoint_every = b->p.args.checkpoint_every;
    b->args.checkpoint_cu_starts = b->p.args.checkpoint_cu_starts;
    return wrong;
}

const char *backward_problem_make(struct backward_problem *b, const struct backward_case *c, struct random *r) {
    *b = (struct backward_problem){.c = *c};
    prefill_problem_make(&b->p, &c->forward, r);
    b->args = backward_of_prefill(&b->p.args);
    make_given(b, r);
    describe_outputs(b);
    return make_checkpoints(b);
}

void backward_problem_free(struct backward_problem *b) {
    tensor_free(&b->d_out);
    tensor_free(&b->d_final_state);
    tensor_free(&b->checkpoints);
    for (int i = 0; i < GRADIENTS; i++)
        free(b->outputs[i].written);
    prefill_problem_free(&b->p);
}

bool backward_asks(const struct backward_problem *b, int gradient) {
    return b->outputs[gradient].ndim && !(b->c.without >> gradient & 1);
}

/* ---- Results ----------------------------------------------------------------------------------- */

void backward_results_make(struct backward_results *r, const struct backward_problem *b) {
    *r = (struct backward_results){0};
    for (int i = 0; i < GRADIENTS; i++) {
        const struct prefill_output *o = &b->outputs[i];
        enum spacing spacing = b->p.c.outputs;
        if (o->ndim != 4 && spacing != SPACING_COMPACT)
            spacing = SPACING_FUSED;
        if (!backward_asks(b, i))
            continue;
        if (i == D_INITIAL_STATE && b->c.d_initial == STORAGE_IN_PLACE)
            tensor_clone(&r->tensors[i], &b->d_final_state);
        else
            tensor_make(&r->tensors[i], o->type, o->ndim, o->shape, layout_of(spacing, false));
    }
}

void backward_results_make_exact(struct backward_results *r, const struct backward_problem *b) {
    *r = (struct backward_results){0};
    for (int i = 0; i < GRADIENTS; i++)
        if (b->outputs[i].ndim)
            tensor_make(&r->tensors[i], TYPE_FP32, b->outputs[i].ndim, b->outputs[i].shape,
                        layout_of(SPACING_COMPACT, false));
}

void backward_results_free(struct backward_results *r) {
    for (int i = 0; i < GRADIENTS; i++)
        tensor_free(&r->tensors[i]);
}

/* ---- Runs -------------------------------------------------------------------------------------- */

flash_kda_backward_args backward_bind(const struct backward_problem *b, struct backward_results *r,
                                      flash_kda_backend backend) {
    flash_kda_backward_args args = b->args;
    const DLTensor **const members[GRADIENTS] = {
        &args.dq,    &args.dk,     &args.dv,        &args.dg,
        &args.dbeta, &args.dA_log, &args.d_dt_bias, &args.d_initial_state};
    for (int i = 0; i < GRADIENTS; i++)
        if (backward_asks(b, i))
            *members[i] = &r->tensors[i].dl;
    if (b->c.d_initial == STORAGE_IN_PLACE && args.d_initial_state)
        args.d_final_state = args.d_initial_state;
    args.backend = backend;
    return args;
}

const char *backward_run(const struct backward_problem *b, struct backward_results *r,
                         flash_kda_backend backend, int fill) {
    const flash_kda_backward_args args = backward_bind(b, r, backend);
    const struct arguments all = arguments_of_backward(&args);
    return call_run(&all, memory_of(backend), fill);
}

double backward_time(const struct backward_problem *b, struct backward_results *r, flash_kda_backend backend) {
    const flash_kda_backward_args args = backward_bind(b, r, backend);
    const struct arguments all = arguments_of_backward(&args);
    return seconds_of(&all);
}
