/* SPDX-License-Identifier: MIT */
/* Backward's entry in flashkda_check. */
#include "backward_compare.h"

static void run(struct check *check) {
    if (check->long_cases) {
        backward_long(check);
        return;
    }
    backward_pairwise(check);
    if (check_tests_cuda(check))
        backward_tiles(check);
    backward_traps(check);
    backward_properties(check);
    backward_cuda(check);
}

const struct operation backward_operation = {"backward", run};
