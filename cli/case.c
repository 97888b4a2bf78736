/* SPDX-License-Identifier: MIT */
/* A KDA problem in host memory. */
#include "case.h"

#include <math.h>
#include <string.h>

const char *const gate_names[] = {"none", "softplus", "sigmoid", NULL};
const char *const beta_names[] = {"given", "sigmoid", "twice_sigmoid", NULL};
const char *const state_layout_names[] = {"v_first", "k_first", NULL};

int name_index(const char *const *names, const char *name) {
    for (int i = 0; names[i]; i++)
        if (strcmp(names[i], name) == 0)
            return i;
    return -1;
}

void case_free(struct kda_case *c) {
    struct tensor *tensors[] = {&c->q,
                                &c->k,
                                &c->v,
                                &c->g,
                                &c->beta,
                                &c->A_log,
                                &c->dt_bias,
                                &c->cu_seqlens,
                                &c->initial_state,
                                &c->expected_out,
                                &c->expected_state};
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++)
        tensor_free(tensors[i]);
    *c = (struct kda_case){0};
}

static const DLTensor *optional(const struct tensor *tensor) {
    return tensor_present(tensor) ? &tensor->dl : NULL;
}

flash_kda_prefill_args case_args(const struct kda_case *c) {
    flash_kda_prefill_args args = FLASH_KDA_PREFILL_ARGS_INIT;
    args.q = &c->q.dl;
    args.k = &c->k.dl;
    args.v = &c->v.dl;
    args.g = &c->g.dl;
    args.beta = &c->beta.dl;
    args.A_log = optional(&c->A_log);
    args.dt_bias = optional(&c->dt_bias);
    args.cu_seqlens = optional(&c->cu_seqlens);
    args.initial_state = optional(&c->initial_state);
    args.gate = c->gate;
    args.lower_bound = c->lower_bound;
    args.beta_mode = c->beta_mode;
    args.scale = c->scale;
    args.flags = c->flags;
    args.state_layout = c->state_layout;
    args.checkpoint_every = c->checkpoint_every;
    return args;
}

void case_out_shape(const struct kda_case *c, int64_t shape[TENSOR_MAX_DIMS]) {
    shape[0] = c->batch;
    shape[1] = c->tokens;
    shape[2] = c->value_heads;
    shape[3] = c->value_dim;
}

void case_state_shape(const struct kda_case *c, int64_t shape[TENSOR_MAX_DIMS]) {
    bool v_first = c->state_layout == FLASH_KDA_STATE_V_FIRST;
    shape[0] = c->sequences;
    shape[1] = c->value_heads;
    shape[2] = v_first ? c->value_dim : c->key_dim;
    shape[3] = v_first ? c->key_dim : c->value_dim;
}

int64_t case_checkpoint_rows(const struct kda_case *c) {
    return c->checkpoint_every ? (c->tokens + c->checkpoint_every - 1) / c->checkpoint_every : 0;
}

/* cu_seqlens where the tokens end earlier. */
static bool clip_cu_seqlens(struct tensor *clipped, const struct tensor *cu_seqlens, int64_t tokens) {
    if (!tensor_alloc(clipped, TYPE_INT64, 1, cu_seqlens->shape))
        return false;
    for (int64_t n = 0; n < cu_seqlens->shape[0]; n++)
        tensor_set(clipped, n, fmin(tensor_get(cu_seqlens, n), (double)tokens));
    return true;
}

bool case_prefix(struct kda_case *prefix, const struct kda_case *c, int64_t tokens, int64_t heads) {
    int64_t value_heads = heads * (c->value_heads / c->heads);
    *prefix = (struct kda_case){.batch = c->batch,
                                .tokens = tokens,
                                .heads = heads,
                                .value_heads = value_heads,
                                .key_dim = c->key_dim,
                                .value_dim = c->value_dim,
                                .sequences = c->sequences,
                                .gate = c->gate,
                                .lower_bound = c->lower_bound,
                                .beta_mode = c->beta_mode,
                                .scale = c->scale,
                                .flags = c->flags,
                                .state_layout = c->state_layout,
                                .bf16_state = c->bf16_state,
                                .checkpoint_every = c->checkpoint_every,
                                .fused = c->fused};
    memcpy(prefix->regime, c->regime, sizeof prefix->regime);
    const struct {
        struct tensor *view;
        const struct tensor *whole;
        int dim; /* of the heads */
        int64_t heads;
    } parts[] = {{&prefix->q, &c->q, 2, heads},
                 {&prefix->k, &c->k, 2, heads},
                 {&prefix->v, &c->v, 2, value_heads},
                 {&prefix->g, &c->g, 2, value_heads},
                 {&prefix->beta, &c->beta, 2, value_heads},
                 {&prefix->A_log, &c->A_log, 0, value_heads},
                 {&prefix->dt_bias, &c->dt_bias, 0, value_heads},
                 {&prefix->initial_state, &c->initial_state, 1, value_heads}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (tensor_present(parts[i].whole)) {
            tensor_view(parts[i].view, &parts[i].whole->dl);
            tensor_narrow(parts[i].view, parts[i].dim, 0, parts[i].heads);
            if (parts[i].dim == 2)
                tensor_narrow(parts[i].view, 1, 0, tokens);
        }
    return !tensor_present(&c->cu_seqlens) || clip_cu_seqlens(&prefix->cu_seqlens, &c->cu_seqlens, tokens);
}
