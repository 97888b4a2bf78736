/* SPDX-License-Identifier: MIT */
/* flashkda bench: times a table of cases, each only after its result has been found right. */
#include "bench.h"

#include "captured.h"
#include "file.h"
#include "level.h"
#include "progress.h"
#include "replay.h"
#include "spec_options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    DEFAULT_REPEATS = 9,
    QUICK_REPEATS = 5,
    BENCH_MAX_LEVELS = 15,
    MAX_VARIANTS = 4, /* output dtypes times numbers of threads of a row */
};

static const char documentation[] =
    "Times prefill, or with --decode decode, or with --backward backward, on random cases: a built-in table, "
    "or the one case that the options describe. A result is timed only after it has been compared with the "
    "oracle, where "
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
    "  flashkda bench --backend cuda --fused --tokens 8192 --heads 32\n"
    "  flashkda bench --backend cuda --backward --tokens 8192 --heads 32 --checkpoint-every 128\n"
    "  flashkda bench --backend cuda --captured data/small_softplus.safetensors --tokens 8192 --heads 32\n"
    "  flashkda bench --commit $(git rev-parse HEAD) -o cpu.json";

enum option_key {
    OPTION_LEVEL = 0x200,
    OPTION_QUICK,
    OPTION_COMMIT,
    OPTION_OUT_DTYPE,
    OPTION_DECODE,
    OPTION_BACKWARD,
    OPTION_CHECKPOINT_EVERY,
    OPTION_FUSED,
};

static const char *const backend_names[] = {"cpu", "cuda", NULL};

static const struct argp_option argp_options[] = {
    {"backend", 'b', "NAME", 0, "cpu or cuda (cpu)", 0},
    {"level", OPTION_LEVEL, "NAME", 0, "Level of the CPU backend, or all (the best one)", 0},
    {"threads", 't', "N", 0, "Threads (as many as flashkda info says)", 0},
    {"repeat", 'r', "N", 0, "Times to run each case after the warm-up, fewer if it takes long (9)", 0},
    {"quick", OPTION_QUICK, NULL, 0, "A table of a few short cases", 0},
    {"decode", OPTION_DECODE, NULL, 0, "A table of decode instead of prefill, beside the rate of a copy", 0},
    {"backward", OPTION_BACKWARD, NULL, 0,
     "Backward instead of prefill: every gradient but those of A_log and dt_bias, in the dtype of the inputs",
     0},
    {"fused", OPTION_FUSED, NULL, 0,
     "Prefill between short convolutions of q, k and v, without states, and a norm gated by a sigmoid", 0},
    {"checkpoint-every", OPTION_CHECKPOINT_EVERY, "N", 0,
     "States kept every N tokens, a multiple of 32: prefill writes them, --backward reads them", 0},
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
    enum bench_operation operation;
    bool has_out_dtype, quick, json, fused;
};

static bool on_cuda(const struct bench_options *options) { return options->backend == 1; }

static error_t check_options(const struct argp_state *state, const struct bench_options *options) {
    if (options->spec.given && options->quick)
        return argument_error(state, "--quick is a table of its own: it does not go with options of a case");
    if (options->operation == BENCH_BACKWARD && options->has_out_dtype)
        return argument_error(state, "--out-dtype is of an output: it does not go with --backward");
    if (options->operation == BENCH_DECODE && (options->spec.given || options->has_out_dtype))
        return argument_error(state, "--decode is a table of its own: it does not go with options of a case");
    if (options->operation != BENCH_PREFILL && options->fused)
        return argument_error(state, "--fused is of prefill: it does not go with --decode and --backward");
    if (options->commit && !options->json && !options->path)
        return argument_error(state, "--commit is kept in the JSON: it goes with --output or --json");
    if (options->path && is_stream(options->path))
        return argument_error(state, "--output - would mix JSON with the table: expected --json");
    if (on_cuda(options) && (options->level || options->threads)) {
        return argument_error(state, "--level and --threads are the CPU backend's: they do not go with "
                                     "--backend cuda");
    }
    return 0;
}

/* One that this machine can run, or all. */
static error_t parse_level(const struct argp_state *state, const char *text) {
    const char *names[BENCH_MAX_LEVELS + 2] = {"all"};
    int index = 0;
    for (const char *const *level = flash_kda_cpu_levels(); *level && index < BENCH_MAX_LEVELS; level++)
        names[++index] = *level;
    return parse_name(state, "level", text, names, &index);
}

static error_t parse_checkpoint_every(const struct argp_state *state, const char *text, int64_t *every) {
    error_t error = parse_integer(state, "checkpoint-every", text, 32, 1 << 20, every);
    return error || *every % 32 == 0
               ? error
               : argument_error(state, "--checkpoint-every is %s, expected a multiple of 32", text);
}

static error_t parse_option(int key, char *argument, struct argp_state *state) {
    struct bench_options *options = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &options->spec;
        return 0;
    case 'b':
        return parse_name(state, "backend", argument, backend_names, &options->backend);
    case OPTION_LEVEL:
        options->level = argument;
        return parse_level(state, argument);
    case 't':
        return parse_integer(state, "threads", argument, 1, MAX_THREADS, &options->threads);
    case 'r':
        return parse_integer(state, "repeat", argument, 1, BENCH_MAX_REPEATS, &options->repeats);
    case OPTION_QUICK:
        options->quick = true;
        return 0;
    case OPTION_DECODE:
        options->operation = BENCH_DECODE;
        return 0;
    case OPTION_BACKWARD:
        options->operation = BENCH_BACKWARD;
        return 0;
    case OPTION_FUSED:
        options->fused = options->spec.spec.fused = true;
        return 0;
    case OPTION_CHECKPOINT_EVERY:
        options->spec.given = true;
        return parse_checkpoint_every(state, argument, &options->spec.spec.checkpoint_every);
    case OPTION_OUT_DTYPE:
        options->has_out_dtype = type_named(argument, &options->out_dtype);
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

/* ---- The table --------------------------------------------------------------------------------- */

struct bench {
    const struct bench_options *options;
    struct bench_machine machine;
    const char *levels[BENCH_MAX_LEVELS]; /* to run; NULL: the library's choice */
    int level_count, done, total, wrong;
    struct bench_result *results; /* [total], done of them filled */
};

/* The output dtypes and numbers of threads to time a case in. */
struct variant {
    DLDataType out_dtype;
    int threads;
};

static int row_variants(const struct bench *bench, const struct bench_row *row, DLDataType dtype,
                        struct variant variants[MAX_VARIANTS]) {
    const struct bench_options *options = bench->options;
    int threads = options->threads ? (int)options->threads : bench->machine.host.threads, count = 0;
    if (on_cuda(options))
        threads = 0;
    DLDataType dtypes[2] = {options->has_out_dtype ? options->out_dtype : dtype, TYPE_FP32};
    for (int i = 0; i < (row->fp32_out && !options->has_out_dtype ? 2 : 1); i++) {
        if (row->one_thread && threads > 1)
            variants[count++] = (struct variant){dtypes[i], 1};
        variants[count++] = (struct variant){dtypes[i], threads};
    }
    return count;
}

static void name_result(struct bench_result *result, const struct bench_case *c) {
    const struct case_spec *spec = &result->spec;
    if (c->operation != BENCH_DECODE) {
        case_spec_name(spec, result->name, sizeof result->name);
        return;
    }
    snprintf(result->name, sizeof result->name, "H%lld-B%lld-T%lld-%s%s%s", (long long)spec->heads,
             (long long)spec->batch, (long long)spec->tokens, spec->bf16_state ? "bf16" : "fp32",
             c->way ? ", " : "", c->way ? decode_way_names[c->way] : "");
}

static bool bench_variant(struct bench *bench, const struct bench_case *c, const struct case_spec *spec,
                          const struct variant *variant, const char *level) {
    struct bench_result *result = &bench->results[bench->done];
    *result =
        (struct bench_result){.spec = *spec, .out_dtype = variant->out_dtype, .threads = variant->threads};
    name_result(result, c);
    progress_show(bench->done, bench->total, result->name);
    if (level)
        level_select(level);
    if (!bench_measure(c, result))
        return false;
    bench->done++;
    bench->wrong += !result->passed;
    if (!bench->options->json) {
        progress_clear();
        bench_print_line(&bench->machine, result);
    }
    return true;
}

static bool bench_spec(struct bench *bench, const struct case_spec *spec, const struct bench_row *row) {
    const struct bench_options *options = bench->options;
    struct variant variants[MAX_VARIANTS];
    int count = row_variants(bench, row, spec->dtype, variants);
    struct bench_case c = {.operation = options->operation,
                           .way = row->way,
                           .backend = on_cuda(options) ? FLASH_KDA_BACKEND_CUDA : FLASH_KDA_BACKEND_CPU,
                           .repeats = options->repeats ? (int)options->repeats
                                      : options->quick ? QUICK_REPEATS
                                                       : DEFAULT_REPEATS,
                           .l2_bytes = bench->machine.device.l2_bytes};
    progress_show(bench->done, bench->total, "inputs and oracle");
    if (!bench_case_make(&c, spec))
        return false;
    bool good = true;
    for (int i = 0; good && i < count; i++)
        for (int level = 0; good && level < bench->level_count; level++)
            good = bench_variant(bench, &c, spec, &variants[i], bench->levels[level]);
    bench_case_free(&c);
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

/* The next row of the table that is asked for, from row i on; NULL after the last. */
static const struct bench_row *next_row(const struct bench_options *options, int *i) {
    const struct bench_table *table = bench_table(options->operation, on_cuda(options));
    while (*i < table->count && table->rows[*i].quick != options->quick)
        ++*i;
    return *i < table->count ? &table->rows[(*i)++] : NULL;
}

static bool bench_rows(struct bench *bench) {
    bool good = true;
    int i = 0;
    for (const struct bench_row *row = NULL; good && (row = next_row(bench->options, &i)) != NULL;) {
        struct case_spec spec = row_spec(row);
        spec.fused = bench->options->fused;
        good = bench_spec(bench, &spec, row);
    }
    return good;
}

static int count_results(const struct bench *bench) {
    struct variant variants[MAX_VARIANTS];
    int i = 0, count = 0;
    if (bench->options->spec.given)
        return bench->level_count;
    for (const struct bench_row *row = NULL; (row = next_row(bench->options, &i)) != NULL;)
        count += row_variants(bench, row, TYPE_BF16, variants);
    return count * bench->level_count;
}

/* ---- The command ------------------------------------------------------------------------------- */

/* The levels to run: the one that is named or the library's own choice, or all. On CUDA its choice, NULL. */
static bool choose_levels(struct bench *bench) {
    const char *wanted = bench->options->level;
    if (!on_cuda(bench->options) && wanted && strcmp(wanted, "all") == 0) {
        for (const char *const *level = flash_kda_cpu_levels(); *level; level++)
            bench->levels[bench->level_count++] = *level;
        return true;
    }
    if (wanted)
        level_select(wanted);
    bench->level_count = 1;
    bench->levels[0] = on_cuda(bench->options) ? NULL : flash_kda_cpu_level();
    return on_cuda(bench->options) || bench->levels[0] || failed("%s", flash_kda_last_error());
}

static bool print_results(const struct bench *bench, struct new_file *file) {
    const struct bench_options *options = bench->options;
    if (!options->json && !options->path)
        return true;
    char *text = bench_json(&bench->machine, options->commit, bench->results, bench->done);
    if (!text)
        return failed("out of memory for the results");
    if (options->json)
        printf("%s\n", text);
    if (options->path)
        new_file_write(file, text, strlen(text));
    free(text);
    return true;
}

static bool describe_machine(struct bench *bench) {
    struct bench_machine *machine = &bench->machine;
    machine_describe(&machine->host);
    if (on_cuda(bench->options))
        return device_describe(&machine->device, 0) && replay_copy(&machine->copy_rate);
    int64_t threads = bench->options->threads;
    if (bench->options->operation == BENCH_DECODE)
        machine->copy_rate = machine_copy_rate(threads ? (int)threads : machine->host.threads);
    return true;
}

static bool bench_all(struct bench *bench, struct new_file *file) {
    const struct bench_options *options = bench->options;
    static const struct bench_row plain = {.way = DECODE_IN_PLACE};
    if (!describe_machine(bench) || !choose_levels(bench))
        return false;
    bench->total = count_results(bench);
    bench->results = calloc((size_t)bench->total + 1, sizeof *bench->results);
    if (!bench->results)
        return failed("out of memory for %d results", bench->total);
    if (!options->json)
        bench_print_head(&bench->machine, options->operation == BENCH_DECODE);
    bool good = options->spec.given ? bench_spec(bench, &options->spec.spec, &plain) : bench_rows(bench);
    progress_clear();
    return good && print_results(bench, file);
}

int command_bench(int argc, char **argv) {
    static const struct argp_child children[] = {{&spec_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        .options = argp_options, .parser = parse_option, .doc = documentation, .children = children};
    struct bench_options options = {0};
    if (!parse_arguments(&argp, argc, argv, 0, &options))
        return STATUS_ERROR;
    struct bench bench = {.options = &options};
    struct new_file file;
    if (options.path && !new_file_open(&file, options.path)) /* before what takes long */
        return report_error(argv[0], "%s", failure());
    bool good = captured_describe(&options.spec.spec) && bench_all(&bench, &file);
    if (options.path && good)
        good = new_file_commit(&file);
    else if (options.path)
        new_file_cancel(&file);
    free(bench.results);
    if (!good)
        return report_error(argv[0], "%s", failure());
    if (bench.wrong > 0) {
        report_error(argv[0], "%d of %d results were outside tolerance and not timed", bench.wrong,
                     bench.total);
        return STATUS_WRONG_RESULT;
    }
    return STATUS_OK;
}
