/* SPDX-License-Identifier: MIT */
/* What a row of measured times says. */
#include "timing.h"

#include <stdlib.h>
#include <time.h>

double timing_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static int compare_times(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

/* Between the two nearest of a sorted row. */
static double quantile(const double *sorted, int count, double part) {
    double place = part * (count - 1);
    int below = (int)place;
    int above = below + 1 < count ? below + 1 : below;
    return sorted[below] + (place - below) * (sorted[above] - sorted[below]);
}

struct timing timing_of(double *seconds, int count) {
    qsort(seconds, (size_t)count, sizeof *seconds, compare_times);
    return (struct timing){.min = seconds[0],
                           .q1 = quantile(seconds, count, 0.25),
                           .median = quantile(seconds, count, 0.5),
                           .q3 = quantile(seconds, count, 0.75),
                           .max = seconds[count - 1],
                           .repeats = count};
}
