/* SPDX-License-Identifier: MIT */
/* Prints what flashkda run found, for people and for programs. */
#include "failure.h"
#include "run.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_HEADS_LISTED = 8 };

/* ---- Text -------------------------------------------------------------------------------------- */

static void print_shape(FILE *stream, const struct kda_case *c, DLDataType out_dtype) {
    fprintf(stream, "shape     ");
    if (c->batch != 1)
        fprintf(stream, " B %lld,", (long long)c->batch);
    fprintf(stream, " T %lld, H %lld,", (long long)c->tokens, (long long)c->heads);
    if (c->value_heads != c->heads)
        fprintf(stream, " HV %lld,", (long long)c->value_heads);
    fprintf(stream, " K %lld, V %lld", (long long)c->key_dim, (long long)c->value_dim);
    if (tensor_present(&c->cu_seqlens))
        fprintf(stream, ", %lld packed sequences", (long long)c->sequences);
    fprintf(stream, "; %s in, %s out%s\n", type_name(c->q.dl.dtype), type_name(out_dtype),
            tensor_present(&c->initial_state) ? ", from an initial state" : "");
}

static void print_flags(FILE *stream, const struct kda_case *c) {
    fprintf(stream, "problem    gate %s", gate_names[c->gate]);
    if (c->gate == FLASH_KDA_GATE_SIGMOID)
        fprintf(stream, " (lower bound %g)", c->lower_bound);
    fprintf(stream, ", beta %s, q/k %s, scale ", beta_names[c->beta_mode],
            c->flags & FLASH_KDA_QK_NORM ? "normalised" : "as given");
    if (c->scale == 0)
        fprintf(stream, "1/sqrt(K), state %s\n", state_layout_names[c->state_layout]);
    else
        fprintf(stream, "%g, state %s\n", c->scale, state_layout_names[c->state_layout]);
}

static void format_half_life(double log_decay, char *text, size_t size) {
    double tokens = half_life(log_decay);
    if (isinf(tokens))
        snprintf(text, size, "never");
    else
        snprintf(text, size, tokens >= 100 && tokens < 1e6 ? "%.0f" : "%.3g", tokens);
}

static void print_decay(FILE *stream, const char *label, double mean, double slowest) {
    char mean_half[32], slowest_half[32];
    format_half_life(mean, mean_half, sizeof mean_half);
    format_half_life(slowest, slowest_half, sizeof slowest_half);
    fprintf(stream, "  %-8s %12.3g %10s %16.3g %10s\n", label, mean, mean_half, slowest, slowest_half);
}

static int compare_reals(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

/* The i-th smallest of one member over the heads. */
static double ranked(const struct run_report *report, bool slowest, int64_t i) {
    size_t heads = (size_t)report->problem->value_heads;
    double *sorted = malloc(heads * sizeof *sorted);
    if (!sorted)
        return NAN;
    for (size_t h = 0; h < heads; h++)
        sorted[h] = slowest ? report->heads[h].slowest : report->heads[h].mean;
    qsort(sorted, heads, sizeof *sorted, compare_reals);
    double value = sorted[i];
    free(sorted);
    return value;
}

static void print_decays(FILE *stream, const struct run_report *report) {
    int64_t heads = report->problem->value_heads;
    if (report->gate_tokens == 0 || heads == 0)
        return;
    fprintf(stream, "forgetting (log decay a token, half-life in tokens");
    if (report->gate_tokens < report->problem->batch * report->problem->tokens)
        fprintf(stream, "; %lld tokens sampled", (long long)report->gate_tokens);
    fprintf(stream, ")\n  %-8s %23s %33s\n", "", "all channels", "each token's slowest channel");
    if (heads > MAX_HEADS_LISTED) {
        print_decay(stream, "fastest", ranked(report, false, 0), ranked(report, true, 0));
        print_decay(stream, "median", ranked(report, false, heads / 2), ranked(report, true, heads / 2));
        print_decay(stream, "slowest", ranked(report, false, heads - 1), ranked(report, true, heads - 1));
        return;
    }
    for (int64_t h = 0; h < heads; h++) {
        char label[16];
        snprintf(label, sizeof label, "head %lld", (long long)h);
        print_decay(stream, label, report->heads[h].mean, report->heads[h].slowest);
    }
}

static void print_warning(FILE *stream, const struct run_report *report) {
    double largest = -INFINITY;
    for (int64_t h = 0; report->gate_tokens > 0 && h < report->problem->value_heads; h++)
        largest = fmax(largest, report->heads[h].largest);
    if (largest > 0)
        fprintf(stream, "warning    a log decay is %.3g, above 0: there the state grows, and may overflow\n",
                largest);
}

static void print_checks(FILE *stream, const struct run_report *report) {
    if (report->check_count == 0)
        return;
    fprintf(stream, "check      error ratio, RMS(x - reference) / RMS(reference)\n");
    for (int i = 0; i < report->check_count; i++) {
        const struct run_check *check = &report->checks[i];
        fprintf(stream, "  %-13s against the %-7s %.2e, at most %.1e  %s\n", check->what, check->against,
                check->comparison.error_ratio, check->comparison.tolerance,
                check->comparison.passed ? "ok" : "TOO LARGE");
    }
    fprintf(stream, "result     %s\n", report->passed ? "within tolerance" : "NOT WITHIN TOLERANCE");
}

void run_report_text(const struct run_report *report, FILE *stream) {
    char path[SENTENCE_SIZE];
    printable(path, sizeof path, report->path);
    fprintf(stream, "file       %s\n", path);
    fprintf(stream, "ran on     %s\n", report->ran_on);
    print_shape(stream, report->problem, report->out_dtype);
    print_flags(stream, report->problem);
    print_decays(stream, report);
    print_warning(stream, report);
    fprintf(stream, "time       best %.3f ms, median %.3f ms of %d; %.4g tokens/s\n", report->timing.min * 1e3,
            report->timing.median * 1e3, report->timing.repeats, report->tokens_per_second);
    if (report->out_path) {
        printable(path, sizeof path, report->out_path);
        fprintf(stream, "written    %s\n", path);
    }
    print_checks(stream, report);
}

/* ---- JSON -------------------------------------------------------------------------------------- */

/* JSON has no infinity and no NaN: null. */
static json_t *real(double value) { return isfinite(value) ? json_real(value) : json_null(); }

static json_t *problem_json(const struct kda_case *c, DLDataType out_dtype) {
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:s, s:s, s:s, s:o, s:s, s:f, s:b, s:s, s:b}", //
                     "batch", (json_int_t)c->batch, "tokens", (json_int_t)c->tokens, "heads",
                     (json_int_t)c->heads, "value_heads", (json_int_t)c->value_heads, "key_dim",
                     (json_int_t)c->key_dim, "value_dim", (json_int_t)c->value_dim, "sequences",
                     (json_int_t)c->sequences, "dtype", type_name(c->q.dl.dtype), "out_dtype",
                     type_name(out_dtype), "gate", gate_names[c->gate], "lower_bound",
                     c->gate == FLASH_KDA_GATE_SIGMOID ? real(c->lower_bound) : json_null(), "beta",
                     beta_names[c->beta_mode], "scale", c->scale != 0 ? c->scale : 1 / sqrt((double)c->key_dim),
                     "qk_norm", (c->flags & FLASH_KDA_QK_NORM) != 0, "state_layout",
                     state_layout_names[c->state_layout], "initial_state", tensor_present(&c->initial_state));
}

static json_t *decays_json(const struct run_report *report) {
    json_t *heads = json_array();
    for (int64_t h = 0; report->gate_tokens > 0 && h < report->problem->value_heads; h++) {
        const struct head_decay *decay = &report->heads[h];
        json_array_append_new(heads, json_pack("{s:o, s:o, s:o, s:o}", "mean_log_decay", real(decay->mean), //
                                               "half_life_tokens", real(half_life(decay->mean)),
                                               "slowest_log_decay", real(decay->slowest),
                                               "slowest_half_life_tokens", real(half_life(decay->slowest))));
    }
    return json_pack("{s:I, s:o}", "sampled_tokens", (json_int_t)report->gate_tokens, "heads", heads);
}

static json_t *checks_json(const struct run_report *report) {
    json_t *checks = json_array();
    for (int i = 0; i < report->check_count; i++) {
        const struct run_check *check = &report->checks[i];
        json_array_append_new(
            checks, json_pack("{s:s, s:s, s:o, s:f, s:b}", "what", check->what, "against", check->against,
                              "error_ratio", real(check->comparison.error_ratio), "tolerance",
                              check->comparison.tolerance, "passed", check->comparison.passed));
    }
    return checks;
}

bool run_report_json(const struct run_report *report) {
    const struct timing *timing = &report->timing;
    char path[SENTENCE_SIZE], out_path[SENTENCE_SIZE]; /* JSON is UTF-8, a file's name may not be */
    printable(path, sizeof path, report->path);
    printable(out_path, sizeof out_path, report->out_path ? report->out_path : "");
    json_t *root = json_pack("{s:s, s:s, s:s, s:s?, s:o, s:o, s:{s:f, s:f, s:i}, s:o, s:I, s:o, s:o}", //
                             "version", flash_kda_version(), "file", path, "ran_on", report->ran_on, "written",
                             report->out_path ? out_path : NULL, "problem",
                             problem_json(report->problem, report->out_dtype), "forgetting",
                             decays_json(report), "seconds", "best", timing->min, "median", timing->median,
                             "repeats", timing->repeats, "tokens_per_second", real(report->tokens_per_second),
                             "non_finite", (json_int_t)report->non_finite, "checks", checks_json(report),
                             "passed", report->check_count ? json_boolean(report->passed) : json_null());
    if (!root)
        return false;
    json_dumpf(root, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(6));
    printf("\n");
    json_decref(root);
    return true;
}
