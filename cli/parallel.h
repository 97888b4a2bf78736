/* SPDX-License-Identifier: MIT */
/* Work of the program itself on several threads. */
#ifndef FLASHKDA_PARALLEL_H
#define FLASHKDA_PARALLEL_H

/* Runs work(context, i) for each i below count, on a thread each but for the caller's own; on fewer where there are no more. */
void parallel_run(int count, void (*work)(void *context, int i), void *context);

#endif
