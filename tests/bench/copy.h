/* SPDX-License-Identifier: MIT */
/* A copy within a GPU's memory by a kernel: the copy engine, which a memcpy node of a graph may go to, is slower. */
#ifndef BENCH_COPY_H
#define BENCH_COPY_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* bytes: a multiple of 16, as both addresses are. */
cudaError_t copy_on_device(void *to, const void *from, size_t bytes, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
