/* SPDX-License-Identifier: MIT */
#include "workspace.h"

#include "flash_kda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORKSPACE_GUARD = 64, GUARD_BYTE = 0xee };

void workspace_make(struct workspace *w, size_t bytes, int fill) {
    w->bytes = bytes;
    w->block = malloc(bytes + 2 * WORKSPACE_GUARD + 1);
    if (!w->block) {
        fprintf(stderr, "out of memory: a workspace of %zu bytes\n", bytes);
        exit(2);
    }
    memset(w->block, GUARD_BYTE, bytes + 2 * WORKSPACE_GUARD + 1);
    /* Any alignment will do, says the header. */
    w->data = bytes ? w->block + WORKSPACE_GUARD + 1 : NULL;
    if (bytes)
        memset(w->data, fill, bytes);
}

bool workspace_intact(const struct workspace *w) {
    for (size_t i = 0; i < 2 * WORKSPACE_GUARD + 1; i++) {
        size_t place = i <= WORKSPACE_GUARD ? i : i + w->bytes;
        if (w->block[place] != GUARD_BYTE)
            return false;
    }
    return true;
}

void workspace_free(struct workspace *w) { free(w->block); }

const char *workspace_failed(const char *call) {
    static char text[700];
    snprintf(text, sizeof text, "%s: %s", call, flash_kda_last_error());
    return text;
}
