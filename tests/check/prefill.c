/* SPDX-License-Identifier: MIT */
/* Prefill's entry in flashkda_check. */
#include "check.h"
#include "prefill_families.h"

static void run(struct check *check) {
    if (check->long_cases) {
        prefill_long(check);
        return;
    }
    prefill_lengths(check);
    prefill_marks(check);
    prefill_fused(check);
    prefill_pairwise(check);
    prefill_traps(check);
    prefill_nonfinite(check);
    prefill_properties(check);
    prefill_cuda(check);
}

const struct operation prefill_operation = {"prefill", run};
