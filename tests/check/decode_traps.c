/* SPDX-License-Identifier: MIT */
/* Numerical traps, on the few tokens of one call of decode. */
#include "decode_case.h"
#include "decode_families.h"

#include <math.h>
#include <stdio.h>

static void both_layouts(struct check *check, struct decode_case c, const char *name) {
    for (int k_first = 0; k_first < 2; k_first++) {
        c.tokens.layout = (flash_kda_state_layout)k_first;
        snprintf(c.tokens.name, sizeof c.tokens.name, "decode, %s, %s", name, k_first ? "K first" : "V first");
        decode_compare(check, &c);
    }
}

static struct decode_case trap(flash_kda_gate gate, double parameter,
                               void (*fill)(struct prefill_problem *, struct random *)) {
    struct decode_case c = decode_case_plain();
    c.tokens.gate = gate;
    c.tokens.A_log = c.tokens.dt_bias = gate != FLASH_KDA_GATE_NONE;
    c.tokens.lengths[0] = c.tokens.lengths[1] = FLASH_KDA_MAX_DECODE_TOKENS;
    c.tokens.fill = fill;
    c.tokens.parameter = parameter;
    return c;
}

static void fill_decay(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    tensor_fill(&p->g, p->c.parameter);
}

/* A hard reset of some channels, on some tokens. */
static void fill_resets(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    for (int64_t i = 0; i < tensor_count(&p->g); i++)
        if (random_below(r, 4) == 0)
            tensor_set(&p->g, i, -(double)INFINITY);
}

/* A gate of 0 times an exp(A_log) that is infinite. */
static void fill_large_A_log(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    tensor_fill(&p->A_log, p->c.parameter);
    tensor_fill(&p->g, -1e4);
}

static void fill_large_values(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    for (int64_t i = 0; i < tensor_count(&p->v); i++)
        tensor_set(&p->v, i, tensor_get(&p->v, i) * p->c.parameter);
    for (int64_t i = 0; i < tensor_count(&p->initial_state); i++)
        tensor_set(&p->initial_state, i, tensor_get(&p->initial_state, i) * p->c.parameter);
}

static void fill_scaled_keys(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    fill_normal(&p->q, r, 0, p->c.parameter);
    fill_normal(&p->k, r, 0, p->c.parameter);
}

static void fill_zero_keys(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    tensor_fill(&p->k, 0);
    tensor_fill(&p->q, 0);
}

void decode_traps(struct check *check) {
    static const double decays[] = {0, -1e-9, -5, -100, -1e30}, magnitudes[] = {1e20, 1e-20, 1e-37},
                        key_sizes[] = {1e15, 1e19, 1e20, 1e30, 3e37}, outputs[] = {1e10, 1e19, 1e25, 1e35};
    char name[80];
    for (size_t i = 0; i < sizeof decays / sizeof *decays; i++) {
        snprintf(name, sizeof name, "log decay %g", decays[i]);
        both_layouts(check, trap(FLASH_KDA_GATE_NONE, decays[i], fill_decay), name);
    }
    for (size_t i = 0; i < sizeof magnitudes / sizeof *magnitudes; i++) {
        snprintf(name, sizeof name, "values and states of %g", magnitudes[i]);
        both_layouts(check, trap(FLASH_KDA_GATE_SIGMOID, magnitudes[i], fill_large_values), name);
    }
    for (size_t i = 0; i < sizeof key_sizes / sizeof *key_sizes; i++) {
        struct decode_case c = trap(FLASH_KDA_GATE_SIGMOID, key_sizes[i], fill_scaled_keys);
        c.tokens.qk_norm = true;
        snprintf(name, sizeof name, "q and k of %g", key_sizes[i]);
        both_layouts(check, c, name);
        c.tokens.lengths[0] = c.tokens.lengths[1] = 1;
        c.tokens.K = c.tokens.V = 128;
        snprintf(name, sizeof name, "q and k of %g, one token", key_sizes[i]);
        both_layouts(check, c, name);
    }
    for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) {
        struct decode_case c = trap(FLASH_KDA_GATE_SIGMOID, outputs[i], fill_large_values);
        c.fused.norm = true;
        snprintf(name, sizeof name, "a norm of outputs of %g", outputs[i]);
        both_layouts(check, c, name);
    }
    both_layouts(check, trap(FLASH_KDA_GATE_NONE, 0, fill_resets), "hard resets");
    both_layouts(check, trap(FLASH_KDA_GATE_SOFTPLUS, 100, fill_large_A_log), "A_log 100, gate 0");
    both_layouts(check, trap(FLASH_KDA_GATE_SIGMOID, 2, fill_large_A_log), "sigmoid gate at 0");
    both_layouts(check, trap(FLASH_KDA_GATE_SIGMOID, 0, fill_zero_keys), "q and k of 0");
    struct decode_case collinear = trap(FLASH_KDA_GATE_SIGMOID, 0, fill_collinear);
    collinear.tokens.fp32_tolerance = TOLERANCE_FP32_COLLINEAR;
    both_layouts(check, collinear, "equal keys");
}
