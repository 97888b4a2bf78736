/* SPDX-License-Identifier: MIT */
/* A KDA problem as a safetensors file: docs/file-format.md. */
#ifndef FLASHKDA_CASE_FILE_H
#define FLASHKDA_CASE_FILE_H

#include "trial.h"

/* Reads a case; it keeps nothing of the file. On failure returns false, leaves nothing to free and reports
 * failure(). Shapes that only prefill can judge are left to it. */
bool case_file_read(const char *path, struct kda_case *c);

/* Writes the inputs of a case. On failure returns false, with failure(). */
bool case_file_write(const char *path, const struct kda_case *c);

/* Writes what a trial made of a case: o and state. On failure as above. */
bool case_file_write_result(const char *path, const struct kda_case *c, const struct trial *trial);

#endif
