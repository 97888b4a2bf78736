/* SPDX-License-Identifier: MIT */
/* Argument structs of callers that were built against an older header. */
#ifndef KDA_API_ARGS_H
#define KDA_API_ARGS_H

#include "flash_kda.h"

#include <stddef.h>

/* An argument struct as this library knows it. */
struct kda_args_type {
    const char *name; /* of the struct and of what it is started from, for messages */
    const char *init;
    size_t least; /* where the members end without which no call can be described */
    size_t size;
};

/* Copies *args to *whole, which is of type->size bytes. What the caller's header did not have yet, by the struct_size that
 * *args begins with, becomes zero; nothing beyond struct_size is read. */
flash_kda_status kda_args_read(const void *args, const struct kda_args_type *type, void *whole);

#endif
