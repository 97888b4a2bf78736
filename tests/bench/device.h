/* SPDX-License-Identifier: MIT */
/* CUDA for the workbench, with plain types. What fails returns false or NULL, with failure(); without CUDA in the build
 * (device_absent.c) all does. */
#ifndef BENCH_DEVICE_H
#define BENCH_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct device {
    char name[256];
    char driver[32];               /* version of the kernel's driver, or empty */
    int driver_cuda, runtime_cuda; /* as CUDA counts: 13000 is 13.0 */
    int major, minor;              /* compute capability */
    int multiprocessors;
    int clock_mhz, memory_clock_mhz; /* the highest; 0 if the driver does not tell */
    int64_t memory_bytes, l2_bytes;
};

/* Device number `index` of the machine, as CUDA_VISIBLE_DEVICES shows it. */
bool device_describe(struct device *device, int index);

/* Memory of device 0, or managed. */
void *device_allocate(size_t bytes, bool managed);
void device_free(void *memory);

/* Either side of a copy may be the host's. */
bool device_copy(void *to, const void *from, size_t bytes);
bool device_fill(void *to, int byte, size_t bytes);

/* A stream that waits for no other. */
void *device_stream(void);
void device_stream_free(void *stream);

/* Waits until everything on a stream, or NULL on the device, has run. */
bool device_wait(void *stream);

#endif
