/* SPDX-License-Identifier: MIT */
#include "fused.h"

#include "prefill_case.h"

#include <math.h>

const struct fused_options fused_kinds[FUSED_KINDS] = {
    {{true, true, true}, true, {0, 0, 0}, true, true, FLASH_KDA_NORM_SIGMOID, "all"},
    {{true, true, true}, false, {0, 0, 0}, true, true, FLASH_KDA_NORM_SILU, "all, no bias, SiLU"},
    {{true, false, false}, true, {0, 0, 0}, false, false, FLASH_KDA_NORM_SIGMOID, "convolution of q"},
    {{false, true, false}, true, {0, 0, 0}, false, false, FLASH_KDA_NORM_SIGMOID, "convolution of k"},
    {{false, false, true}, true, {0, 0, 0}, false, false, FLASH_KDA_NORM_SIGMOID, "convolution of v"},
    {{false, false, false}, false, {0, 0, 0}, true, false, FLASH_KDA_NORM_SIGMOID, "norm"},
    {{false, false, false}, false, {0, 0, 0}, true, true, FLASH_KDA_NORM_SILU, "norm and SiLU"},
};

void fused_move(struct tensor *to, struct tensor *from) {
    *to = *from;
    to->dl.shape = to->shape;
    to->dl.strides = from->dl.strides ? to->strides : NULL;
    *from = (struct tensor){.block = NULL};
}

static double silu(double x) { return x / (1 + exp(-x)); }

static int64_t channels_of(const struct fused_convolution *conv) {
    return conv->raw.shape[2] * conv->raw.shape[3];
}

void fused_make_weights(struct fused_convolution *conv, const struct fused_options *o, struct random *r) {
    const int64_t shape[2] = {channels_of(conv), CONV_WIDTH};
    tensor_make(&conv->weight, o->conv_type, 2, shape, (struct tensor_layout){SPACING_FUSED, 0, false});
    fill_normal(&conv->weight, r, 0, 0.5);
    if (o->conv_bias) {
        tensor_make(&conv->bias, o->conv_type, 1, shape, (struct tensor_layout){SPACING_COMPACT, 0, false});
        fill_normal(&conv->bias, r, 0, 0.3);
    }
}

void fused_make_states(struct fused_convolution *conv, const struct fused_options *o, int64_t slots,
                       bool exchange) {
    const int64_t shape[3] = {slots, channels_of(conv), CONV_PAST};
    tensor_make(&conv->state, o->conv_type, 3, shape,
                (struct tensor_layout){exchange ? SPACING_HEADS_FIRST : SPACING_FUSED, 0, true});
}

double fused_convolve(const struct fused_convolution *conv, int64_t channel, const double inputs[CONV_WIDTH]) {
    double sum = conv->bias.block ? tensor_get(&conv->bias, channel) : 0;
    for (int64_t i = 0; i < CONV_WIDTH; i++)
        sum += tensor_get(&conv->weight, channel * CONV_WIDTH + i) * inputs[i];
    return silu(sum);
}

void fused_norm(const struct fused_options *o, const struct tensor *weight, const struct tensor *gate,
                int64_t V, struct tensor *out) {
    for (int64_t row = 0; V && row < tensor_count(out) / V; row++) {
        double squares = 0;
        for (int64_t j = row * V; j < (row + 1) * V; j++)
            squares += tensor_get(out, j) * tensor_get(out, j);
        double factor = 1 / sqrt(squares / (double)V + FUSED_NORM_EPS);
        for (int64_t j = row * V; j < (row + 1) * V; j++) {
            double y = tensor_get(out, j) * factor * tensor_get(weight, j % V), z = 0;
            if (o->norm_gate)
                z = tensor_get(gate, j);
            if (o->norm_gate)
                y *= o->norm_activation == FLASH_KDA_NORM_SILU ? silu(z) : 1 / (1 + exp(-z));
            tensor_set(out, j, y);
        }
    }
}
