/* SPDX-License-Identifier: MIT */
/* The levels under test: those of the CPU backend by name, and "cuda" and "reference", which are backends. */
#ifndef BENCH_LEVEL_H
#define BENCH_LEVEL_H

#include "flash_kda.h"

#include <stdbool.h>

flash_kda_backend level_backend(const char *level);

/* Is there such a level, on this machine or another? */
bool level_exists(const char *level);

/* The level that a backend runs on. */
const char *level_of(flash_kda_backend backend);

/* Makes a level of the CPU backend what the next calls run on. */
void level_select(const char *level);

/* The rule of flash_kda.h: does the level take bf16 operands in the large products of this prefill? */
bool level_rounds(const char *level, const flash_kda_prefill_args *args);

/* The same of gradients, whatever their dtypes. */
bool level_rounds_gradients(const char *level);

#endif
