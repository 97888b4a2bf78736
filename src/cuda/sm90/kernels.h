/* SPDX-License-Identifier: MIT */
/* The kernels of the Hopper level (sm_90a), as the host code calls them. */
#ifndef KDA_CUDA_SM90_KERNELS_H
#define KDA_CUDA_SM90_KERNELS_H

#include "api/problem.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Can kda_sm90_chain take this problem? It needs K <= 128, V a multiple of 64, and v in bf16 with rows that start at
 * multiples of 16 bytes. */
bool kda_sm90_takes(const struct kda_prefill *p);

/* As kda_sm80_chain. `processors`: multiprocessors of the device, which decide how V is shared out. */
cudaError_t kda_sm90_chain(const struct kda_prefill *p, int64_t chunks, const void *operands, int processors,
                           cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
