/* SPDX-License-Identifier: MIT */
/* Runs a prefill problem through the public API and keeps its results. */
#include "call.h"
#include "prefill_case.h"

static void make_output(struct tensor *t, const struct prefill_output *o, DLDataType type,
                        enum spacing spacing) {
    if (o->ndim)
        tensor_make(t, type, o->ndim, o->shape, (struct tensor_layout){spacing, 0, false});
}

void prefill_results_make(struct prefill_results *r, const struct prefill_problem *p) {
    enum spacing states = p->c.outputs == SPACING_COMPACT ? SPACING_COMPACT : SPACING_FUSED;
    *r = (struct prefill_results){.in_place = p->c.final == STORAGE_IN_PLACE,
                                  .shared_pool = p->c.checkpoints == CHECKPOINTS_SHARED_POOL};
    make_output(&r->out, &p->out, p->out.type, p->c.outputs);
    if (r->in_place)
        tensor_clone(&r->final, &p->initial_state);
    else
        make_output(&r->final, &p->final, p->final.type, states);
    if (!r->shared_pool)
        make_output(&r->checkpoints, &p->checkpoints, p->checkpoints.type, states);
    for (int i = 0; i < CONVOLUTIONS; i++)
        if (p->conv[i].state.block)
            tensor_clone(&r->conv_state[i], &p->conv[i].state);
}

void prefill_results_make_exact(struct prefill_results *r, const struct prefill_problem *p) {
    *r = (struct prefill_results){.in_place = false};
    make_output(&r->out, &p->out, TYPE_FP32, SPACING_COMPACT);
    make_output(&r->final, &p->final, TYPE_FP32, SPACING_COMPACT);
    make_output(&r->checkpoints, &p->checkpoints, TYPE_FP32, SPACING_COMPACT);
}

void prefill_results_free(struct prefill_results *r) {
    tensor_free(&r->out);
    tensor_free(&r->final);
    tensor_free(&r->checkpoints);
    for (int i = 0; i < CONVOLUTIONS; i++)
        tensor_free(&r->conv_state[i]);
}

const struct tensor *prefill_checkpoints(const struct prefill_results *r) {
    return r->shared_pool ? &r->final : &r->checkpoints;
}

bool prefill_same(const struct prefill_results *a, const struct prefill_results *b) {
    for (int i = 0; i < CONVOLUTIONS; i++)
        if (!tensor_same(&a->conv_state[i], &b->conv_state[i]))
            return false;
    return tensor_same(&a->out, &b->out) && tensor_same(&a->final, &b->final) &&
           tensor_same(&a->checkpoints, &b->checkpoints);
}

const char *prefill_call(const flash_kda_prefill_args *args, int fill) {
    const struct arguments all = arguments_of_prefill(args);
    return call_run(&all, memory_of(args->backend), fill);
}

flash_kda_prefill_args prefill_bind(const struct prefill_problem *p, struct prefill_results *r,
                                    flash_kda_backend backend) {
    flash_kda_prefill_args args = p->args;
    args.backend = backend;
    args.out = &r->out.dl;
    args.final_state = p->final.ndim ? &r->final.dl : NULL;
    args.checkpoints = p->checkpoints.ndim ? &prefill_checkpoints(r)->dl : NULL;
    if (r->in_place)
        args.initial_state = &r->final.dl;
    args.q_conv_state = args.q_conv_weight && r->conv_state[0].block ? &r->conv_state[0].dl : NULL;
    args.k_conv_state = args.k_conv_weight && r->conv_state[1].block ? &r->conv_state[1].dl : NULL;
    args.v_conv_state = args.v_conv_weight && r->conv_state[2].block ? &r->conv_state[2].dl : NULL;
    return args;
}

const char *prefill_run(const struct prefill_problem *p, struct prefill_results *r, flash_kda_backend backend,
                        int fill) {
    flash_kda_prefill_args args = prefill_bind(p, r, backend);
    return prefill_call(&args, fill);
}
