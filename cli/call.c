/* SPDX-License-Identifier: MIT */
/* One prefill of a case, with the memory it needs, to be run as often as wanted. */
#include "call.h"

#include "device.h"
#include "feed.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static bool allocate(struct prefill_call *call, const struct kda_case *c, DLDataType out_dtype, bool exact) {
    int64_t out[TENSOR_MAX_RANK], state[TENSOR_MAX_RANK];
    case_out_shape(c, out);
    case_state_shape(c, state);
    if (!tensor_alloc(&call->out, out_dtype, 4, out) ||
        !tensor_alloc(&call->state, c->bf16_state && !exact ? dtype_bf16 : dtype_fp32, 4, state)) {
        return false;
    }
    const int64_t checkpoints[] = {c->batch, case_checkpoint_rows(c), state[1], state[2], state[3]};
    return !c->checkpoint_every ||
           tensor_alloc(&call->checkpoints, exact ? dtype_fp32 : dtype_bf16, 5, checkpoints);
}

static bool allocate_workspace(struct prefill_call *call, char *error, size_t error_size) {
    if (flash_kda_prefill_workspace_size(&call->args, &call->workspace_bytes) != FLASH_KDA_OK) {
        snprintf(error, error_size, "%s", flash_kda_last_error());
        return false;
    }
    if (call->copies) {
        call->workspace = device_allocate(call->workspace_bytes, error, error_size);
        return call->workspace != NULL;
    }
    call->workspace = malloc(call->workspace_bytes ? call->workspace_bytes : 1);
    if (!call->workspace) {
        snprintf(error, error_size, "out of memory for a workspace of %zu bytes", call->workspace_bytes);
    }
    return call->workspace != NULL;
}

static bool copy_to_device(struct prefill_call *call, char *error, size_t error_size) {
    flash_kda_prefill_args *a = &call->args;
    const DLTensor **const tensors[] = {&a->out,   &a->final_state, &a->checkpoints, &a->q,
                                        &a->k,     &a->v,           &a->g,           &a->beta,
                                        &a->A_log, &a->dt_bias,     &a->cu_seqlens,  &a->initial_state};
    enum { WRITTEN = 3 };
    call->copies = device_copies_make(tensors, sizeof tensors / sizeof tensors[0], WRITTEN, error, error_size);
    return call->copies != NULL;
}

bool call_prepare(struct prefill_call *call, const struct kda_case *c, DLDataType out_dtype,
                  flash_kda_backend backend, int32_t threads, char *error, size_t error_size) {
    *call = (struct prefill_call){.args = case_args(c)};
    if (!allocate(call, c, out_dtype, backend == FLASH_KDA_BACKEND_REFERENCE)) {
        snprintf(error, error_size, "out of memory for the output and the final state");
        call_free(call);
        return false;
    }
    call->args.out = &call->out.dl;
    call->args.final_state = &call->state.dl;
    call->args.checkpoints = c->checkpoint_every ? &call->checkpoints.dl : NULL;
    call->args.backend = backend;
    call->args.num_threads = threads;
    bool placed = backend != FLASH_KDA_BACKEND_CUDA || copy_to_device(call, error, error_size);
    if (!placed || !allocate_workspace(call, error, error_size)) {
        call_free(call);
        return false;
    }
    return true;
}

bool call_launch(const struct prefill_call *call, void *stream, char *error, size_t error_size) {
    flash_kda_prefill_args args = call->args;
    args.stream = stream;
    if (flash_kda_prefill(&args, call->workspace, call->workspace_bytes) != FLASH_KDA_OK) {
        snprintf(error, error_size, "%s", flash_kda_last_error());
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
    flash_kda_status status = call->by_token
                                  ? feed_tokens(call, call->by_token)
                                  : flash_kda_prefill(&call->args, call->workspace, call->workspace_bytes);
    if (status != FLASH_KDA_OK) {
        snprintf(error, error_size, "%s", flash_kda_last_error());
        return false;
    }
    if (call->copies && !device_wait(error, error_size)) {
        return false;
    }
    *seconds = now() - start;
    return !call->copies || device_copies_fetch(call->copies, error, error_size);
}

int64_t call_bytes(const struct prefill_call *call) {
    const flash_kda_prefill_args *a = &call->args;
    const DLTensor *tensors[] = {a->q,           a->k,          a->v,          a->g,   a->beta,
                                 a->A_log,       a->dt_bias,    a->cu_seqlens, a->out, a->initial_state,
                                 a->final_state, a->checkpoints};
    int64_t sum = 0;
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++) {
        int64_t bytes = tensors[i] ? tensors[i]->dtype.bits / 8 : 0;
        for (int dim = 0; tensors[i] && dim < tensors[i]->ndim; dim++) {
            bytes *= tensors[i]->shape[dim];
        }
        sum += bytes;
    }
    return sum;
}

void call_free(struct prefill_call *call) {
    tensor_free(&call->out);
    tensor_free(&call->state);
    tensor_free(&call->checkpoints);
    if (call->args.backend == FLASH_KDA_BACKEND_CUDA) {
        device_free(call->workspace);
    } else {
        free(call->workspace);
    }
    device_copies_free(call->copies);
    call->copies = NULL;
    call->workspace = NULL;
}
