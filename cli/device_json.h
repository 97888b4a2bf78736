/* SPDX-License-Identifier: MIT */
/* A CUDA device as JSON, the same for info and bench. */
#ifndef FLASHKDA_DEVICE_JSON_H
#define FLASHKDA_DEVICE_JSON_H

#include "device.h"

#include <jansson.h>

/* A new object; NULL if out of memory. */
json_t *device_json(const struct device *device);

#endif
