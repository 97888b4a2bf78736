/* SPDX-License-Identifier: MIT */
/* Prefill on thousands of tokens: the rows of the accuracy table (docs/maths.md), the traps that need length,
 * and the shapes whose speed is quoted. */
#include "prefill_compare.h"
#include "prefill_families.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static int64_t tokens(const struct check *check, int64_t count) { return check->quick ? count / 8 : count; }

/* ---- The accuracy table ------------------------------------------------------------------------ */

static void fill_strong(struct prefill_problem *p, struct random *r) {
    struct tensor *const normal[] = {&p->q, &p->k, &p->v, &p->g, &p->beta};
    for (size_t i = 0; i < sizeof normal / sizeof *normal; i++)
        fill_normal(normal[i], r, 0, 1);
    fill_uniform(&p->A_log, r, 0, 1);
    fill_uniform(&p->dt_bias, r, 0, 1);
}

static void fill_slow(struct prefill_problem *p, struct random *r) {
    fill_strong(p, r);
    fill_normal(&p->g, r, -7, 1);
    tensor_fill(&p->dt_bias, 0);
}

static void fill_uniform_inputs(struct prefill_problem *p, struct random *r) {
    fill_strong(p, r);
    fill_uniform(&p->q, r, 0, 1);
    fill_uniform(&p->k, r, 0, 1);
    fill_uniform(&p->v, r, 0, 1);
    tensor_fill(&p->g, p->c.parameter);
}

static struct prefill_case row(const struct check *check) {
    struct prefill_case c = prefill_case_plain();
    c.initial = STORAGE_NONE;
    c.K = c.V = 128;
    c.lengths[0] = tokens(check, 4096);
    c.q_type = c.k_type = c.v_type = c.g_type = c.beta_type = TYPE_BF16;
    return c;
}

/* With an fp32 output all levels use fp32 arithmetic; with a bf16 one some use bf16 products. */
static void both_outputs(struct check *check, struct prefill_case *c, const char *name) {
    for (int bf16 = 0; bf16 < 2; bf16++) {
        c->out_type = bf16 ? TYPE_BF16 : TYPE_FP32;
        snprintf(c->name, sizeof c->name, "accuracy: %s, T = %lld, out %s", name, (long long)c->lengths[0],
                 bf16 ? "bf16" : "fp32");
        prefill_compare(check, c);
    }
}

static void accuracy_table(struct check *check) {
    static const struct {
        const char *name;
        void (*fill)(struct prefill_problem *, struct random *);
        double parameter;
        struct bf16_tolerance tolerance;
    } rows[] = {{"strong random gates", fill_strong, 0, BF16_STRONG},
                {"slow random gates", fill_slow, 0, BF16_SLOW},
                {"uniform inputs, g = -8", fill_uniform_inputs, -8, BF16_UNIFORM_8},
                {"uniform inputs, g = -4", fill_uniform_inputs, -4, BF16_UNIFORM_4},
                {"uniform inputs, g = 0", fill_uniform_inputs, 0, BF16_UNIFORM_0}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct prefill_case c = row(check);
        c.fill = rows[i].fill;
        c.parameter = rows[i].parameter;
        c.bf16_tolerance = rows[i].tolerance;
        both_outputs(check, &c, rows[i].name);
    }
}

static void near_collinear(struct check *check) {
    static const int64_t lengths[] = {4096, 16384};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        struct prefill_case c = row(check);
        c.H = 1;
        c.lengths[0] = tokens(check, lengths[i]);
        c.fill = fill_collinear;
        c.fp32_tolerance = TOLERANCE_FP32_COLLINEAR;
        c.bf16_tolerance = BF16_COLLINEAR;
        both_outputs(check, &c, "near-collinear keys");
    }
}

/* ---- Long traps -------------------------------------------------------------------------------- */

/* Keys of norm 0.9 around one direction a head, beta 1, log decays in [-0.034, -0.012]: other kernels gave
 * NaN, the exact answer stays small. */
static void fill_correlated(struct prefill_problem *p, struct random *r) {
    double common[2][128], key[128];
    for (int64_t i = 0; i < 2 * 128; i++)
        common[i / 128][i % 128] = random_normal(r);
    fill_normal(&p->q, r, 0, 0.09);
    fill_normal(&p->v, r, 0, 0.01);
    fill_uniform(&p->g, r, -0.034, -0.012);
    tensor_fill(&p->beta, 1);
    for (int64_t i = 0; i < p->T * p->c.H; i++) {
        double norm = 0;
        for (int c = 0; c < 128; c++) {
            key[c] = common[i % p->c.H][c] + 0.3 * random_normal(r);
            norm += key[c] * key[c];
        }
        for (int c = 0; c < 128; c++)
            tensor_set(&p->k, i * 128 + c, 0.9 * key[c] / sqrt(norm));
    }
}

static void correlated(struct check *check) {
    struct prefill_case c = row(check);
    c.lengths[0] = tokens(check, 8192);
    c.gate = FLASH_KDA_GATE_NONE;
    c.A_log = c.dt_bias = c.qk_norm = false;
    c.beta_mode = FLASH_KDA_BETA_GIVEN;
    c.fill = fill_correlated;
    if (!strcmp(check->level, "cuda"))
        c.bf16_tolerance = BF16_CORRELATED;
    both_outputs(check, &c, "correlated keys of norm 0.9, beta 1");
}

/* ---- Speed ------------------------------------------------------------------------------------- */

/* The shapes whose speed is quoted; only worth their oracle when they are timed. */
static void speed(struct check *check) {
    static const struct {
        int64_t H, T;
        int threads;
    } shapes[] = {{8, 4096, 0}, {1, 65536, 1}, {1, 65536, 2}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes && check->bench; i++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            struct prefill_case c = row(check);
            c.H = shapes[i].H;
            c.lengths[0] = tokens(check, shapes[i].T);
            c.threads = shapes[i].threads;
            c.gate = FLASH_KDA_GATE_SOFTPLUS;
            c.out_type = bf16 ? TYPE_BF16 : TYPE_FP32;
            snprintf(c.name, sizeof c.name, "speed: H = %lld, T = %lld, %d threads, out %s", (long long)c.H,
                     (long long)c.lengths[0], c.threads, bf16 ? "bf16" : "fp32");
            prefill_compare(check, &c);
        }
}

void prefill_long(struct check *check) {
    accuracy_table(check);
    near_collinear(check);
    correlated(check);
    speed(check);
}
