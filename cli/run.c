/* SPDX-License-Identifier: MIT */
/* flashkda run: runs prefill on a file, times it, checks it. */
#include "run.h"

#include "case_file.h"
#include "command.h"
#include "feed.h"
#include "progress.h"

#include <stdio.h>
#include <stdlib.h>

enum { DEFAULT_REPEATS = 3, MAX_REPEATS = 100000 };

static const char documentation[] =
    "Runs KDA prefill on the inputs of a safetensors file and prints what it "
    "ran on, how fast the heads forget and "
    "how long it took.\v"
    "With --check the result is compared with the oracle, the token recurrence "
    "in fp64, and with the tensors `o` and "
    "`state` of the file where it has them.\n\n"
    "With --decode the tokens go through decode, one a call, and the result is also "
    "compared with prefill's.\n\n"
    "Examples:\n"
    "  flashkda run data/small_softplus.safetensors --check\n"
    "  flashkda run data/small_softplus.safetensors --decode --check\n"
    "  flashkda run in.safetensors -o out.safetensors --threads 4\n"
    "  flashkda run in.safetensors --backend reference --check --json\n"
    "  FLASH_KDA_CPU=generic flashkda run in.safetensors --repeat 20\n\n"
    "Exit status: 0 the result is within tolerance (or was not checked), 1 it "
    "is not, 2 a bad file or argument.";

static const struct argp_option argp_options[] = {
    {"output", 'o', "OUT.safetensors", 0, "Write the output `o` and the final state `state`", 0},
    {"backend", 'b', "NAME", 0, "auto, reference, cpu or cuda (auto)", 0},
    {"threads", 't', "N", 0, "Threads of the CPU backend (as many as flashkda info says)", 0},
    {"repeat", 'r', "N", 0, "Times to run it after the first, which warms up (3)", 0},
    {"check", 'c', NULL, 0, "Compare with the oracle and with the file's answer", 0},
    {"decode", 'd', NULL, 0, "Decode it token by token instead of prefilling it", 0},
    {"json", 'j', NULL, 0, "Print one JSON object", 0},
    {0},
};

struct run_options {
    const char *path, *out_path;
    int backend; /* flash_kda_backend */
    int64_t threads, repeats;
    bool check, decode, json;
};

static error_t parse_backend(const struct argp_state *state, const char *text, int *backend) {
    const char *names[5] = {NULL};
    for (int i = 0; i < 4; i++) {
        names[i] = flash_kda_backend_name((flash_kda_backend)i);
    }
    return parse_name(state, "backend", text, names, backend);
}

static error_t parse_option(int key, char *argument, struct argp_state *state) {
    struct run_options *options = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->err_stream = NULL; /* getopt's own line is enough */
        return 0;
    case 'o':
        options->out_path = argument;
        return 0;
    case 'b':
        return parse_backend(state, argument, &options->backend);
    case 't':
        return parse_integer(state, "threads", argument, 1, MAX_THREADS, &options->threads);
    case 'r':
        return parse_integer(state, "repeat", argument, 1, MAX_REPEATS, &options->repeats);
    case 'c':
        options->check = true;
        return 0;
    case 'd':
        options->decode = true;
        return 0;
    case 'j':
        options->json = true;
        return 0;
    case ARGP_KEY_ARG:
        if (options->path) {
            return argument_error(state, "unexpected argument '%s': one input file at a time", argument);
        }
        options->path = argument;
        return 0;
    case ARGP_KEY_END:
        return options->path ? 0 : argument_error(state, "no input file: flashkda run IN.safetensors");
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* The first run warms up. */
static bool time_call(struct prefill_call *call, int repeats, int steps, struct timing *timing, char *error,
                      size_t error_size) {
    double *seconds = calloc((size_t)repeats, sizeof *seconds), first = 0;
    if (!seconds) {
        snprintf(error, error_size, "out of memory for %d times", repeats);
        return false;
    }
    progress_show(0, steps, "first run");
    bool good = call_run(call, &first, error, error_size);
    for (int i = 0; good && i < repeats; i++) {
        progress_show(1 + i, steps, "timing");
        good = call_run(call, &seconds[i], error, error_size);
    }
    if (good) {
        *timing = timing_of(seconds, repeats);
    }
    free(seconds);
    return good;
}

static void add_check(struct run_report *report, const char *what, const char *against,
                      const struct tensor *value, const struct tensor *reference, double tolerance) {
    if (!tensor_present(reference)) {
        return;
    }
    struct run_check *check = &report->checks[report->check_count++];
    *check = (struct run_check){what, against, compare(value, reference, tolerance)};
    report->passed = report->passed && check->comparison.passed;
}

/* The file's answer may be rounded itself. */
static void add_check_against_file(struct run_report *report, const char *what, const struct tensor *value,
                                   const struct tensor *expected, const struct tensor *exact,
                                   double tolerance) {
    if (tensor_present(expected)) {
        tolerance += rounding_error(exact, expected->dl.dtype);
        add_check(report, what, "file", value, expected, tolerance);
    }
}

/* What was decoded, against prefill of the same tokens on the same backend. */
static bool check_against_prefill(struct run_report *report, const struct prefill_call *call,
                                  const struct prefill_call *oracle, char *error, size_t error_size) {
    const struct kda_case *c = report->problem;
    const flash_kda_prefill_args *a = &call->args;
    struct prefill_call prefill;
    double seconds = 0;
    if (!call_prepare(&prefill, c, report->out_dtype, a->backend, a->num_threads, error, error_size)) {
        return false;
    }
    bool good = call_run(&prefill, &seconds, error, error_size);
    if (good) {
        struct tolerance decoded = call_tolerance(call, oracle, c->regime);
        struct tolerance prefilled = call_tolerance(&prefill, oracle, c->regime);
        add_check(report, "output", "prefill", &call->out, &prefill.out, decoded.output + prefilled.output);
        add_check(report, "state", "prefill", &call->state, &prefill.state, decoded.state + prefilled.state);
    }
    call_free(&prefill);
    return good;
}

static bool check_call(struct run_report *report, const struct prefill_call *call, char *error,
                       size_t error_size) {
    const struct kda_case *c = report->problem;
    struct prefill_call oracle;
    double seconds = 0;
    if (!call_prepare(&oracle, c, dtype_fp32, FLASH_KDA_BACKEND_REFERENCE, 1, error, error_size)) {
        return false;
    }
    bool good = call_run(&oracle, &seconds, error, error_size);
    if (good) {
        const struct tensor *out = &oracle.out, *state = &oracle.state;
        struct tolerance tolerance = call_tolerance(call, &oracle, c->regime);
        struct tolerance exact = call_tolerance(&oracle, &oracle, c->regime);
        report->passed = report->non_finite == 0;
        add_check(report, "output", "oracle", &call->out, out, tolerance.output);
        add_check(report, "state", "oracle", &call->state, state, tolerance.state);
        add_check_against_file(report, "output", &call->out, &c->expected_out, out, tolerance.output);
        add_check_against_file(report, "state", &call->state, &c->expected_state, state, tolerance.state);
        add_check_against_file(report, "oracle output", out, &c->expected_out, out, exact.output);
        add_check_against_file(report, "oracle state", state, &c->expected_state, state, exact.state);
        good = !call->by_token || check_against_prefill(report, call, &oracle, error, error_size);
    }
    call_free(&oracle);
    return good;
}

/* Runs, checks and writes; fills what the report says about it. */
static bool run_call(struct run_report *report, struct prefill_call *call, const struct run_options *options,
                     char *error, size_t error_size) {
    const struct kda_case *c = report->problem;
    int steps = 1 + (int)options->repeats + (options->check ? 1 : 0);
    flash_kda_status status =
        call->by_token ? feed_describe(call, c, report->ran_on, sizeof report->ran_on)
                       : flash_kda_prefill_describe(&call->args, report->ran_on, sizeof report->ran_on);
    if (status != FLASH_KDA_OK) {
        snprintf(error, error_size, "%s", flash_kda_last_error());
        return false;
    }
    if (!time_call(call, (int)options->repeats, steps, &report->timing, error, error_size)) {
        return false;
    }
    report->tokens_per_second = (double)(c->batch * c->tokens) / report->timing.median;
    report->non_finite = count_non_finite(&call->out) + count_non_finite(&call->state);
    if (options->check) {
        progress_show(steps - 1, steps, "oracle");
        if (!check_call(report, call, error, error_size)) {
            return false;
        }
    }
    return !options->out_path || case_file_write_result(options->out_path, c, call, error, error_size);
}

static int print_report(const char *program, const struct run_report *report, bool json) {
    if (report->non_finite > 0) {
        report_error(program, "%s: %lld values of the result are not finite", report->path,
                     (long long)report->non_finite);
    }
    if (!json) {
        run_report_text(report);
    } else if (!run_report_json(report)) {
        return report_error(program, "out of memory for the report");
    }
    return report->check_count > 0 && !report->passed ? STATUS_WRONG_RESULT : STATUS_OK;
}

static int run_case(const char *program, const struct kda_case *c, const struct run_options *options) {
    char error[MESSAGE_SIZE];
    struct prefill_call call;
    if (!call_prepare(&call, c, c->v.dl.dtype, (flash_kda_backend)options->backend, (int32_t)options->threads,
                      error, sizeof error)) {
        return report_error(program, "%s: %s", options->path, error);
    }
    call.by_token = options->decode ? c : NULL;
    struct run_report report = {
        .path = options->path, .out_path = options->out_path, .problem = c, .out_dtype = c->v.dl.dtype};
    int status = STATUS_ERROR;
    report.heads = calloc((size_t)c->value_heads + 1, sizeof *report.heads);
    if (!report.heads) {
        report_error(program, "out of memory for the gate statistics");
    } else if (!run_call(&report, &call, options, error, sizeof error)) {
        progress_clear();
        report_error(program, "%s", error);
    } else {
        report.gate_tokens = gate_stats(c, report.heads);
        progress_clear();
        status = print_report(program, &report, options->json);
    }
    free(report.heads);
    call_free(&call);
    return status;
}

int command_run(int argc, char **argv) {
    static const struct argp argp = {
        .options = argp_options, .parser = parse_option, .args_doc = "IN.safetensors", .doc = documentation};
    struct run_options options = {.repeats = DEFAULT_REPEATS};
    if (!parse_arguments(&argp, argc, argv, 0, &options)) {
        return STATUS_ERROR;
    }
    char error[MESSAGE_SIZE];
    struct kda_case c;
    if (!case_file_read(options.path, &c, error, sizeof error)) {
        return report_error(argv[0], "%s", error);
    }
    int status = run_case(argv[0], &c, &options);
    case_free(&c);
    return status;
}
