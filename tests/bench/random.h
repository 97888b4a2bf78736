/* SPDX-License-Identifier: MIT */
/* Random numbers that are the same bits on every machine: splitmix64, integers and exact floating point only. */
#ifndef BENCH_RANDOM_H
#define BENCH_RANDOM_H

#include <stdint.h>

struct random {
    uint64_t state;
};

/* A stream of its own for every name, so that a case run alone has the inputs it has among all others. */
struct random random_named(uint64_t seed, const char *name);
uint64_t random_next(struct random *r);
/* Uniform on 0 .. bound - 1; bound > 0. */
int64_t random_below(struct random *r, int64_t bound);
/* Uniform on [low, high), in 2^24 steps. */
double random_uniform(struct random *r, double low, double high);
/* Mean 0, variance 1, within +-6. */
double random_normal(struct random *r);

/* The stream after so many normal numbers. */
struct random random_after_normal(struct random r, int64_t count);

#endif
