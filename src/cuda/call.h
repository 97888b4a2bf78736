/* SPDX-License-Identifier: MIT */
/* What the operations of the CUDA backend share on the host. */
#ifndef KDA_CUDA_CALL_H
#define KDA_CUDA_CALL_H

#include "api/problem.h"
#include "cuda/wish.h"

#include <cuda_runtime_api.h>

/* The status of a call whose part `what` ended with this error. */
flash_kda_status kda_cuda_status(cudaError_t error, const char *what);

/* What a call may run on. */
struct kda_cuda_device {
    int processors; /* multiprocessors */
    bool sm90;      /* may Hopper's kernels be used: are they here, can it run them, does nobody forbid it? */
    struct kda_cuda_wish wish; /* what else the environment asks for */
};

/* Describes the device; an error where the environment asks for a level that cannot run. what: the operation. */
flash_kda_status kda_cuda_look_at(int device, const char *what, struct kda_cuda_device *found);

/* Can a grid's second dimension hold the value heads? */
flash_kda_status kda_cuda_check_heads(const struct kda_prefill *p);

/* Makes a device the thread's current one; *previous is for kda_cuda_leave, which makes it that again. */
flash_kda_status kda_cuda_enter(int device, int *previous);
void kda_cuda_leave(int device, int previous);

#endif
