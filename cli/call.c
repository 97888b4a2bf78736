/* SPDX-License-Identifier: MIT */
/* One prefill of a case, with the memory it needs, to be run as often as wanted. */
#include "call.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static bool allocate(struct prefill_call *call, const struct kda_case *c, DLDataType out_dtype) {
    int64_t shape[TENSOR_MAX_RANK];
    case_out_shape(c, shape);
    if (!tensor_alloc(&call->out, out_dtype, TENSOR_MAX_RANK, shape)) {
        return false;
    }
    case_state_shape(c, shape);
    return tensor_alloc(&call->state, dtype_fp32, TENSOR_MAX_RANK, shape);
}

static bool allocate_workspace(struct prefill_call *call, char *error, size_t error_size) {
    if (flash_kda_prefill_workspace_size(&call->args, &call->workspace_bytes) != FLASH_KDA_OK) {
        snprintf(error, error_size, "%s", flash_kda_last_error());
        return false;
    }
    call->workspace = malloc(call->workspace_bytes ? call->workspace_bytes : 1);
    if (!call->workspace) {
        snprintf(error, error_size, "out of memory for a workspace of %zu bytes", call->workspace_bytes);
    }
    return call->workspace != NULL;
}

bool call_prepare(struct prefill_call *call, const struct kda_case *c, DLDataType out_dtype,
                  flash_kda_backend backend, int32_t threads, char *error, size_t error_size) {
    *call = (struct prefill_call){.args = case_args(c)};
    if (!allocate(call, c, out_dtype)) {
        snprintf(error, error_size, "out of memory for the output and the final state");
        call_free(call);
        return false;
    }
    call->args.out = &call->out.dl;
    call->args.final_state = &call->state.dl;
    call->args.backend = backend;
    call->args.num_threads = threads;
    if (!allocate_workspace(call, error, error_size)) {
        call_free(call);
        return false;
    }
    return true;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

bool call_run(struct prefill_call *call, double *seconds, char *error, size_t error_size) {
    double start = now();
    flash_kda_status status = flash_kda_prefill(&call->args, call->workspace, call->workspace_bytes);
    *seconds = now() - start;
    if (status != FLASH_KDA_OK) {
        snprintf(error, error_size, "%s", flash_kda_last_error());
    }
    return status == FLASH_KDA_OK;
}

void call_free(struct prefill_call *call) {
    tensor_free(&call->out);
    tensor_free(&call->state);
    free(call->workspace);
    call->workspace = NULL;
}
