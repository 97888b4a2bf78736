/* SPDX-License-Identifier: MIT */
/* A KDA problem as a safetensors file: docs/file-format.md. */
#ifndef FLASHKDA_CASE_FILE_H
#define FLASHKDA_CASE_FILE_H

#include "call.h"

/* Reads a case; it keeps nothing of the file. On failure returns false, leaves nothing to free and writes
 * one sentence to error. Shapes that only prefill can judge are left to it. */
bool case_file_read(const char *path, struct kda_case *c, char *error, size_t error_size);

/* Writes the inputs of a case. On failure returns false and writes one sentence to error. */
bool case_file_write(const char *path, const struct kda_case *c, char *error, size_t error_size);

/* Writes what a call made of a case: o and state. On failure as above. */
bool case_file_write_result(const char *path, const struct kda_case *c, const struct prefill_call *call,
                            char *error, size_t error_size);

#endif
