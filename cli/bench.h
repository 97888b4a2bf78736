/* SPDX-License-Identifier: MIT */
/* What flashkda bench measures: its table of cases, its results and how they are printed. */
#ifndef FLASHKDA_BENCH_H
#define FLASHKDA_BENCH_H

#include "generate.h"
#include "machine.h"
#include "timing.h"

#include <stdio.h>

/* One case with bf16 inputs of the built-in table, timed in up to two output dtypes and numbers of threads.
 * What is 0 is as in default_spec. */
struct bench_row {
    int64_t tokens, heads, value_heads;
    int64_t dim; /* of keys and values */
    const char *lengths;
    int gate, regime; /* flash_kda_gate, enum regime */
    bool fp32_out;    /* also with an fp32 output, hence fp32 arithmetic */
    bool one_thread;  /* also on one thread */
    bool quick;       /* the whole of the quick table */
};

extern const struct bench_row bench_rows[];
extern const int bench_row_count;

struct bench_result {
    char name[96];
    struct case_spec spec;
    int64_t tokens; /* of a batch entry */
    DLDataType out_dtype;
    const char *level;
    int threads;
    char ran_on[256];
    int64_t checked_tokens; /* of each batch entry, from the first one, against the oracle */
    double output_error, state_error;
    bool passed; /* within tolerance; timing is only there if so */
    struct timing timing;
};

double bench_tokens_per_second(const struct bench_result *result);

/* 8 K V floating-point operations for a token of a value head: three products and one update of the state. */
double bench_gflops(const struct bench_result *result);

void bench_print_head(FILE *stream);
void bench_print_line(FILE *stream, const struct bench_result *result);

/* The whole as text, to be freed; NULL if out of memory. commit: what was built, or NULL. */
char *bench_json(const struct machine *machine, const char *commit, const struct bench_result *results,
                 int count);
char *bench_csv(const struct bench_result *results, int count);

#endif
