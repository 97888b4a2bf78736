/* SPDX-License-Identifier: MIT */
/* The options that describe a random case, shared by gen and bench. */
#include "spec_options.h"

#include <string.h>

enum { MAX_EXTENT = 1 << 30 };

const struct case_spec default_spec = {.batch = 1,
                                       .tokens = 4096,
                                       .heads = 8,
                                       .key_dim = 128,
                                       .value_dim = 128,
                                       .dtype = {kDLBfloat, 16, 1},
                                       .gate = FLASH_KDA_GATE_SOFTPLUS,
                                       .lower_bound = -5,
                                       .regime = REGIME_SLOW,
                                       .constant_g = -4};

enum option_key {
    OPTION_BATCH = 0x100,
    OPTION_TOKENS,
    OPTION_LENGTHS,
    OPTION_HEADS,
    OPTION_VALUE_HEADS,
    OPTION_KEY_DIM,
    OPTION_VALUE_DIM,
    OPTION_DTYPE,
    OPTION_GATE,
    OPTION_LOWER_BOUND,
    OPTION_REGIME,
    OPTION_G,
    OPTION_INITIAL_STATE,
    OPTION_SEED,
    OPTION_CAPTURED,
};

static const struct argp_option options[] = {
    {NULL, 0, NULL, 0, "The case:", 1},
    {"batch", OPTION_BATCH, "B", 0, "Sequences of --tokens each (1)", 1},
    {"tokens", OPTION_TOKENS, "T", 0, "Tokens of a sequence (4096)", 1},
    {"lengths", OPTION_LENGTHS, "T1,T2,...", 0, "Packed sequences of these lengths instead", 1},
    {"heads", OPTION_HEADS, "H", 0, "Query and key heads (8)", 1},
    {"value-heads", OPTION_VALUE_HEADS, "HV", 0, "Value heads, a multiple of H (H)", 1},
    {"key-dim", OPTION_KEY_DIM, "K", 0, "Head dim of keys, at most 256 (128)", 1},
    {"value-dim", OPTION_VALUE_DIM, "V", 0, "Head dim of values (128)", 1},
    {"dtype", OPTION_DTYPE, "NAME", 0, "Of q, k, v, g and beta: bf16, fp16 or fp32 (bf16)", 1},
    {"gate", OPTION_GATE, "NAME", 0, "none, softplus or sigmoid (softplus)", 1},
    {"lower-bound", OPTION_LOWER_BOUND, "X", 0, "Of the sigmoid gate, from -5 to below 0 (-5)", 1},
    {"regime", OPTION_REGIME, "NAME", 0,
     "strong: the past is soon forgotten; slow: decay near 1, as trained heads have; uniform: q, k, v in [0, "
     "1), "
     "g constant; near-collinear: all keys equal, hard on the arithmetic (slow)",
     1},
    {"g", OPTION_G, "X", 0, "The constant g of regime uniform (-4)", 1},
    {"initial-state", OPTION_INITIAL_STATE, NULL, 0, "With a random initial state", 1},
    {"seed", OPTION_SEED, "N", 0, "Same seed, same bits, on every machine (0)", 1},
    {"captured", OPTION_CAPTURED, "FILE", 0,
     "Instead of random numbers tokens and heads of this safetensors file, again and again; it says the gate, "
     "the dtype and the head dims",
     1},
    {0},
};

static error_t parse_extent(const struct argp_state *state, const char *option, const char *text,
                            int64_t lowest, int64_t *value) {
    return parse_integer(state, option, text, lowest, MAX_EXTENT, value);
}

static error_t parse_shape(int key, const char *text, const struct argp_state *state, struct case_spec *spec) {
    switch (key) {
    case OPTION_BATCH:
        return parse_extent(state, "batch", text, 1, &spec->batch);
    case OPTION_TOKENS:
        return parse_extent(state, "tokens", text, 0, &spec->tokens);
    case OPTION_HEADS:
        return parse_extent(state, "heads", text, 1, &spec->heads);
    case OPTION_VALUE_HEADS:
        return parse_extent(state, "value-heads", text, 1, &spec->value_heads);
    case OPTION_KEY_DIM:
        return parse_integer(state, "key-dim", text, 1, 256, &spec->key_dim);
    case OPTION_VALUE_DIM:
        return parse_extent(state, "value-dim", text, 1, &spec->value_dim);
    case OPTION_LENGTHS:
        spec->lengths = text;
        return case_spec_tokens(spec) >= 0
                   ? 0
                   : argument_error(state, "--lengths is '%s', expected whole numbers with commas between",
                                    text);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static error_t parse_kind(int key, const char *text, const struct argp_state *state, struct case_spec *spec) {
    int index = 0;
    int64_t seed = 0;
    error_t error = 0;
    switch (key) {
    case OPTION_DTYPE:
        return type_named(text, &spec->dtype)
                   ? 0
                   : argument_error(state, "--dtype is '%s', expected one of: bf16, fp16, fp32", text);
    case OPTION_GATE:
        error = parse_name(state, "gate", text, gate_names, &index);
        spec->gate = (flash_kda_gate)index;
        return error;
    case OPTION_REGIME:
        error = parse_name(state, "regime", text, regime_names, &index);
        spec->regime = (enum regime)index;
        return error;
    case OPTION_LOWER_BOUND:
        error = parse_real(state, "lower-bound", text, -5, 0, &spec->lower_bound);
        return error || spec->lower_bound < 0 ? error
                                              : argument_error(state, "--lower-bound is 0, expected less");
    case OPTION_G:
        return parse_real(state, "g", text, -1e4, 1e4, &spec->constant_g);
    case OPTION_CAPTURED:
        spec->captured = text;
        return 0;
    case OPTION_INITIAL_STATE:
        spec->initial_state = true;
        return 0;
    case OPTION_SEED:
        error = parse_integer(state, "seed", text, 0, INT64_MAX, &seed);
        spec->seed = (uint64_t)seed;
        return error;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* Does a file of captured inputs say what this option does? */
static bool said_by_file(int key) {
    switch (key) {
    case OPTION_VALUE_HEADS:
    case OPTION_KEY_DIM:
    case OPTION_VALUE_DIM:
    case OPTION_DTYPE:
    case OPTION_GATE:
    case OPTION_LOWER_BOUND:
    case OPTION_REGIME:
    case OPTION_G:
        return true;
    default:
        return false;
    }
}

static error_t check_spec(const struct argp_state *state, const struct spec_options *input) {
    const struct case_spec *spec = &input->spec;
    if (spec->captured && input->said_by_file) {
        return argument_error(state,
                              "--captured goes with --batch, --tokens, --lengths, --heads, --initial-state "
                              "and --seed alone: the file says the rest");
    }
    if (spec->regime == REGIME_CAPTURED && !spec->captured) {
        return argument_error(state,
                              "--regime captured has no inputs of its own: name their file, --captured FILE");
    }
    if (input->lower_bound && spec->gate != FLASH_KDA_GATE_SIGMOID)
        return argument_error(state, "--lower-bound is of the sigmoid gate: it does not go with --gate %s",
                              gate_names[spec->gate]);
    if (input->g && spec->regime != REGIME_UNIFORM)
        return argument_error(state, "--g is of --regime uniform: it does not go with %s",
                              regime_names[spec->regime]);
    if (spec->lengths && input->tokens)
        return argument_error(state, "--lengths does not go with --tokens: it says how many each sequence has");
    if (spec->lengths && spec->batch != 1)
        return argument_error(state, "--lengths does not go with --batch: packed sequences are one batch");
    if (spec->value_heads % spec->heads != 0) {
        return argument_error(state, "--value-heads is %lld, expected a multiple of the %lld heads",
                              (long long)spec->value_heads, (long long)spec->heads);
    }
    return 0;
}

static error_t parse_option(int key, char *argument, struct argp_state *state) {
    struct spec_options *input = state->input;
    if (key == ARGP_KEY_INIT) {
        input->spec = default_spec;
        return 0;
    }
    if (key == ARGP_KEY_END)
        return check_spec(state, input);
    error_t error = parse_shape(key, argument, state, &input->spec);
    if (error == ARGP_ERR_UNKNOWN)
        error = parse_kind(key, argument, state, &input->spec);
    input->given = input->given || error != ARGP_ERR_UNKNOWN;
    input->said_by_file = input->said_by_file || said_by_file(key);
    input->tokens = input->tokens || key == OPTION_TOKENS;
    input->lower_bound = input->lower_bound || key == OPTION_LOWER_BOUND;
    input->g = input->g || key == OPTION_G;
    return error;
}

const struct argp spec_argp = {.options = options, .parser = parse_option};
