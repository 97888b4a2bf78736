/* SPDX-License-Identifier: MIT */
/* The device that a call runs on, and what the environment asks of it. */
#ifndef KDA_CUDA_DEVICE_H
#define KDA_CUDA_DEVICE_H

#include "api/problem.h"
#include "cuda/override.h"

#include <cuda_runtime_api.h>

/* Turns a CUDA error into a status; `what` names the step that ended with it. */
flash_kda_status kda_cuda_status(cudaError_t error, const char *what);

struct kda_cuda_device {
    int major; /* of the compute capability */
    int multiprocessors;
    struct kda_override override;
};

/* Describes the device. Fails if the environment asks for a level that cannot run. what: the operation. */
flash_kda_status kda_cuda_query(int device, const char *what, struct kda_cuda_device *found);

/* Can a grid's second dimension hold the value heads? */
flash_kda_status kda_cuda_check_heads(const struct kda_tokens *p);

/* Makes a device the thread's current one. kda_cuda_leave makes *previous the current one again. */
flash_kda_status kda_cuda_enter(int device, int *previous);
void kda_cuda_leave(int device, int previous);

/* Can the portable kernels overlap on this device? They must wait for each other then, and do so only where they were
 * compiled for sm_90 or later: a device may run what its driver made of an earlier one's PTX. */
bool kda_cuda_can_overlap(int device);

#endif
