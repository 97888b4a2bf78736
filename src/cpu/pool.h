/* SPDX-License-Identifier: MIT */
/*
 * Threads that help a caller with pieces of its work.
 *
 * The caller works too and is done as soon as every piece is: it waits for a helper only while that one is inside a
 * piece. Helpers are made when they are first wanted, sleep when there is nothing to do, and are fewer, or none, where
 * they cannot be had; the result is the same. Any thread may call, also from inside a piece, and after a fork.
 */
#ifndef KDA_CPU_POOL_H
#define KDA_CPU_POOL_H

#include <stdint.h>

/* Works one piece. Two pieces that run at the same time have different members, all below the call's `threads`; the
 * caller is member 0. */
typedef void kda_pool_work(void *context, uint32_t piece, int member);

/* Called by one thread when all pieces of a step are done, before the next step's first; returns how many pieces that
 * has, 0 for no further step. */
typedef uint32_t kda_pool_next(void *context);

/* Works pieces 0 to pieces - 1, in that order of claiming, on at most `threads` threads; then, unless `next` is NULL,
 * further steps until it has no more. All of a step is done before the next begins. */
void kda_pool_run(int threads, uint32_t pieces, kda_pool_work *work, kda_pool_next *next, void *context);

#endif
