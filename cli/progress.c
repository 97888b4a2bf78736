/* SPDX-License-Identifier: MIT */
/* A progress bar on stderr while work of several steps goes on; silent where stderr is no terminal. */
#include "progress.h"

#include <signal.h>
#include <stdio.h>
#include <unistd.h>

enum { BAR_WIDTH = 24 };

static volatile sig_atomic_t shown;
static const char wipe[] = "\r\033[K";

void progress_show(int done, int total, const char *what) {
    static const char full[] = "########################", empty[] = "........................";
    _Static_assert(sizeof full == BAR_WIDTH + 1 && sizeof empty == BAR_WIDTH + 1, "one character a column");
    if (!isatty(STDERR_FILENO))
        return;
    int filled = total > 0 ? (int)((long long)BAR_WIDTH * done / total) : 0;
    fprintf(stderr, "%s[%.*s%.*s] %d/%d %.40s", wipe, filled, full, BAR_WIDTH - filled, empty, done, total,
            what);
    fflush(stderr);
    shown = 1;
}

void progress_clear(void) {
    if (shown) {
        fputs(wipe, stderr);
        fflush(stderr);
        shown = 0;
    }
}

void progress_abandon(void) {
    ssize_t written = shown ? write(STDERR_FILENO, wipe, sizeof wipe - 1) : 0;
    (void)written;
}
