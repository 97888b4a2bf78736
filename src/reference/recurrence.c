/* SPDX-License-Identifier: MIT */
/* The recurrence of docs/maths.md in fp64. Every backend is compared with it, so it is kept as short and as plain as the
 * mathematics. */
#include "reference/recurrence.h"

#include <math.h>

double kda_sigmoid(double x) { return 1 / (1 + exp(-x)); }

double kda_softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

double kda_gate_factor(const struct kda_tokens *p, int64_t head) {
    const struct kda_tensor *t = &p->A_log;
    return t->data ? exp((double)kda_load(t->data + head * t->stride[0], t->dtype, 0)) : 1;
}

double kda_gate_bias(const struct kda_tokens *p, int64_t head, int64_t c) {
    const struct kda_tensor *t = &p->dt_bias;
    return t->data ? kda_load(t->data + head * t->stride[0], t->dtype, c) : 0;
}

/* a: the log decay of one channel. */
static double log_decay(const struct kda_tokens *p, double g, double A, double dt_bias) {
    switch (p->gate) {
    case FLASH_KDA_GATE_SOFTPLUS:
        return -A * kda_softplus(g + dt_bias);
    case FLASH_KDA_GATE_SIGMOID:
        return p->lower_bound * kda_sigmoid(A * (g + dt_bias));
    default:
        return g;
    }
}

static double step(const struct kda_tokens *p, double beta) {
    switch (p->beta_mode) {
    case FLASH_KDA_BETA_SIGMOID:
        return kda_sigmoid(beta);
    case FLASH_KDA_BETA_TWICE_SIGMOID:
        return 2 * kda_sigmoid(beta);
    default:
        return beta;
    }
}

void kda_normalise(const struct kda_tokens *p, double *x) {
    double squares = 0;
    for (int64_t c = 0; c < p->key_dim; c++)
        squares += x[c] * x[c];
    for (int64_t c = 0; p->qk_norm && c < p->key_dim; c++)
        x[c] /= sqrt(squares + 1e-6);
}

/* x [K]: one row of q or k, normalised if asked for. */
static void load_key(const struct kda_tokens *p, const struct kda_tensor *t, int64_t batch, int64_t token,
                     int64_t head, double *x) {
    const char *row = kda_row(t, batch, token, head);
    for (int64_t c = 0; c < p->key_dim; c++)
        x[c] = kda_load(row, t->dtype, c);
    kda_normalise(p, x);
}

struct kda_token kda_load_token(const struct kda_tokens *p, int64_t batch, int64_t token, int64_t head) {
    struct kda_token x;
    int64_t group = p->value_heads / p->heads;
    load_key(p, &p->q, batch, token, head / group, x.q);
    load_key(p, &p->k, batch, token, head / group, x.k);
    const char *g = kda_row(&p->g, batch, token, head);
    double A = kda_gate_factor(p, head);
    for (int64_t c = 0; c < p->key_dim; c++)
        x.decay[c] = exp(log_decay(p, kda_load(g, p->g.dtype, c), A, kda_gate_bias(p, head, c)));
    x.beta = step(p, kda_load(kda_row(&p->beta, batch, token, head), p->beta.dtype, 0));
    return x;
}

void kda_load_state(const struct kda_tokens *p, struct kda_state state, struct kda_columns columns, double *S) {
    for (int64_t c = 0; c < p->key_dim; c++)
        for (int64_t j = 0; j < columns.count; j++) {
            int64_t row = state.v_first ? columns.first + j : c, column = state.v_first ? c : columns.first + j;
            S[c * columns.count + j] =
                state.data ? kda_load(state.data + row * state.stride, state.dtype, column) : 0;
        }
}

void kda_store_state(const struct kda_tokens *p, struct kda_state state, struct kda_columns columns,
                     const double *S) {
    for (int64_t c = 0; c < p->key_dim; c++)
        for (int64_t j = 0; j < columns.count; j++) {
            int64_t row = state.v_first ? columns.first + j : c, column = state.v_first ? c : columns.first + j;
            kda_store(state.data + row * state.stride, state.dtype, column, (float)S[c * columns.count + j]);
        }
}

void kda_recur(const struct kda_tokens *p, const struct kda_token *x, int64_t count, double *S, double *u) {
    for (int64_t c = 0; c < p->key_dim; c++)
        for (int64_t j = 0; j < count; j++) {
            S[c * count + j] *= x->decay[c];
            u[j] -= S[c * count + j] * x->k[c];
        }
    for (int64_t c = 0; c < p->key_dim; c++)
        for (int64_t j = 0; j < count; j++)
            S[c * count + j] += x->k[c] * x->beta * u[j];
    for (int64_t j = 0; j < count; j++)
        u[j] = 0;
    for (int64_t c = 0; c < p->key_dim; c++)
        for (int64_t j = 0; j < count; j++)
            u[j] += S[c * count + j] * x->q[c];
    for (int64_t j = 0; j < count; j++)
        u[j] *= p->scale;
}
