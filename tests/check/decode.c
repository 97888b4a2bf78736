/* SPDX-License-Identifier: MIT */
/* Decode's entry in flashkda_check. */
#include "check.h"
#include "decode_families.h"

static void run(struct check *check) {
    decode_soak(check);
    if (check->long_cases) {
        decode_drift(check);
        return;
    }
    decode_shapes(check);
    decode_pairwise(check);
    decode_traps(check);
    decode_nonfinite(check);
    decode_fused(check);
    decode_properties(check);
    decode_cuda(check);
}

const struct operation decode_operation = {"decode", run};
