/* SPDX-License-Identifier: MIT */
/* One prefill of a case, with the memory it needs, to be run as often as wanted. */
#ifndef FLASHKDA_CALL_H
#define FLASHKDA_CALL_H

#include "case.h"

/* Holds struct tensor: not to be copied or moved. */
struct prefill_call {
    flash_kda_prefill_args args;
    struct tensor out;   /* [B, T, HV, V] */
    struct tensor state; /* fp32, final states [N, HV, V, K] or [N, HV, K, V] */
    void *workspace;
    size_t workspace_bytes;
};

/* Allocates everything. The case must outlive the call. On failure returns false, leaves nothing to free and
 * writes one sentence to error. */
bool call_prepare(struct prefill_call *call, const struct kda_case *c, DLDataType out_dtype,
                  flash_kda_backend backend, int32_t threads, char *error, size_t error_size);

/* Runs it once; *seconds is how long that took. On failure returns false and writes one sentence to error. */
bool call_run(struct prefill_call *call, double *seconds, char *error, size_t error_size);

void call_free(struct prefill_call *call);

#endif
