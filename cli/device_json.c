/* SPDX-License-Identifier: MIT */
/* A CUDA device as JSON, the same for info and bench. */
#include "device_json.h"

/* 13000 is 13.0. */
static json_t *cuda_version(int version) { return json_sprintf("%d.%d", version / 1000, version % 1000 / 10); }

static json_t *known(int value) { return value ? json_integer(value) : json_null(); }

json_t *device_json(const struct device *device) {
    return json_pack(
        "{s:s, s:o, s:i, s:I, s:I, s:o, s:o, s:o, s:o, s:o}", "name", device->name, "compute_capability",
        json_sprintf("%d.%d", device->major, device->minor), "multiprocessors", device->multiprocessors,
        "memory_bytes", (json_int_t)device->memory_bytes, "l2_bytes", (json_int_t)device->l2_bytes,
        "max_clock_mhz", known(device->clock_mhz), "max_memory_clock_mhz", known(device->memory_clock_mhz),
        "driver", *device->driver ? json_string(device->driver) : json_null(), "driver_cuda",
        cuda_version(device->driver_cuda), "runtime_cuda", cuda_version(device->runtime_cuda));
}
