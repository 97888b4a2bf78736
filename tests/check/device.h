/* SPDX-License-Identifier: MIT */
/* Runs a call on CUDA copies of its tensors. Every tensor and the workspace lie between guards on the device, at the
 * alignment they have here; guards and inputs must be unchanged afterwards. Tensors that share memory here share it
 * there. Everything returns NULL or what went wrong. */
#ifndef CHECK_DEVICE_H
#define CHECK_DEVICE_H

#include "flash_kda.h"

enum device_memory { DEVICE_MEMORY, DEVICE_MANAGED };

/* Runs prefill with a workspace filled with `fill`, and copies what is written back. */
const char *device_prefill(const flash_kda_prefill_args *args, int fill, enum device_memory memory);

/* Runs prefill, describes it, and copies the first word of its workspace from where the library begins to use it; 0xff bytes
 * where it has none. */
const char *device_prefill_described(const flash_kda_prefill_args *args, char *text, size_t size,
                                     int32_t *word);

/* Captures the call in a graph, gives every tensor the contents it has in `changed`, of the same shapes, replays the
 * graph, and copies what is written back to the tensors of `changed`. */
const char *device_prefill_replayed(const flash_kda_prefill_args *captured,
                                    const flash_kda_prefill_args *changed, int fill);

/* Seconds of the fastest of several runs. */
const char *device_prefill_time(const flash_kda_prefill_args *args, double *seconds);

/* The same of decode. */
const char *device_decode(const flash_kda_decode_args *args, enum device_memory memory);
const char *device_decode_in_steps(const flash_kda_decode_args *args, int64_t count); /* as decode_in_steps() */
const char *device_decode_replayed(const flash_kda_decode_args *captured, const flash_kda_decode_args *changed);
const char *device_decode_time(const flash_kda_decode_args *args, double *seconds);

/* A fill that is written although memory is bare, for calls whose indices lead to parts of the workspace that nothing
 * wrote: what they compute means nothing, but the read is no error. */
enum { DEVICE_FILL_ALWAYS = 0 };

/* From now on there are no guards and no workspace is filled: compute-sanitizer then sees every access behind the end
 * of a tensor, and every read of what was not written. */
void device_bare(void);

#endif
