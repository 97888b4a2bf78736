/* SPDX-License-Identifier: MIT */
/* What Hopper's level rests on although PTX does not document it: cp.async.bulk.wait_group.read also waits for copies from
 * one shared memory of a cluster to another. */
#ifndef CHECK_CLUSTER_COPY_H
#define CHECK_CLUSTER_COPY_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

bool cluster_copy_can_run(void);

/* Copies a stage to the other CTA again and again, and overwrites its source after the wait, or at once. Returns which
 * share of the words was overwritten before it had been read; negative: CUDA failed. */
double cluster_copy_overwritten(bool waits);

#ifdef __cplusplus
}
#endif

#endif
