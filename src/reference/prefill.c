/* SPDX-License-Identifier: MIT */
/* The oracle: the token recurrence of docs/maths.md in fp64, one head after the other. Every backend is
 * compared with it, so it is kept as short and as plain as the mathematics. */
#include "api/backend.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

static double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

/* a: the log decay of one channel. */
static double log_decay(const struct kda_prefill *p, double g, double A, double dt_bias) {
    switch (p->gate) {
    case FLASH_KDA_GATE_SOFTPLUS:
        return -A * softplus(g + dt_bias);
    case FLASH_KDA_GATE_SIGMOID:
        return p->lower_bound * sigmoid(A * (g + dt_bias));
    default:
        return g;
    }
}

static double step(const struct kda_prefill *p, double beta) {
    switch (p->beta_mode) {
    case FLASH_KDA_BETA_SIGMOID:
        return sigmoid(beta);
    case FLASH_KDA_BETA_TWICE_SIGMOID:
        return 2 * sigmoid(beta);
    default:
        return beta;
    }
}

/* x [K]: one row of q or k, normalised if asked for. */
static void load_key(const struct kda_prefill *p, const struct kda_tensor *t, int64_t batch, int64_t token,
                     int64_t head, double *x) {
    const char *row = kda_row(t, batch, token, head);
    double squares = 0;
    for (int64_t c = 0; c < p->key_dim; c++) {
        x[c] = kda_load(row, t->dtype, c);
        squares += x[c] * x[c];
    }
    for (int64_t c = 0; p->qk_norm && c < p->key_dim; c++)
        x[c] /= sqrt(squares + 1e-6);
}

/* S [K, V] from memory; zero if there is none. */
static void load_state(const struct kda_prefill *p, struct kda_state state, double *S) {
    for (int64_t c = 0; c < p->key_dim; c++)
        for (int64_t j = 0; j < p->value_dim; j++) {
            int64_t row = state.v_first ? j : c, column = state.v_first ? c : j;
            S[c * p->value_dim + j] =
                state.data ? kda_load(state.data + row * state.stride, state.dtype, column) : 0;
        }
}

static void store_state(const struct kda_prefill *p, struct kda_state state, const double *S) {
    for (int64_t c = 0; c < p->key_dim; c++)
        for (int64_t j = 0; j < p->value_dim; j++) {
            int64_t row = state.v_first ? j : c, column = state.v_first ? c : j;
            kda_store(state.data + row * state.stride, state.dtype, column, (float)S[c * p->value_dim + j]);
        }
}

static void store_checkpoints(const struct kda_prefill *p, int64_t n, int64_t position, int64_t head,
                              const double *S) {
    int64_t cursor = 0;
    struct kda_state state;
    while ((state = kda_checkpoint_at(p, n, position, head, &cursor)).data)
        store_state(p, state, S);
}

/* One token: decay, delta rule, read-out. u [V] is scratch. */
static void recur(const struct kda_prefill *p, int64_t batch, int64_t token, int64_t head, double *S,
                  double *u) {
    int64_t K = p->key_dim, V = p->value_dim, group = p->value_heads / p->heads;
    double q[256], k[256];
    load_key(p, &p->q, batch, token, head / group, q);
    load_key(p, &p->k, batch, token, head / group, k);
    const char *v = kda_row(&p->v, batch, token, head), *g = kda_row(&p->g, batch, token, head);
    double beta = step(p, kda_load(kda_row(&p->beta, batch, token, head), p->beta.dtype, 0));
    double A =
        p->A_log.data ? exp((double)kda_load(p->A_log.data + head * p->A_log.stride[0], p->A_log.dtype, 0)) : 1;

    for (int64_t j = 0; j < V; j++)
        u[j] = kda_load(v, p->v.dtype, j);
    for (int64_t c = 0; c < K; c++) {
        double dt_bias =
            p->dt_bias.data ? kda_load(p->dt_bias.data + head * p->dt_bias.stride[0], p->dt_bias.dtype, c) : 0;
        double decay = exp(log_decay(p, kda_load(g, p->g.dtype, c), A, dt_bias));
        for (int64_t j = 0; j < V; j++) {
            S[c * V + j] *= decay;
            u[j] -= S[c * V + j] * k[c];
        }
    }
    for (int64_t c = 0; c < K; c++)
        for (int64_t j = 0; j < V; j++)
            S[c * V + j] += k[c] * beta * u[j];
    for (int64_t j = 0; j < V; j++)
        u[j] = 0;
    for (int64_t c = 0; c < K; c++)
        for (int64_t j = 0; j < V; j++)
            u[j] += S[c * V + j] * q[c];
    for (int64_t j = 0; j < V; j++)
        kda_store(kda_row(&p->out, batch, token, head), p->out.dtype, j, (float)(p->scale * u[j]));
}

static flash_kda_status prefill(const struct kda_prefill *p, void *workspace) {
    double *S = workspace, *u = S + p->key_dim * p->value_dim;
    for (int64_t n = 0; n < p->sequences; n++) {
        struct kda_sequence sequence = kda_sequence(p, n);
        for (int64_t head = 0; head < p->value_heads && sequence.slot >= 0; head++) {
            load_state(p, kda_state_at(p, &p->initial_state, sequence.slot, head), S);
            store_checkpoints(p, n, 0, head, S);
            for (int64_t t = 0; t < sequence.length; t++) {
                recur(p, sequence.batch, sequence.first + t, head, S, u);
                store_checkpoints(p, n, t + 1, head, S);
            }
            struct kda_state final_state = kda_state_at(p, &p->final_state, sequence.slot, head);
            if (final_state.data)
                store_state(p, final_state, S);
        }
    }
    return FLASH_KDA_OK;
}

static flash_kda_status workspace_size(const struct kda_prefill *p, size_t *bytes) {
    *bytes = (size_t)(p->key_dim + 1) * (size_t)p->value_dim * sizeof(double);
    return FLASH_KDA_OK;
}

static flash_kda_status describe(const struct kda_prefill *p, char *text, size_t size) {
    snprintf(text, size, "reference: token recurrence in fp64, %" PRId64 " chains on 1 thread",
             p->sequences * p->value_heads);
    return FLASH_KDA_OK;
}

static bool available(void) { return true; }

const struct kda_backend kda_reference_backend = {.name = "reference",
                                                  .on_host = true,
                                                  .available = available,
                                                  .prefill_workspace_size = workspace_size,
                                                  .prefill = prefill,
                                                  .prefill_describe = describe,
                                                  .decode = kda_reference_decode,
                                                  .decode_describe = kda_reference_decode_describe};
