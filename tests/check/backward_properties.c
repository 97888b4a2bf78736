/* SPDX-License-Identifier: MIT */
/* What must hold between runs of backward, and between it and prefill: identities of the operator, powers of two,
 * gradients that are not asked for, threads, states that were kept. */
#include "backward_compare.h"
#include "prefill_compare.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { WORKSPACE_FILL = 0xff };

static struct backward_case property(struct check *check, flash_kda_gate gate, const char *name) {
    bool small = level_backend(check->levels[0]) == FLASH_KDA_BACKEND_REFERENCE;
    struct backward_case b = backward_case_plain();
    struct prefill_case *c = &b.forward;
    prefill_case_set_gate(c, gate);
    c->packing = PACKING_INT32;
    c->sequences = 3;
    c->lengths[0] = 100;
    c->lengths[1] = 0;
    c->lengths[2] = 150;
    c->group = 2;
    c->K = small ? 16 : 128;
    c->V = small ? 12 : 96;
    snprintf(c->name, sizeof c->name, "%s, gate %s", name, prefill_gate_names[gate]);
    return b;
}

/* Runs a case on every level; `broken` says what does not hold, or NULL. */
static void each_level(struct check *check, const struct backward_case *c,
                       const char *(*broken)(struct backward_problem *b, flash_kda_backend backend)) {
    if (!check_wanted(check, c->forward.name))
        return;
    struct random r = random_named(check->seed, c->forward.name);
    struct backward_problem b;
    const char *wrong = backward_problem_make(&b, c, &r);
    for (int i = 0; i < check->level_count; i++) {
        level_select(check->levels[i]);
        if (!wrong)
            wrong = broken(&b, level_backend(check->levels[i]));
        check_report(check, !wrong, check->levels[i], c->forward.name, wrong ? wrong : "holds");
    }
    backward_problem_free(&b);
}

/* ---- Identities -------------------------------------------------------------------------------- */

/* Two sums that must be equal, and the size of their terms. */
struct sums {
    double left, right, squares;
};

static void add(double *side, struct sums *s, double x) {
    *side += x;
    s->squares += x * x;
}

static bool equal(const struct sums *s, flash_kda_backend backend) {
    double error =
        level_rounds_gradients(level_of(backend)) ? BF16_GRADIENTS_ANY.of[DBETA] * 4 : TOLERANCE_FP32 * 10;
    return fabs(s->left - s->right) <= error * sqrt(s->squares) + 1e-30;
}

static void add_products(double *side, struct sums *s, const struct tensor *a, const struct tensor *b) {
    for (int64_t i = 0; i < tensor_count(a); i++)
        add(side, s, tensor_get(a, i) * tensor_get(b, i));
}

/* o . dO + S_T . dS_T = v . dv + S_0 . dS_0: both are what is linear in v and S_0. */
static bool linear_in_values(const struct backward_problem *b, const struct backward_results *r,
                             const struct prefill_results *o, flash_kda_backend backend) {
    struct sums s = {0};
    add_products(&s.left, &s, &o->out, &b->d_out);
    add_products(&s.left, &s, &o->final, &b->d_final_state);
    add_products(&s.right, &s, &b->p.v, &r->tensors[DV]);
    add_products(&s.right, &s, &b->p.initial_state, &r->tensors[D_INITIAL_STATE]);
    return equal(&s, backend);
}

/* q . dq = o . dO for every token of a q/k head, where q is not normalised; else it is 0. */
static bool linear_in_q(const struct backward_problem *b, const struct backward_results *r,
                        const struct prefill_results *o, flash_kda_backend backend) {
    const struct prefill_problem *p = &b->p;
    int64_t values = p->c.group * p->c.V;
    for (int64_t row = 0; row < p->T * p->c.H; row++) {
        struct sums s = {0};
        for (int64_t i = row * p->c.K; i < (row + 1) * p->c.K; i++)
            add(&s.left, &s, tensor_get(&p->q, i) * tensor_get(&r->tensors[DQ], i));
        for (int64_t j = row * values; j < (row + 1) * values && !p->c.qk_norm; j++)
            add(&s.right, &s, tensor_get(&o->out, j) * tensor_get(&b->d_out, j));
        if (!equal(&s, backend))
            return false;
    }
    return true;
}

static const char *identities_broken(struct backward_problem *b, flash_kda_backend backend) {
    struct backward_results r;
    struct prefill_results o;
    backward_results_make(&r, b);
    prefill_results_make(&o, &b->p);
    const char *wrong = backward_run(b, &r, backend, WORKSPACE_FILL);
    if (!wrong)
        wrong = prefill_run(&b->p, &o, backend, WORKSPACE_FILL);
    if (!wrong && !linear_in_values(b, &r, &o, backend))
        wrong = "o . dO + S . dS is not v . dv + S0 . dS0";
    if (!wrong && !linear_in_q(b, &r, &o, backend))
        wrong = "q . dq of a token is not its o . dO";
    prefill_results_free(&o);
    backward_results_free(&r);
    return wrong;
}

static void identities(struct check *check) {
    for (int gate = 0; gate < 3; gate++) {
        struct backward_case b = property(check, (flash_kda_gate)gate, "backward, identities");
        b.forward.final = STORAGE_FP32;
        b.forward.qk_norm = gate == FLASH_KDA_GATE_SIGMOID;
        each_level(check, &b, identities_broken);
    }
}

/* ---- Powers of two ----------------------------------------------------------------------------- */

static bool scaled_by(const struct backward_results *scaled, const struct backward_results *r, int exponent) {
    for (int g = 0; g < GRADIENTS; g++)
        for (int64_t i = 0; r->tensors[g].block && i < tensor_count(&r->tensors[g]); i++)
            if (tensor_get(&scaled->tensors[g], i) != ldexp(tensor_get(&r->tensors[g], i), exponent))
                return false;
    return true;
}

static void scale_given(struct backward_problem *b, int exponent) {
    struct tensor *const given[] = {&b->d_out, &b->d_final_state};
    for (int g = 0; g < 2; g++)
        for (int64_t i = 0; i < tensor_count(given[g]); i++)
            tensor_set(given[g], i, ldexp(tensor_get(given[g], i), exponent));
}

/* Sizes of gradients reach from 2^-40, of a mean over many tokens, to 2^40. */
static const char *powers_broken(struct backward_problem *b, flash_kda_backend backend) {
    static const int exponents[] = {-40, 40};
    struct backward_results r, scaled;
    backward_results_make(&r, b);
    backward_results_make(&scaled, b);
    const char *wrong = backward_run(b, &r, backend, WORKSPACE_FILL);
    for (int i = 0; i < 2 && !wrong; i++) {
        scale_given(b, exponents[i]);
        wrong = backward_run(b, &scaled, backend, WORKSPACE_FILL);
        if (!wrong && !scaled_by(&scaled, &r, exponents[i]))
            wrong = "gradients given times a power of two did not give the same bits times that";
        scale_given(b, -exponents[i]);
    }
    backward_results_free(&scaled);
    backward_results_free(&r);
    return wrong;
}

static void powers(struct check *check) {
    for (int gate = 0; gate < 3; gate++) {
        struct backward_case b = property(check, (flash_kda_gate)gate, "backward, powers of two");
        b.forward.fill = fill_remembering; /* or products of decays leave fp32's normal numbers on the way */
        each_level(check, &b, powers_broken);
    }
}

/* ---- Gradients that are not asked for ------------------------------------------------------------ */

static const char *others_changed(struct backward_problem *b, flash_kda_backend backend) {
    struct backward_results all, fewer;
    const char *wrong;
    b->c.without = 0;
    backward_results_make(&all, b);
    wrong = backward_run(b, &all, backend, WORKSPACE_FILL);
    for (int i = 0; i <= GRADIENTS && !wrong; i++) { /* the last time all of them */
        b->c.without = i < GRADIENTS ? 1u << i : (1u << GRADIENTS) - 1;
        backward_results_make(&fewer, b);
        wrong = backward_run(b, &fewer, backend, WORKSPACE_FILL);
        for (int g = 0; g < GRADIENTS && !wrong; g++)
            if (fewer.tensors[g].block &&
                memcmp(fewer.tensors[g].block, all.tensors[g].block, all.tensors[g].block_bytes) != 0)
                wrong = "gradients changed their bits when another was not asked for";
        backward_results_free(&fewer);
    }
    b->c.without = 0;
    backward_results_free(&all);
    return wrong;
}

static void fewer_gradients(struct check *check) {
    for (int gate = 0; gate < 3; gate++) {
        struct backward_case b = property(check, (flash_kda_gate)gate, "backward, fewer gradients");
        each_level(check, &b, others_changed);
    }
}

/* ---- Threads ------------------------------------------------------------------------------------- */

/* Do all threads share each head? */
static bool shares_heads(const struct backward_problem *b) {
    char text[200] = "";
    return !flash_kda_backward_describe(&b->args, text, sizeof text) && strstr(text, "all to each");
}

/* Few enough threads take a head each, many share the segments and columns of each head. */
static const char *threads_differ(struct backward_problem *b, flash_kda_backend backend) {
    static const int threads[] = {2, 3, 16, 40};
    struct backward_results one, more;
    int shared = 0;
    backward_results_make(&one, b);
    b->args.num_threads = 1;
    const char *wrong = backward_run(b, &one, backend, WORKSPACE_FILL);
    for (int i = 0; i < 4 && !wrong; i++) {
        backward_results_make(&more, b);
        b->args.num_threads = threads[i];
        wrong = backward_run(b, &more, backend, WORKSPACE_FILL);
        for (int g = 0; g < GRADIENTS && !wrong; g++)
            if (memcmp(more.tensors[g].block, one.tensors[g].block, one.tensors[g].block_bytes) != 0)
                wrong = "another number of threads gave other bits";
        shared += shares_heads(b);
        backward_results_free(&more);
    }
    if (!wrong && backend == FLASH_KDA_BACKEND_CPU && (shared == 0 || shared == 4))
        wrong = "only one of the two schedules was tried";
    backward_results_free(&one);
    return wrong;
}

static void threads(struct check *check) {
    struct backward_case b = property(check, FLASH_KDA_GATE_SIGMOID, "backward, threads");
    for (int kept = 0; kept < 2; kept++) {
        b.forward.H = 1 + 2 * kept;
        b.forward.checkpoints = kept ? CHECKPOINTS_EVERY : b.forward.checkpoints;
        if (kept)
            snprintf(b.forward.name, sizeof b.forward.name, "backward, threads, from states that prefill kept");
        each_level(check, &b, threads_differ);
    }
}

/* ---- States that prefill kept ------------------------------------------------------------------ */

static bool all_finite(const struct backward_results *r) {
    for (int g = 0; g < GRADIENTS; g++)
        for (int64_t i = 0; r->tensors[g].block && i < tensor_count(&r->tensors[g]); i++)
            if (!isfinite(tensor_get(&r->tensors[g], i)))
                return false;
    return true;
}

/* The case keeps rows 0, 1 and 2 of one sequence, and the last one is its final state. */
static const char *kept_states_ignored(struct backward_problem *b, flash_kda_backend backend) {
    struct tensor kept;
    struct backward_results r;
    int64_t row = tensor_count(&b->checkpoints) / 3;
    backward_results_make(&r, b);
    tensor_clone(&kept, &b->checkpoints);
    const char *wrong = NULL;
    for (int i = 2; i >= 0 && !wrong; i--) {
        for (int64_t e = 0; e < tensor_count(&kept); e++)
            tensor_set(&b->checkpoints, e, e / row == i ? (double)NAN : tensor_get(&kept, e));
        wrong = backward_run(b, &r, backend, WORKSPACE_FILL);
        if (!wrong && all_finite(&r) != (i == 2))
            wrong = i == 2 ? "the final state is read" : "a kept state is not read";
    }
    for (int64_t e = 0; e < tensor_count(&kept); e++) /* as the next level expects them */
        tensor_set(&b->checkpoints, e, tensor_get(&kept, e));
    tensor_free(&kept);
    backward_results_free(&r);
    return wrong;
}

static void kept_states(struct check *check) {
    for (int gate = 0; gate < 3; gate++) {
        struct backward_case b = property(check, (flash_kda_gate)gate, "backward, kept states are read");
        b.forward.packing = PACKING_DENSE;
        b.forward.sequences = 1;
        b.forward.lengths[0] = 150;
        b.forward.checkpoints = CHECKPOINTS_EVERY;
        each_level(check, &b, kept_states_ignored);
    }
}

void backward_properties(struct check *check) {
    kept_states(check);
    identities(check);
    powers(check);
    fewer_gradients(check);
    threads(check);
}
