/* SPDX-License-Identifier: MIT */
/* Backward's entry in flashkda_check. */
#include "backward_compare.h"

#include <string.h>

static void run(struct check *check) {
    struct check own = *check;
    own.level_count = 0;
    for (int i = 0; i < check->level_count; i++)
        if (strcmp(check->levels[i], "cuda") != 0) /* which cannot run it yet */
            own.levels[own.level_count++] = check->levels[i];
    if (!own.level_count)
        return;
    if (check->long_cases) {
        backward_long(&own);
    } else {
        backward_pairwise(&own);
        backward_traps(&own);
        backward_properties(&own);
    }
    check->passed = own.passed;
    check->failed = own.failed;
}

const struct operation backward_operation = {"backward", run};
