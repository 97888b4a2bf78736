/* SPDX-License-Identifier: MIT */
/* One prefill of a case, with the memory it needs, to be run as often as wanted. */
#ifndef FLASHKDA_CALL_H
#define FLASHKDA_CALL_H

#include "case.h"

/* Holds struct tensor: not to be copied or moved. */
struct prefill_call {
    flash_kda_prefill_args args;
    struct tensor out;            /* [B, T, HV, V] */
    struct tensor state;          /* final states [N, HV, V, K] or [N, HV, K, V] */
    struct tensor checkpoints;    /* [B, rows, HV, V, K] or [B, rows, HV, K, V]; absent if the case has none */
    struct device_copies *copies; /* of all tensors, where the call runs; NULL: in host memory */
    void *workspace;
    size_t workspace_bytes;
    const struct kda_case *by_token; /* decode runs it, one token after the other; NULL: prefill does */
};

/* Allocates everything, on the CUDA backend with copies on the device. The oracle's states and checkpoints are
 * fp32, others as the case says. The case must outlive the call. On failure returns false, leaves nothing to free and
 * writes one sentence to error. */
bool call_prepare(struct prefill_call *call, const struct kda_case *c, DLDataType out_dtype,
                  flash_kda_backend backend, int32_t threads, char *error, size_t error_size);

/* Runs it once, to out, state and checkpoints in host memory; *seconds is how long the call took, copies between
 * memories not counted. On failure returns false and writes one sentence to error. */
bool call_run(struct prefill_call *call, double *seconds, char *error, size_t error_size);

/* Launches it on a stream. On failure returns false and writes one sentence to error. */
bool call_launch(const struct prefill_call *call, void *stream, char *error, size_t error_size);

/* Bytes that it must move: every tensor once. */
int64_t call_bytes(const struct prefill_call *call);

void call_free(struct prefill_call *call);

#endif
