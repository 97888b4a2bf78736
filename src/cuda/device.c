/* SPDX-License-Identifier: MIT */
#include "cuda/device.h"

#include "cuda/level.h"
#include "cuda/sm80/kernels.h"

#include <stdlib.h>
#include <string.h>

/* What a grid can hold in its second dimension. */
enum { MAX_GRID_Y = 65535 };

flash_kda_status kda_cuda_status(cudaError_t error, const char *what) {
    if (!error)
        return FLASH_KDA_OK;
    cudaGetLastError(); /* or the next launch would report this error as its own */
    return kda_fail(FLASH_KDA_ERROR_CUDA, "%s: %s (%s)", what, cudaGetErrorName(error),
                    cudaGetErrorString(error));
}

/* Can the level that the environment names run? */
static flash_kda_status check_override(const struct kda_cuda_device *device, const char *value) {
    const struct kda_cuda_level *const *level = kda_cuda_levels;
    while (*level && strcmp((*level)->name, device->override.level) != 0)
        level++;
    if (*level && (*level)->runs_on(device))
        return FLASH_KDA_OK;
    return kda_fail(FLASH_KDA_ERROR_UNSUPPORTED,
                    "the environment variable " KDA_CUDA_VARIABLE " is %.40s, which %s; expected sm80", value,
                    *level ? "this device cannot run" : "this build lacks");
}

flash_kda_status kda_cuda_query(int device, const char *what, struct kda_cuda_device *found) {
    const char *value = getenv(KDA_CUDA_VARIABLE);
    flash_kda_status status = kda_read_override(&found->override, value);
    if (!status)
        status = kda_cuda_status(
            cudaDeviceGetAttribute(&found->major, cudaDevAttrComputeCapabilityMajor, device), what);
    if (!status)
        status = kda_cuda_status(
            cudaDeviceGetAttribute(&found->multiprocessors, cudaDevAttrMultiProcessorCount, device), what);
    return status || !found->override.level ? status : check_override(found, value);
}

flash_kda_status kda_cuda_check_heads(const struct kda_tokens *p) {
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

bool kda_cuda_can_overlap(int device) {
    enum { UNKNOWN, NO, YES, DEVICES = 64 };
    static _Atomic int known[DEVICES];
    int previous = 0, version = 0, answer = device < DEVICES ? known[device] : UNKNOWN;
    if (answer != UNKNOWN || kda_cuda_enter(device, &previous))
        return answer == YES;
    cudaError_t error = kda_sm80_ptx_version(&version);
    kda_cuda_leave(device, previous);
    answer = !error && version >= 90 ? YES : NO;
    if (!error && device < DEVICES)
        known[device] = answer;
    return answer == YES;
}
