/* SPDX-License-Identifier: MIT */
/* The table of cases that flashkda bench times when no case is given. */
#include "bench.h"

enum {
    SOFTPLUS = FLASH_KDA_GATE_SOFTPLUS,
    SIGMOID = FLASH_KDA_GATE_SIGMOID,
    STRONG = REGIME_STRONG,
    SLOW = REGIME_SLOW,
};

const struct bench_row bench_rows[] = {
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

const int bench_row_count = sizeof bench_rows / sizeof bench_rows[0];
