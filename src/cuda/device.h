/* SPDX-License-Identifier: MIT */
/* The device that a call runs on, and what the environment asks of it. */
#ifndef KDA_CUDA_DEVICE_H
#define KDA_CUDA_DEVICE_H

#include "api/problem.h"
#include "cuda/override.h"

#include <cuda_runtime_api.h>

/* The status of a call whose part `what` ended with this error. */
flash_kda_status kda_cuda_status(cudaError_t error, const char *what);

struct kda_cuda_device {
    int major; /* of the compute capability */
    int multiprocessors;
    struct kda_override override;
};

/* Describes the device; an error where the environment asks for a level that cannot run. what: the operation. */
flash_kda_status kda_cuda_query(int device, const char *what, struct kda_cuda_device *found);

/* Can a grid's second dimension hold the value heads? */
flash_kda_status kda_cuda_check_heads(const struct kda_prefill *p);

/* Makes a device the thread's current one; *previous is for kda_cuda_leave, which makes it that again. */
flash_kda_status kda_cuda_enter(int device, int *previous);
void kda_cuda_leave(int device, int previous);

#endif
