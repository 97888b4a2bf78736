/* SPDX-License-Identifier: MIT */
/* The two halves of a call. */
#ifndef CHECK_PARALLEL_HALVES_H
#define CHECK_PARALLEL_HALVES_H

#include "call.h"
#include "check.h"

/* Runs a call's first half and fetches what it wrote; the call stays open, with its workspace. NULL or what went wrong. */
const char *halves_begin(struct call *c, const struct arguments *args);

/* Runs the second half with what the tensors hold now, unless `ran` says that something has failed before, and ends the
 * call. */
const char *halves_finish(struct call *c, const struct arguments *args, bool ran);

/* What a half writes and what it leaves alone, with any rows coming in and going on. */
void parallel_halves(struct check *check);

#endif
