/* SPDX-License-Identifier: MIT */
/* Prints what flashkda bench measured: a table, JSON. */
#include "bench.h"

#include "device_json.h"
#include "failure.h"

#include <flash_kda.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <time.h>

static int64_t value_heads(const struct case_spec *spec) {
    return spec->value_heads ? spec->value_heads : spec->heads;
}

double bench_tokens_per_second(const struct bench_result *result) {
    return (double)(result->spec.batch * result->tokens) / result->timing.median;
}

double bench_gflops(const struct bench_result *result) {
    const struct case_spec *spec = &result->spec;
    double operations = 8.0 * (double)spec->key_dim * (double)spec->value_dim;
    return bench_tokens_per_second(result) * (double)value_heads(spec) * operations * 1e-9;
}

double bench_byte_rate(const struct bench_result *result) {
    return (double)result->bytes / result->timing.median;
}

/* ---- Table ------------------------------------------------------------------------------------- */

void bench_print_head(const struct bench_machine *machine, bool decode) {
    printf("%s, ", machine->device.name[0] ? machine->device.name : machine->host.cpu);
    if (machine->copy_rate > 0)
        printf("copies %.3g GB/s, ", machine->copy_rate * 1e-9);
    printf("flashkda %s\n", flash_kda_version());
    if (decode)
        printf("%-32s %-10s %7s %10s %21s %9s %8s %10s %15s\n", "case", "level", "threads", "cold us",
               "quartiles", "GB/s", "of copy", "warm us", "error o, state");
    else
        printf("%-36s %-4s %-10s %7s %9s %19s %10s %8s %7s %15s\n", "case", "out", "level", "threads",
               "median ms", "quartiles", "tokens/s", "GFLOP/s", "GB/s", "error o, state");
}

static void print_prefill_time(const struct bench_result *result) {
    const struct timing *timing = &result->timing;
    if (!result->passed)
        printf("%58s ", "WRONG, not timed");
    else
        printf("%9.4f %9.4f-%-9.4f %10.4g %8.1f %7.1f ", timing->median * 1e3, timing->q1 * 1e3,
               timing->q3 * 1e3, bench_tokens_per_second(result), bench_gflops(result),
               bench_byte_rate(result) * 1e-9);
}

static void print_decode_time(const struct bench_machine *machine, const struct bench_result *result) {
    const struct timing *timing = &result->timing;
    char warm[16] = "-";
    if (result->warm.repeats)
        snprintf(warm, sizeof warm, "%.2f", result->warm.median * 1e6);
    if (!result->passed)
        printf("%62s ", "WRONG, not timed");
    else
        printf("%10.2f %10.2f-%-10.2f %9.1f %7.0f%% %10s ", timing->median * 1e6, timing->q1 * 1e6,
               timing->q3 * 1e6, bench_byte_rate(result) * 1e-9,
               100 * bench_byte_rate(result) / machine->copy_rate, warm);
}

void bench_print_line(const struct bench_machine *machine, const struct bench_result *result) {
    char threads[16] = "-";
    if (result->threads)
        snprintf(threads, sizeof threads, "%d", result->threads);
    if (result->decode) {
        printf("%-32s %-10s %7s ", result->name, result->level, threads);
        print_decode_time(machine, result);
    } else {
        printf("%-36s %-4s %-10s %7s ", result->name, type_name(result->out_dtype), result->level, threads);
        print_prefill_time(result);
    }
    printf("%.1e %.1e\n", result->output_error, result->state_error);
    fflush(stdout);
}

/* ---- JSON -------------------------------------------------------------------------------------- */

/* JSON has no infinity: null. */
static json_t *real(double value) { return isfinite(value) ? json_real(value) : json_null(); }

static json_t *case_json(const struct bench_result *result) {
    const struct case_spec *spec = &result->spec;
    return json_pack(
        "{s:I, s:I, s:s?, s:I, s:I, s:I, s:I, s:s, s:s, s:s, s:o, s:s, s:b, s:s, s:I, s:b, s:b, s:I}", //
        "batch", (json_int_t)spec->batch, "tokens", (json_int_t)result->tokens, "lengths", spec->lengths,
        "heads", (json_int_t)spec->heads, "value_heads", (json_int_t)value_heads(spec), "key_dim",
        (json_int_t)spec->key_dim, "value_dim", (json_int_t)spec->value_dim, "dtype", type_name(spec->dtype),
        "out_dtype", type_name(result->out_dtype), "gate", gate_names[spec->gate], "lower_bound",
        spec->gate == FLASH_KDA_GATE_SIGMOID ? real(spec->lower_bound) : json_null(), "regime",
        regime_names[spec->regime], "initial_state", spec->initial_state, "state_dtype",
        type_name(spec->bf16_state ? TYPE_BF16 : TYPE_FP32), "checkpoint_every",
        (json_int_t)spec->checkpoint_every, "batch_invariant", spec->batch_invariant, "fused", spec->fused,
        "seed", (json_int_t)spec->seed);
}

static json_t *timing_json(const struct timing *timing) {
    return json_pack("{s:f, s:f, s:f, s:f, s:f, s:i}", "min", timing->min, "q1", timing->q1, "median",
                     timing->median, "q3", timing->q3, "max", timing->max, "repeats", timing->repeats);
}

static json_t *result_json(const struct bench_result *result) {
    json_t *object = json_pack(
        "{s:s, s:o, s:s, s:o, s:s, s:I, s:I, s:{s:I, s:I, s:o, s:o, s:o, s:b}}", "name", result->name, "case",
        case_json(result), "level", result->level, "threads",
        result->threads ? json_integer(result->threads) : json_null(), "ran_on", result->ran_on, "bytes",
        (json_int_t)result->bytes, "workspace_bytes", (json_int_t)result->workspace_bytes, "check", "tokens",
        (json_int_t)result->checked_tokens, "value_heads", (json_int_t)result->checked_heads, "output_error",
        real(result->output_error), "state_error", real(result->state_error), "checkpoint_error",
        result->spec.checkpoint_every ? real(result->checkpoint_error) : json_null(), "passed", result->passed);
    if (result->decode)
        json_object_set_new(object, "decode", json_string(result->decode));
    if (result->backward)
        json_object_set_new(object, "backward", json_true());
    if (result->passed) {
        json_object_set_new(object, "seconds", timing_json(&result->timing));
        if (result->warm.repeats)
            json_object_set_new(object, "warm_seconds", timing_json(&result->warm));
        json_object_set_new(object, "tokens_per_second", real(bench_tokens_per_second(result)));
        json_object_set_new(object, "gflops", real(bench_gflops(result)));
        json_object_set_new(object, "gb_per_second", real(bench_byte_rate(result) * 1e-9));
    }
    return object;
}

static json_t *machine_json(const struct bench_machine *machine) {
    const struct machine *host = &machine->host;
    json_t *object =
        json_pack("{s:s, s:s, s:s, s:i, s:i}", "cpu", host->cpu, "architecture", host->architecture, "features",
                  host->features, "processors", host->processors, "threads", host->threads);
    bool on_device = machine->device.name[0];
    json_t *device = on_device ? device_json(&machine->device) : json_null();
    if (machine->copy_rate > 0)
        json_object_set_new(on_device ? device : object, "copy_gb_per_second", real(machine->copy_rate * 1e-9));
    json_object_set_new(object, "device", device);
    return object;
}

char *bench_json(const struct bench_machine *machine, const char *commit, const struct bench_result *results,
                 int count) {
    char date[32] = "", build[SENTENCE_SIZE];
    printable(build, sizeof build, commit ? commit : "");
    time_t now = time(NULL);
    struct tm utc;
    if (gmtime_r(&now, &utc))
        strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", &utc);
    json_t *list = json_array();
    for (int i = 0; i < count; i++)
        json_array_append_new(list, result_json(&results[i]));
    json_t *root =
        json_pack("{s:s, s:s?, s:s, s:o, s:o}", "version", flash_kda_version(), "commit", commit ? build : NULL,
                  "date", date, "machine", machine_json(machine), "results", list);
    char *text = root ? json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(6)) : NULL;
    json_decref(root);
    return text;
}
