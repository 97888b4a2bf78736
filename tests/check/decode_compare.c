/* SPDX-License-Identifier: MIT */
/* The comparison of decode: error ratios of outputs and of every state that is written, untouched memory, inputs left alone,
 * the same bits twice. */
#include "decode_case.h"
#include "device.h"
#include "prefill_compare.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- Measuring --------------------------------------------------------------------------------- */

/* RMS(x - ref) / RMS(ref) in the making. Rounding to nearest is forgiven in results of 16 bits. */
struct error {
    double differences, squares;
    int64_t count;
    bool broken; /* x is not finite */
};

/* Elements of one row of x against those of one row of the oracle's. */
static void add_row(struct error *e, const struct tensor *x, int64_t row, const struct tensor *ref,
                    int64_t ref_row, int64_t count) {
    for (int64_t i = 0; i < count; i++, e->count++) {
        double a = tensor_get(x, row * count + i), b = tensor_get(ref, ref_row * count + i);
        double difference = fabs(a - b);
        e->broken |= !isfinite(a);
        if (x->dl.dtype.bits == 16)
            difference = fmax(0, difference - type_half_ulp(x->dl.dtype, b));
        e->differences += difference * difference;
        e->squares += b * b;
    }
}

static double ratio(const struct error *e) {
    if (!e->count)
        return 0;
    double rms = sqrt(e->squares / (double)e->count);
    return e->broken ? (double)INFINITY
                     : sqrt(e->differences / (double)e->count) / fmax(rms, TOLERANCE_SMALLEST_REFERENCE);
}

static bool results_within(const struct decode_problem *d, const struct decode_results *r, double allowed,
                           char *text, size_t size) {
    const struct prefill_problem *p = &d->p;
    struct error out = {0}, state = {0};
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t t = 0; t < d->processed[n]; t++) {
            int64_t place = decode_place(d, n, t), slot = decode_target(d, n, t);
            if (!d->c.no_out)
                add_row(&out, &r->out, place, &d->exact.out, place, p->HV * p->c.V);
            if (slot >= 0)
                add_row(&state, &r->state, slot, &d->exact.checkpoints, place, p->HV * p->c.K * p->c.V);
        }
    bool good = ratio(&out) <= allowed && ratio(&state) <= allowed;
    snprintf(text, size, "out %.1e, state %.1e%s", ratio(&out), ratio(&state), good ? "" : " (too far)");
    if (!good)
        snprintf(text + strlen(text), size - strlen(text), ", at most %.1e", allowed);
    return good;
}

/* ---- One level --------------------------------------------------------------------------------- */

enum { INPUTS = 22 };

static void input_list(const struct decode_problem *d, const struct tensor *list[INPUTS]) {
    const struct prefill_problem *p = &d->p;
    const struct tensor *all[INPUTS] = {&p->q,
                                        &p->k,
                                        &p->v,
                                        &p->g,
                                        &p->beta,
                                        &p->A_log,
                                        &p->dt_bias,
                                        &p->cu_seqlens,
                                        &d->accepted,
                                        &d->state_indices,
                                        &d->num_accepted_tokens,
                                        &d->conv[0].raw,
                                        &d->conv[0].weight,
                                        &d->conv[0].bias,
                                        &d->conv[1].raw,
                                        &d->conv[1].weight,
                                        &d->conv[1].bias,
                                        &d->conv[2].raw,
                                        &d->conv[2].weight,
                                        &d->conv[2].bias,
                                        &d->norm_weight,
                                        &d->norm_gate};
    memcpy(list, all, sizeof all);
}

static bool same_bytes(const struct tensor *a, const struct tensor *b) {
    return !a->block || memcmp(a->block, b->block, a->block_bytes) == 0;
}

/* NULL, or which memory was touched that should not have been. */
static const char *rest_touched(const struct decode_problem *d, const struct decode_results *r,
                                const struct decode_results *before, const struct tensor inputs[INPUTS]) {
    const struct tensor *list[INPUTS];
    input_list(d, list);
    if (!tensor_unchanged(&r->out, &before->out, 2, d->c.no_out ? NULL : d->out_written, NULL))
        return "wrote to padding of out, or to a row that is not to be written";
    if (!tensor_unchanged(&r->state, &before->state, 1, d->state_written, NULL))
        return "wrote to padding of state, or to a slot that is not to be written";
    for (int i = 0; i < INPUTS; i++)
        if (!same_bytes(list[i], &inputs[i]))
            return "changed an input";
    return NULL;
}

/* Every state of a convolution holds the last inputs before where it stands, and all other memory what it held. */
static const char *conv_states_differ(const struct decode_problem *d, const struct decode_results *r) {
    for (int i = 0; i < 3; i++) {
        struct tensor expected;
        if (!d->c.conv[i])
            continue;
        tensor_clone(&expected, &d->conv[i].state);
        int64_t channels = expected.shape[1];
        for (int64_t n = 0; n < d->p.N; n++)
            for (int64_t t = 0; t < d->processed[n]; t++)
                for (int64_t e = 0, slot = decode_target(d, n, t); e < channels * CONV_PAST && slot >= 0; e++)
                    tensor_set(&expected, slot * channels * CONV_PAST + e,
                               decode_conv_input(d, i, n, t + 1 - CONV_PAST + e % CONV_PAST, e / CONV_PAST));
        bool same = memcmp(expected.block, r->conv_state[i].block, expected.block_bytes) == 0;
        tensor_free(&expected);
        if (!same)
            return "a convolution's states are not the last inputs, or memory beside them was touched";
    }
    return NULL;
}

static const char *run(const struct decode_problem *d, struct decode_results *r, const char *level) {
    const flash_kda_decode_args args = decode_bind(d, r, prefill_backend(level));
    return decode_call(&args);
}

static const char *differs_again(const struct decode_problem *d, const struct decode_results *first,
                                 const char *level) {
    struct decode_results again;
    decode_results_make(&again, d);
    const char *wrong = run(d, &again, level);
    bool same = same_bytes(&first->out, &again.out) && same_bytes(&first->state, &again.state);
    for (int i = 0; i < 3; i++)
        same = same && same_bytes(&first->conv_state[i], &again.conv_state[i]);
    if (!wrong && !same)
        wrong = "a second run gave other bits";
    decode_results_free(&again);
    return wrong;
}

static double seconds_of(const struct decode_problem *d, struct decode_results *r, const char *level) {
    const flash_kda_decode_args args = decode_bind(d, r, prefill_backend(level));
#ifdef CHECK_CUDA
    if (args.backend == FLASH_KDA_BACKEND_CUDA) {
        double seconds = 0;
        return device_decode_time(&args, &seconds) ? (double)NAN : seconds;
    }
#endif
    double begin = check_seconds(), best = HUGE_VAL;
    while (check_seconds() - begin < 0.1) {
        double start = check_seconds();
        flash_kda_decode(&args);
        best = fmin(best, check_seconds() - start);
    }
    return best;
}

static void compare_level(struct check *check, const struct decode_problem *d,
                          const struct tensor inputs[INPUTS], const char *level) {
    struct decode_results r, before;
    char text[800] = "";
    bool convolved = d->c.conv[0] || d->c.conv[1] || d->c.conv[2];
    double allowed = strcmp(level, "reference") ? d->c.tokens.fp32_tolerance
                     : convolved                ? TOLERANCE_ORACLE_CONVOLVED
                                                : TOLERANCE_ORACLE;
    check_select_level(level);
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
        snprintf(text + strlen(text), sizeof text - strlen(text), "; %.2f us", seconds_of(d, &r, level) * 1e6);
    check_report(check, good, level, d->c.tokens.name, wrong ? wrong : text);
    decode_results_free(&r);
    decode_results_free(&before);
}

/* ---- A case ------------------------------------------------------------------------------------ */

static void compare_problem(struct check *check, const struct decode_problem *d) {
    struct tensor inputs[INPUTS] = {{.block = NULL}};
    const struct tensor *list[INPUTS];
    input_list(d, list);
    for (int i = 0; i < INPUTS; i++)
        if (list[i]->block)
            tensor_clone(&inputs[i], list[i]);
    for (int i = 0; i < check->level_count; i++)
        compare_level(check, d, inputs, check->levels[i]);
    for (int i = 0; i < INPUTS; i++)
        tensor_free(&inputs[i]);
}

void decode_compare(struct check *check, const struct decode_case *c) {
    if (!check_wanted(check, c->tokens.name))
        return;
    struct random r = random_named(check->seed, c->tokens.name);
    struct decode_problem d;
    bool oracle_tested = prefill_backend(check->levels[0]) == FLASH_KDA_BACKEND_REFERENCE;
    const char *wrong = decode_problem_make(&d, c, oracle_tested, &r);
    if (check->threads >= 0)
        d.args.num_threads = check->threads;
    if (wrong)
        check_report(check, false, "reference", c->tokens.name, wrong);
    else
        compare_problem(check, &d);
    decode_problem_free(&d);
}
