/* SPDX-License-Identifier: MIT */
/* Backward on odd lengths and head dims, and on the numerical traps of gates, steps and keys. */
#include "backward_compare.h"
#include "prefill_compare.h"

#include <math.h>
#include <stdio.h>

/* Derivatives one by one take small head dims; levels take those of models. */
static bool oracle_tested(const struct check *check) {
    return level_backend(check->levels[0]) == FLASH_KDA_BACKEND_REFERENCE;
}

/* ---- Lengths and head dims --------------------------------------------------------------------- */

static void lengths(struct check *check) {
    static const int64_t list[] = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129};
    enum { LENGTHS = sizeof list / sizeof *list };
    for (int i = 0; i < LENGTHS; i++)
        for (int gate = 0; gate < 3; gate++) {
            struct backward_case b = backward_case_plain();
            struct prefill_case *c = &b.forward;
            prefill_case_set_gate(c, (flash_kda_gate)gate);
            c->H = 1;
            c->group = 2;
            c->K = c->V = oracle_tested(check) ? 3 : 64;
            c->packing = gate == 1 ? PACKING_DENSE : PACKING_INT64;
            c->sequences = 2;
            c->lengths[0] = list[i];
            c->lengths[1] = gate == 1 ? list[i] : list[LENGTHS - 1 - i];
            c->checkpoints = i % 2 ? CHECKPOINTS_EVERY : CHECKPOINTS_NONE;
            snprintf(c->name, sizeof c->name, "backward of lengths %lld and %lld, gate %s, states %s",
                     (long long)c->lengths[0], (long long)c->lengths[1], prefill_gate_names[gate],
                     i % 2 ? "kept" : "found again");
            backward_compare(check, &b);
        }
}

/* Fused spacing surrounds every row with NaN: a read past K or V shows. */
static void head_dims(struct check *check) {
    static const int64_t dims[] = {1, 2, 7, 16, 17, 33, 63, 64, 65, 96, 100, 128, 129, 192, 256};
    enum { DIMS = sizeof dims / sizeof *dims };
    for (int i = 0; i < DIMS; i++) {
        struct backward_case b = backward_case_plain();
        struct prefill_case *c = &b.forward;
        c->K = dims[i];
        c->V = dims[(i * 7 + 5) % DIMS];
        c->lengths[0] = oracle_tested(check) ? 3 : 70;
        if (oracle_tested(check) && c->K * c->V > 1500)
            c->V = 2;
        c->group = 1 + i % 2;
        c->inputs = c->outputs = SPACING_FUSED;
        prefill_case_set_gate(c, (flash_kda_gate)(i % 3));
        snprintf(c->name, sizeof c->name, "backward of head dims K = %lld, V = %lld, gate %s", (long long)c->K,
                 (long long)c->V, prefill_gate_names[c->gate]);
        backward_compare(check, &b);
    }
}

/* ---- Traps ------------------------------------------------------------------------------------- */

/* Some channels of some tokens are reset, whole tokens too, by what the case says; some do not decay at all. */
static void fill_resets(struct prefill_problem *p, struct random *r) {
    double reset = p->c.parameter;
    fill_ordinary(p, r);
    for (int64_t i = 0; i < tensor_count(&p->g); i++) {
        bool whole_token = i / p->c.K / p->HV % 30 == 20;
        double u = random_uniform(r, 0, 1);
        if (whole_token || u < 0.05)
            tensor_set(&p->g, i, reset);
        else if (p->c.gate == FLASH_KDA_GATE_NONE)
            tensor_set(&p->g, i, u < 0.1 ? 0 : -random_uniform(r, 0, 0.1));
    }
}

/* Steps of 0 and 1 as given; logits at which a sigmoid in fp32 is one of them. */
static void fill_steps(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    bool given = p->c.beta_mode == FLASH_KDA_BETA_GIVEN;
    for (int64_t i = 0; i < tensor_count(&p->beta); i++)
        if (i % 5 < 2)
            tensor_set(&p->beta, i, given ? (double)(i % 5) : i % 5 ? 120 : -120);
}

/* Gates so far out that sigmoid and softplus are at their ends, with the largest exp(A_log) of trained models. */
static void fill_saturated(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    for (int64_t h = 0; h < p->HV; h++)
        tensor_set(&p->A_log, h, h % 2 ? random_uniform(r, -3, 3) : log(201));
    for (int64_t i = 0; i < tensor_count(&p->g); i++)
        if (random_uniform(r, 0, 1) < 0.3)
            tensor_set(&p->g, i, random_uniform(r, 0, 1) < 0.5 ? 500 : -500);
}

static void fill_zero_rows(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    for (int64_t i = 0; i < tensor_count(&p->q); i++) {
        if (i / p->c.K % 7 == 3)
            tensor_set(&p->q, i, 0);
        if (i / p->c.K % 11 == 3)
            tensor_set(&p->k, i, 0);
    }
}

/* -4.97 nats a token in most channels. */
static void fill_strong(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    for (int64_t i = 0; i < tensor_count(&p->g); i++)
        tensor_set(&p->g, i, i % p->c.K * 2 < p->c.K || random_uniform(r, 0, 1) < 0.9 ? -4.97 : -0.01);
}

/* Keys of length 0.95 that have much in common, and beta 1. */
static void fill_correlated(struct prefill_problem *p, struct random *r) {
    fill_remembering(p, r);
    tensor_fill(&p->beta, 1);
    for (int64_t row = 0; row < tensor_count(&p->k) / p->c.K; row++) {
        double squares = 0;
        for (int64_t i = 0; i < p->c.K; i++) {
            double x = 3 + random_normal(r);
            tensor_set(&p->k, row * p->c.K + i, x);
            squares += x * x;
        }
        for (int64_t i = 0; i < p->c.K; i++)
            tensor_set(&p->k, row * p->c.K + i, 0.95 * tensor_get(&p->k, row * p->c.K + i) / sqrt(squares));
    }
}

static void fill_collinear_keys(struct prefill_problem *p, struct random *r) {
    fill_collinear(p, r);
    fill_normal(&p->q, r, 0, 1); /* of a q along k the gradient is 0 after the norm */
}

static struct backward_case trap(struct check *check, flash_kda_gate gate,
                                 void (*fill)(struct prefill_problem *, struct random *), const char *name) {
    struct backward_case b = backward_case_plain();
    struct prefill_case *c = &b.forward;
    prefill_case_set_gate(c, gate);
    c->K = oracle_tested(check) ? 6 : 128;
    c->V = oracle_tested(check) ? 3 : 128;
    c->lengths[0] = oracle_tested(check) ? 70 : 257;
    c->fill = fill;
    snprintf(c->name, sizeof c->name, "backward, %s", name);
    return b;
}

static void gates(struct check *check) {
    struct backward_case b =
        trap(check, FLASH_KDA_GATE_NONE, fill_resets, "hard resets by a log decay of -inf, some of 0");
    b.forward.parameter = -HUGE_VAL;
    backward_compare(check, &b);
    b = trap(check, FLASH_KDA_GATE_NONE, fill_resets, "hard resets by a log decay of -1e4, some of 0");
    b.forward.parameter = -1e4;
    backward_compare(check, &b);
    b = trap(check, FLASH_KDA_GATE_SOFTPLUS, fill_resets, "hard resets by g = 1e30, softplus");
    b.forward.parameter = 1e30;
    backward_compare(check, &b);
    b = trap(check, FLASH_KDA_GATE_SOFTPLUS, fill_saturated, "gates at their ends, exp(A_log) 201, softplus");
    backward_compare(check, &b);
    b = trap(check, FLASH_KDA_GATE_SIGMOID, fill_saturated, "gates at their ends, exp(A_log) 201, sigmoid");
    backward_compare(check, &b);
    b = trap(check, FLASH_KDA_GATE_NONE, fill_strong, "-5 nats in most channels");
    backward_compare(check, &b);
    for (int e = -60; e <= 40; e += 20) {
        b = trap(check, FLASH_KDA_GATE_NONE, fill_strong, "");
        b.size = ldexp(1, e);
        snprintf(b.forward.name, sizeof b.forward.name, "backward, -5 nats in most channels, gradients of 2^%d",
                 e);
        backward_compare(check, &b);
    }
}

static void steps_and_keys(struct check *check) {
    for (int mode = 0; mode < 3; mode++) {
        struct backward_case b = trap(check, FLASH_KDA_GATE_SIGMOID, fill_steps, "");
        b.forward.beta_mode = (flash_kda_beta)mode;
        snprintf(b.forward.name, sizeof b.forward.name, "backward, steps of 0 and 1, beta mode %d", mode);
        backward_compare(check, &b);
    }
    struct backward_case b = trap(check, FLASH_KDA_GATE_SIGMOID, fill_zero_rows, "rows of zeros in q and k");
    backward_compare(check, &b);
    b = trap(check, FLASH_KDA_GATE_SOFTPLUS, fill_zero_rows, "rows of zeros in q and k, not normalised");
    b.forward.qk_norm = false;
    backward_compare(check, &b);
    b = trap(check, FLASH_KDA_GATE_SIGMOID, fill_correlated, "correlated keys of length 0.95, beta 1");
    b.forward.qk_norm = false;
    b.forward.beta_mode = FLASH_KDA_BETA_GIVEN;
    b.forward.fp32_tolerance = TOLERANCE_FP32_COLLINEAR;
    b.bf16 = BF16_GRADIENTS_COLLINEAR;
    backward_compare(check, &b);
    b = trap(check, FLASH_KDA_GATE_SIGMOID, fill_collinear_keys, "equal keys, beta near 1, slow decay");
    b.forward.fp32_tolerance = TOLERANCE_FP32_COLLINEAR;
    b.bf16 = BF16_GRADIENTS_COLLINEAR;
    backward_compare(check, &b);
    b = trap(check, FLASH_KDA_GATE_SIGMOID, fill_moving, "every channel forgets within 32 tokens");
    backward_compare(check, &b);
}

/* ---- Long ones --------------------------------------------------------------------------------- */

/* Gates of random models, where decay is strong and where it is slow. */
static void fill_random(struct prefill_problem *p, struct random *r) {
    fill_normal(&p->q, r, 0, 1);
    fill_normal(&p->k, r, 0, 1);
    fill_normal(&p->v, r, 0, 1);
    fill_normal(&p->g, r, p->c.parameter, 1);
    fill_normal(&p->beta, r, 0, 1);
    fill_uniform(&p->A_log, r, 0, 1);
    fill_uniform(&p->dt_bias, r, 0, 1);
}

void backward_long(struct check *check) {
    static const struct {
        const char *name;
        flash_kda_gate gate;
        double mean;
        struct bf16_gradients bf16;
    } inputs[] = {{"strong gates", FLASH_KDA_GATE_SIGMOID, 0, BF16_GRADIENTS_STRONG},
                  {"slow gates", FLASH_KDA_GATE_SIGMOID, -7, BF16_GRADIENTS_SLOW},
                  {"softplus gates", FLASH_KDA_GATE_SOFTPLUS, -3, BF16_GRADIENTS_SLOW}};
    int64_t shorter = check->quick ? 8 : 1;
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        for (int kept = 0; kept < 2; kept++) {
            struct backward_case b = trap(check, inputs[i].gate, fill_random, "");
            b.forward.lengths[0] = 4096 / shorter;
            b.forward.parameter = inputs[i].mean;
            b.bf16 = inputs[i].bf16;
            b.forward.q_type = b.forward.k_type = b.forward.v_type = b.forward.g_type = TYPE_BF16;
            b.forward.beta_type = b.forward.out_type = TYPE_BF16;
            b.forward.checkpoints = kept ? CHECKPOINTS_EVERY : CHECKPOINTS_NONE;
            b.forward.every = 128;
            for (int g = 0; kept && g < DA_LOG; g++) /* as models are trained */
                b.types[g] = TYPE_BF16;
            snprintf(b.forward.name, sizeof b.forward.name, "backward, 4096 tokens, %s%s", inputs[i].name,
                     kept ? ", states kept" : "");
            backward_compare(check, &b);
        }
    struct backward_case b =
        trap(check, FLASH_KDA_GATE_SIGMOID, fill_collinear_keys, "equal keys, 16384 tokens");
    b.forward.H = 1;
    b.forward.lengths[0] = 16384 / shorter;
    b.forward.fp32_tolerance = TOLERANCE_FP32_COLLINEAR;
    b.bf16 = BF16_GRADIENTS_COLLINEAR;
    backward_compare(check, &b);
}

void backward_traps(struct check *check) {
    lengths(check);
    head_dims(check);
    gates(check);
    steps_and_keys(check);
}
