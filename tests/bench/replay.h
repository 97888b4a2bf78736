/* SPDX-License-Identifier: MIT */
/* GPU time by replay of CUDA graphs: no launch from the host is in it. */
#ifndef BENCH_REPLAY_H
#define BENCH_REPLAY_H

#include "call.h"

/* Can calls be captured? The emulator of CUDA kernels has no graphs. */
bool replay_is_possible(void);

/* Captures one graph that runs the calls, all on the CUDA backend, one after another, and replays it, first to warm up;
 * seconds[repeats]: of one call, each the mean over many replays. */
bool replay_calls(struct call *const calls[], int count, double *seconds, int repeats);

/* Captures a call in a graph, gives every tensor the contents it has in `changed`, of the same shapes, replays the graph, and
 * copies what is written back to the tensors of `changed`. Returns NULL or what went wrong. */
const char *replay_changed(const struct arguments *captured, const struct arguments *changed, int fill);

/* The rate of a large copy within the device's memory, bytes read and written: what a call that does nothing but
 * move its tensors could reach. */
bool replay_copy(double *bytes_per_second);

#endif
