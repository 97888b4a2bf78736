/* SPDX-License-Identifier: MIT */
/* A second derivation of prefill, to test the oracle with: no recurrence over a state, but the closed form of
 * a whole sequence in fp64. With P(j, i) the product of the decays of tokens j + 1 .. i,
 *     u_i = beta_i (v_i - S_0^T P(-1, i) k_i - sum_{j < i} (k_i . P(j, i) k_j) u_j)
 *     o_i = scale (S_0^T P(-1, i) q_i + sum_{j <= i} (q_i . P(j, i) k_j) u_j)
 *     S after n tokens = P(-1, n - 1) S_0 + sum_{j < n} P(j, n - 1) k_j u_j^T. */
#include "prefill_case.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One head of one sequence; all [T, ..] arrays row-major. */
struct chain {
    int64_t T, K, V;
    double *q, *k, *decay; /* [T, K] */
    double *u;             /* [T, V]: v at first */
    double *beta;          /* [T] */
    double *S0;            /* [K, V] */
    double *weights;       /* [K] */
};

bool formula_feasible(const struct prefill_problem *p) {
    double pairs = 0;
    for (int64_t n = 0; n < p->N; n++)
        pairs += (double)p->c.lengths[n] * (double)p->c.lengths[n];
    return pairs * (double)p->HV * (double)(p->c.K + p->c.V) < 2e8;
}

static double *numbers(int64_t count) { return must_allocate(count, sizeof(double)); }

static double decay_of(const struct prefill_problem *p, double g, double A_log, double dt_bias) {
    double x = g + dt_bias;
    if (p->c.gate == FLASH_KDA_GATE_SOFTPLUS)
        return exp(-exp(A_log) * (x > 30 ? x : log1p(exp(x))));
    if (p->c.gate == FLASH_KDA_GATE_SIGMOID)
        return exp(p->c.lower_bound / (1 + exp(-exp(A_log) * x)));
    return exp(g);
}

static void load_unit(const struct prefill_problem *p, const struct tensor *t, int64_t row, double *x) {
    double norm = 0;
    for (int64_t c = 0; c < p->c.K; c++) {
        x[c] = tensor_get(t, row * p->c.K + c);
        norm += x[c] * x[c];
    }
    for (int64_t c = 0; c < p->c.K && p->c.qk_norm; c++)
        x[c] /= sqrt(norm + 1e-6);
}

static double step_of(const struct prefill_problem *p, double beta) {
    if (p->c.beta_mode == FLASH_KDA_BETA_GIVEN)
        return beta;
    return (p->c.beta_mode == FLASH_KDA_BETA_SIGMOID ? 1 : 2) / (1 + exp(-beta));
}

/* Place of (channel c, value j) of head h of a row of states. */
static int64_t state_place(const struct prefill_problem *p, int64_t row, int64_t h, int64_t c, int64_t j) {
    int64_t K = p->c.K, V = p->c.V;
    int64_t inner = p->c.layout == FLASH_KDA_STATE_V_FIRST ? j * K + c : c * V + j;
    return (row * p->HV + h) * K * V + inner;
}

static void load(const struct prefill_problem *p, int64_t n, int64_t h, struct chain *s) {
    for (int64_t t = 0; t < s->T; t++) {
        load_unit(p, &p->q, prefill_row(p, &p->q, n, t, h / p->c.group), s->q + t * s->K);
        load_unit(p, &p->k, prefill_row(p, &p->k, n, t, h / p->c.group), s->k + t * s->K);
        s->beta[t] = step_of(p, tensor_get(&p->beta, prefill_row(p, &p->beta, n, t, h)));
        int64_t row = prefill_row(p, &p->g, n, t, h);
        for (int64_t c = 0; c < s->K; c++)
            s->decay[t * s->K + c] =
                decay_of(p, tensor_get(&p->g, row * s->K + c), p->c.A_log ? tensor_get(&p->A_log, h) : 0,
                         p->c.dt_bias ? tensor_get(&p->dt_bias, h * s->K + c) : 0);
        for (int64_t j = 0; j < s->V; j++)
            s->u[t * s->V + j] = tensor_get(&p->v, prefill_row(p, &p->v, n, t, h) * s->V + j);
    }
    for (int64_t c = 0; c < s->K && p->c.initial && !p->fresh[n]; c++)
        for (int64_t j = 0; j < s->V; j++)
            s->S0[c * s->V + j] = tensor_get(&p->initial_state, state_place(p, p->slot[n], h, c, j));
}

static void add_scaled(double *x, const double *y, double factor, int64_t count) {
    for (int64_t j = 0; j < count; j++)
        x[j] += factor * y[j];
}

/* x += factor * (row . P(j, i) k_j) u_j over j = last .. 0, then factor * S_0^T P(-1, i) row. */
static void read_past(const struct chain *s, const double *row, int64_t i, int64_t last, double factor,
                      double *x) {
    memcpy(s->weights, row, (size_t)s->K * sizeof *row);
    for (int64_t j = i; j >= 0; j--) {
        double dot = 0;
        for (int64_t c = 0; c < s->K; c++)
            dot += s->weights[c] * s->k[j * s->K + c];
        if (j <= last)
            add_scaled(x, s->u + j * s->V, factor * dot, s->V);
        for (int64_t c = 0; c < s->K; c++)
            s->weights[c] *= s->decay[j * s->K + c];
    }
    for (int64_t c = 0; c < s->K; c++)
        add_scaled(x, s->S0 + c * s->V, factor * s->weights[c], s->V);
}

/* Writes the state after n tokens to a row of t. */
static void write_state(const struct prefill_problem *p, const struct chain *s, int64_t n, int64_t h,
                        struct tensor *t, int64_t row) {
    double *column = numbers(s->V);
    for (int64_t c = 0; c < s->K; c++) {
        double product = 1;
        memset(column, 0, (size_t)s->V * sizeof *column);
        for (int64_t j = n - 1; j >= 0; j--) {
            add_scaled(column, s->u + j * s->V, product * s->k[j * s->K + c], s->V);
            product *= s->decay[j * s->K + c];
        }
        add_scaled(column, s->S0 + c * s->V, product, s->V);
        for (int64_t j = 0; j < s->V; j++)
            tensor_set(t, state_place(p, row, h, c, j), column[j]);
    }
    free(column);
}

static void write_outputs(const struct prefill_problem *p, const struct chain *s, int64_t n, int64_t h,
                          struct tensor *out) {
    double scale = p->c.scale != 0 ? p->c.scale : 1 / sqrt((double)s->K);
    double *o = numbers(s->V);
    for (int64_t i = 0; i < s->T; i++) {
        double *u = s->u + i * s->V;
        read_past(s, s->k + i * s->K, i, i - 1, -1, u);
        for (int64_t j = 0; j < s->V; j++)
            u[j] *= s->beta[i];
        memset(o, 0, (size_t)s->V * sizeof *o);
        read_past(s, s->q + i * s->K, i, i, scale, o);
        for (int64_t j = 0; j < s->V; j++)
            tensor_set(out, prefill_row(p, out, n, i, h) * s->V + j, o[j]);
    }
    free(o);
}

static void one_chain(const struct prefill_problem *p, int64_t n, int64_t h, struct prefill_results *exact) {
    struct chain s = {.T = p->c.lengths[n], .K = p->c.K, .V = p->c.V};
    s.q = numbers(s.T * s.K);
    s.k = numbers(s.T * s.K);
    s.decay = numbers(s.T * s.K);
    s.u = numbers(s.T * s.V);
    s.beta = numbers(s.T);
    s.S0 = numbers(s.K * s.V);
    s.weights = numbers(s.K);
    load(p, n, h, &s);
    write_outputs(p, &s, n, h, &exact->out);
    if (p->final.ndim)
        write_state(p, &s, s.T, h, &exact->final, p->slot[n]);
    for (int64_t row = 0; row < p->checkpoints.rows; row++)
        if (p->checkpoints.written[row] && p->checkpoint_sequence[row] == n)
            write_state(p, &s, p->checkpoint_position[row], h, &exact->checkpoints, row);
    double *const all[] = {s.q, s.k, s.decay, s.u, s.beta, s.S0, s.weights};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

void formula_prefill(const struct prefill_problem *p, struct prefill_results *exact) {
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t h = 0; h < p->HV && p->slot[n] >= 0; h++)
            one_chain(p, n, h, exact);
}
