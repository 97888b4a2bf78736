/* SPDX-License-Identifier: MIT */
#include "device.h"
#include "failure.h"
#include "replay.h"

static bool absent(void) { return failed("this program was built without CUDA"); }

bool device_describe(struct device *device, int index) {
    (void)index;
    *device = (struct device){0};
    return absent();
}

void *device_allocate(size_t bytes, bool managed) {
    (void)bytes, (void)managed;
    absent();
    return NULL;
}

void device_free(void *memory) { (void)memory; }

bool device_copy(void *to, const void *from, size_t bytes) {
    (void)to, (void)from, (void)bytes;
    return absent();
}

bool device_fill(void *to, int byte, size_t bytes) {
    (void)to, (void)byte, (void)bytes;
    return absent();
}

void *device_stream(void) {
    absent();
    return NULL;
}

void device_stream_free(void *stream) { (void)stream; }

bool device_wait(void *stream) {
    (void)stream;
    return absent();
}

bool replay_is_possible(void) { return false; }

bool replay_calls(struct call *const calls[], int count, double *seconds, int repeats) {
    (void)calls, (void)count, (void)repeats;
    *seconds = 0;
    return absent();
}

const char *replay_changed(const struct arguments *captured, const struct arguments *changed, int fill) {
    (void)captured, (void)changed, (void)fill;
    absent();
    return failure();
}

bool replay_copy(double *bytes_per_second) {
    *bytes_per_second = 0;
    return absent();
}
