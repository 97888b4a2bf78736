/* SPDX-License-Identifier: MIT */
/* What went wrong, as one sentence. */
#ifndef BENCH_FAILURE_H
#define BENCH_FAILURE_H

#include <stdbool.h>
#include <stddef.h>

enum { SENTENCE_SIZE = 800 };

/* Keeps the sentence, printable; always false, for the caller to return. */
__attribute__((format(printf, 1, 2))) bool failed(const char *format, ...);

/* The sentence of the last failure of this thread, until its next one. */
const char *failure(void);

/* Text from anywhere as one line of UTF-8: control characters and bytes that are no UTF-8 become \x1b and the like. */
void printable(char *to, size_t size, const char *from);

#endif
