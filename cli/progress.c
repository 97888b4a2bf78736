/* SPDX-License-Identifier: MIT */
/* A progress bar on stderr while work of several steps goes on; silent where stderr is no terminal. */
#include "progress.h"

#include <stdbool.h>
#include <stdio.h>
#include <unistd.h>

enum { BAR_WIDTH = 24 };

static bool shown;

void progress_show(int done, int total, const char *what) {
    static const char full[] = "########################", empty[] = "........................";
    _Static_assert(sizeof full == BAR_WIDTH + 1 && sizeof empty == BAR_WIDTH + 1, "one character a column");
    if (!isatty(STDERR_FILENO))
        return;
    int filled = total > 0 ? (int)((long long)BAR_WIDTH * done / total) : 0;
    fprintf(stderr, "\r\033[K[%.*s%.*s] %d/%d %.40s", filled, full, BAR_WIDTH - filled, empty, done, total,
            what);
    fflush(stderr);
    shown = true;
}

void progress_clear(void) {
    if (shown) {
        fputs("\r\033[K", stderr);
        fflush(stderr);
        shown = false;
    }
}
