/* SPDX-License-Identifier: MIT */
/* A workspace of exactly the size asked for, between guards. */
#ifndef CHECK_WORKSPACE_H
#define CHECK_WORKSPACE_H

#include <stdbool.h>
#include <stddef.h>

struct workspace {
    unsigned char *block, *data; /* data is not aligned, and NULL if bytes is 0 */
    size_t bytes;
};

void workspace_make(struct workspace *w, size_t bytes, int fill);
bool workspace_intact(const struct workspace *w);
void workspace_free(struct workspace *w);

/* What flash_kda_last_error() says, with the call that failed. */
const char *workspace_failed(const char *call);

#endif
