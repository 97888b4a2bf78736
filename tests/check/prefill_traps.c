/* SPDX-License-Identifier: MIT */
/* Numerical traps that other kernels fell into, on a few hundred tokens; the long ones are in prefill_long.c. */
#include "prefill_compare.h"
#include "prefill_families.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static void both_types(struct check *check, struct prefill_case *c, const char *name) {
    snprintf(c->name, sizeof c->name, "%s, fp32", name);
    prefill_compare(check, c);
    if (check->quick)
        return;
    c->q_type = c->k_type = c->v_type = c->g_type = c->beta_type = c->out_type = TYPE_BF16;
    snprintf(c->name, sizeof c->name, "%s, bf16", name);
    prefill_compare(check, c);
}

static struct prefill_case trap(flash_kda_gate gate, void (*fill)(struct prefill_problem *, struct random *)) {
    struct prefill_case c = prefill_case_plain();
    c.gate = gate;
    c.A_log = c.dt_bias = gate != FLASH_KDA_GATE_NONE;
    c.K = c.V = 128;
    c.lengths[0] = 257;
    c.fill = fill;
    return c;
}

/* ---- Constant strong decay --------------------------------------------------------------------- */

static void fill_constant_decay(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    tensor_fill(&p->g, p->c.parameter);
}

/* 64-token blocks with one anchor gave NaN at -5 a token and were silently wrong at -3; 16-token blocks
 * overflowed past -5.5. */
static void constant_decays(struct check *check) {
    static const double decays[] = {-3, -5, -5.5, -6, -20, -50, -1000, -1e30};
    for (size_t i = 0; i < sizeof decays / sizeof *decays; i++) {
        char name[80];
        struct prefill_case c = trap(FLASH_KDA_GATE_NONE, fill_constant_decay);
        c.parameter = decays[i];
        snprintf(name, sizeof name, "log decay %g on every channel and token", decays[i]);
        both_types(check, &c, name);
    }
}

/* Log decays above 0, which a caller may give, among others below: the state grows and shrinks. */
static void fill_rising(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    fill_uniform(&p->g, r, -0.5, 0.3);
}

static void rising(struct check *check) {
    struct prefill_case c = trap(FLASH_KDA_GATE_NONE, fill_rising);
    both_types(check, &c, "log decays from -0.5 to 0.3");
}

/* The sigmoid gate at its bound, reached as kernels reach it. */
static void fill_saturated(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    tensor_fill(&p->g, p->c.parameter);
    tensor_fill(&p->A_log, 2);
}

static void saturated_sigmoid(struct check *check) {
    static const double gates[] = {100, -100};
    for (size_t i = 0; i < sizeof gates / sizeof *gates; i++) {
        char name[80];
        struct prefill_case c = trap(FLASH_KDA_GATE_SIGMOID, fill_saturated);
        c.parameter = gates[i];
        snprintf(name, sizeof name, "sigmoid gate saturated at raw g = %g", gates[i]);
        both_types(check, &c, name);
    }
}

/* ---- Unbounded gates --------------------------------------------------------------------------- */

/* Log decays anywhere from 0 to `parameter`, many small and some huge, so that a channel that was wiped must
 * still be exact afterwards. */
static void fill_unbounded(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    for (int64_t i = 0; i < tensor_count(&p->g); i++) {
        double u = random_uniform(r, 0, 1);
        tensor_set(&p->g, i,
                   u < 0.1 ? p->c.parameter * random_uniform(r, 0, 1) : -exp(random_uniform(r, -10, 1)));
    }
}

static void unbounded(struct check *check) {
    static const double deepest[] = {-50, -1e3, -6e4, -1e30, -HUGE_VAL};
    for (size_t i = 0; i < sizeof deepest / sizeof *deepest; i++) {
        char name[80];
        struct prefill_case c = trap(FLASH_KDA_GATE_NONE, fill_unbounded);
        c.lengths[0] = 129;
        c.H = 8;
        c.parameter = deepest[i];
        snprintf(name, sizeof name, "unbounded log decay down to %g, 129 tokens of 8 heads", deepest[i]);
        both_types(check, &c, name);
    }
}

/* Ranges of real checkpoints: exp(A_log) to 201, raw g to +-2661. */
static void fill_large_A_log(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    for (int64_t h = 0; h < p->HV; h++)
        tensor_set(&p->A_log, h, h % 2 ? random_uniform(r, -3, 3) : log(201));
    for (int64_t i = 0; i < tensor_count(&p->g); i++) {
        double u = random_uniform(r, 0, 1);
        tensor_set(&p->g, i, u < 0.05 ? random_uniform(r, -2661, 2661) : -8 + 4 * random_normal(r));
    }
}

static void large_A_log(struct check *check) {
    for (int gate = FLASH_KDA_GATE_SOFTPLUS; gate <= FLASH_KDA_GATE_SIGMOID; gate++) {
        struct prefill_case c = trap((flash_kda_gate)gate, fill_large_A_log);
        both_types(check, &c,
                   gate == FLASH_KDA_GATE_SIGMOID ? "exp(A_log) 201 and raw g to 2661, sigmoid"
                                                  : "exp(A_log) 201 and raw g to 2661, softplus");
    }
}

/* ---- Hard resets ------------------------------------------------------------------------------- */

/* Some channels of some tokens are reset, whole tokens too; everything else decays slowly. */
static void fill_resets(struct prefill_problem *p, struct random *r) {
    double reset = p->c.gate == FLASH_KDA_GATE_SOFTPLUS ? HUGE_VAL : -HUGE_VAL;
    fill_ordinary(p, r);
    for (int64_t i = 0; i < tensor_count(&p->g); i++) {
        bool whole_token = i / p->c.K % 50 == 20;
        if (whole_token || random_uniform(r, 0, 1) < 0.02)
            tensor_set(&p->g, i, reset);
        else
            tensor_set(&p->g, i, p->c.gate == FLASH_KDA_GATE_NONE ? -random_uniform(r, 0, 0.1) : -4);
    }
}

static void resets(struct check *check) {
    for (int gate = FLASH_KDA_GATE_NONE; gate <= FLASH_KDA_GATE_SOFTPLUS; gate++) {
        struct prefill_case c = trap((flash_kda_gate)gate, fill_resets);
        both_types(check, &c, gate ? "hard resets by g = inf, softplus" : "hard resets by a log decay of -inf");
        c = trap((flash_kda_gate)gate, fill_resets);
        c.K = 20;
        c.V = 7;
        c.H = 1;
        c.lengths[0] = 700;
        c.threads = 8;
        both_types(check, &c,
                   gate ? "hard resets by g = inf, softplus, K = 20, split" : "hard resets, K = 20, split");
    }
}

/* ---- What a float's exponent does not hold ------------------------------------------------------- */

/* A token that forgets nothing among some that forget all: within 16 tokens decay leaves fp32's range, but two neighbours must
 * see each other. */
static void fill_island(struct prefill_problem *p, struct random *r) {
    enum { PERIOD = 32, ISLAND = PERIOD / 2, REACH = PERIOD / 4 };
    fill_ordinary(p, r);
    tensor_fill(&p->A_log, 0);
    tensor_fill(&p->dt_bias, 0);
    for (int64_t i = 0; i < tensor_count(&p->g); i++) {
        int64_t distance = llabs(i / p->c.K / p->HV % PERIOD - ISLAND);
        tensor_set(&p->g, i, distance == 0 || distance > REACH ? -6 : 20);
    }
}

static void island(struct check *check) {
    struct prefill_case c = trap(FLASH_KDA_GATE_SOFTPLUS, fill_island);
    c.qk_norm = true;
    both_types(check, &c, "a token without decay among tokens that forget all");
}

/* ---- What moves between channels --------------------------------------------------------------- */

static void moving(struct check *check) {
    struct prefill_case c = trap(FLASH_KDA_GATE_SIGMOID, fill_moving);
    both_types(check, &c, "every channel forgets within 32 tokens, the state does not");
}

/* ---- Scales ------------------------------------------------------------------------------------ */

static void fill_scaled_v(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    fill_normal(&p->v, r, 0, p->c.parameter);
}

/* v's scale grows by orders of magnitude on the way, as a kernel with a power-of-two scale must follow. */
static void fill_growing_v(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    int64_t row = p->HV * p->c.V, count = tensor_count(&p->v);
    for (int64_t i = 0; i < count; i++) {
        int64_t token = i / row;
        tensor_set(&p->v, i, random_normal(r) * pow(10, -6 + 10.0 * (double)token / (double)p->T));
    }
}

static void scales(struct check *check) {
    static const double factors[] = {1e-6, 1e4, 1e-20, 1e20, 1e-40};
    for (size_t i = 0; i < sizeof factors / sizeof *factors; i++) {
        char name[80];
        struct prefill_case c = trap(FLASH_KDA_GATE_SIGMOID, fill_scaled_v);
        c.initial = STORAGE_NONE;
        c.parameter = factors[i];
        snprintf(name, sizeof name, "v of scale %g", factors[i]);
        both_types(check, &c, name);
    }
    struct prefill_case c = trap(FLASH_KDA_GATE_SOFTPLUS, fill_growing_v);
    both_types(check, &c, "v growing from 1e-6 to 1e4");
}

/* Normalised q and k may be of any size, whatever factors of the decay they meet. Parameter 0: growing on the way. */
static void fill_scaled_keys(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    int64_t row = p->c.H * p->c.K, count = tensor_count(&p->k);
    for (int64_t i = 0; i < count; i++) {
        int64_t token = i / row;
        double growing = pow(10, -6 + 10.0 * (double)token / (double)p->T);
        double size = p->c.parameter != 0 ? p->c.parameter : growing;
        tensor_set(&p->q, i, size * random_normal(r));
        tensor_set(&p->k, i, size * random_normal(r));
    }
}

static void fill_scaled_keys_at_bound(struct prefill_problem *p, struct random *r) {
    fill_scaled_keys(p, r);
    tensor_fill(&p->g, 100);
    tensor_fill(&p->A_log, 2);
}

static void key_scales(struct check *check) {
    static const double sizes[] = {1e-6, 1e4, 1e15, 1e19, 1e20, 1e30, 3e37, 0};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char name[80], size[40];
        snprintf(size, sizeof size, sizes[i] != 0 ? "of scale %g" : "growing from 1e-6 to 1e4", sizes[i]);
        struct prefill_case c = trap(FLASH_KDA_GATE_SIGMOID, fill_scaled_keys);
        c.qk_norm = true;
        c.parameter = sizes[i];
        snprintf(name, sizeof name, "q and k %s", size);
        both_types(check, &c, name);
        c.fill = fill_scaled_keys_at_bound;
        snprintf(name, sizeof name, "q and k %s, decay at its bound", size);
        both_types(check, &c, name);
    }
}

/* Denormal q and k are normalised by sqrt(1e-6), not by their own length. */
static void fill_denormal_keys(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    for (int64_t i = 0; i < tensor_count(&p->q); i++)
        if (random_uniform(r, 0, 1) < 0.5) {
            tensor_set(&p->q, i, 1e-39 * random_normal(r));
            tensor_set(&p->k, i, 1e-39 * random_normal(r));
        }
    for (int64_t i = 0; i < 4 * p->c.H * p->c.K; i++)
        tensor_set(&p->k, i, 0);
}

static void denormal_keys(struct check *check) {
    struct prefill_case c = trap(FLASH_KDA_GATE_SIGMOID, fill_denormal_keys);
    both_types(check, &c, "denormal and zero entries of q and k");
}

/* ---- Nearly equal keys ------------------------------------------------------------------------- */

static void collinear(struct check *check) {
    struct prefill_case c = trap(FLASH_KDA_GATE_SIGMOID, fill_collinear);
    c.fp32_tolerance = TOLERANCE_FP32_COLLINEAR;
    c.bf16_tolerance = BF16_COLLINEAR;
    c.initial = STORAGE_NONE;
    both_types(check, &c, "equal keys, beta near 1, slow decay, 257 tokens");
    c = trap(FLASH_KDA_GATE_SIGMOID, fill_collinear);
    c.fp32_tolerance = TOLERANCE_FP32_COLLINEAR;
    c.bf16_tolerance = BF16_COLLINEAR;
    c.initial = STORAGE_NONE;
    c.beta_mode = FLASH_KDA_BETA_TWICE_SIGMOID;
    c.lengths[0] = 65;
    both_types(check, &c, "equal keys, beta near 2, slow decay, 65 tokens");
}

/* ---- Keys that are not normalised ---------------------------------------------------------------- */

/* Where beta |k|^2 is above 2 a token makes what lies along its key larger. After keys of length `parameter` and values of 0
 * come some tokens with values, as after left padding: the answer is 0 up to there, but what a segment does to a state
 * overflows. */
static void fill_growing(struct prefill_problem *p, struct random *r) {
    enum { LAST = 20 };
    fill_ordinary(p, r);
    tensor_fill(&p->g, -0.01);
    tensor_fill(&p->beta, 1);
    for (int64_t t = 0; t < p->T; t++)
        for (int64_t h = 0; h < p->HV; h++) {
            double squares = 0;
            int64_t k = prefill_row(p, &p->k, 0, t, h) * p->c.K, v = prefill_row(p, &p->v, 0, t, h) * p->c.V;
            for (int64_t c = 0; c < p->c.K; c++)
                squares += tensor_get(&p->k, k + c) * tensor_get(&p->k, k + c);
            double length = t < p->T - LAST ? p->c.parameter : 1;
            for (int64_t c = 0; c < p->c.K; c++)
                tensor_set(&p->k, k + c, tensor_get(&p->k, k + c) * length / sqrt(squares));
            for (int64_t j = 0; t < p->T - LAST && j < p->c.V; j++)
                tensor_set(&p->v, v + j, 0);
        }
}

/* What keys of length 1.45 make grow, decay makes small again: outputs are ordinary numbers all the way, and must be as right
 * as they are without segments. */
static void fill_growing_and_decaying(struct prefill_problem *p, struct random *r) {
    fill_growing(p, r);
    tensor_fill(&p->g, -0.2);
    fill_normal(&p->v, r, 0, 1);
}

/* Keys of length 1, and instead a beta that is not between 0 and 2. */
static void fill_given_beta(struct prefill_problem *p, struct random *r) {
    enum { LAST = 20 };
    fill_ordinary(p, r);
    tensor_fill(&p->g, -9);
    for (int64_t i = 0; i < (p->T - LAST) * p->HV; i++)
        tensor_set(&p->beta, i, p->c.parameter);
    for (int64_t i = 0; i < (p->T - LAST) * p->HV * p->c.V; i++)
        tensor_set(&p->v, i, 0);
}

static void given_beta(struct check *check) {
    static const double betas[] = {2.5, -0.5};
    for (size_t i = 0; i < sizeof betas / sizeof *betas; i++) {
        struct prefill_case c = trap(FLASH_KDA_GATE_SIGMOID, fill_given_beta);
        char name[80];
        c.H = 1;
        c.lengths[0] = 4096;
        c.threads = 16;
        c.qk_norm = true;
        c.A_log = c.dt_bias = false;
        c.beta_mode = FLASH_KDA_BETA_GIVEN;
        c.initial = STORAGE_NONE;
        c.parameter = betas[i];
        snprintf(name, sizeof name, "a given beta of %g, values 0 but for the last 20, in segments", betas[i]);
        both_types(check, &c, name);
    }
}

static void growing(struct check *check) {
    static const double lengths[] = {1.6, 3, 8};
    for (size_t i = 0; i <= sizeof lengths / sizeof *lengths; i++) {
        bool last = i == sizeof lengths / sizeof *lengths;
        struct prefill_case c = trap(FLASH_KDA_GATE_NONE, last ? fill_growing_and_decaying : fill_growing);
        char name[80];
        c.H = 1;
        c.K = c.V = 64;
        c.lengths[0] = 4096;
        c.threads = 16;
        c.qk_norm = false;
        c.beta_mode = FLASH_KDA_BETA_GIVEN;
        c.initial = STORAGE_NONE;
        c.parameter = last ? 1.45 : lengths[i];
        snprintf(name, sizeof name, "keys of length %g, %s, in segments", c.parameter,
                 last ? "decay against them" : "values 0 but for the last 20");
        both_types(check, &c, name);
    }
}

void prefill_traps(struct check *check) {
    constant_decays(check);
    rising(check);
    saturated_sigmoid(check);
    unbounded(check);
    large_A_log(check);
    resets(check);
    island(check);
    moving(check);
    scales(check);
    key_scales(check);
    denormal_keys(check);
    collinear(check);
    growing(check);
    given_beta(check);
}
