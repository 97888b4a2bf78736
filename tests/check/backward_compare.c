/* SPDX-License-Identifier: MIT */
/* The comparison of gradients: errors, untouched memory, inputs left alone, the same bits twice. The oracle is
 * computed once a case and serves all levels; the oracle itself is compared with derivatives. */
#include "backward_compare.h"
#include "calls.h"
#include "compare.h"
#include "prefill_compare.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { WORKSPACE_NAN = 0xff, WORKSPACE_ZERO = 0 };

struct comparison {
    const struct backward_problem *b;
    const struct backward_results *expected;
    struct snapshot inputs;
    char text[1024]; /* what was measured or went wrong */
};

static bool fail(struct comparison *c, const char *why) {
    snprintf(c->text, sizeof c->text, "%s", why);
    return false;
}

/* ---- Errors ------------------------------------------------------------------------------------ */

/* What a level may be off by, and whether the rounding to its dtype is taken off a result first. */
struct allowance {
    double ratio;
    bool forgive_rounding;
};

static double size_of(const struct tensor *t) {
    double squares = 0;
    for (int64_t i = 0; i < tensor_count(t); i++)
        squares += tensor_get(t, i) * tensor_get(t, i);
    return sqrt(squares / fmax(1, (double)tensor_count(t)));
}

/* Without d_out every token only takes from the gradient of the state. What is left of it is a difference of what bf16
 * rounds, and may be less than what a pair's decay counts for at least, exp(-10) of a token (docs/maths.md). */
static double left_over(const struct backward_problem *b, const struct backward_results *expected) {
    const struct bf16_gradients collinear = BF16_GRADIENTS_COLLINEAR;
    double least = exp(-10) * size_of(&b->d_final_state);
    double size = fmax(size_of(&expected->tensors[D_INITIAL_STATE]), TOLERANCE_SMALLEST_REFERENCE);
    return collinear.of[DV] + least / size;
}

static struct allowance allowance(const struct comparison *comparison, int gradient, const char *level) {
    const struct backward_problem *b = comparison->b;
    const struct prefill_case *c = &b->p.c;
    if (!strcmp(level, "reference"))
        return (struct allowance){b->checkpoints.block ? TOLERANCE_ORACLE_KEPT : TOLERANCE_ORACLE, true};
    if (!level_rounds_gradients(level))
        /* dA_log is a sum of terms with the errors of dg, which equal keys magnify. */
        return (struct allowance){gradient == DA_LOG ? TOLERANCE_DA_LOG * c->fp32_tolerance / TOLERANCE_FP32
                                                     : c->fp32_tolerance,
                                  true};
    const struct bf16_gradients bf16 = c->K == 1   ? BF16_GRADIENTS_ONE_CHANNEL
                                       : c->K < 16 ? BF16_GRADIENTS_FEW_CHANNELS
                                                   : b->c.bf16;
    double samples =
        (double)(gradient == D_INITIAL_STATE ? b->p.N * b->p.HV * c->K : b->p.B * b->p.T * b->p.HV);
    double few = bf16.few / sqrt(fmax(1, samples)), ratio = bf16.of[gradient];
    if (gradient == D_INITIAL_STATE && !b->c.d_out)
        ratio = left_over(b, comparison->expected);
    return (struct allowance){TOLERANCE_BF16_MARGIN * (1 + few) * ratio, false};
}

static bool results_within(struct comparison *c, const struct backward_results *r, const char *level) {
    bool good = true;
    for (int i = 0; i < GRADIENTS; i++) {
        const struct tensor *x = &r->tensors[i], *ref = &c->expected->tensors[i];
        if (!x->block)
            continue;
        struct allowance allowed = allowance(c, i, level);
        const struct prefill_problem *p = &c->b->p;
        double error = i == DA_LOG
                           ? A_log_error(x, ref, p->c.gate, &p->g, &p->dt_bias, &c->expected->tensors[DG])
                           : prefill_error(x, ref, &c->b->outputs[i], allowed.forgive_rounding);
        append_text(c->text, sizeof c->text, "%s%s %.1e", c->text[0] ? ", " : "", gradient_names[i], error);
        if (error <= allowed.ratio)
            continue;
        good = false;
        append_text(c->text, sizeof c->text,
                    isnan(error) ? " (the expected result is not finite)" : " (at most %.1e)", allowed.ratio);
    }
    return good;
}

/* ---- One level --------------------------------------------------------------------------------- */

static bool rest_untouched(struct comparison *c, const struct backward_results *r,
                           const struct backward_results *before) {
    for (int i = 0; i < GRADIENTS; i++)
        if (r->tensors[i].block &&
            !tensor_unchanged(&r->tensors[i], &before->tensors[i], 0, c->b->outputs[i].written, NULL)) {
            snprintf(c->text, sizeof c->text, "wrote to padding of %s", gradient_names[i]);
            return false;
        }
    return true;
}

static bool repeats(struct comparison *c, const struct backward_results *first, flash_kda_backend backend) {
    struct backward_results again;
    backward_results_make(&again, c->b);
    const char *wrong = backward_run(c->b, &again, backend, WORKSPACE_ZERO);
    for (int i = 0; i < GRADIENTS && !wrong; i++)
        if (again.tensors[i].block &&
            memcmp(again.tensors[i].block, first->tensors[i].block, again.tensors[i].block_bytes) != 0)
            wrong = "a second run, with other bytes in the workspace, gave other bits";
    backward_results_free(&again);
    return !wrong || fail(c, wrong);
}

static void compare_level(struct check *check, struct comparison *c, const char *level) {
    struct backward_results r, before;
    flash_kda_backend backend = level_backend(level);
    level_select(level);
    backward_results_make(&r, c->b);
    backward_results_make(&before, c->b);
    c->text[0] = '\0';
    const char *wrong = backward_run(c->b, &r, backend, WORKSPACE_NAN);
    bool good = !wrong || fail(c, wrong);
    good = good && rest_untouched(c, &r, &before);
    wrong = snapshot_changed(&c->inputs);
    good = good && (!wrong || fail(c, wrong));
    good = good && repeats(c, &r, backend) && results_within(c, &r, level);
    if (good && check->bench)
        append_text(c->text, sizeof c->text, "; %.3f ms", backward_time(c->b, &r, backend) * 1e3);
    check_report(check, good, level, c->b->p.c.name, c->text);
    backward_results_free(&before);
    backward_results_free(&r);
}

/* ---- A case ------------------------------------------------------------------------------------ */

static void compare_problem(struct check *check, const struct backward_problem *b,
                            const struct backward_results *expected) {
    struct comparison c = {.b = b, .expected = expected};
    const struct arguments inputs = arguments_of_backward(&b->args);
    snapshot_take(&c.inputs, &inputs);
    for (int i = 0; i < check->level_count; i++)
        compare_level(check, &c, check->levels[i]);
    snapshot_free(&c.inputs);
}

/* All gradients that there are, in fp32, by the oracle. */
static const char *run_oracle(const struct backward_problem *b, struct backward_results *expected) {
    struct backward_problem all = *b;
    all.c.without = 0;
    if (all.c.d_initial == STORAGE_IN_PLACE)
        all.c.d_initial = b->c.d_final;
    return backward_run(&all, expected, FLASH_KDA_BACKEND_REFERENCE, WORKSPACE_NAN);
}

void backward_compare(struct check *check, const struct backward_case *c) {
    if (!check_wanted(check, c->forward.name))
        return;
    struct random r = random_named(check->seed, c->forward.name);
    struct backward_problem b;
    struct backward_results expected;
    bool oracle_tested = level_backend(check->levels[0]) == FLASH_KDA_BACKEND_REFERENCE;
    const char *wrong = backward_problem_make(&b, c, &r);
    if (check->threads >= 0)
        b.args.num_threads = check->threads;
    backward_results_make_exact(&expected, &b);
    if (oracle_tested && !formula_backward_feasible(&b))
        printf("note %-10s %s: too long for derivatives, not run\n", "reference", c->forward.name);
    else if (oracle_tested)
        formula_backward(&b, &expected);
    else if (!wrong)
        wrong = run_oracle(&b, &expected);
    if (wrong)
        check_report(check, false, "reference", c->forward.name, wrong);
    else if (!oracle_tested || formula_backward_feasible(&b))
        compare_problem(check, &b, &expected);
    backward_results_free(&expected);
    backward_problem_free(&b);
}
