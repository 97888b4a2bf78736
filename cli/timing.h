/* SPDX-License-Identifier: MIT */
/* What a row of measured times says. */
#ifndef FLASHKDA_TIMING_H
#define FLASHKDA_TIMING_H

#include <stddef.h>

struct timing {
    double min, q1, median, q3, max; /* seconds */
    int repeats;
};

/* Sorts the times; count is at least 1. */
struct timing timing_of(double *seconds, int count);

#endif
