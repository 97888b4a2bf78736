/* SPDX-License-Identifier: MIT */
/* Random numbers: splitmix64, named streams by FNV-1a, normals by Box and Muller. */
#include "random.h"

#include <math.h>

struct random random_named(uint64_t seed, const char *name) {
    uint64_t hash = 0xcbf29ce484222325U;
    for (const char *c = name; *c; c++)
        hash = (hash ^ (unsigned char)*c) * 0x100000001b3U;
    struct random r = {seed};
    r.state = random_next(&r) ^ hash;
    return r;
}

uint64_t random_next(struct random *r) {
    uint64_t x = r->state += 0x9e3779b97f4a7c15U;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
    return x ^ (x >> 31);
}

int64_t random_below(struct random *r, int64_t bound) { return (int64_t)(random_next(r) % (uint64_t)bound); }

double random_uniform(struct random *r, double low, double high) {
    return low + (high - low) * ((double)(random_next(r) >> 11) * 0x1p-53);
}

double random_normal(struct random *r) {
    double radius = sqrt(-2 * log(1 - random_uniform(r, 0, 1)));
    return radius * cos(6.283185307179586 * random_uniform(r, 0, 1));
}
