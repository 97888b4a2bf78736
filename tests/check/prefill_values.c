/* SPDX-License-Identifier: MIT */
/* Values of inputs that several families of cases share. */
#include "prefill_case.h"

#include <math.h>

void fill_normal(struct tensor *t, struct random *r, double mean, double deviation) {
    for (int64_t i = 0; i < tensor_count(t); i++)
        tensor_set(t, i, mean + deviation * random_normal(r));
}

void fill_uniform(struct tensor *t, struct random *r, double low, double high) {
    for (int64_t i = 0; i < tensor_count(t); i++)
        tensor_set(t, i, random_uniform(r, low, high));
}

/* Log decays from e^-6 to e^2 nats a token: some channels forget at once, some keep nearly everything. */
static void fill_log_decay(struct tensor *g, struct random *r) {
    for (int64_t i = 0; i < tensor_count(g); i++)
        tensor_set(g, i, -exp(random_uniform(r, -6, 2)));
}

/* Rows of q or k as a caller who normalises by himself gives them. Longer keys make the recurrence unstable. */
static void fill_unit_rows(struct tensor *t, struct random *r) {
    int64_t K = t->shape[3];
    double row[256];
    for (int64_t first = 0; first < tensor_count(t); first += K) {
        double squares = 0;
        for (int64_t c = 0; c < K; c++) {
            row[c] = random_normal(r);
            squares += row[c] * row[c];
        }
        for (int64_t c = 0; c < K; c++)
            tensor_set(t, first + c, row[c] / sqrt(squares));
    }
}

void fill_ordinary(struct prefill_problem *p, struct random *r) {
    if (p->c.qk_norm) {
        fill_normal(&p->q, r, 0, 1);
        fill_normal(&p->k, r, 0, 1);
    } else {
        fill_unit_rows(&p->q, r);
        fill_unit_rows(&p->k, r);
    }
    fill_normal(&p->v, r, 0, 1);
    if (p->c.gate == FLASH_KDA_GATE_NONE)
        fill_log_decay(&p->g, r);
    else
        fill_normal(&p->g, r, -2, 3);
    if (p->c.beta_mode == FLASH_KDA_BETA_GIVEN)
        fill_uniform(&p->beta, r, 0, 1);
    else
        fill_normal(&p->beta, r, 0, 1);
    if (p->c.A_log)
        fill_uniform(&p->A_log, r, -1, 2);
    if (p->c.dt_bias)
        fill_uniform(&p->dt_bias, r, -1, 1);
}

void fill_remembering(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    if (p->c.gate == FLASH_KDA_GATE_NONE)
        fill_uniform(&p->g, r, -1e-3, 0);
    else
        fill_normal(&p->g, r, -9, 1);
    if (p->c.beta_mode == FLASH_KDA_BETA_GIVEN)
        fill_uniform(&p->beta, r, 0, 0.05);
    else
        fill_normal(&p->beta, r, -4, 1);
    if (p->c.A_log) /* with a small exp(A_log) the sigmoid gate is strong whatever g is */
        fill_uniform(&p->A_log, r, 0, 0.5);
}

void fill_collinear(struct prefill_problem *p, struct random *r) {
    tensor_fill(&p->q, 1);
    tensor_fill(&p->k, 1);
    for (int64_t i = 0; i < tensor_count(&p->v); i++) {
        int64_t period = 16 * p->HV * p->c.V;
        tensor_set(&p->v, i, i < period ? random_normal(r) : tensor_get(&p->v, i - period));
    }
    tensor_fill(&p->g, -12);
    tensor_fill(&p->beta, 8);
    tensor_fill(&p->A_log, 0);
    tensor_fill(&p->dt_bias, 0);
}

void fill_moving(struct prefill_problem *p, struct random *r) {
    enum { PERIOD = 32, HALF = PERIOD / 2 };
    int64_t K = p->c.K, heads = p->HV;
    fill_ordinary(p, r);
    tensor_fill(&p->A_log, 0);
    tensor_fill(&p->dt_bias, 0);
    for (int64_t i = 0; i < tensor_count(&p->g); i++) {
        bool second = i / K / heads % PERIOD >= HALF, upper = i % K >= K / 2;
        tensor_set(&p->g, i, second == upper ? -20 : 20);
    }
    for (int64_t i = 0; i < tensor_count(&p->beta); i++)
        tensor_set(&p->beta, i, i / heads % HALF == HALF - 1 ? 20 : -4);
    for (int64_t i = 0; i < tensor_count(&p->k); i++)
        if (i / K / p->c.H % HALF == HALF - 1)
            tensor_set(&p->k, i, i % 3 ? 1 : -1);
}
