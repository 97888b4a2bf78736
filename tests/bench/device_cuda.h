/* SPDX-License-Identifier: MIT */
/* Errors of the CUDA runtime as sentences, for the files that call it. */
#ifndef BENCH_DEVICE_CUDA_H
#define BENCH_DEVICE_CUDA_H

#include <cuda_runtime_api.h>
#include <stdbool.h>

/* True if status is success; else false, with failure(). what: what was being done. */
bool cuda_good(cudaError_t status, const char *what);

#endif
