/* SPDX-License-Identifier: MIT */
/* Prefill as a whole step of a layer: convolutions in front of it, a gated norm after it. What is right comes from the
 * oracle between them, and from both written once more in fused.c. */
#include "prefill_compare.h"
#include "prefill_families.h"

#include <stdio.h>

/* ---- What is right ------------------------------------------------------------------------------- */

static struct tensor *input_of(struct prefill_problem *p, int i) {
    return i == 0 ? &p->q : i == 1 ? &p->k : &p->v;
}

static bool starts_from_zero(const struct prefill_problem *p, int64_t n) {
    return !p->c.initial || p->fresh[n] || !p->c.conv_states;
}

/* Input of a channel, counted over heads, at token t of sequence n, as the convolution sees it; t >= -CONV_PAST. */
static double conv_input(const struct prefill_problem *p, int i, int64_t n, int64_t t, int64_t channel) {
    const struct fused_convolution *conv = &p->conv[i];
    int64_t dim = conv->raw.shape[3], channels = conv->raw.shape[2] * dim;
    if (t >= 0)
        return tensor_get(&conv->raw, prefill_row(p, &conv->raw, n, t, channel / dim) * dim + channel % dim);
    if (starts_from_zero(p, n))
        return 0;
    return tensor_get(&conv->state, (p->slot[n] * channels + channel) * CONV_PAST + CONV_PAST + t);
}

static void make_states(struct prefill_problem *p, int i, struct random *r) {
    struct fused_convolution *conv = &p->conv[i];
    if (!p->c.conv_states)
        return;
    fused_make_states(conv, &p->c.fused, p->slots, p->c.inputs != SPACING_COMPACT);
    int64_t elements = conv->state.shape[1] * CONV_PAST;
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t j = 0; j < elements && p->slot[n] >= 0 && !starts_from_zero(p, n); j++)
            tensor_set(&conv->state, p->slot[n] * elements + j, random_normal(r));
}

void prefill_fuse_inputs(struct prefill_problem *p, struct random *r) {
    for (int i = 0; i < CONVOLUTIONS; i++) {
        struct fused_convolution *conv = &p->conv[i];
        struct tensor *input = input_of(p, i);
        if (!p->c.fused.conv[i])
            continue;
        fused_move(&conv->raw, input);
        fused_make_weights(conv, &p->c.fused, r);
        make_states(p, i, r);
        tensor_make(input, TYPE_FP32, 4, conv->raw.shape, (struct tensor_layout){SPACING_COMPACT, 0, false});
        int64_t dim = conv->raw.shape[3], channels = conv->weight.shape[0];
        for (int64_t n = 0; n < p->N; n++)
            for (int64_t t = 0; t < p->c.lengths[n] && p->slot[n] >= 0; t++)
                for (int64_t c = 0; c < channels; c++) {
                    double inputs[CONV_WIDTH];
                    for (int64_t j = 0; j < CONV_WIDTH; j++)
                        inputs[j] = conv_input(p, i, n, t - CONV_PAST + j, c);
                    tensor_set(input, prefill_row(p, input, n, t, c / dim) * dim + c % dim,
                               fused_convolve(conv, c, inputs));
                }
    }
}

static const DLTensor *optional(const struct tensor *t) { return t->block ? &t->dl : NULL; }

static void make_args(struct prefill_problem *p) {
    flash_kda_prefill_args *a = &p->args;
    if (p->c.fused.conv[0])
        a->q = &p->conv[0].raw.dl;
    if (p->c.fused.conv[1])
        a->k = &p->conv[1].raw.dl;
    if (p->c.fused.conv[2])
        a->v = &p->conv[2].raw.dl;
    a->q_conv_weight = optional(&p->conv[0].weight);
    a->q_conv_bias = optional(&p->conv[0].bias);
    a->k_conv_weight = optional(&p->conv[1].weight);
    a->k_conv_bias = optional(&p->conv[1].bias);
    a->v_conv_weight = optional(&p->conv[2].weight);
    a->v_conv_bias = optional(&p->conv[2].bias);
    a->norm_weight = optional(&p->norm_weight);
    a->norm_gate = optional(&p->norm_gate);
    a->norm_activation = p->c.fused.norm_activation;
    a->norm_eps = FUSED_NORM_EPS;
}

void prefill_fuse_outputs(struct prefill_problem *p, struct prefill_results *exact, struct random *r) {
    const struct fused_options *o = &p->c.fused;
    if (o->norm) {
        tensor_make(&p->norm_weight, p->c.parameter_type, 1, &p->c.V,
                    (struct tensor_layout){SPACING_COMPACT, 0, false});
        fill_normal(&p->norm_weight, r, 1, 0.3);
        if (o->norm_gate) {
            tensor_make(&p->norm_gate, p->c.g_type, 4, p->out.shape,
                        (struct tensor_layout){p->c.inputs, 1, false});
            fill_normal(&p->norm_gate, r, 0, 2);
        }
        fused_norm(o, &p->norm_weight, &p->norm_gate, p->c.V, &exact->out);
    }
    if (o->norm || o->conv[0] || o->conv[1] || o->conv[2])
        make_args(p);
}

/* Every state holds the last inputs of its sequence, and all other memory what it held. */
const char *prefill_conv_states_differ(const struct prefill_problem *p, const struct prefill_results *r) {
    for (int i = 0; i < CONVOLUTIONS; i++) {
        struct tensor expected;
        if (!p->conv[i].state.block)
            continue;
        tensor_clone(&expected, &p->conv[i].state);
        int64_t elements = expected.shape[1] * CONV_PAST;
        for (int64_t n = 0; n < p->N; n++)
            for (int64_t e = 0; e < elements && p->slot[n] >= 0; e++)
                tensor_set(&expected, p->slot[n] * elements + e,
                           conv_input(p, i, n, p->c.lengths[n] - CONV_PAST + e % CONV_PAST, e / CONV_PAST));
        bool same = tensor_same(&expected, &r->conv_state[i]);
        tensor_free(&expected);
        if (!same)
            return "a convolution's states are not the last inputs, or memory beside them was touched";
    }
    return NULL;
}

/* ---- Cases --------------------------------------------------------------------------------------- */

static const struct {
    enum packing packing;
    int count;
    int64_t lengths[MAX_SEQUENCES];
    const char *name;
} batches[] = {{PACKING_INT64, 7, {70, 1, 0, 33, 2, 3, 130}, "packed"},
               {PACKING_DENSE, 2, {100, 100}, "dense"},
               {PACKING_INT32, 4, {0, 300, 5, 0}, "packed, empty ends"},
               {PACKING_DENSE, 3, {2, 2, 2}, "two tokens"}};
enum { BATCHES = sizeof batches / sizeof *batches };

static const int64_t dims[][4] = {{2, 2, 64, 64}, {2, 1, 128, 128}, {2, 2, 20, 7}, {1, 3, 100, 130}};
enum { DIMS = sizeof dims / sizeof *dims };

static struct prefill_case case_of(int kind, int batch, int variant) {
    const DLDataType types[] = {TYPE_BF16, TYPE_FP32, TYPE_FP16};
    const int64_t *dim = dims[variant % DIMS];
    struct prefill_case c = prefill_case_plain();
    c.sequences = batches[batch].count;
    c.packing = batches[batch].packing;
    for (int n = 0; n < c.sequences; n++)
        c.lengths[n] = batches[batch].lengths[n];
    c.H = dim[0];
    c.group = dim[1];
    c.K = dim[2];
    c.V = dim[3];
    prefill_case_set_gate(&c, (flash_kda_gate)(variant % 3));
    c.fill = fill_remembering;
    c.q_type = c.k_type = types[variant % 3];
    c.v_type = c.g_type = types[variant / 2 % 3];
    c.out_type = types[variant / 3 % 3];
    c.inputs = variant / 2 % 2 ? SPACING_COMPACT : SPACING_FUSED;
    c.threads = 1 + variant % 3;
    c.initial = variant % 5 == 4 ? STORAGE_NONE : STORAGE_FP32;
    c.final = variant % 4 == 3 ? STORAGE_NONE : STORAGE_IN_PLACE;
    if (c.final == STORAGE_IN_PLACE && !c.initial)
        c.final = STORAGE_FP32;
    c.layout = (flash_kda_state_layout)(variant % 2);
    c.pool = variant % 3 && (c.initial || c.final);
    c.padding_slot = variant % 2;
    c.flags = (enum flags)(variant % 4);
    c.checkpoints = variant % 4 == 1 ? CHECKPOINTS_EVERY : CHECKPOINTS_NONE;
    c.fused = fused_kinds[kind];
    c.fused.conv_type = types[variant % 3];
    c.conv_states = variant % 6 != 5;
    c.bf16_tolerance = BF16_FUSED;
    snprintf(c.name, sizeof c.name, "fused, %s, %s, H %lld x%lld, K %lld, V %lld, %s%s%s", c.fused.name,
             batches[batch].name, (long long)dim[0], (long long)dim[1], (long long)dim[2], (long long)dim[3],
             type_name(c.q_type), c.pool ? ", in a pool" : "", c.conv_states ? "" : ", no states");
    return c;
}

/* Whole rows of 16 bytes, all in bf16, in shapes that Hopper's schedules take. */
static struct prefill_case plain_case_of(int kind, int batch, int64_t dim) {
    struct prefill_case c = case_of(kind, batch, 0);
    c.H = 4;
    c.group = 1;
    c.K = c.V = dim;
    prefill_case_set_gate(&c, FLASH_KDA_GATE_SIGMOID);
    c.v_type = c.g_type = c.beta_type = c.out_type = TYPE_BF16;
    c.inputs = SPACING_COMPACT;
    c.pool = true;
    snprintf(c.name, sizeof c.name, "fused, %s, %s, K = V = %lld in bf16", c.fused.name, batches[batch].name,
             (long long)dim);
    return c;
}

void prefill_fused(struct check *check) {
    for (int kind = 0, variant = 0; kind < FUSED_KINDS; kind++)
        for (int batch = 0; batch < BATCHES; batch++, variant++) {
            const struct prefill_case c = case_of(kind, batch, variant),
                                      plain = plain_case_of(kind, batch, kind % 2 ? 64 : 128);
            prefill_compare(check, &c);
            prefill_compare(check, &plain);
        }
}
