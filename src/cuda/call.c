/* SPDX-License-Identifier: MIT */
#include "cuda/call.h"

#include "api/status.h"

/* What a grid can hold in its second dimension. */
enum { MAX_GRID_Y = 65535 };

flash_kda_status kda_cuda_status(cudaError_t error, const char *what) {
    if (!error)
        return FLASH_KDA_OK;
    cudaGetLastError(); /* or the next launch would report this error as its own */
    return kda_fail(FLASH_KDA_ERROR_CUDA, "%s: %s (%s)", what, cudaGetErrorName(error),
                    cudaGetErrorString(error));
}

flash_kda_status kda_cuda_check_heads(const struct kda_prefill *p) {
    if (p->value_heads > MAX_GRID_Y)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                        "v has HV = %lld value heads; expected at most %d on CUDA", (long long)p->value_heads,
                        MAX_GRID_Y);
    return FLASH_KDA_OK;
}

flash_kda_status kda_cuda_enter(int device, int *previous) {
    flash_kda_status status = kda_cuda_status(cudaGetDevice(previous), "cudaGetDevice");
    if (!status && *previous != device)
        status = kda_cuda_status(cudaSetDevice(device), "cudaSetDevice");
    return status;
}

void kda_cuda_leave(int device, int previous) {
    if (previous != device)
        cudaSetDevice(previous);
}
