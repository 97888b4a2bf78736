/* SPDX-License-Identifier: MIT */
/* What flashkda bench measures: its table of cases, its results and how they are printed. */
#ifndef FLASHKDA_BENCH_H
#define FLASHKDA_BENCH_H

#include "decode_call.h"
#include "device.h"
#include "generate.h"
#include "machine.h"
#include "timing.h"

#include <stdio.h>

/* One case with bf16 inputs of a built-in table, timed in up to two output dtypes and numbers of threads.
 * What is 0 is as in default_spec. */
struct bench_row {
    int64_t batch, tokens, heads, value_heads;
    int64_t dim; /* of keys and values */
    const char *lengths;
    int gate, regime; /* flash_kda_gate, enum regime */
    bool initial_state, bf16_state, batch_invariant;
    int64_t checkpoint_every;
    bool fp32_out;   /* also with an fp32 output, hence fp32 arithmetic */
    bool one_thread; /* also on one thread */
    bool quick;      /* the whole of the quick table */
};

struct bench_table {
    const struct bench_row *rows;
    int count;
};

extern const struct bench_table bench_cpu_table, bench_cuda_table;

/* Where it was measured. */
struct bench_machine {
    struct machine host;
    struct device device; /* on CUDA, else all 0 */
    double copy_rate;     /* bytes read and written a second within its memory; 0: not measured */
};

/* One case of decode: K = V = 128, bf16 inputs, sigmoid gate. */
struct bench_decode_row {
    int64_t heads, batch, tokens;
    bool bf16_state;
    enum decode_way way;
    bool quick; /* the whole of the quick table */
};

struct bench_decode_table {
    const struct bench_decode_row *rows;
    int count;
};

extern const struct bench_decode_table bench_decode_cpu_table, bench_decode_cuda_table;

/* How all rows are timed. */
struct bench_decode {
    const struct bench_machine *machine;
    flash_kda_backend backend;
    int threads, repeats;
};

struct bench_result {
    char name[96];
    struct case_spec spec;
    const char *decode; /* what becomes of decode's states; NULL: it is prefill */
    int64_t tokens;     /* of a batch entry */
    DLDataType out_dtype;
    char level[16];
    int threads; /* 0 on CUDA */
    char ran_on[256];
    int64_t bytes;                         /* of all tensors: what a call must move at least */
    int64_t workspace_bytes;               /* of prefill */
    int64_t checked_tokens, checked_heads; /* of each batch entry, from the first ones, against the oracle */
    double output_error, state_error, checkpoint_error;
    bool passed; /* within tolerance; timing is only there if so */
    struct timing timing;
    struct timing warm; /* of decode on one set of tensors, all in the cache; no repeats: not measured */
};

/* Fills *result, without a timing if it is not right. On failure returns false and writes one sentence to error. */
bool bench_decode_row(const struct bench_decode *how, const struct bench_decode_row *row,
                      struct bench_result *result, char *error, size_t error_size);

double bench_tokens_per_second(const struct bench_result *result);

/* 8 K V floating-point operations for a token of a value head: three products and one update of the state. */
double bench_gflops(const struct bench_result *result);

void bench_print_machine(FILE *stream, const struct bench_machine *machine);
void bench_print_head(FILE *stream);
void bench_print_line(FILE *stream, const struct bench_result *result);
void bench_print_decode_head(FILE *stream);
void bench_print_decode_line(FILE *stream, const struct bench_machine *machine,
                             const struct bench_result *result);

/* Bytes a second, of those that a call must move. */
double bench_byte_rate(const struct bench_result *result);

/* The whole as text, to be freed; NULL if out of memory. commit: what was built, or NULL. */
char *bench_json(const struct bench_machine *machine, const char *commit, const struct bench_result *results,
                 int count);

#endif
