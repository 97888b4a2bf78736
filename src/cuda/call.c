/* SPDX-License-Identifier: MIT */
#include "cuda/call.h"

#include "api/status.h"

#include <stdlib.h>

#ifdef KDA_WITH_SM90
enum { HAS_SM90 = true };
#else
enum { HAS_SM90 = false };
#endif

/* What a grid can hold in its second dimension. */
enum { MAX_GRID_Y = 65535 };

flash_kda_status kda_cuda_status(cudaError_t error, const char *what) {
    if (!error)
        return FLASH_KDA_OK;
    cudaGetLastError(); /* or the next launch would report this error as its own */
    return kda_fail(FLASH_KDA_ERROR_CUDA, "%s: %s (%s)", what, cudaGetErrorName(error),
                    cudaGetErrorString(error));
}

flash_kda_status kda_cuda_look_at(int device, const char *what, struct kda_cuda_device *found) {
    const char *forced = getenv(KDA_CUDA_VARIABLE);
    int major = 0;
    flash_kda_status status = kda_cuda_read_wish(&found->wish, forced);
    if (!status)
        status =
            kda_cuda_status(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), what);
    if (!status)
        status = kda_cuda_status(
            cudaDeviceGetAttribute(&found->processors, cudaDevAttrMultiProcessorCount, device), what);
    if (status)
        return status;
    bool runs = HAS_SM90 && major == 9;
    if (found->wish.sm90 && !runs)
        return kda_fail(FLASH_KDA_ERROR_UNSUPPORTED,
                        "the environment variable " KDA_CUDA_VARIABLE " is %.40s, which %s; expected sm80",
                        forced, HAS_SM90 ? "this device cannot run" : "this build lacks");
    found->sm90 = runs && !found->wish.sm80;
    return FLASH_KDA_OK;
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
