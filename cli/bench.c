/* SPDX-License-Identifier: MIT */
/* flashkda bench: times a table of cases, each only after its result has been found right. */
#include "bench.h"

#include "captured.h"
#include "check.h"
#include "file.h"
#include "progress.h"
#include "replay.h"
#include "spec_options.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    DEFAULT_REPEATS = 9,
    QUICK_REPEATS = 5,
    MIN_REPEATS = 3, /* however long one takes */
    MAX_REPEATS = 1000,
    MAX_VARIANTS = 4, /* output dtypes times numbers of threads of a row */
    MAX_COPIES = 64,  /* of a case's tensors on a GPU */
};

/* After this long no further repeat begins, seconds. */
static const double time_budget = 4;

/* The oracle looks at so many heads, then tokens, that its work, tokens x value heads x K x V, stays below this:
 * about a second. Of a longer case the rest is covered by the shorter one: no token depends on a later one. */
static const int64_t oracle_budget = (int64_t)1 << 29;

static const char documentation[] =
    "Times prefill, or with --decode decode, on random cases: a built-in table, or the one case that "
    "the options describe. A result is timed only after it has been compared with the oracle, where "
    "that takes long on its first heads and tokens.\v"
    "Each line is the median of repeated runs after a warm-up, with the quartiles. On CUDA it is the "
    "GPU's time by replay of a CUDA graph, over as many copies of the tensors as overflow the L2 cache. "
    "GFLOP/s counts 8 K V operations for a token of a value head; GB/s the bytes of all tensors, each "
    "once. Decode on CUDA has both: cold, in that way, as between the layers of a model; and warm, "
    "where the states fit in the L2 cache: all calls on one set of tensors.\n\n"
    "Examples:\n"
    "  flashkda bench\n"
    "  flashkda bench --quick --level all\n"
    "  flashkda bench --tokens 65536 --heads 1 --threads 1 --out-dtype fp32\n"
    "  flashkda bench --backend cuda -o cuda.json\n"
    "  flashkda bench --backend cuda --decode\n"
    "  flashkda bench --backend cuda --captured data/small_softplus.safetensors --tokens 8192 --heads 32\n"
    "  flashkda bench --commit $(git rev-parse HEAD) -o cpu.json";

enum option_key {
    OPTION_LEVEL = 0x200,
    OPTION_QUICK,
    OPTION_COMMIT,
    OPTION_OUT_DTYPE,
    OPTION_DECODE,
};

static const char *const backend_names[] = {"cpu", "cuda", NULL};

static const struct argp_option argp_options[] = {
    {"backend", 'b', "NAME", 0, "cpu or cuda (cpu)", 0},
    {"level", OPTION_LEVEL, "NAME", 0, "Level of the CPU backend, or all (the best one)", 0},
    {"threads", 't', "N", 0, "Threads (as many as flashkda info says)", 0},
    {"repeat", 'r', "N", 0, "Times to run each case after the warm-up, fewer if it takes long (9)", 0},
    {"quick", OPTION_QUICK, NULL, 0, "A table of a few short cases", 0},
    {"decode", OPTION_DECODE, NULL, 0, "A table of decode instead of prefill, beside the rate of a copy", 0},
    {"out-dtype", OPTION_OUT_DTYPE, "NAME", 0, "Only this output dtype: bf16, fp16 or fp32", 0},
    {"output", 'o', "FILE", 0, "Write the results as JSON", 0},
    {"json", 'j', NULL, 0, "Print JSON instead of the table", 0},
    {"commit", OPTION_COMMIT, "NAME", 0, "What was built, to be kept in the JSON", 0},
    {0},
};

struct bench_options {
    struct spec_options spec;
    const char *level, *path, *commit;
    int64_t threads, repeats; /* 0: the default */
    DLDataType out_dtype;     /* where has_out_dtype */
    int backend;              /* in backend_names */
    bool has_out_dtype, decode, quick, json;
};

static bool on_cuda(const struct bench_options *options) { return options->backend == 1; }

static error_t check_options(const struct argp_state *state, const struct bench_options *options) {
    if (options->spec.given && options->quick) {
        return argument_error(state, "--quick is a table of its own: it does not go with options of a case");
    }
    if (options->decode && (options->spec.given || options->has_out_dtype)) {
        return argument_error(state, "--decode is a table of its own: it does not go with options of a case");
    }
    if (on_cuda(options) && (options->level || options->threads)) {
        return argument_error(state, "--level and --threads are the CPU backend's: they do not go with "
                                     "--backend cuda");
    }
    return 0;
}

static error_t parse_option(int key, char *argument, struct argp_state *state) {
    struct bench_options *options = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->err_stream = NULL; /* getopt's own line is enough */
        state->child_inputs[0] = &options->spec;
        return 0;
    case 'b':
        return parse_name(state, "backend", argument, backend_names, &options->backend);
    case OPTION_LEVEL:
        options->level = argument;
        return 0;
    case 't':
        return parse_integer(state, "threads", argument, 1, MAX_THREADS, &options->threads);
    case 'r':
        return parse_integer(state, "repeat", argument, 1, MAX_REPEATS, &options->repeats);
    case OPTION_QUICK:
        options->quick = true;
        return 0;
    case OPTION_DECODE:
        options->decode = true;
        return 0;
    case OPTION_OUT_DTYPE:
        options->has_out_dtype = dtype_from_name(argument, &options->out_dtype);
        return options->has_out_dtype
                   ? 0
                   : argument_error(state, "--out-dtype is '%s', expected one of: bf16, fp16, fp32", argument);
    case 'o':
        options->path = argument;
        return 0;
    case 'j':
        options->json = true;
        return 0;
    case OPTION_COMMIT:
        options->commit = argument;
        return 0;
    case ARGP_KEY_ARG:
        return argument_error(state, "unexpected argument '%s'", argument);
    case ARGP_KEY_END:
        return check_options(state, options);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---- One measurement --------------------------------------------------------------------------- */

/* A case and the exact answer to its first tokens and heads. */
struct bench_case {
    struct kda_case whole, prefix;
    struct prefill_call oracle; /* of prefix, fp32 */
};

struct bench {
    const struct bench_options *options;
    struct bench_machine machine;
    const char *levels[16]; /* to run, ended by NULL */
    int level_count, done, total, wrong;
    struct bench_result *results; /* [total], done of them filled */
    bool table;                   /* print lines as they come */
    char error[MESSAGE_SIZE];
};

/* How many units, of so much work each, the budget allows: 1 to `most`. */
static int64_t affordable(int64_t work, int64_t most) {
    int64_t count = oracle_budget / (work > 0 ? work : 1);
    count = count < most ? count : most;
    return count > 0 ? count : 1;
}

static bool make_prefix(struct kda_case *prefix, const struct kda_case *c) {
    int64_t token = c->batch * (c->value_heads / c->heads) * c->key_dim * c->value_dim; /* of one head */
    int64_t heads = affordable(token * c->tokens, c->heads);
    return case_prefix(prefix, c, c->tokens ? affordable(token * heads, c->tokens) : 0, heads);
}

static void free_case(struct bench_case *c) {
    call_free(&c->oracle);
    case_free(&c->prefix);
    case_free(&c->whole);
}

static bool make_case(struct bench *bench, struct bench_case *c, const struct case_spec *spec) {
    double seconds = 0;
    *c = (struct bench_case){0};
    bool good = captured_generate(&c->whole, spec, bench->error, sizeof bench->error);
    if (good && !make_prefix(&c->prefix, &c->whole)) {
        snprintf(bench->error, sizeof bench->error, "out of memory for a case");
        good = false;
    }
    good = good &&
           call_prepare(&c->oracle, &c->prefix, dtype_fp32, FLASH_KDA_BACKEND_REFERENCE, 1, bench->error,
                        sizeof bench->error) &&
           call_run(&c->oracle, &seconds, bench->error, sizeof bench->error);
    if (!good) {
        free_case(c);
    }
    return good;
}

/* Compares one result where the oracle has its answer; keeps the largest error. */
static void judge_tensor(struct bench_result *result, const struct tensor *value, const struct tensor *exact,
                         int head_dim, double tolerance, double *error) {
    struct tensor heads;
    tensor_view(&heads, value, head_dim, exact->shape[head_dim]);
    struct comparison comparison = compare(&heads, exact, tolerance);
    *error = fmax(*error, comparison.error_ratio);
    result->passed = result->passed && comparison.passed;
}

static void judge(struct bench_result *result, const struct bench_case *c, const struct prefill_call *call) {
    struct tolerance tolerance = call_tolerance(call, &c->oracle, c->whole.regime);
    struct tensor first;
    tensor_view(&first, &call->out, 1, c->prefix.tokens);
    judge_tensor(result, &first, &c->oracle.out, 2, tolerance.output, &result->output_error);
    if (call->args.q->shape[1] == c->prefix.tokens) {
        judge_tensor(result, &call->state, &c->oracle.state, 1, tolerance.state, &result->state_error);
        if (tensor_present(&call->checkpoints)) {
            judge_tensor(result, &call->checkpoints, &c->oracle.checkpoints, 2, tolerance.checkpoints,
                         &result->checkpoint_error);
        }
    }
}

/* Runs the case once, which warms up, and where only its first tokens have an exact answer those too. */
static bool check_call(struct bench *bench, const struct bench_case *c, struct prefill_call *call,
                       struct bench_result *result) {
    double seconds = 0;
    if (!call_run(call, &seconds, bench->error, sizeof bench->error)) {
        return false;
    }
    result->passed = count_non_finite(&call->out) == 0 && count_non_finite(&call->state) == 0;
    judge(result, c, call);
    if (c->prefix.tokens == c->whole.tokens) {
        return true;
    }
    struct prefill_call prefix;
    if (!call_prepare(&prefix, &c->prefix, result->out_dtype, call->args.backend, call->args.num_threads,
                      bench->error, sizeof bench->error)) {
        return false;
    }
    bool good = call_run(&prefix, &seconds, bench->error, sizeof bench->error);
    if (good) {
        judge(result, c, &prefix);
    }
    call_free(&prefix);
    return good;
}

static int repeats(const struct bench_options *options) {
    if (options->repeats > 0) {
        return (int)options->repeats;
    }
    return options->quick ? QUICK_REPEATS : DEFAULT_REPEATS;
}

/* Do the copies hold the bits of the result that was found right? */
static bool same_result(struct bench *bench, const struct prefill_call *copies, int count,
                        const struct prefill_call *checked) {
    for (int i = 0; i < count; i++) {
        if (!device_copies_fetch(copies[i].copies, bench->error, sizeof bench->error)) {
            return false;
        }
        if (memcmp(copies[i].out.dl.data, checked->out.dl.data, tensor_bytes(&checked->out)) != 0 ||
            memcmp(copies[i].state.dl.data, checked->state.dl.data, tensor_bytes(&checked->state)) != 0) {
            snprintf(bench->error, sizeof bench->error,
                     "a replayed call gave other bits than the one that was compared with the oracle");
            return false;
        }
    }
    return true;
}

static bool launch(const void *calls, int i, void *stream, char *error, size_t error_size) {
    return call_launch((const struct prefill_call *)calls + i, stream, error, error_size);
}

static bool time_copies(struct bench *bench, const struct bench_case *c, const struct prefill_call *checked,
                        struct prefill_call *copies, int count, struct timing *timing) {
    double seconds[MAX_REPEATS];
    int made = 0;
    while (made < count && call_prepare(&copies[made], &c->whole, checked->out.dl.dtype, checked->args.backend,
                                        0, bench->error, sizeof bench->error)) {
        made++;
    }
    bool good = made == count &&
                replay_calls(launch, copies, count, seconds, repeats(bench->options), bench->error,
                             sizeof bench->error) &&
                same_result(bench, copies, count, checked);
    if (good) {
        *timing = timing_of(seconds, repeats(bench->options));
    }
    for (int i = 0; i < made; i++) {
        call_free(&copies[i]);
    }
    return good;
}

/* GPU time of the call. It runs on copies in turn, so many that none is in the cache when its turn comes. */
static bool time_on_device(struct bench *bench, const struct bench_case *c, const struct prefill_call *checked,
                           struct timing *timing) {
    int64_t wanted = 1 + 2 * bench->machine.device.l2_bytes / call_bytes(checked);
    int count = (int)(wanted < MAX_COPIES ? wanted : MAX_COPIES);
    struct prefill_call *copies = calloc((size_t)count, sizeof *copies);
    if (!copies) {
        snprintf(bench->error, sizeof bench->error, "out of memory for %d calls", count);
        return false;
    }
    bool good = time_copies(bench, c, checked, copies, count, timing);
    free(copies);
    return good;
}

static bool time_call(struct bench *bench, const struct bench_case *c, struct prefill_call *call,
                      struct timing *timing) {
    if (call->copies) {
        return time_on_device(bench, c, call, timing);
    }
    double seconds[MAX_REPEATS], sum = 0;
    int count = 0, wanted = repeats(bench->options);
    while (count < wanted && (count < MIN_REPEATS || sum < time_budget)) {
        if (!call_run(call, &seconds[count], bench->error, sizeof bench->error)) {
            return false;
        }
        sum += seconds[count++];
    }
    *timing = timing_of(seconds, count);
    return true;
}

/* What the library says it runs: "cuda: level sm80, ..." names the level. */
static bool describe_call(struct bench *bench, const struct prefill_call *call, struct bench_result *result) {
    if (flash_kda_prefill_describe(&call->args, result->ran_on, sizeof result->ran_on) != FLASH_KDA_OK) {
        snprintf(bench->error, sizeof bench->error, "%s", flash_kda_last_error());
        return false;
    }
    sscanf(result->ran_on, "%*[^:]: level %15[^,]", result->level);
    return true;
}

/* Checks and times the case as the result says: output dtype, level, threads. */
static bool measure(struct bench *bench, const struct bench_case *c, struct bench_result *result) {
    struct prefill_call call;
    flash_kda_backend backend = on_cuda(bench->options) ? FLASH_KDA_BACKEND_CUDA : FLASH_KDA_BACKEND_CPU;
    if (!call_prepare(&call, &c->whole, result->out_dtype, backend, result->threads, bench->error,
                      sizeof bench->error)) {
        return false;
    }
    result->bytes = call_bytes(&call);
    result->workspace_bytes = (int64_t)call.workspace_bytes;
    bool good = describe_call(bench, &call, result) && check_call(bench, c, &call, result) &&
                (!result->passed || time_call(bench, c, &call, &result->timing));
    call_free(&call);
    return good;
}

/* ---- The table --------------------------------------------------------------------------------- */

/* The output dtypes and numbers of threads to time a case in. */
struct variant {
    DLDataType out_dtype;
    int threads;
};

static int row_variants(const struct bench *bench, const struct case_spec *spec, bool fp32_out, bool one_thread,
                        struct variant variants[MAX_VARIANTS]) {
    const struct bench_options *options = bench->options;
    int threads = options->threads ? (int)options->threads : bench->machine.host.threads, count = 0;
    if (on_cuda(options)) {
        threads = 0;
    }
    DLDataType dtypes[2] = {options->has_out_dtype ? options->out_dtype : spec->dtype, dtype_fp32};
    for (int i = 0; i < (fp32_out && !options->has_out_dtype ? 2 : 1); i++) {
        if (one_thread && threads > 1) {
            variants[count++] = (struct variant){dtypes[i], 1};
        }
        variants[count++] = (struct variant){dtypes[i], threads};
    }
    return count;
}

static bool bench_variant(struct bench *bench, const struct bench_case *c, const struct case_spec *spec,
                          const struct variant *variant, const char *level) {
    struct bench_result *result = &bench->results[bench->done];
    *result = (struct bench_result){.spec = *spec,
                                    .tokens = c->whole.tokens,
                                    .out_dtype = variant->out_dtype,
                                    .threads = variant->threads,
                                    .checked_tokens = c->prefix.tokens,
                                    .checked_heads = c->prefix.value_heads};
    case_spec_name(spec, result->name, sizeof result->name);
    progress_show(bench->done, bench->total, result->name);
    if (level) {
        setenv("FLASH_KDA_CPU", level, 1);
    }
    if (!measure(bench, c, result)) {
        return false;
    }
    bench->done++;
    bench->wrong += !result->passed;
    if (bench->table) {
        progress_clear();
        bench_print_line(stdout, result);
    }
    return true;
}

static bool bench_spec(struct bench *bench, const struct case_spec *spec, bool fp32_out, bool one_thread) {
    struct variant variants[MAX_VARIANTS];
    struct bench_case c;
    int count = row_variants(bench, spec, fp32_out, one_thread, variants);
    progress_show(bench->done, bench->total, "inputs and oracle");
    if (!make_case(bench, &c, spec)) {
        return false;
    }
    bool good = true;
    for (int i = 0; good && i < count; i++) {
        for (int level = 0; good && level < bench->level_count; level++) {
            good = bench_variant(bench, &c, spec, &variants[i], bench->levels[level]);
        }
    }
    free_case(&c);
    return good;
}

static struct case_spec row_spec(const struct bench_row *row) {
    struct case_spec spec = default_spec;
    spec.batch = row->batch ? row->batch : default_spec.batch;
    spec.tokens = row->tokens;
    spec.heads = row->heads;
    spec.value_heads = row->value_heads;
    spec.key_dim = spec.value_dim = row->dim ? row->dim : default_spec.key_dim;
    spec.lengths = row->lengths;
    spec.gate = (flash_kda_gate)row->gate;
    spec.regime = (enum regime)row->regime;
    spec.initial_state = row->initial_state;
    spec.bf16_state = row->bf16_state;
    spec.batch_invariant = row->batch_invariant;
    spec.checkpoint_every = row->checkpoint_every;
    return spec;
}

static const struct bench_table *table_of(const struct bench_options *options) {
    return on_cuda(options) ? &bench_cuda_table : &bench_cpu_table;
}

static bool bench_all_rows(struct bench *bench) {
    const struct bench_table *table = table_of(bench->options);
    bool good = true;
    for (int i = 0; good && i < table->count; i++) {
        const struct bench_row *row = &table->rows[i];
        if (row->quick == bench->options->quick) {
            struct case_spec spec = row_spec(row);
            good = bench_spec(bench, &spec, row->fp32_out, row->one_thread);
        }
    }
    return good;
}

/* ---- Decode ------------------------------------------------------------------------------------ */

static const struct bench_decode_table *decode_table(const struct bench_options *options) {
    return on_cuda(options) ? &bench_decode_cuda_table : &bench_decode_cpu_table;
}

static bool bench_decode_on_level(struct bench *bench, const struct bench_decode_row *row, const char *level) {
    const struct bench_options *options = bench->options;
    const struct bench_decode how = {.machine = &bench->machine,
                                     .backend =
                                         on_cuda(options) ? FLASH_KDA_BACKEND_CUDA : FLASH_KDA_BACKEND_CPU,
                                     .threads = on_cuda(options)   ? 0
                                                : options->threads ? (int)options->threads
                                                                   : bench->machine.host.threads,
                                     .repeats = repeats(options)};
    struct bench_result *result = &bench->results[bench->done];
    progress_show(bench->done, bench->total, "decode");
    if (level) {
        setenv("FLASH_KDA_CPU", level, 1);
    }
    if (!bench_decode_row(&how, row, result, bench->error, sizeof bench->error)) {
        return false;
    }
    bench->done++;
    bench->wrong += !result->passed;
    if (bench->table) {
        progress_clear();
        bench_print_decode_line(stdout, &bench->machine, result);
    }
    return true;
}

static bool bench_decode_rows(struct bench *bench) {
    const struct bench_decode_table *table = decode_table(bench->options);
    bool good = true;
    for (int i = 0; i < table->count; i++) {
        for (int level = 0; good && level < bench->level_count; level++) {
            if (table->rows[i].quick == bench->options->quick) {
                good = bench_decode_on_level(bench, &table->rows[i], bench->levels[level]);
            }
        }
    }
    return good;
}

static int count_decode_results(const struct bench *bench) {
    const struct bench_decode_table *table = decode_table(bench->options);
    int count = 0;
    for (int i = 0; i < table->count; i++) {
        count += table->rows[i].quick == bench->options->quick;
    }
    return count * bench->level_count;
}

static int count_results(const struct bench *bench) {
    struct variant variants[MAX_VARIANTS];
    if (bench->options->decode) {
        return count_decode_results(bench);
    }
    if (bench->options->spec.given) {
        return bench->level_count;
    }
    const struct bench_table *table = table_of(bench->options);
    int count = 0;
    for (int i = 0; i < table->count; i++) {
        const struct bench_row *row = &table->rows[i];
        if (row->quick == bench->options->quick) {
            count += row_variants(bench, &default_spec, row->fp32_out, row->one_thread, variants);
        }
    }
    return count * bench->level_count;
}

/* ---- The command ------------------------------------------------------------------------------- */

/* The levels to run: the one that is named or the library's own choice, or all. On CUDA its choice, NULL. */
static bool choose_levels(struct bench *bench) {
    const char *wanted = bench->options->level;
    if (on_cuda(bench->options)) {
        bench->level_count = 1;
        return true;
    }
    if (wanted && strcmp(wanted, "all") == 0) {
        for (const char *const *level = flash_kda_cpu_levels(); *level; level++) {
            bench->levels[bench->level_count++] = *level;
        }
        return true;
    }
    if (wanted) {
        setenv("FLASH_KDA_CPU", wanted, 1);
    }
    bench->levels[0] = flash_kda_cpu_level();
    bench->level_count = 1;
    if (!bench->levels[0]) {
        snprintf(bench->error, sizeof bench->error, "%s", flash_kda_last_error());
    }
    return bench->levels[0] != NULL;
}

static bool write_text(const char *path, const char *text, char *error, size_t error_size) {
    struct new_file file;
    if (!new_file_open(&file, path, error, error_size)) {
        return false;
    }
    new_file_write(&file, text, strlen(text));
    return new_file_commit(&file, error, error_size);
}

static bool print_results(struct bench *bench) {
    const struct bench_options *options = bench->options;
    if (!options->json && !options->path) {
        return true;
    }
    char *text = bench_json(&bench->machine, options->commit, bench->results, bench->done);
    if (!text) {
        snprintf(bench->error, sizeof bench->error, "out of memory for the results");
        return false;
    }
    if (options->json) {
        printf("%s\n", text);
    }
    bool good = !options->path || write_text(options->path, text, bench->error, sizeof bench->error);
    free(text);
    return good;
}

static bool describe_machine(struct bench *bench) {
    struct bench_machine *machine = &bench->machine;
    machine_describe(&machine->host);
    if (bench->options->decode && !on_cuda(bench->options)) {
        int64_t threads = bench->options->threads;
        machine->copy_rate = machine_copy_rate(threads ? (int)threads : machine->host.threads);
    }
    return !on_cuda(bench->options) ||
           (device_describe(&machine->device, 0, bench->error, sizeof bench->error) &&
            replay_copy(&machine->copy_rate, bench->error, sizeof bench->error));
}

static bool bench_all(struct bench *bench) {
    const struct bench_options *options = bench->options;
    if (!describe_machine(bench) || !choose_levels(bench)) {
        return false;
    }
    bench->total = count_results(bench);
    bench->results = calloc((size_t)bench->total + 1, sizeof *bench->results);
    if (!bench->results) {
        snprintf(bench->error, sizeof bench->error, "out of memory for %d results", bench->total);
        return false;
    }
    if (bench->table) {
        bench_print_machine(stdout, &bench->machine);
        (options->decode ? bench_print_decode_head : bench_print_head)(stdout);
    }
    bool good = options->decode       ? bench_decode_rows(bench)
                : options->spec.given ? bench_spec(bench, &options->spec.spec, false, false)
                                      : bench_all_rows(bench);
    progress_clear();
    return good && print_results(bench);
}

int command_bench(int argc, char **argv) {
    static const struct argp_child children[] = {{&spec_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        .options = argp_options, .parser = parse_option, .doc = documentation, .children = children};
    struct bench_options options = {0};
    if (!parse_arguments(&argp, argc, argv, 0, &options)) {
        return STATUS_ERROR;
    }
    struct bench bench = {.options = &options, .table = !options.json};
    bool good = captured_describe(&options.spec.spec, bench.error, sizeof bench.error) && bench_all(&bench);
    free(bench.results);
    if (!good) {
        return report_error(argv[0], "%s", bench.error);
    }
    if (bench.wrong > 0) {
        report_error(argv[0], "%d of %d results were outside tolerance and not timed", bench.wrong,
                     bench.total);
        return STATUS_WRONG_RESULT;
    }
    return STATUS_OK;
}
