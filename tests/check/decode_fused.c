/* SPDX-License-Identifier: MIT */
/* Decode as a whole step of a layer: convolutions in front of it, a gated norm after it. What is right comes from the oracle
 * between them, and from both written once more here. */
#include "decode_case.h"
#include "decode_families.h"

#include <stdio.h>

/* ---- Convolutions -------------------------------------------------------------------------------- */

static struct tensor *input_of(struct prefill_problem *p, int i) {
    struct tensor *const inputs[] = {&p->q, &p->k, &p->v};
    return inputs[i];
}

double decode_conv_input(const struct decode_problem *d, int i, int64_t n, int64_t t, int64_t channel) {
    const struct fused_convolution *conv = &d->conv[i];
    int64_t channels = conv->weight.shape[0], dim = conv->raw.shape[3];
    if (t >= 0)
        return tensor_get(&conv->raw,
                          prefill_row(&d->p, &conv->raw, n, t, channel / dim) * dim + channel % dim);
    if (d->p.fresh[n])
        return 0;
    return tensor_get(&conv->state,
                      (d->slot[n][d->column[n]] * channels + channel) * CONV_PAST + CONV_PAST + t);
}

static double convolved(const struct decode_problem *d, int i, int64_t n, int64_t t, int64_t channel) {
    double inputs[CONV_WIDTH];
    for (int64_t j = 0; j < CONV_WIDTH; j++)
        inputs[j] = decode_conv_input(d, i, n, t - CONV_PAST + j, channel);
    return fused_convolve(&d->conv[i], channel, inputs);
}

/* Weights, and states that are NaN but for those of the sequences. */
static void make_convolution(struct decode_problem *d, int i, struct random *r) {
    struct fused_convolution *conv = &d->conv[i];
    fused_make_weights(conv, &d->c.fused, r);
    fused_make_states(conv, &d->c.fused, d->slots, d->c.tokens.inputs != SPACING_COMPACT);
    int64_t channels = conv->state.shape[1];
    for (int64_t n = 0; n < d->p.N; n++)
        for (int64_t j = 0; j < channels * CONV_PAST && d->p.slot[n] >= 0 && !d->p.fresh[n]; j++)
            tensor_set(&conv->state, d->slot[n][d->column[n]] * channels * CONV_PAST + j, random_normal(r));
}

void decode_fuse_inputs(struct decode_problem *d, struct random *r) {
    for (int i = 0; i < 3; i++) {
        struct fused_convolution *conv = &d->conv[i];
        struct tensor *input = input_of(&d->p, i);
        if (!d->c.fused.conv[i])
            continue;
        fused_move(&conv->raw, input);
        make_convolution(d, i, r);
        tensor_make(input, TYPE_FP32, 4, conv->raw.shape, (struct tensor_layout){SPACING_COMPACT, 0, false});
        int64_t dim = conv->raw.shape[3], channels = conv->weight.shape[0];
        for (int64_t n = 0; n < d->p.N; n++)
            for (int64_t t = 0; t < d->c.tokens.lengths[n] && d->p.slot[n] >= 0; t++)
                for (int64_t c = 0; c < channels; c++)
                    tensor_set(input, prefill_row(&d->p, input, n, t, c / dim) * dim + c % dim,
                               convolved(d, i, n, t, c));
    }
}

/* ---- The norm ------------------------------------------------------------------------------------ */

void decode_fuse_outputs(struct decode_problem *d, struct random *r) {
    int64_t V = d->c.tokens.V;
    struct tensor *out = &d->exact.out;
    if (!d->c.fused.norm)
        return;
    tensor_make(&d->norm_weight, d->c.tokens.parameter_type, 1, &V,
                (struct tensor_layout){SPACING_COMPACT, 0, false});
    fill_normal(&d->norm_weight, r, 1, 0.3);
    if (d->c.fused.norm_gate) {
        tensor_make(&d->norm_gate, d->c.tokens.g_type, 4, out->shape,
                    (struct tensor_layout){d->c.tokens.inputs, 1, false});
        fill_normal(&d->norm_gate, r, 0, 2);
    }
    fused_norm(&d->c.fused, &d->norm_weight, &d->norm_gate, V, out);
}

/* ---- Cases --------------------------------------------------------------------------------------- */

/* How it is called: as in pairwise_cases.c. */
static const struct {
    int64_t columns;
    bool num_accepted, accepted, keep_state, no_out;
    enum packing packing;
    const char *name;
} ways[] = {
    {0, false, false, false, false, PACKING_DENSE, "pool"},
    {16, true, false, false, false, PACKING_INT32, "verify"},
    {16, true, true, false, false, PACKING_INT64, "verify, accepted"},
    {0, false, false, true, false, PACKING_INT32, "state kept"},
    {0, false, true, false, true, PACKING_DENSE, "commit"},
};
enum { WAYS = sizeof ways / sizeof *ways };

static const int64_t dims[][4] = {
    {2, 1, 64, 64}, {1, 4, 128, 128}, {2, 2, 20, 7}, {1, 1, 256, 100}, {3, 2, 1, 130}};
enum { DIMS = sizeof dims / sizeof *dims };

static struct decode_case case_of(int part, int way, int variant) {
    static const int64_t lengths[] = {5, 0, 16, 1, 2};
    const DLDataType types[] = {TYPE_FP32, TYPE_BF16, TYPE_FP16};
    const int64_t *dim = dims[variant % DIMS];
    struct decode_case c = decode_case_plain();
    c.tokens.sequences = sizeof lengths / sizeof *lengths;
    c.tokens.packing = ways[way].packing;
    for (int n = 0; n < c.tokens.sequences; n++)
        c.tokens.lengths[n] = ways[way].packing == PACKING_DENSE ? 1 + variant % 4 : lengths[n];
    c.tokens.H = dim[0];
    c.tokens.group = dim[1];
    c.tokens.K = dim[2];
    c.tokens.V = dim[3];
    c.tokens.layout = (flash_kda_state_layout)(variant % 2);
    c.tokens.gate = variant % 3 ? FLASH_KDA_GATE_SOFTPLUS : FLASH_KDA_GATE_SIGMOID;
    c.tokens.inputs = variant % 2 ? SPACING_FUSED : SPACING_COMPACT;
    c.tokens.q_type = c.tokens.k_type = types[variant % 3];
    c.tokens.v_type = types[variant / 2 % 3];
    c.tokens.out_type = c.tokens.g_type = types[variant / 3 % 3];
    c.tokens.threads = 1 + variant % 3;
    c.tokens.flags = (enum flags)(variant % 4);
    c.tokens.padding_slot = variant / 2 % 2;
    c.tokens.wide_indices = variant / 3 % 2;
    c.state_type = types[variant / 2 % 3];
    c.columns = ways[way].columns;
    c.num_accepted = ways[way].num_accepted;
    c.accepted = ways[way].accepted;
    c.keep_state = ways[way].keep_state;
    c.no_out = ways[way].no_out;
    c.fused = fused_kinds[part];
    c.fused.conv_type = types[variant % 3];
    snprintf(c.tokens.name, sizeof c.tokens.name, "fused, %s, %s, H %lld x%lld, K %lld, V %lld, %s state, %s",
             fused_kinds[part].name, ways[way].name, (long long)dim[0], (long long)dim[1], (long long)dim[2],
             (long long)dim[3], type_name(c.state_type), variant % 2 ? "K first" : "V first");
    return c;
}

void decode_fused(struct check *check) {
    for (int part = 0, variant = 0; part < FUSED_KINDS; part++)
        for (int way = 0; way < WAYS; way++, variant++) {
            const struct decode_case c = case_of(part, way, variant);
            decode_compare(check, &c);
        }
}
