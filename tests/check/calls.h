/* SPDX-License-Identifier: MIT */
/* What checks do around a call: are its inputs as they were, how long does it take? */
#ifndef CHECK_CALLS_H
#define CHECK_CALLS_H

#include "call.h"

/* The tensors of a call before it runs. */
struct snapshot {
    int count;
    const struct tensor *tensors[MAX_ARGUMENTS];
    struct tensor before[MAX_ARGUMENTS];
};

void snapshot_take(struct snapshot *s, const struct arguments *args);
/* NULL, or that one of them is not what it was. */
const char *snapshot_changed(const struct snapshot *s);
void snapshot_free(struct snapshot *s);

/* Frees the tensors of a call, whose DLTensors must be struct tensors'. */
void arguments_free(const struct arguments *args);

/* Seconds of the fastest of several runs; NaN if they fail. */
double seconds_of(const struct arguments *args);

#endif
