/* SPDX-License-Identifier: MIT */
/* CUDA for the program: the devices, and device copies of the tensors of a call. */
#include "device.h"

#include "device_error.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TENSORS = 16 };

bool device_failed(cudaError_t status, const char *what, char *error, size_t error_size) {
    if (status != cudaSuccess) {
        snprintf(error, error_size, "CUDA, %s: %s (%s)", what, cudaGetErrorName(status),
                 cudaGetErrorString(status));
    }
    return status != cudaSuccess;
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
    if (!file) {
        return;
    }
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

bool device_describe(struct device *device, int index, char *error, size_t error_size) {
    struct cudaDeviceProp properties;
    int count = 0;
    *device = (struct device){0};
    if (device_failed(cudaGetDeviceCount(&count), "looking for devices", error, error_size)) {
        return false;
    }
    if (index >= count) {
        snprintf(error, error_size, "there is no CUDA device %d, only %d", index, count);
        return false;
    }
    if (device_failed(cudaGetDeviceProperties(&properties, index), "describing a device", error, error_size) ||
        device_failed(cudaDriverGetVersion(&device->driver_cuda), "asking for the driver", error, error_size) ||
        device_failed(cudaRuntimeGetVersion(&device->runtime_cuda), "asking for the runtime", error,
                      error_size)) {
        return false;
    }
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

void *device_allocate(size_t bytes, char *error, size_t error_size) {
    void *memory = NULL;
    return device_failed(cudaMalloc(&memory, bytes ? bytes : 1), "allocating memory", error, error_size)
               ? NULL
               : memory;
}

void device_free(void *memory) { cudaFree(memory); }

bool device_wait(char *error, size_t error_size) {
    return !device_failed(cudaDeviceSynchronize(), "running a call", error, error_size);
}

/* ---- Copies ------------------------------------------------------------------------------------ */

/* One tensor's bytes, from its first to behind its last element, on both sides. */
struct copy {
    DLTensor dl;
    void *host, *device;
    size_t bytes;
};

struct device_copies {
    struct copy tensors[MAX_TENSORS];
    int count, written; /* the first `written` are */
};

static size_t extent(const DLTensor *t) {
    int64_t elements = 1;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0) {
            return 0;
        }
        elements += (t->shape[i] - 1) * t->strides[i]; /* the program's tensors all have strides */
    }
    return (size_t)elements * t->dtype.bits / 8;
}

static bool copy_make(struct copy *copy, const DLTensor *host, char *error, size_t error_size) {
    copy->dl = *host;
    copy->host = host->data;
    copy->bytes = extent(host);
    copy->device = device_allocate(copy->bytes, error, error_size);
    copy->dl.data = copy->device;
    copy->dl.device = (DLDevice){kDLCUDA, 0};
    return copy->device &&
           !device_failed(cudaMemcpy(copy->device, copy->host, copy->bytes, cudaMemcpyHostToDevice),
                          "copying a tensor to the device", error, error_size);
}

struct device_copies *device_copies_make(const DLTensor **const tensors[], int count, int written, char *error,
                                         size_t error_size) {
    struct device_copies *copies = calloc(1, sizeof *copies);
    if (!copies) {
        snprintf(error, error_size, "out of memory for device copies");
        return NULL;
    }
    for (int i = 0; i < count && i < MAX_TENSORS; i++) {
        if (!*tensors[i]) {
            continue;
        }
        struct copy *copy = &copies->tensors[copies->count++];
        if (!copy_make(copy, *tensors[i], error, error_size)) {
            device_copies_free(copies);
            return NULL;
        }
        *tensors[i] = &copy->dl;
        copies->written += i < written;
    }
    return copies;
}

bool device_copies_fetch(const struct device_copies *copies, char *error, size_t error_size) {
    for (int i = 0; i < copies->written; i++) {
        const struct copy *copy = &copies->tensors[i];
        if (device_failed(cudaMemcpy(copy->host, copy->device, copy->bytes, cudaMemcpyDeviceToHost),
                          "copying a result back", error, error_size)) {
            return false;
        }
    }
    return true;
}

void device_copies_free(struct device_copies *copies) {
    for (int i = 0; copies && i < copies->count; i++) {
        cudaFree(copies->tensors[i].device);
    }
    free(copies);
}
