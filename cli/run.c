/* SPDX-License-Identifier: MIT */
/* flashkda run: runs prefill on a file, times it, checks it. */
#include "run.h"

#include "case_file.h"
#include "command.h"
#include "file.h"
#include "progress.h"

#include <stdio.h>
#include <stdlib.h>

enum { DEFAULT_REPEATS = 3, MAX_REPEATS = 100000 };

static const char documentation[] =
    "Runs KDA prefill on the inputs of a safetensors file, - being standard input, and prints what it ran on, "
    "how "
    "fast the heads forget and how long it took.\v"
    "With --check the result is compared with the oracle, the token recurrence "
    "in fp64, and with the tensors `o` and "
    "`state` of the file where it has them.\n\n"
    "With --decode the tokens go through decode, one a trial, and the result is also "
    "compared with prefill's.\n\n"
    "Examples:\n"
    "  flashkda run data/small_softplus.safetensors --check\n"
    "  flashkda run data/small_softplus.safetensors --decode --check\n"
    "  flashkda run in.safetensors -o out.safetensors --threads 4\n"
    "  flashkda gen - | flashkda run - -o - >out.safetensors\n"
    "  flashkda run in.safetensors --backend reference --check --json\n"
    "  FLASH_KDA_CPU=generic flashkda run in.safetensors --repeat 20\n\n"
    "Exit status: 0 the result is within tolerance (or was not checked), 1 it "
    "is not, 2 a bad file or argument.";

static const struct argp_option argp_options[] = {
    {"output", 'o', "OUT.safetensors", 0,
     "Write the output `o` and the final state `state`; - is standard output, and the report goes to standard "
     "error",
     0},
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
    for (int i = 0; i < 4; i++)
        names[i] = flash_kda_backend_name((flash_kda_backend)i);
    return parse_name(state, "backend", text, names, backend);
}

static error_t check_options(const struct argp_state *state, const struct run_options *options) {
    bool on_cpu = options->backend == FLASH_KDA_BACKEND_AUTO || options->backend == FLASH_KDA_BACKEND_CPU;
    if (!options->path)
        return argument_error(state, "no input file: flashkda run IN.safetensors");
    if (options->threads && !on_cpu)
        return argument_error(state, "--threads is the CPU backend's: it does not go with --backend %s",
                              flash_kda_backend_name((flash_kda_backend)options->backend));
    if (options->out_path && is_stream(options->out_path) && options->json)
        return argument_error(state, "--output - and --json both write to standard output");
    if (options->out_path && !is_stream(options->out_path) && same_file(options->path, options->out_path))
        return argument_error(state, "--output is the input file, '%s'", options->out_path);
    return 0;
}

static error_t parse_option(int key, char *argument, struct argp_state *state) {
    struct run_options *options = state->input;
    switch (key) {
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
        if (options->path)
            return argument_error(state, "unexpected argument '%s': one input file at a time", argument);
        options->path = argument;
        return 0;
    case ARGP_KEY_END:
        return check_options(state, options);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* The first run warms up. */
static bool time_call(struct trial *trial, int repeats, int steps, struct timing *timing) {
    double *seconds = calloc((size_t)repeats, sizeof *seconds), first = 0;
    if (!seconds)
        return failed("out of memory for %d times", repeats);
    progress_show(0, steps, "first run");
    bool good = trial_run(trial, &first);
    for (int i = 0; good && i < repeats; i++) {
        progress_show(1 + i, steps, "timing");
        good = trial_run(trial, &seconds[i]);
    }
    if (good)
        *timing = timing_of(seconds, repeats);
    free(seconds);
    return good;
}

static void add_check(struct run_report *report, const char *what, const char *against,
                      const struct tensor *value, const struct tensor *reference, double tolerance) {
    if (!tensor_present(reference))
        return;
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
static bool check_against_prefill(struct run_report *report, const struct trial *trial,
                                  const struct trial *oracle) {
    const struct kda_case *c = report->problem;
    const flash_kda_prefill_args *a = &trial->call.args.prefill;
    struct trial prefill;
    double seconds = 0;
    if (!trial_prefill(&prefill, c, report->out_dtype, a->backend, a->num_threads))
        return false;
    bool good = trial_run(&prefill, &seconds);
    if (good) {
        struct tolerance decoded = trial_tolerance(trial, oracle);
        struct tolerance prefilled = trial_tolerance(&prefill, oracle);
        add_check(report, "output", "prefill", &trial->out, &prefill.out, decoded.output + prefilled.output);
        add_check(report, "state", "prefill", &trial->state, &prefill.state, decoded.state + prefilled.state);
    }
    trial_free(&prefill);
    return good;
}

static bool check_call(struct run_report *report, const struct trial *trial) {
    const struct kda_case *c = report->problem;
    struct trial oracle;
    double seconds = 0;
    if (!trial_prefill(&oracle, c, TYPE_FP32, FLASH_KDA_BACKEND_REFERENCE, 1))
        return false;
    bool good = trial_run(&oracle, &seconds);
    if (good) {
        const struct tensor *out = &oracle.out, *state = &oracle.state;
        struct tolerance tolerance = trial_tolerance(trial, &oracle);
        struct tolerance exact = trial_tolerance(&oracle, &oracle);
        report->passed = report->non_finite == 0;
        add_check(report, "output", "oracle", &trial->out, out, tolerance.output);
        add_check(report, "state", "oracle", &trial->state, state, tolerance.state);
        add_check_against_file(report, "output", &trial->out, &c->expected_out, out, tolerance.output);
        add_check_against_file(report, "state", &trial->state, &c->expected_state, state, tolerance.state);
        add_check_against_file(report, "oracle output", out, &c->expected_out, out, exact.output);
        add_check_against_file(report, "oracle state", state, &c->expected_state, state, exact.state);
        good = !trial->by_token || check_against_prefill(report, trial, &oracle);
    }
    trial_free(&oracle);
    return good;
}

/* Runs, checks and writes; fills what the report says about it. */
static bool run_call(struct run_report *report, struct trial *trial, const struct run_options *options) {
    const struct kda_case *c = report->problem;
    int steps = 1 + (int)options->repeats + (options->check ? 1 : 0);
    if (!trial_describe(trial, report->ran_on, sizeof report->ran_on))
        return false;
    if (!time_call(trial, (int)options->repeats, steps, &report->timing))
        return false;
    report->tokens_per_second = (double)(c->batch * c->tokens) / report->timing.median;
    report->non_finite = count_non_finite(&trial->out) + count_non_finite(&trial->state);
    if (options->check) {
        progress_show(steps - 1, steps, "oracle");
        if (!check_call(report, trial))
            return false;
    }
    return !options->out_path || case_file_write_result(options->out_path, c, trial);
}

static int print_report(const char *program, const struct run_report *report, bool json) {
    if (report->non_finite > 0) {
        report_error(program, "%s: %lld values of the result are not finite", report->path,
                     (long long)report->non_finite);
    }
    if (!json)
        run_report_text(report, report->out_path && is_stream(report->out_path) ? stderr : stdout);
    else if (!run_report_json(report))
        return report_error(program, "out of memory for the report");
    return report->check_count > 0 && !report->passed ? STATUS_WRONG_RESULT : STATUS_OK;
}

static int run_case(const char *program, const struct kda_case *c, const struct run_options *options) {
    struct trial trial;
    if (!trial_prefill(&trial, c, c->v.dl.dtype, (flash_kda_backend)options->backend,
                       (int32_t)options->threads))
        return report_error(program, "%s: %s", options->path, failure());
    trial.by_token = options->decode;
    struct run_report report = {
        .path = options->path, .out_path = options->out_path, .problem = c, .out_dtype = c->v.dl.dtype};
    int status = STATUS_ERROR;
    report.heads = calloc((size_t)c->value_heads + 1, sizeof *report.heads);
    if (!report.heads) {
        report_error(program, "out of memory for the gate statistics");
    } else if (!run_call(&report, &trial, options)) {
        progress_clear();
        report_error(program, "%s", failure());
    } else {
        report.gate_tokens = gate_stats(c, report.heads);
        progress_clear();
        status = print_report(program, &report, options->json);
    }
    free(report.heads);
    trial_free(&trial);
    return status;
}

int command_run(int argc, char **argv) {
    static const struct argp argp = {
        .options = argp_options, .parser = parse_option, .args_doc = "IN.safetensors", .doc = documentation};
    struct run_options options = {.repeats = DEFAULT_REPEATS};
    if (!parse_arguments(&argp, argc, argv, 0, &options))
        return STATUS_ERROR;
    struct kda_case c;
    if (!case_file_read(options.path, &c))
        return report_error(argv[0], "%s", failure());
    int status = run_case(argv[0], &c, &options);
    case_free(&c);
    return status;
}
