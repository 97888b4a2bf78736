/* SPDX-License-Identifier: MIT */
/* CUDA for the program: the devices, and device copies of the tensors of a call. Without CUDA in the build
 * (device_absent.c) everything fails with a sentence that says so. */
#ifndef FLASHKDA_DEVICE_H
#define FLASHKDA_DEVICE_H

#include <flash_kda.h>
#include <stdbool.h>

struct device {
    char name[256];
    char driver[32];               /* version of the kernel's driver, or empty */
    int driver_cuda, runtime_cuda; /* as CUDA counts: 13000 is 13.0 */
    int major, minor;              /* compute capability */
    int multiprocessors;
    int clock_mhz, memory_clock_mhz; /* the highest; 0 if the driver does not tell */
    int64_t memory_bytes, l2_bytes;
};

/* Device number `index` of the machine, as CUDA_VISIBLE_DEVICES shows it. False, with one sentence in error, if
 * there is none or CUDA cannot be used at all. */
bool device_describe(struct device *device, int index, char *error, size_t error_size);

/* Copies on device 0 of all tensors of a call. */
struct device_copies;

/* Copies the tensors of a call, those that are not NULL, and points the call to the copies: tensors[count] are the members
 * of its arguments, the `written` first of which it writes. On failure returns NULL and writes one sentence to error. */
struct device_copies *device_copies_make(const DLTensor **const tensors[], int count, int written, char *error,
                                         size_t error_size);

/* Copies what a call has written back to where it came from. False, with one sentence in error, if that or
 * the call failed. */
bool device_copies_fetch(const struct device_copies *copies, char *error, size_t error_size);

void device_copies_free(struct device_copies *copies);

/* Memory of device 0; NULL, with one sentence in error, if there is not enough. */
void *device_allocate(size_t bytes, char *error, size_t error_size);
void device_free(void *memory);

/* Waits until everything that was launched has run. */
bool device_wait(char *error, size_t error_size);

#endif
