/* SPDX-License-Identifier: MIT */
/* Which backends this build has, and which one runs where. */
#include "api/backend.h"

#include "api/status.h"

#include <stdbool.h>

static const char *const names[] = {
    [FLASH_KDA_BACKEND_AUTO] = "auto",
    [FLASH_KDA_BACKEND_REFERENCE] = "reference",
    [FLASH_KDA_BACKEND_CPU] = "cpu",
    [FLASH_KDA_BACKEND_CUDA] = "cuda",
};

/* AUTO stands for the one that suits the device. */
static const struct kda_backend *const backends[] = {
    [FLASH_KDA_BACKEND_AUTO] = &kda_cpu_backend,
    [FLASH_KDA_BACKEND_REFERENCE] = &kda_reference_backend,
    [FLASH_KDA_BACKEND_CPU] = &kda_cpu_backend,
#ifdef KDA_WITH_CUDA
    [FLASH_KDA_BACKEND_CUDA] = &kda_cuda_backend,
#else
    [FLASH_KDA_BACKEND_CUDA] = NULL,
#endif
};

static bool known(flash_kda_backend backend) { return (unsigned)backend < sizeof names / sizeof *names; }

const char *flash_kda_backend_name(flash_kda_backend backend) { return known(backend) ? names[backend] : NULL; }

int flash_kda_backend_available(flash_kda_backend backend) {
    return known(backend) && backends[backend] && backends[backend]->available();
}

bool kda_on_host(DLDevice device) { return device.device_type == kDLCPU || device.device_type == kDLCUDAHost; }

static bool on_cuda(DLDevice device) {
    return device.device_type == kDLCUDA || device.device_type == kDLCUDAManaged;
}

flash_kda_status kda_backend_for(flash_kda_backend backend, const char *name, DLDevice device,
                                 const struct kda_backend **out) {
    if (!known(backend))
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT, "backend is %d; expected a flash_kda_backend",
                        (int)backend);
    if (backend == FLASH_KDA_BACKEND_AUTO && on_cuda(device) && backends[FLASH_KDA_BACKEND_CUDA])
        backend = FLASH_KDA_BACKEND_CUDA;
    if (!backends[backend])
        return kda_fail(FLASH_KDA_ERROR_UNSUPPORTED, "backend is %s, which this build does not have",
                        names[backend]);
    if (backends[backend]->on_host ? !kda_on_host(device) : !on_cuda(device))
        return kda_fail(FLASH_KDA_ERROR_UNSUPPORTED,
                        "%s is on DLPack device %d:%d, where backend %s does not work; expected %s memory (%d)",
                        name, (int)device.device_type, device.device_id, backends[backend]->name,
                        backends[backend]->on_host ? "host" : "CUDA",
                        backends[backend]->on_host ? (int)kDLCPU : (int)kDLCUDA);
    *out = backends[backend];
    return FLASH_KDA_OK;
}
