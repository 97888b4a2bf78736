/* SPDX-License-Identifier: MIT */
/* Random numbers that are the same bits on every platform: splitmix64. */
#include "random.h"

enum { BITS_PER_NORMAL = 3 }; /* words of random bits */

static const uint64_t step = 0x9e3779b97f4a7c15;

static uint64_t random_bits(struct random_stream *stream) {
    uint64_t z = stream->state += step;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

struct random_stream random_stream(uint64_t seed, const char *name) {
    uint64_t hash = 0xcbf29ce484222325; /* FNV-1a */
    for (; *name; name++) {
        hash = (hash ^ (unsigned char)*name) * 0x100000001b3;
    }
    struct random_stream stream = {seed};
    stream.state = random_bits(&stream) ^ hash;
    return stream;
}

double random_uniform(struct random_stream *stream) { return (double)(random_bits(stream) >> 40) * 0x1p-24; }

/* The sum of 12 uniform numbers of 16 bits, whose variance is 1: no logarithm or cosine, whose last bit
 * differs between libraries. */
double random_normal(struct random_stream *stream) {
    int64_t sum = 0;
    for (int i = 0; i < BITS_PER_NORMAL; i++) {
        uint64_t bits = random_bits(stream);
        sum += (int64_t)(bits & 0xffff) + (int64_t)(bits >> 16 & 0xffff) + (int64_t)(bits >> 32 & 0xffff) +
               (int64_t)(bits >> 48);
    }
    return (double)(2 * sum - 12 * 0xffff) * 0x1p-17;
}

struct random_stream random_after_normal(struct random_stream stream, int64_t count) {
    stream.state += step * BITS_PER_NORMAL * (uint64_t)count;
    return stream;
}
