/* SPDX-License-Identifier: MIT */
/* Reproducible random numbers for inputs: the same seed gives the same case on every machine. */
#ifndef CHECK_RANDOM_H
#define CHECK_RANDOM_H

#include <stdint.h>

struct random {
    uint64_t state;
};

/* A stream of its own for every name, so that a case run alone has the inputs it has among all others. */
struct random random_named(uint64_t seed, const char *name);
uint64_t random_next(struct random *r);
/* Uniform on 0 .. bound - 1; bound > 0. */
int64_t random_below(struct random *r, int64_t bound);
/* Uniform on [low, high). */
double random_uniform(struct random *r, double low, double high);
double random_normal(struct random *r);

#endif
