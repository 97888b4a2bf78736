/* SPDX-License-Identifier: MIT */
/* The comparison: error ratios, untouched memory, inputs left alone, the same bits twice. The oracle is
 * computed once a case and serves all levels; the oracle itself is compared with the closed formula. */
#include "prefill_compare.h"

#include "calls.h"
#include "compare.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- Measuring --------------------------------------------------------------------------------- */

double prefill_error(const struct tensor *x, const struct tensor *ref, const struct prefill_output *o,
                     bool forgive_rounding) {
    struct error e = {0};
    int64_t count = o->rows ? tensor_count(ref) / o->rows : 0;
    for (int64_t row = 0; row < o->rows; row++)
        if (o->written[row])
            error_add_row(&e, x, row, ref, row, count, forgive_rounding);
    return error_of_all(&e);
}

/* What a level may be off by, and whether the rounding to its dtype is taken off a result first. */
struct allowance {
    double ratio;
    bool forgive_rounding;
};

/* bf16: the column of the table that counts; samples: see tolerance.h. */
static struct allowance allowance(const struct prefill_problem *p, const char *level, double bf16,
                                  int64_t samples) {
    const struct prefill_case *c = &p->c;
    flash_kda_prefill_args args = p->args;
    DLTensor out = {.dtype = c->out_type};
    args.out = &out;
    bool convolved = c->fused.conv[0] || c->fused.conv[1] || c->fused.conv[2];
    if (!strcmp(level, "reference"))
        return (struct allowance){convolved ? TOLERANCE_ORACLE_CONVOLVED : TOLERANCE_ORACLE, true};
    if (!level_rounds(level, &args))
        return (struct allowance){c->fp32_tolerance, true};
    if (c->K == 1 &&
        !strcmp(level, "cuda")) /* keys of one channel are all collinear; it rounds more operands */
        bf16 = BF16_COLLINEAR.out;
    double few = c->bf16_tolerance.few / sqrt(fmax(1, (double)samples));
    return (struct allowance){TOLERANCE_BF16_MARGIN * (1 + few) * bf16, false};
}

static struct allowance state_allowance(const struct prefill_problem *p, const char *level,
                                        const struct prefill_output *o) {
    struct allowance a = allowance(p, level, p->c.bf16_tolerance.state, o->rows * p->HV * p->c.K);
    if (!a.forgive_rounding && type_equal(o->type, TYPE_BF16))
        a.ratio += ROUNDING_BF16_RMS;
    return a;
}

/* ---- One level --------------------------------------------------------------------------------- */

struct comparison {
    const struct prefill_problem *p;
    const struct prefill_results *expected;
    struct snapshot inputs;
    char text[1024]; /* what was measured or went wrong */
};

static bool fail(struct comparison *c, const char *why) {
    snprintf(c->text, sizeof c->text, "%s", why);
    return false;
}

static bool within(struct comparison *c, const char *name, const struct tensor *x, const struct tensor *ref,
                   const struct prefill_output *o, struct allowance allowed) {
    if (!o->ndim)
        return true;
    double error = prefill_error(x, ref, o, allowed.forgive_rounding);
    append_text(c->text, sizeof c->text, "%s%s %.1e", c->text[0] ? ", " : "", name, error);
    if (error <= allowed.ratio)
        return true;
    if (isnan(error))
        append_text(c->text, sizeof c->text, " (the expected result is not finite)");
    else
        append_text(c->text, sizeof c->text, " (at most %.1e)", allowed.ratio);
    return false;
}

/* Outputs that are computed: not those of padding. */
static int64_t live_outputs(const struct prefill_problem *p) {
    int64_t tokens = 0;
    for (int64_t t = 0; t < p->B * p->T; t++)
        tokens += p->out.written[t];
    return tokens * p->HV;
}

static bool results_within(struct comparison *c, const struct prefill_results *r, const char *level) {
    const struct prefill_problem *p = c->p;
    const struct prefill_results *expected = c->expected;
    bool good = within(c, "out", &r->out, &expected->out, &p->out,
                       allowance(p, level, p->c.bf16_tolerance.out, live_outputs(p)));
    good &= within(c, "state", &r->final, &expected->final, &p->final, state_allowance(p, level, &p->final));
    good &= within(c, "checkpoints", prefill_checkpoints(r), &expected->checkpoints, &p->checkpoints,
                   state_allowance(p, level, &p->checkpoints));
    return good;
}

/* Untouched: guards, padding, rows of padding sequences, slots and checkpoints that were not named. */
static bool rest_untouched(struct comparison *c, const struct prefill_results *r,
                           const struct prefill_results *before) {
    const struct prefill_problem *p = c->p;
    if (!tensor_unchanged(&r->out, &before->out, p->out.lead, p->out.written, NULL))
        return fail(c, "wrote to padding of out, or to rows of a padding sequence");
    if (r->final.block && !tensor_unchanged(&r->final, &before->final, p->final.lead, p->final.written,
                                            r->shared_pool ? p->checkpoints.written : NULL))
        return fail(c, "wrote to padding of final_state, or to a slot that was not named");
    if (r->checkpoints.block && !tensor_unchanged(&r->checkpoints, &before->checkpoints, p->checkpoints.lead,
                                                  p->checkpoints.written, NULL))
        return fail(c, "wrote to padding of checkpoints, or to a row that was not named");
    const char *wrong = prefill_conv_states_differ(p, r);
    return !wrong || fail(c, wrong);
}

static bool repeats(struct comparison *c, const struct prefill_results *first, flash_kda_backend backend) {
    struct prefill_results again;
    prefill_results_make(&again, c->p);
    const char *wrong = prefill_run(c->p, &again, backend, FILL_ALWAYS);
    if (!wrong && !prefill_same(first, &again))
        wrong = "a second run, with other bytes in the workspace, gave other bits";
    prefill_results_free(&again);
    return !wrong || fail(c, wrong);
}

static bool compare_results(struct comparison *c, struct prefill_results *r, const char *level) {
    struct prefill_results before;
    prefill_results_make(&before, c->p);
    const char *wrong = prefill_run(c->p, r, level_backend(level), FILL_NAN);
    bool good = !wrong || fail(c, wrong);
    good = good && rest_untouched(c, r, &before);
    wrong = good ? snapshot_changed(&c->inputs) : NULL;
    good = good && (!wrong || fail(c, wrong));
    good = good && repeats(c, r, level_backend(level));
    prefill_results_free(&before);
    return good && results_within(c, r, level);
}

static void append_time(struct comparison *c, struct prefill_results *r, const char *level) {
    const struct prefill_problem *p = c->p;
    flash_kda_prefill_args args = prefill_bind(p, r, level_backend(level));
    const struct arguments all = arguments_of_prefill(&args);
    double seconds = seconds_of(&all);
    double rows = (double)(p->B * p->T * p->HV), flop = 8 * rows * (double)(p->c.K * p->c.V);
    append_text(c->text, sizeof c->text, "; %.3f ms, %.1f thousand tokens/s, %.1f GFLOP/s", seconds * 1e3,
                (double)(p->B * p->T) / seconds * 1e-3, flop / seconds * 1e-9);
}

static void compare_level(struct check *check, struct comparison *c, const char *level) {
    struct prefill_results r;
    level_select(level);
    prefill_results_make(&r, c->p);
    c->text[0] = '\0';
    bool good = compare_results(c, &r, level);
    if (good && check->bench)
        append_time(c, &r, level);
    check_report(check, good, level, c->p->c.name, c->text);
    prefill_results_free(&r);
}

/* ---- A case ------------------------------------------------------------------------------------ */

static void compare_problem(struct check *check, const struct prefill_problem *p,
                            const struct prefill_results *expected) {
    struct comparison c = {.p = p, .expected = expected};
    const struct arguments args = arguments_of_prefill(&p->args);
    snapshot_take(&c.inputs, &args);
    for (int i = 0; i < check->level_count; i++)
        compare_level(check, &c, check->levels[i]);
    snapshot_free(&c.inputs);
}

void prefill_compare(struct check *check, const struct prefill_case *c) {
    if (!check_wanted(check, c->name))
        return;
    struct random r = random_named(check->seed, c->name);
    struct prefill_problem p;
    struct prefill_results expected;
    prefill_problem_make(&p, c, &r);
    if (check->threads >= 0)
        p.args.num_threads = check->threads;
    prefill_results_make_exact(&expected, &p);
    bool oracle_tested = level_backend(check->levels[0]) == FLASH_KDA_BACKEND_REFERENCE;
    const char *wrong = NULL;
    if (oracle_tested && !formula_feasible(&p))
        printf("note %-10s %s: too long for the formula, not run\n", "reference", c->name);
    else if (oracle_tested)
        formula_prefill(&p, &expected);
    else
        wrong = prefill_run(&p, &expected, FLASH_KDA_BACKEND_REFERENCE, FILL_NAN);
    if (!wrong)
        prefill_fuse_outputs(&p, &expected, &r);
    if (wrong)
        check_report(check, false, "reference", c->name, wrong);
    else if (!oracle_tested || formula_feasible(&p))
        compare_problem(check, &p, &expected);
    prefill_results_free(&expected);
    prefill_problem_free(&p);
}

void prefill_examine(struct check *check, const struct prefill_case *c, prefill_property *property,
                     const void *context) {
    if (!check_wanted(check, c->name))
        return;
    struct random r = random_named(check->seed, c->name);
    struct prefill_problem p;
    struct prefill_results exact;
    prefill_problem_make(&p, c, &r);
    prefill_results_make_exact(&exact, &p);
    const char *wrong = prefill_run(&p, &exact, FLASH_KDA_BACKEND_REFERENCE, FILL_NAN);
    if (wrong)
        check_report(check, false, "reference", c->name, wrong);
    for (int i = 0; i < check->level_count && !wrong; i++) {
        level_select(check->levels[i]);
        property(check, &p, &exact, check->levels[i], context);
    }
    prefill_results_free(&exact);
    prefill_problem_free(&p);
}
