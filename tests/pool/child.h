/* SPDX-License-Identifier: MIT */
/* Runs what may hang, die or print in a child process. */
#ifndef POOL_CHILD_H
#define POOL_CHILD_H

#include <stdbool.h>

/* Forks; the child runs works(context) and ends by _exit. NULL if it says true in time and has printed nothing, or what
 * went wrong. */
const char *child_run(bool (*works)(void *context), void *context);

#endif
