/* SPDX-License-Identifier: MIT */
/* Gradients as derivatives of a sum, one input after the other: sum = o . dO + S_T . dS_T, by a complex step. With
 * f analytic, f(x + ih) = f(x) + ih f'(x) + O(h^2), so that the imaginary part over h is what a central difference
 * approaches, and nothing cancels however small h is. The recurrence here is a second one, apart from the
 * library's. */
#include "backward_case.h"

#include <complex.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define STEP 0x1p-100

typedef double complex number;

enum { MAX_DIM = 256 };

/* One value head of one sequence. */
struct chain {
    const struct backward_problem *b;
    int64_t n, h, T, K, V;
    double *states;     /* [T + 1, K, V]: before each token, and after the last */
    number *S;          /* [K, V] */
    double *d_final;    /* [K, V] */
    enum gradient what; /* the input that takes the step: of token t, element i; [K, V] of the initial state */
    int64_t t, i;
};

bool formula_backward_feasible(const struct backward_problem *b) {
    double K = (double)b->p.c.K, V = (double)b->p.c.V, runs = 0;
    for (int64_t n = 0; n < b->p.N; n++)
        runs += (double)b->p.c.lengths[n] * ((double)b->p.c.lengths[n] * (3 * K + V + 1) + K + K * V);
    return runs * (double)b->p.HV * K * V < 1.2e8;
}

static double *numbers(int64_t count) { return must_allocate(count, sizeof(double)); }

/* Element i of a row, with the step if it is what is stepped. */
static number load(const struct chain *s, const struct tensor *x, enum gradient what, int64_t t, int64_t head,
                   int64_t width, int64_t i) {
    double value = tensor_get(x, prefill_row(&s->b->p, x, s->n, t, head) * width + i);
    return s->what == what && s->t == t && s->i == i ? value + STEP * I : value;
}

static number load_parameter(const struct chain *s, const struct tensor *x, bool given, enum gradient what,
                             int64_t at, int64_t i) {
    double value = given ? tensor_get(x, at) : 0;
    return s->what == what && s->i == i ? value + STEP * I : value;
}

static void load_unit(const struct chain *s, const struct tensor *x, enum gradient what, int64_t t,
                      number *row) {
    number squares = 1e-6;
    for (int64_t i = 0; i < s->K; i++) {
        row[i] = load(s, x, what, t, s->h / s->b->p.c.group, s->K, i);
        squares += row[i] * row[i];
    }
    for (int64_t i = 0; i < s->K && s->b->p.c.qk_norm; i++)
        row[i] /= csqrt(squares);
}

static number sigmoid(number x) { return 1 / (1 + cexp(-x)); }

static number decay(const struct chain *s, int64_t t, int64_t i) {
    const struct prefill_case *c = &s->b->p.c;
    number g = load(s, &s->b->p.g, DG, t, s->h, s->K, i);
    number A = cexp(load_parameter(s, &s->b->p.A_log, c->A_log, DA_LOG, s->h, 0));
    g += load_parameter(s, &s->b->p.dt_bias, c->dt_bias, D_DT_BIAS, s->h * s->K + i, i);
    if (c->gate == FLASH_KDA_GATE_SOFTPLUS)
        return cexp(-A * (creal(g) > 30 ? g : clog(1 + cexp(g))));
    if (c->gate == FLASH_KDA_GATE_SIGMOID)
        return cexp(c->lower_bound * sigmoid(A * g));
    return cexp(g);
}

static number step(const struct chain *s, int64_t t) {
    number beta = load(s, &s->b->p.beta, DBETA, t, s->h, 1, 0);
    if (s->b->p.c.beta_mode == FLASH_KDA_BETA_GIVEN)
        return beta;
    return (s->b->p.c.beta_mode == FLASH_KDA_BETA_SIGMOID ? 1 : 2) * sigmoid(beta);
}

/* S through token t; adds o . dO. */
static number advance(const struct chain *s, int64_t t) {
    const struct prefill_case *c = &s->b->p.c;
    number q[MAX_DIM], k[MAX_DIM], a[MAX_DIM] = {0}, beta = step(s, t), sum = 0;
    load_unit(s, &s->b->p.q, DQ, t, q);
    load_unit(s, &s->b->p.k, DK, t, k);
    for (int64_t i = 0; i < s->K; i++)
        a[i] = decay(s, t, i);
    for (int64_t j = 0; j < s->V; j++) {
        number u = load(s, &s->b->p.v, DV, t, s->h, s->V, j), o = 0;
        for (int64_t i = 0; i < s->K; i++) {
            s->S[i * s->V + j] *= a[i];
            u -= s->S[i * s->V + j] * k[i];
        }
        for (int64_t i = 0; i < s->K; i++) {
            s->S[i * s->V + j] += k[i] * beta * u;
            o += s->S[i * s->V + j] * q[i];
        }
        if (s->b->c.d_out)
            sum += (c->scale != 0 ? c->scale : 1 / sqrt((double)s->K)) * o *
                   tensor_get(&s->b->d_out, prefill_row(&s->b->p, &s->b->d_out, s->n, t, s->h) * s->V + j);
    }
    return sum;
}

/* The derivative where the step is taken, which changes nothing before token `first`. */
static double derivative(struct chain *s, enum gradient what, int64_t first, int64_t i) {
    int64_t KV = s->K * s->V;
    number sum = 0;
    s->what = what;
    s->t = first;
    s->i = i;
    for (int64_t e = 0; e < KV; e++)
        s->S[e] = s->states[first * KV + e];
    if (what == D_INITIAL_STATE)
        s->S[i] += STEP * I;
    for (int64_t t = first; t < s->T; t++)
        sum += advance(s, t);
    for (int64_t e = 0; e < KV; e++)
        sum += s->S[e] * s->d_final[e];
    return cimag(sum) / STEP;
}

/* Place of (channel i, value j) of a head of a tensor of states. */
static int64_t state_place(const struct chain *s, int64_t i, int64_t j) {
    const struct prefill_problem *p = &s->b->p;
    int64_t inner = p->c.layout == FLASH_KDA_STATE_V_FIRST ? j * s->K + i : i * s->V + j;
    return (s->n * p->HV + s->h) * s->K * s->V + inner;
}

static void find_states(struct chain *s) {
    int64_t KV = s->K * s->V;
    for (int64_t e = 0; e < KV; e++) {
        int64_t place = state_place(s, e / s->V, e % s->V);
        s->S[e] = s->b->p.c.initial ? tensor_get(&s->b->p.initial_state, place) : 0;
        s->d_final[e] = s->b->c.d_final ? tensor_get(&s->b->d_final_state, place) : 0;
    }
    s->what = GRADIENTS; /* none */
    for (int64_t t = 0; t <= s->T; t++) {
        for (int64_t e = 0; e < KV; e++)
            s->states[t * KV + e] = creal(s->S[e]);
        if (t < s->T)
            advance(s, t);
    }
}

/* A tensor of tokens: `width` elements of head `head`; sums over value heads. */
static void add_rows(struct chain *s, enum gradient what, int64_t head, int64_t width, double *exact,
                     const struct tensor *like) {
    for (int64_t t = 0; t < s->T; t++)
        for (int64_t i = 0; i < width && like->block; i++)
            exact[prefill_row(&s->b->p, like, s->n, t, head) * width + i] += derivative(s, what, t, i);
}

static void add_chain(struct chain *s, const struct backward_results *r, double *const sums[GRADIENTS]) {
    int64_t key_head = s->h / s->b->p.c.group;
    find_states(s);
    add_rows(s, DQ, key_head, s->K, sums[DQ], &r->tensors[DQ]);
    add_rows(s, DK, key_head, s->K, sums[DK], &r->tensors[DK]);
    add_rows(s, DV, s->h, s->V, sums[DV], &r->tensors[DV]);
    add_rows(s, DG, s->h, s->K, sums[DG], &r->tensors[DG]);
    add_rows(s, DBETA, s->h, 1, sums[DBETA], &r->tensors[DBETA]);
    if (r->tensors[DA_LOG].block)
        sums[DA_LOG][s->h] += derivative(s, DA_LOG, 0, 0);
    for (int64_t i = 0; r->tensors[D_DT_BIAS].block && i < s->K; i++)
        sums[D_DT_BIAS][s->h * s->K + i] += derivative(s, D_DT_BIAS, 0, i);
    for (int64_t e = 0; r->tensors[D_INITIAL_STATE].block && e < s->K * s->V; e++)
        sums[D_INITIAL_STATE][state_place(s, e / s->V, e % s->V)] = derivative(s, D_INITIAL_STATE, 0, e);
}

void formula_backward(const struct backward_problem *b, struct backward_results *exact) {
    const struct prefill_problem *p = &b->p;
    double *sums[GRADIENTS] = {NULL};
    struct chain s = {.b = b, .K = p->c.K, .V = p->c.V};
    s.states = numbers((p->T + 1) * s.K * s.V);
    s.d_final = numbers(s.K * s.V);
    s.S = (number *)(void *)numbers(2 * s.K * s.V);
    for (int i = 0; i < GRADIENTS; i++)
        if (exact->tensors[i].block)
            sums[i] = numbers(tensor_count(&exact->tensors[i]));
    for (s.n = 0; s.n < p->N; s.n++)
        for (s.h = 0; s.h < p->HV; s.h++) {
            s.T = p->c.lengths[s.n];
            add_chain(&s, exact, sums);
        }
    for (int i = 0; i < GRADIENTS; i++) {
        for (int64_t e = 0; sums[i] && e < tensor_count(&exact->tensors[i]); e++)
            tensor_set(&exact->tensors[i], e, sums[i][e]);
        free(sums[i]);
    }
    free(s.states);
    free(s.d_final);
    free(s.S);
}
