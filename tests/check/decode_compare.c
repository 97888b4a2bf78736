/* SPDX-License-Identifier: MIT */
/* The comparison of decode: error ratios of outputs and of every state that is written, untouched memory, inputs left alone,
 * the same bits twice. */
#include "calls.h"
#include "compare.h"
#include "decode_case.h"

#include <stdio.h>
#include <string.h>

/* ---- Measuring --------------------------------------------------------------------------------- */

static bool results_within(const struct decode_problem *d, const struct decode_results *r, double allowed,
                           char *text, size_t size) {
    const struct prefill_problem *p = &d->p;
    struct error out = {0}, state = {0};
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t t = 0; t < d->processed[n]; t++) {
            int64_t place = decode_place(d, n, t), slot = decode_target(d, n, t);
            if (!d->c.no_out)
                error_add_row(&out, &r->out, place, &d->exact.out, place, p->HV * p->c.V, true);
            if (slot >= 0)
                error_add_row(&state, &r->state, slot, &d->exact.checkpoints, place, p->HV * p->c.K * p->c.V,
                              true);
        }
    double out_error = error_of_all(&out), state_error = error_of_all(&state);
    bool good = out_error <= allowed && state_error <= allowed;
    snprintf(text, size, "out %.1e, state %.1e%s", out_error, state_error, good ? "" : " (too far)");
    if (!good)
        snprintf(text + strlen(text), size - strlen(text), ", at most %.1e", allowed);
    return good;
}

/* ---- One level --------------------------------------------------------------------------------- */

/* NULL, or which memory was touched that should not have been. */
static const char *rest_touched(const struct decode_problem *d, const struct decode_results *r,
                                const struct decode_results *before, const struct snapshot *inputs) {
    if (!tensor_unchanged(&r->out, &before->out, 2, d->c.no_out ? NULL : d->out_written, NULL))
        return "wrote to padding of out, or to a row that is not to be written";
    if (!tensor_unchanged(&r->state, &before->state, 1, d->state_written, NULL))
        return "wrote to padding of state, or to a slot that is not to be written";
    return snapshot_changed(inputs);
}

/* Every state of a convolution holds the last inputs before where it stands, and all other memory what it held. */
static const char *conv_states_differ(const struct decode_problem *d, const struct decode_results *r) {
    for (int i = 0; i < 3; i++) {
        struct tensor expected;
        if (!d->c.fused.conv[i])
            continue;
        tensor_clone(&expected, &d->conv[i].state);
        int64_t channels = expected.shape[1];
        for (int64_t n = 0; n < d->p.N; n++)
            for (int64_t t = 0; t < d->processed[n]; t++)
                for (int64_t e = 0, slot = decode_target(d, n, t); e < channels * CONV_PAST && slot >= 0; e++)
                    tensor_set(&expected, slot * channels * CONV_PAST + e,
                               decode_conv_input(d, i, n, t + 1 - CONV_PAST + e % CONV_PAST, e / CONV_PAST));
        bool same = tensor_same(&expected, &r->conv_state[i]);
        tensor_free(&expected);
        if (!same)
            return "a convolution's states are not the last inputs, or memory beside them was touched";
    }
    return NULL;
}

static const char *run(const struct decode_problem *d, struct decode_results *r, const char *level) {
    const flash_kda_decode_args args = decode_bind(d, r, level_backend(level));
    return decode_call(&args);
}

static const char *differs_again(const struct decode_problem *d, const struct decode_results *first,
                                 const char *level) {
    struct decode_results again;
    decode_results_make(&again, d);
    const char *wrong = run(d, &again, level);
    bool same = tensor_same(&first->out, &again.out) && tensor_same(&first->state, &again.state);
    for (int i = 0; i < 3; i++)
        same = same && tensor_same(&first->conv_state[i], &again.conv_state[i]);
    if (!wrong && !same)
        wrong = "a second run gave other bits";
    decode_results_free(&again);
    return wrong;
}

static double call_seconds(const struct decode_problem *d, struct decode_results *r, const char *level) {
    const flash_kda_decode_args args = decode_bind(d, r, level_backend(level));
    const struct arguments all = arguments_of_decode(&args);
    return seconds_of(&all);
}

static void compare_level(struct check *check, const struct decode_problem *d, const struct snapshot *inputs,
                          const char *level) {
    struct decode_results r, before;
    char text[800] = "";
    bool convolved = d->c.fused.conv[0] || d->c.fused.conv[1] || d->c.fused.conv[2];
    double allowed = strcmp(level, "reference") ? d->c.tokens.fp32_tolerance
                     : convolved                ? TOLERANCE_ORACLE_CONVOLVED
                                                : TOLERANCE_ORACLE;
    level_select(level);
    decode_results_make(&r, d);
    decode_results_make(&before, d);
    const char *wrong = run(d, &r, level);
    if (!wrong)
        wrong = rest_touched(d, &r, &before, inputs);
    if (!wrong)
        wrong = conv_states_differ(d, &r);
    if (!wrong)
        wrong = differs_again(d, &r, level);
    bool good = !wrong && results_within(d, &r, allowed, text, sizeof text);
    if (good && check->bench)
        snprintf(text + strlen(text), sizeof text - strlen(text), "; %.2f us",
                 call_seconds(d, &r, level) * 1e6);
    check_report(check, good, level, d->c.tokens.name, wrong ? wrong : text);
    decode_results_free(&r);
    decode_results_free(&before);
}

/* ---- A case ------------------------------------------------------------------------------------ */

static void compare_problem(struct check *check, const struct decode_problem *d) {
    struct snapshot inputs;
    const struct arguments args = arguments_of_decode(&d->args);
    snapshot_take(&inputs, &args);
    for (int i = 0; i < check->level_count; i++)
        compare_level(check, d, &inputs, check->levels[i]);
    snapshot_free(&inputs);
}

void decode_compare(struct check *check, const struct decode_case *c) {
    if (!check_wanted(check, c->tokens.name))
        return;
    struct random r = random_named(check->seed, c->tokens.name);
    struct decode_problem d;
    bool oracle_tested = level_backend(check->levels[0]) == FLASH_KDA_BACKEND_REFERENCE;
    const char *wrong = decode_problem_make(&d, c, oracle_tested, &r);
    if (check->threads >= 0)
        d.args.num_threads = check->threads;
    if (wrong)
        check_report(check, false, "reference", c->tokens.name, wrong);
    else
        compare_problem(check, &d);
    decode_problem_free(&d);
}
