/* SPDX-License-Identifier: MIT */
#include "random.h"

enum { WORDS_PER_NORMAL = 3 }; /* of random bits */

static const uint64_t step = 0x9e3779b97f4a7c15U;

struct random random_named(uint64_t seed, const char *name) {
    uint64_t hash = 0xcbf29ce484222325U; /* FNV-1a */
    for (const char *c = name; *c; c++)
        hash = (hash ^ (unsigned char)*c) * 0x100000001b3U;
    struct random r = {seed};
    r.state = random_next(&r) ^ hash;
    return r;
}

uint64_t random_next(struct random *r) {
    uint64_t x = r->state += step;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
    return x ^ (x >> 31);
}

int64_t random_below(struct random *r, int64_t bound) { return (int64_t)(random_next(r) % (uint64_t)bound); }

double random_uniform(struct random *r, double low, double high) {
    return low + (high - low) * ((double)(random_next(r) >> 40) * 0x1p-24);
}

/* The sum of 12 uniform numbers of 16 bits, whose variance is 1: no logarithm or cosine, whose last bit differs between
 * libraries. */
double random_normal(struct random *r) {
    int64_t sum = 0;
    for (int i = 0; i < WORDS_PER_NORMAL; i++) {
        uint64_t bits = random_next(r);
        sum += (int64_t)(bits & 0xffff) + (int64_t)(bits >> 16 & 0xffff) + (int64_t)(bits >> 32 & 0xffff) +
               (int64_t)(bits >> 48);
    }
    return (double)(2 * sum - 12 * 0xffff) * 0x1p-17;
}

struct random random_after_normal(struct random r, int64_t count) {
    r.state += step * WORDS_PER_NORMAL * (uint64_t)count;
    return r;
}
