/* SPDX-License-Identifier: MIT */
/* Random numbers that are the same bits on every platform: integers and exact floating point only. */
#ifndef FLASHKDA_RANDOM_H
#define FLASHKDA_RANDOM_H

#include <stdint.h>

struct random_stream {
    uint64_t state;
};

/* Streams of one seed with different names are independent. */
struct random_stream random_stream(uint64_t seed, const char *name);

double random_uniform(struct random_stream *stream); /* [0, 1), a multiple of 2^-24 */
double random_normal(struct random_stream *stream);  /* mean 0, variance 1, within +-6 */

/* The stream after so many normal numbers. */
struct random_stream random_after_normal(struct random_stream stream, int64_t count);

#endif
