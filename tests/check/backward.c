/* SPDX-License-Identifier: MIT */
/* Backward's entry in flashkda_check. */
#include "backward_compare.h"

#include <string.h>

static void run(struct check *check) {
    struct check own = *check;
    own.level_count = 0;
    for (int i = 0; i < check->level_count; i++)
        if (!strcmp(check->levels[i], "reference")) /* the only one that has it */
            own.levels[own.level_count++] = check->levels[i];
    if (!own.level_count || check->long_cases)
        return;
    backward_pairwise(&own);
    backward_traps(&own);
    backward_properties(&own);
    check->passed = own.passed;
    check->failed = own.failed;
}

const struct operation backward_operation = {"backward", run};
