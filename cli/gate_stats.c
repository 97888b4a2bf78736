/* SPDX-License-Identifier: MIT */
/* How fast the heads of a case forget. */
#include "gate_stats.h"

#include <math.h>

enum { MAX_SAMPLES = 4096 };

double half_life(double log_decay) { return M_LN2 / -log_decay; }

static double softplus(double x) { return fmax(x, 0) + log1p(exp(-fabs(x))); }

static double log_decay(const struct kda_case *c, int64_t token, int64_t head, int64_t channel) {
    double g = tensor_get(&c->g, (token * c->value_heads + head) * c->key_dim + channel);
    if (c->gate == FLASH_KDA_GATE_NONE)
        return g;
    double rate = tensor_present(&c->A_log) ? exp(tensor_get(&c->A_log, head)) : 1;
    double biased =
        g + (tensor_present(&c->dt_bias) ? tensor_get(&c->dt_bias, head * c->key_dim + channel) : 0);
    return c->gate == FLASH_KDA_GATE_SOFTPLUS ? -rate * softplus(biased)
                                              : c->lower_bound / (1 + exp(-rate * biased));
}

static struct head_decay head_stats(const struct kda_case *c, int64_t head, int64_t tokens, int64_t samples) {
    double sum = 0, sum_of_largest = 0, largest_of_all = -INFINITY;
    for (int64_t i = 0; i < samples; i++) {
        double largest = -INFINITY;
        for (int64_t channel = 0; channel < c->key_dim; channel++) {
            double a = log_decay(c, i * tokens / samples, head, channel);
            sum += a;
            largest = fmax(largest, a);
        }
        sum_of_largest += largest;
        largest_of_all = fmax(largest_of_all, largest);
    }
    double tokens_seen = (double)samples;
    return (struct head_decay){sum / (tokens_seen * (double)c->key_dim), sum_of_largest / tokens_seen,
                               largest_of_all};
}

int64_t gate_stats(const struct kda_case *c, struct head_decay *heads) {
    int64_t tokens = c->batch * c->tokens;
    int64_t samples = tokens < MAX_SAMPLES ? tokens : MAX_SAMPLES;
    for (int64_t head = 0; head < c->value_heads; head++)
        heads[head] = head_stats(c, head, tokens, samples);
    return samples;
}
