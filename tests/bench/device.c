/* SPDX-License-Identifier: MIT */
#include "device.h"

#include "device_cuda.h"
#include "failure.h"

#include <stdio.h>
#include <string.h>

bool cuda_good(cudaError_t status, const char *what) {
    if (status == cudaSuccess)
        return true;
    cudaGetLastError(); /* what has been reported is over */
    return failed("CUDA, %s: %s (%s)", what, cudaGetErrorName(status), cudaGetErrorString(status));
}

/* ---- Devices ----------------------------------------------------------------------------------- */

static int attribute(enum cudaDeviceAttr which, int index) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, which, index) == cudaSuccess ? value : 0;
}

/* "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  ...": the first word that begins with a digit. */
static void read_driver(struct device *device) {
    char line[256] = "";
    FILE *file = fopen("/proc/driver/nvidia/version", "r");
    if (!file)
        return;
    bool read = fgets(line, sizeof line, file);
    fclose(file);
    for (char *rest = NULL, *word = strtok_r(line, " \n", &rest); read && word;
         word = strtok_r(NULL, " \n", &rest)) {
        if (*word >= '0' && *word <= '9') {
            snprintf(device->driver, sizeof device->driver, "%s", word);
            return;
        }
    }
}

bool device_describe(struct device *device, int index) {
    struct cudaDeviceProp properties;
    int count = 0;
    *device = (struct device){0};
    if (!cuda_good(cudaGetDeviceCount(&count), "looking for devices"))
        return false;
    if (index >= count)
        return failed("there is no CUDA device %d, only %d", index, count);
    if (!cuda_good(cudaGetDeviceProperties(&properties, index), "describing a device") ||
        !cuda_good(cudaDriverGetVersion(&device->driver_cuda), "asking for the driver") ||
        !cuda_good(cudaRuntimeGetVersion(&device->runtime_cuda), "asking for the runtime"))
        return false;
    snprintf(device->name, sizeof device->name, "%s", properties.name);
    device->major = properties.major;
    device->minor = properties.minor;
    device->multiprocessors = properties.multiProcessorCount;
    device->memory_bytes = (int64_t)properties.totalGlobalMem;
    device->l2_bytes = properties.l2CacheSize;
    device->clock_mhz = attribute(cudaDevAttrClockRate, index) / 1000;
    device->memory_clock_mhz = attribute(cudaDevAttrMemoryClockRate, index) / 1000;
    read_driver(device);
    return true;
}

/* ---- Memory ------------------------------------------------------------------------------------ */

void *device_allocate(size_t bytes, bool managed) {
    void *memory = NULL;
    size_t size = bytes ? bytes : 1;
    cudaError_t status =
        managed ? cudaMallocManaged(&memory, size, cudaMemAttachGlobal) : cudaMalloc(&memory, size);
    return cuda_good(status, "allocating memory") ? memory : NULL;
}

void device_free(void *memory) { cudaFree(memory); }

bool device_copy(void *to, const void *from, size_t bytes) {
    return cuda_good(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "copying between host and device");
}

bool device_fill(void *to, int byte, size_t bytes) {
    return cuda_good(cudaMemset(to, byte, bytes), "filling memory");
}

/* ---- Streams ----------------------------------------------------------------------------------- */

void *device_stream(void) {
    cudaStream_t stream = NULL;
    return cuda_good(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream") ? stream
                                                                                                   : NULL;
}

void device_stream_free(void *stream) { cudaStreamDestroy(stream); }

bool device_wait(void *stream) {
    return cuda_good(stream ? cudaStreamSynchronize(stream) : cudaDeviceSynchronize(), "running a call");
}
