/* SPDX-License-Identifier: MIT */
/* What takes the place of device.c and replay.c in a build without CUDA. */
#include "device.h"
#include "replay.h"

#include <stdio.h>

static bool absent(char *error, size_t error_size) {
    snprintf(error, error_size, "this flashkda was built without CUDA");
    return false;
}

bool device_describe(struct device *device, int index, char *error, size_t error_size) {
    (void)index;
    *device = (struct device){0};
    return absent(error, error_size);
}

struct device_copies *device_copies_make(const DLTensor **const tensors[], int count, int written, char *error,
                                         size_t error_size) {
    (void)tensors, (void)count, (void)written;
    absent(error, error_size);
    return NULL;
}

bool device_copies_fetch(const struct device_copies *copies, char *error, size_t error_size) {
    (void)copies;
    return absent(error, error_size);
}

void device_copies_free(struct device_copies *copies) { (void)copies; }

void *device_allocate(size_t bytes, char *error, size_t error_size) {
    (void)bytes;
    absent(error, error_size);
    return NULL;
}

void device_free(void *memory) { (void)memory; }

bool device_wait(char *error, size_t error_size) { return absent(error, error_size); }

bool replay_calls(replay_launch *launch, const void *calls, int count, double *seconds, int repeats,
                  char *error, size_t error_size) {
    (void)launch, (void)calls, (void)count, (void)repeats;
    *seconds = 0;
    return absent(error, error_size);
}

bool replay_copy(double *bytes_per_second, char *error, size_t error_size) {
    *bytes_per_second = 0;
    return absent(error, error_size);
}
