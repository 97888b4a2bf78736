/* SPDX-License-Identifier: MIT */
/* Problems of prefill, decode and backward with everything on, their memory on the heap. */
#ifndef POOL_PROBLEM_H
#define POOL_PROBLEM_H

#include "flash_kda.h"

#include <stdbool.h>

enum { PROBLEM_TENSORS = 28 };

struct problem_tensor {
    DLTensor dl;
    int64_t shape[4];
    size_t bytes;
};

struct problem_size {
    int64_t B, T, H, K, V;
};

struct problem {
    struct problem_tensor tensors[PROBLEM_TENSORS];
    int count;
    flash_kda_prefill_args prefill;
    flash_kda_decode_args decode;     /* convolutions, and with V at most 1024 a gated norm */
    flash_kda_backward_args backward; /* out is d_out, the state d_final_state */
    void *workspace;
    size_t workspace_bytes;
};

/* Inputs are the same each time. The workspace is for prefill and backward on at most `threads`. False if there is no memory. */
bool problem_make(struct problem *p, struct problem_size size, flash_kda_backend backend, int threads);
void problem_free(struct problem *p);

/* Sets outputs and states back, for a call to give the same again. */
void problem_reset(struct problem *p);

/* Whether prefill's outputs and states are the same bits. */
bool problem_same(const struct problem *a, const struct problem *b);

#endif
