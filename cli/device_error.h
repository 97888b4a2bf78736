/* SPDX-License-Identifier: MIT */
/* Errors of the CUDA runtime as sentences, for the files that call it. */
#ifndef FLASHKDA_DEVICE_ERROR_H
#define FLASHKDA_DEVICE_ERROR_H

#include <cuda_runtime_api.h>
#include <stdbool.h>

/* True, with one sentence in error, if status is not success; what: what was being done. */
bool device_failed(cudaError_t status, const char *what, char *error, size_t error_size);

#endif
