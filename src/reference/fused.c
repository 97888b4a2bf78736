/* SPDX-License-Identifier: MIT */
#include "reference/fused.h"

#include <math.h>

double kda_load_input(const struct kda_tensor *x, const struct kda_convolution *conv,
                      const struct kda_sequence *s, int64_t t, int64_t head, int64_t c) {
    if (!conv->weight.data)
        return kda_load(kda_row(x, s->batch, s->first + t, head), x->dtype, c);
    int64_t channel = head * x->shape[3] + c;
    const char *weight = conv->weight.data + channel * conv->weight.stride[0];
    double sum = conv->bias.data ? kda_load(conv->bias.data, conv->bias.dtype, channel) : 0;
    for (int64_t i = 0; i < KDA_CONV_WIDTH; i++)
        sum += kda_load(weight, conv->weight.dtype, i) *
               (double)kda_conv_input(x, conv, s, t - KDA_CONV_PAST + i, head, c);
    return sum * kda_sigmoid(sum);
}

struct kda_token kda_load_fused_token(const struct kda_tokens *p, const struct kda_fused *fused,
                                      const struct kda_sequence *s, int64_t t, int64_t head) {
    struct kda_token x = kda_load_token(p, s->batch, s->first + t, head);
    int64_t key_head = head / (p->value_heads / p->heads);
    for (int64_t c = 0; c < p->key_dim; c++) {
        x.q[c] = kda_load_input(&p->q, &fused->q_conv, s, t, key_head, c);
        x.k[c] = kda_load_input(&p->k, &fused->k_conv, s, t, key_head, c);
    }
    kda_normalise(p, x.q);
    kda_normalise(p, x.k);
    return x;
}

double kda_normed(const struct kda_fused *fused, const struct kda_sequence *s, int64_t t, int64_t head,
                  int64_t j, double o, double mean_square) {
    if (!fused->norm_weight.data)
        return o;
    double y = o / sqrt(mean_square + (double)fused->norm_eps) *
               kda_load(fused->norm_weight.data, fused->norm_weight.dtype, j);
    if (!fused->norm_gate.data)
        return y;
    double z = kda_load(kda_row(&fused->norm_gate, s->batch, s->first + t, head), fused->norm_gate.dtype, j);
    return y * kda_sigmoid(z) * (fused->norm_activation == FLASH_KDA_NORM_SILU ? z : 1);
}
