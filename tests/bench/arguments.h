/* SPDX-License-Identifier: MIT */
/* The arguments of either operation, and the one list of each one's tensors. */
#ifndef BENCH_ARGUMENTS_H
#define BENCH_ARGUMENTS_H

#include "flash_kda.h"
#include "tensor.h"

struct arguments {
    bool decodes;
    flash_kda_prefill_args prefill;
    flash_kda_decode_args decode;
};

struct arguments arguments_of_prefill(const flash_kda_prefill_args *args);
struct arguments arguments_of_decode(const flash_kda_decode_args *args);

/* A tensor of the arguments, NULL where it is not given. */
struct argument {
    const char *name;
    const DLTensor **tensor;
    bool written;
};

enum { PREFILL_ARGUMENTS = 16, DECODE_ARGUMENTS = 24, MAX_ARGUMENTS = DECODE_ARGUMENTS };

/* Fills the list and returns how many there are; those that are written come first. */
int arguments_list(struct arguments *a, struct argument list[MAX_ARGUMENTS]);
int prefill_list(flash_kda_prefill_args *a, struct argument list[MAX_ARGUMENTS]);
int decode_list(flash_kda_decode_args *a, struct argument list[MAX_ARGUMENTS]);

/* The tensor of that name, NULL where there is none; the DLTensor must be a struct tensor's. */
struct tensor *prefill_tensor(const flash_kda_prefill_args *a, const char *name);
struct tensor *decode_tensor(const flash_kda_decode_args *a, const char *name);

/* Decode of the same tensors in the same way; its states are final_state. */
flash_kda_decode_args decode_of_prefill(const flash_kda_prefill_args *args);

/* Those that have a row for each token: q, k, v, g, beta, out. */
enum { TOKEN_ARGUMENTS = 6 };

/* Points them to views of entries first .. first + count - 1 of a dimension: 0 the batch, 1 the tokens. They may be these views
 * already. */
void prefill_narrow(flash_kda_prefill_args *a, struct tensor views[TOKEN_ARGUMENTS], int dim, int64_t first,
                    int64_t count);
void decode_narrow(flash_kda_decode_args *a, struct tensor views[TOKEN_ARGUMENTS], int dim, int64_t first,
                   int64_t count);

#endif
