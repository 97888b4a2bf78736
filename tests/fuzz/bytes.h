/* SPDX-License-Identifier: MIT */
/* A fuzzer's bytes as choices, zeros once they have run out; and what a fuzzer does where something does not hold. */
#ifndef FUZZ_BYTES_H
#define FUZZ_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

struct bytes {
    const uint8_t *next;
    size_t left;
};

static inline unsigned take(struct bytes *b) {
    if (!b->left)
        return 0;
    b->left--;
    return *b->next++;
}

/* From low to high, both included. */
static inline int64_t choose(struct bytes *b, int64_t low, int64_t high) {
    return low + take(b) % (high - low + 1);
}

static inline void must(bool holds) {
    if (!holds)
        abort();
}

#endif
