/* SPDX-License-Identifier: MIT */
/* GPU time by replay of CUDA graphs: no launch from the host is in it. */
#ifndef FLASHKDA_REPLAY_H
#define FLASHKDA_REPLAY_H

#include <stdbool.h>
#include <stddef.h>

/* Launches call number i of `calls` on a stream. On failure returns false and writes one sentence to error. */
typedef bool replay_launch(const void *calls, int i, void *stream, char *error, size_t error_size);

/* Captures one graph that runs the calls, all on the CUDA backend, one after another, and replays it, first to warm up;
 * seconds[repeats]: of one call, each the mean over many replays. On failure returns false and writes one
 * sentence to error. */
bool replay_calls(replay_launch *launch, const void *calls, int count, double *seconds, int repeats,
                  char *error, size_t error_size);

/* The rate of a large copy within the device's memory, bytes read and written: what a call that does nothing but
 * move its tensors could reach. */
bool replay_copy(double *bytes_per_second, char *error, size_t error_size);

#endif
