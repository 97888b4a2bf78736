/* SPDX-License-Identifier: MIT */
/* The tables of cases that flashkda bench times when no case is given. */
#include "bench.h"

enum {
    SOFTPLUS = FLASH_KDA_GATE_SOFTPLUS,
    SIGMOID = FLASH_KDA_GATE_SIGMOID,
    STRONG = REGIME_STRONG,
    SLOW = REGIME_SLOW,
};

static const struct bench_row cpu_rows[] = {
    {.quick = true, .tokens = 1024, .heads = 8, .gate = SOFTPLUS, .regime = SLOW, .fp32_out = true},
    {.quick = true, .lengths = "64,17,33,128,1,95,0,162,12", .heads = 8, .gate = SIGMOID, .regime = STRONG},

    {.tokens = 4096, .heads = 8, .gate = SOFTPLUS, .regime = STRONG, .fp32_out = true},
    {.tokens = 4096, .heads = 8, .gate = SOFTPLUS, .regime = SLOW, .fp32_out = true},
    {.tokens = 4096, .heads = 8, .gate = SIGMOID, .regime = STRONG, .fp32_out = true},
    {.tokens = 4096, .heads = 8, .gate = SIGMOID, .regime = SLOW, .fp32_out = true},

    /* One long sequence of one head, which the threads must share. */
    {.tokens = 65536, .heads = 1, .gate = SOFTPLUS, .regime = STRONG, .one_thread = true},
    {.tokens = 65536, .heads = 1, .gate = SOFTPLUS, .regime = SLOW, .fp32_out = true, .one_thread = true},

    /* Packed sequences, grouped value heads, small heads. */
    {.lengths = "1300,547,2048,963,271,3063", .heads = 8, .gate = SIGMOID, .regime = SLOW},
    {.tokens = 2048, .heads = 4, .value_heads = 16, .gate = SOFTPLUS, .regime = SLOW},
    {.tokens = 4096, .heads = 16, .dim = 64, .gate = SOFTPLUS, .regime = SLOW, .fp32_out = true},
};

/* Sigmoid gate, from a state to a state, in both regimes: what peers on the GPU have been measured on. */
#define BOTH_REGIMES(...)                                                      \
    {.gate = SIGMOID, .regime = STRONG, .initial_state = true, __VA_ARGS__}, { \
        .gate = SIGMOID, .regime = SLOW, .initial_state = true, __VA_ARGS__    \
    }

#define MIXED_LENGTHS "1300,547,2048,963,271,3063"

static const struct bench_row cuda_rows[] = {
    {.quick = true, .tokens = 1024, .heads = 8, .gate = SOFTPLUS, .regime = SLOW},
    {.quick = true, .lengths = "64,17,33,128,1,95,0,162,12", .heads = 8, .gate = SIGMOID, .regime = STRONG},
    {.quick = true, .tokens = 1024, .heads = 4, .dim = 64, .gate = SIGMOID, .regime = SLOW, .bf16_state = true},

    BOTH_REGIMES(.heads = 96, .tokens = 8192),
    BOTH_REGIMES(.heads = 96, .lengths = MIXED_LENGTHS),
    BOTH_REGIMES(.heads = 96, .batch = 8, .tokens = 1024),
    BOTH_REGIMES(.heads = 64, .tokens = 8192),
    BOTH_REGIMES(.heads = 64, .lengths = MIXED_LENGTHS),
    BOTH_REGIMES(.heads = 64, .batch = 8, .tokens = 1024),
    BOTH_REGIMES(.heads = 32, .tokens = 8192),
    BOTH_REGIMES(.heads = 32, .lengths = MIXED_LENGTHS),
    BOTH_REGIMES(.heads = 24, .tokens = 8192),
    BOTH_REGIMES(.heads = 16, .tokens = 8192),
    BOTH_REGIMES(.heads = 8, .tokens = 8192),
    BOTH_REGIMES(.heads = 4, .tokens = 32768),
    BOTH_REGIMES(.heads = 8, .tokens = 65536),
    BOTH_REGIMES(.heads = 1, .tokens = 131072),
    BOTH_REGIMES(.heads = 12, .tokens = 2048),
    BOTH_REGIMES(.heads = 16, .tokens = 2048),
    BOTH_REGIMES(.heads = 8, .tokens = 4096),
    BOTH_REGIMES(.heads = 12, .tokens = 4096),
    BOTH_REGIMES(.heads = 10, .tokens = 3072),
    BOTH_REGIMES(.heads = 12, .batch = 4, .tokens = 2048),
    BOTH_REGIMES(.heads = 4, .tokens = 1024),
    BOTH_REGIMES(.heads = 16, .batch = 8, .tokens = 2048),
    BOTH_REGIMES(.heads = 32, .batch = 32, .tokens = 256),
    BOTH_REGIMES(.heads = 32, .batch = 64, .tokens = 64),

    /* The unbounded gate, small heads, grouped value heads, states in bf16, checkpoints, batch invariance. */
    {.heads = 32, .tokens = 8192, .gate = SOFTPLUS, .regime = SLOW, .initial_state = true},
    {.heads = 32, .tokens = 8192, .dim = 64, .gate = SIGMOID, .regime = SLOW, .initial_state = true},
    {.heads = 8, .value_heads = 32, .tokens = 8192, .gate = SIGMOID, .regime = SLOW, .initial_state = true},
    {.heads = 32, .tokens = 8192, .gate = SIGMOID, .regime = SLOW, .initial_state = true, .bf16_state = true},
    {.heads = 32, .tokens = 8192, .gate = SIGMOID, .regime = SLOW, .checkpoint_every = 64},
    {.heads = 32, .lengths = MIXED_LENGTHS, .gate = SIGMOID, .regime = SLOW, .batch_invariant = true},
};

/* ---- Decode ------------------------------------------------------------------------------------ */

/* Sigmoid gate, slow, K = V = 128. */
#define DECODE(...) \
    { .gate = SIGMOID, .regime = SLOW, .initial_state = true, __VA_ARGS__ }
#define BOTH_STATES(...) DECODE(.bf16_state = false, __VA_ARGS__), DECODE(.bf16_state = true, __VA_ARGS__)

static const struct bench_row decode_cpu_rows[] = {
    BOTH_STATES(.quick = true, .heads = 8, .batch = 2, .tokens = 1),
    DECODE(.quick = true, .heads = 8, .batch = 2, .tokens = 4, .way = DECODE_STATE_EACH),

    BOTH_STATES(.heads = 32, .batch = 1, .tokens = 1),
    BOTH_STATES(.heads = 32, .batch = 4, .tokens = 1),
    BOTH_STATES(.heads = 32, .batch = 16, .tokens = 1),
    DECODE(.heads = 32, .batch = 4, .tokens = 4),
    DECODE(.heads = 32, .batch = 4, .tokens = 4, .way = DECODE_STATE_KEPT),
    DECODE(.heads = 32, .batch = 4, .tokens = 4, .way = DECODE_STATE_EACH),
};

static const struct bench_row decode_cuda_rows[] = {
    BOTH_STATES(.quick = true, .heads = 8, .batch = 2, .tokens = 1),
    DECODE(.quick = true, .heads = 8, .batch = 2, .tokens = 4, .way = DECODE_STATE_EACH),

    BOTH_STATES(.heads = 32, .batch = 1, .tokens = 1),
    BOTH_STATES(.heads = 32, .batch = 4, .tokens = 1),
    BOTH_STATES(.heads = 32, .batch = 16, .tokens = 1),
    BOTH_STATES(.heads = 32, .batch = 64, .tokens = 1),
    BOTH_STATES(.heads = 32, .batch = 256, .tokens = 1),
    BOTH_STATES(.heads = 96, .batch = 1, .tokens = 1),
    BOTH_STATES(.heads = 96, .batch = 16, .tokens = 1),
    BOTH_STATES(.heads = 96, .batch = 64, .tokens = 1),
    BOTH_STATES(.heads = 96, .batch = 256, .tokens = 1),
    BOTH_STATES(.heads = 32, .batch = 64, .tokens = 4),
    BOTH_STATES(.heads = 32, .batch = 64, .tokens = 4, .way = DECODE_STATE_KEPT),
    BOTH_STATES(.heads = 32, .batch = 64, .tokens = 4, .way = DECODE_STATE_EACH),
};

/* ---- Backward ---------------------------------------------------------------------------------- */

static const struct bench_row backward_cpu_rows[] = {
    {.quick = true, .tokens = 512, .heads = 2, .gate = SIGMOID, .regime = SLOW, .checkpoint_every = 128},
    {.quick = true, .lengths = "64,17,33,128,1,95,0,162,12", .heads = 2, .gate = SOFTPLUS, .regime = STRONG},

    {.tokens = 4096, .heads = 8, .gate = SIGMOID, .regime = SLOW},
    {.tokens = 4096, .heads = 8, .gate = SIGMOID, .regime = SLOW, .checkpoint_every = 128},
    {.tokens = 2048, .heads = 4, .value_heads = 16, .gate = SOFTPLUS, .regime = SLOW},
};

/* States found again, and kept by prefill. */
#define BOTH_WAYS(...)                                                                               \
    {.gate = SIGMOID, .regime = SLOW, .initial_state = true, __VA_ARGS__}, {                         \
        .gate = SIGMOID, .regime = SLOW, .initial_state = true, .checkpoint_every = 128, __VA_ARGS__ \
    }

static const struct bench_row backward_cuda_rows[] = {
    {.quick = true, .tokens = 1024, .heads = 8, .gate = SIGMOID, .regime = SLOW, .checkpoint_every = 128},
    {.quick = true, .lengths = "64,17,33,128,1,95,0,162,12", .heads = 8, .gate = SOFTPLUS, .regime = STRONG},

    BOTH_WAYS(.heads = 96, .tokens = 8192),
    BOTH_WAYS(.heads = 64, .tokens = 8192),
    BOTH_WAYS(.heads = 32, .tokens = 8192),
    BOTH_WAYS(.heads = 16, .tokens = 8192),
    BOTH_WAYS(.heads = 8, .tokens = 8192),
    BOTH_WAYS(.heads = 8, .tokens = 65536),
    BOTH_WAYS(.heads = 8, .value_heads = 32, .tokens = 8192),
    BOTH_WAYS(.heads = 32, .batch = 32, .tokens = 256),
    BOTH_WAYS(.heads = 24, .tokens = 8192),
    BOTH_WAYS(.heads = 12, .tokens = 2048),
    BOTH_WAYS(.heads = 16, .batch = 8, .tokens = 2048),
    {.heads = 96, .tokens = 8192, .gate = SIGMOID, .regime = STRONG, .checkpoint_every = 128},
    {.heads = 32, .tokens = 8192, .gate = SIGMOID, .regime = STRONG, .checkpoint_every = 128},
    {.heads = 8, .tokens = 8192, .gate = SIGMOID, .regime = STRONG, .checkpoint_every = 128},
    {.heads = 32, .lengths = MIXED_LENGTHS, .gate = SIGMOID, .regime = SLOW},
    {.heads = 32, .batch = 64, .tokens = 64, .gate = SIGMOID, .regime = SLOW},
    {.heads = 32, .tokens = 8192, .gate = SOFTPLUS, .regime = SLOW, .checkpoint_every = 128},
    {.heads = 32, .tokens = 8192, .dim = 64, .gate = SIGMOID, .regime = SLOW, .checkpoint_every = 128},
};

#define TABLE(rows) \
    { rows, sizeof(rows) / sizeof *(rows) }

const struct bench_table *bench_table(enum bench_operation operation, bool cuda) {
    static const struct bench_table tables[BENCH_OPERATIONS][2] = {
        [BENCH_PREFILL] = {TABLE(cpu_rows), TABLE(cuda_rows)},
        [BENCH_DECODE] = {TABLE(decode_cpu_rows), TABLE(decode_cuda_rows)},
        [BENCH_BACKWARD] = {TABLE(backward_cpu_rows), TABLE(backward_cuda_rows)}};
    return &tables[operation][cuda];
}
