/* SPDX-License-Identifier: MIT */
/* flashkda bench: its tables, one measurement, and how results are printed. */
#ifndef FLASHKDA_BENCH_H
#define FLASHKDA_BENCH_H

#include "device.h"
#include "generate.h"
#include "machine.h"
#include "timing.h"
#include "trial.h"

/* One case with bf16 inputs of a built-in table, timed in up to two output dtypes and numbers of threads.
 * What is 0 is as in default_spec. */
struct bench_row {
    int64_t batch, tokens, heads, value_heads;
    int64_t dim; /* of keys and values */
    const char *lengths;
    int gate, regime; /* flash_kda_gate, enum regime */
    bool initial_state, bf16_state, batch_invariant;
    int64_t checkpoint_every;
    bool fp32_out;       /* also with an fp32 output, hence fp32 arithmetic */
    bool one_thread;     /* also on one thread */
    bool quick;          /* the whole of the quick table */
    enum decode_way way; /* of a table of decode */
};

struct bench_table {
    const struct bench_row *rows;
    int count;
};

/* By operation and backend. */
enum bench_operation { BENCH_PREFILL, BENCH_DECODE, BENCH_BACKWARD, BENCH_OPERATIONS };
const struct bench_table *bench_table(enum bench_operation operation, bool cuda);

/* Where it was measured. */
struct bench_machine {
    struct machine host;
    struct device device; /* on CUDA, else all 0 */
    double copy_rate;     /* bytes read and written a second within its memory; 0: not measured */
};

struct bench_result {
    char name[96];
    struct case_spec spec;
    const char *decode; /* what becomes of decode's states; NULL: it is another operation */
    bool backward;
    int64_t tokens; /* of a batch entry */
    DLDataType out_dtype;
    char level[16];
    int threads; /* 0 on CUDA */
    char ran_on[256];
    int64_t bytes;                         /* of all tensors: what a call must move at least */
    int64_t workspace_bytes;               /* not of decode */
    int64_t checked_tokens, checked_heads; /* of each batch entry, from the first ones, against the oracle */
    double output_error, A_log_error, state_error,
        checkpoint_error; /* of backward: of all gradients but states'; of those */
    bool passed;          /* within tolerance; timing is only there if so */
    struct timing timing;
    struct timing warm; /* of decode on one set of tensors, all in the cache; no repeats: not measured */
};

/* ---- One measurement ---- */

enum { BENCH_MAX_REPEATS = 1000 };

/* A case, what is asked of it, and the exact answer to its first tokens and heads. */
struct bench_case {
    enum bench_operation operation;
    enum decode_way way;
    flash_kda_backend backend;
    int repeats;
    int64_t l2_bytes; /* of the device */
    struct kda_case whole, prefix;
    struct trial oracle; /* of prefix, fp32 */
};

/* Makes the case of a spec, what is asked of it being set. On failure returns false, with failure(), and leaves nothing to
 * free. */
bool bench_case_make(struct bench_case *c, const struct case_spec *spec);
void bench_case_free(struct bench_case *c);

/* Checks and, if it is right, times the case with the result's output dtype and threads; fills in the rest. */
bool bench_measure(const struct bench_case *c, struct bench_result *result);

/* ---- Results ---- */

double bench_tokens_per_second(const struct bench_result *result);

/* 8 K V floating-point operations for a token of a value head: three products and one update of the state. */
double bench_gflops(const struct bench_result *result);

/* Bytes a second, of those that a call must move. */
double bench_byte_rate(const struct bench_result *result);

/* The table on standard output, line by line. */
void bench_print_head(const struct bench_machine *machine, bool decode);
void bench_print_line(const struct bench_machine *machine, const struct bench_result *result);

/* The whole as text, to be freed; NULL if out of memory. commit: what was built, or NULL. */
char *bench_json(const struct bench_machine *machine, const char *commit, const struct bench_result *results,
                 int count);

#endif
