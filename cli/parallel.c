/* SPDX-License-Identifier: MIT */
/* Work of the program itself on several threads. */
#include "parallel.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

struct share {
    void (*work)(void *context, int i);
    void *context;
    int i;
    pthread_t thread;
    bool runs;
};

static void *run_share(void *argument) {
    const struct share *share = argument;
    share->work(share->context, share->i);
    return NULL;
}

void parallel_run(int count, void (*work)(void *context, int i), void *context) {
    struct share *shares = calloc((size_t)count, sizeof *shares);
    for (int i = 1; shares && i < count; i++) {
        shares[i] = (struct share){.work = work, .context = context, .i = i};
        shares[i].runs = pthread_create(&shares[i].thread, NULL, run_share, &shares[i]) == 0;
    }
    for (int i = 0; i < count; i++)
        if (!shares || !shares[i].runs)
            work(context, i);
    for (int i = 1; shares && i < count; i++)
        if (shares[i].runs)
            pthread_join(shares[i].thread, NULL);
    free(shares);
}
