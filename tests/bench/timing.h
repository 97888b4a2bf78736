/* SPDX-License-Identifier: MIT */
/* Time, and what a row of measured times says. */
#ifndef BENCH_TIMING_H
#define BENCH_TIMING_H

/* Seconds since some moment. */
double timing_now(void);

struct timing {
    double min, q1, median, q3, max; /* seconds */
    int repeats;
};

/* Sorts the times; count is at least 1. */
struct timing timing_of(double *seconds, int count);

#endif
