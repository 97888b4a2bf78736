/* SPDX-License-Identifier: MIT */
/* Runs a call on CUDA copies of its tensors. */
#ifndef CHECK_DEVICE_H
#define CHECK_DEVICE_H

#include "flash_kda.h"

/* Copies every tensor of args to the device, runs prefill there with a workspace filled with `fill`, and copies what
 * is written back. Tensors that share memory here share it there. Returns NULL or what went wrong. */
const char *device_prefill(const flash_kda_prefill_args *args, int fill);

#endif
