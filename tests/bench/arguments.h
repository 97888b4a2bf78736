/* SPDX-License-Identifier: MIT */
/* The arguments of any operation, and the one list of each one's tensors. */
#ifndef BENCH_ARGUMENTS_H
#define BENCH_ARGUMENTS_H

#include "flash_kda.h"
#include "tensor.h"

enum operation_kind { KIND_PREFILL, KIND_DECODE, KIND_BACKWARD };

struct arguments {
    enum operation_kind kind; /* whose arguments count */
    flash_kda_prefill_args prefill;
    flash_kda_decode_args decode;
    flash_kda_backward_args backward;
};

struct arguments arguments_of_prefill(const flash_kda_prefill_args *args);
struct arguments arguments_of_decode(const flash_kda_decode_args *args);
struct arguments arguments_of_backward(const flash_kda_backward_args *args);

flash_kda_backend arguments_backend(const struct arguments *a);

/* A tensor of the arguments, NULL where it is not given. */
struct argument {
    const char *name;
    const DLTensor **tensor;
    bool written;
};

enum {
    PREFILL_ARGUMENTS = 28,
    DECODE_ARGUMENTS = 25,
    BACKWARD_ARGUMENTS = 21,
    MAX_ARGUMENTS = PREFILL_ARGUMENTS
};

/* Fills the list and returns how many there are; those that are written come first. */
int arguments_list(struct arguments *a, struct argument list[MAX_ARGUMENTS]);
int prefill_list(flash_kda_prefill_args *a, struct argument list[MAX_ARGUMENTS]);
int decode_list(flash_kda_decode_args *a, struct argument list[MAX_ARGUMENTS]);
int backward_list(flash_kda_backward_args *a, struct argument list[MAX_ARGUMENTS]);

/* The tensor of that name, NULL where there is none; the DLTensor must be a struct tensor's. */
struct tensor *prefill_tensor(const flash_kda_prefill_args *a, const char *name);
struct tensor *decode_tensor(const flash_kda_decode_args *a, const char *name);

/* Decode of the same tensors in the same way; its states are final_state. */
flash_kda_decode_args decode_of_prefill(const flash_kda_prefill_args *args);

/* Backward of the same inputs; gradients and kept states are left to the caller. */
flash_kda_backward_args backward_of_prefill(const flash_kda_prefill_args *args);

/* Those that have a row for each token: q, k, v, g, beta, out. */
enum { TOKEN_ARGUMENTS = 6 };

/* Points them to views of entries first .. first + count - 1 of a dimension: 0 the batch, 1 the tokens. They may be these views
 * already. */
void prefill_narrow(flash_kda_prefill_args *a, struct tensor views[TOKEN_ARGUMENTS], int dim, int64_t first,
                    int64_t count);
void decode_narrow(flash_kda_decode_args *a, struct tensor views[TOKEN_ARGUMENTS], int dim, int64_t first,
                   int64_t count);

#endif
