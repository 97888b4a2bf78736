/* SPDX-License-Identifier: MIT */
/* Pairwise cover: few rows in which every two values of any two dimensions meet at least once. */
#ifndef CHECK_PAIRWISE_H
#define CHECK_PAIRWISE_H

#include "random.h"

#include <stdbool.h>

enum { PAIRWISE_MAX_DIMS = 40 };

struct pairwise {
    int dims;
    const int *sizes; /* [dims]: number of values of each dimension */
    /* Whether value x of dimension a cannot go with value y of dimension b. Asked with a < b only. Every
     * value must be able to stand in some row. */
    bool (*forbidden)(int a, int x, int b, int y);
};

/* Rows [count][dims] for the caller to free. */
int *pairwise_rows(const struct pairwise *p, struct random *r, int *count);

/* Number of allowed pairs that no row has, plus the forbidden ones that some row has: 0 if all is well.
 * Counts straight from the rows and so checks the generator. */
int pairwise_missing(const struct pairwise *p, const int *rows, int count, int *pairs);

#endif
