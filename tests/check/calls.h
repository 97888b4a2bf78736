/* SPDX-License-Identifier: MIT */
/* What checks do around a call: give it wild indices, see that its inputs are as they were, time it. */
#ifndef CHECK_CALLS_H
#define CHECK_CALLS_H

#include "call.h"
#include "random.h"

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

/* Replaces about half of an index tensor, if it is there, by values that are out of range: none of them is a slot, so that
 * slots stay distinct. */
void spoil_indices(struct tensor *t, struct random *r);

/* Seconds of the fastest of several runs; NaN if they fail. */
double seconds_of(const struct arguments *args);

#endif
