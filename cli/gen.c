/* SPDX-License-Identifier: MIT */
/* flashkda gen: makes a file of random inputs. */
#include "captured.h"
#include "case_file.h"
#include "failure.h"
#include "file.h"
#include "progress.h"
#include "spec_options.h"

#include <stdio.h>

static const char documentation[] =
    "Makes a safetensors file of random inputs for `flashkda run`; - is standard output.\v"
    "Examples:\n"
    "  flashkda gen a.safetensors\n"
    "  flashkda gen b.safetensors --gate sigmoid --lower-bound -3 --seed 7\n"
    "  flashkda gen c.safetensors --lengths 1300,547,0,963 --value-heads 16\n"
    "  flashkda gen d.safetensors --regime near-collinear --tokens 16384\n"
    "  flashkda gen e.safetensors --captured data/small_softplus.safetensors --heads 32";

struct gen_options {
    struct spec_options spec;
    const char *path;
};

static error_t parse_option(int key, char *argument, struct argp_state *state) {
    struct gen_options *options = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &options->spec;
        return 0;
    case ARGP_KEY_ARG:
        if (options->path)
            return argument_error(state, "unexpected argument '%s': one output file is enough", argument);
        options->path = argument;
        return 0;
    case ARGP_KEY_END:
        return options->path ? 0 : argument_error(state, "no output file: flashkda gen OUT.safetensors");
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int command_gen(int argc, char **argv) {
    static const struct argp_child children[] = {{&spec_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        .parser = parse_option, .args_doc = "OUT.safetensors", .doc = documentation, .children = children};
    struct gen_options options = {0};
    if (!parse_arguments(&argp, argc, argv, 0, &options))
        return STATUS_ERROR;
    char name[128];
    if (!captured_describe(&options.spec.spec))
        return report_error(argv[0], "%s", failure());
    case_spec_name(&options.spec.spec, name, sizeof name);
    progress_show(0, 2, "generating");
    struct kda_case c;
    bool good = captured_generate(&c, &options.spec.spec);
    if (good) {
        progress_show(1, 2, "writing");
        good = case_file_write(options.path, &c);
        case_free(&c);
    }
    progress_clear();
    if (!good)
        return report_error(argv[0], "%s", failure());
    char path[SENTENCE_SIZE];
    printable(path, sizeof path, options.path);
    fprintf(is_stream(options.path) ? stderr : stdout, "%s: %s, %s, seed %llu\n", path, name,
            type_name(options.spec.spec.dtype), (unsigned long long)options.spec.spec.seed);
    return STATUS_OK;
}
