/* SPDX-License-Identifier: MIT */
/* The harness of flashkda_check. An operation registers once, in check.c; its cases then serve comparison and
 * timing for every backend and level. */
#ifndef CHECK_H
#define CHECK_H

#include "level.h"
#include "random.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CHECK_MAX_LEVELS = 8 };

struct check {
    uint64_t seed;
    const char *operation, *level, *filter;
    bool list, bench, long_cases, quick;
    int threads;     /* for every case, instead of its own; -1: its own */
    int part, parts; /* only the cases whose names fall into this part, from 0 on, of so many */

    /* Levels of the CPU backend and "cuda" to test, or "reference" alone. */
    const char *levels[CHECK_MAX_LEVELS];
    int level_count;
    int passed, failed, left_out;
};

struct operation {
    const char *name;
    /* Runs all its cases; times each that passed if check->bench. */
    void (*run)(struct check *check);
};

extern const struct operation prefill_operation, decode_operation, backward_operation, fold_operation,
    parallel_operation;

/* Whether the case of this name is to run now. Prints the name instead for --list. */
bool check_wanted(const struct check *check, const char *name);

/* Is level "cuda" among those that are checked? */
bool check_tests_cuda(const struct check *check);

/* Reports one comparison. The text says what was measured or what went wrong. */
void check_report(struct check *check, bool passed, const char *level, const char *name, const char *text);

/* Counts a case that this build of the check program cannot run. */
void check_leave_out(struct check *check, const char *level, const char *name, const char *why);

/* Appends to a report's text, in an array of so many bytes. */
void append_text(char *text, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
