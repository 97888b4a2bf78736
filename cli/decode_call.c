/* SPDX-License-Identifier: MIT */
/* One call of decode on a case, whose states lie in a pool, to be run as often as wanted. */
#include "decode_call.h"

#include "device.h"

#include <stdio.h>
#include <string.h>

const char *const decode_way_names[] = {"in place", "state kept", "state each", NULL};

/* Slots of a sequence. */
static int64_t columns_of(const struct kda_case *c, enum decode_way way) {
    return way == DECODE_STATE_EACH ? c->tokens : 1;
}

static bool allocate(struct decode_call *call, const struct kda_case *c) {
    int64_t out[TENSOR_MAX_RANK], state[TENSOR_MAX_RANK], columns = columns_of(c, call->way);
    const int64_t indices[] = {c->batch, columns};
    case_out_shape(c, out);
    case_state_shape(c, state);
    state[0] *= columns;
    return tensor_alloc(&call->out, c->v.dl.dtype, 4, out) &&
           tensor_alloc(&call->state, c->initial_state.dl.dtype, 4, state) &&
           tensor_alloc(&call->state_indices, dtype_int32, call->way == DECODE_STATE_EACH ? 2 : 1, indices);
}

/* Each sequence's state is in the first of its slots. */
static void fill_pool(struct decode_call *call, const struct kda_case *c) {
    int64_t columns = columns_of(c, call->way);
    size_t bytes = tensor_bytes(&c->initial_state) / (size_t)c->batch;
    int32_t *indices = call->state_indices.dl.data;
    for (int64_t n = 0; n < c->batch; n++) {
        memcpy((char *)call->state.dl.data + (size_t)(n * columns) * bytes,
               (const char *)c->initial_state.dl.data + (size_t)n * bytes, bytes);
    }
    for (int64_t i = 0; i < c->batch * columns; i++) {
        indices[i] = (int32_t)i;
    }
}

static const DLTensor *optional(const struct tensor *tensor) {
    return tensor_present(tensor) ? &tensor->dl : NULL;
}

static flash_kda_decode_args decode_args(struct decode_call *call, const struct kda_case *c) {
    flash_kda_decode_args args = FLASH_KDA_DECODE_ARGS_INIT;
    args.q = &c->q.dl;
    args.k = &c->k.dl;
    args.v = &c->v.dl;
    args.g = &c->g.dl;
    args.beta = &c->beta.dl;
    args.A_log = optional(&c->A_log);
    args.dt_bias = optional(&c->dt_bias);
    args.out = &call->out.dl;
    args.gate = c->gate;
    args.lower_bound = c->lower_bound;
    args.beta_mode = c->beta_mode;
    args.scale = c->scale;
    args.flags = c->flags | (call->way == DECODE_STATE_KEPT ? FLASH_KDA_KEEP_STATE : 0);
    args.state_layout = c->state_layout;
    args.state = &call->state.dl;
    args.state_indices = &call->state_indices.dl;
    return args;
}

static bool copy_to_device(struct decode_call *call, char *error, size_t error_size) {
    flash_kda_decode_args *a = &call->args;
    const DLTensor **const tensors[] = {&a->out, &a->state, &a->q,     &a->k,       &a->v,
                                        &a->g,   &a->beta,  &a->A_log, &a->dt_bias, &a->state_indices};
    enum { WRITTEN = 2 };
    call->copies = device_copies_make(tensors, sizeof tensors / sizeof tensors[0], WRITTEN, error, error_size);
    return call->copies != NULL;
}

bool decode_prepare(struct decode_call *call, const struct kda_case *c, enum decode_way way,
                    flash_kda_backend backend, int32_t threads, char *error, size_t error_size) {
    *call = (struct decode_call){.way = way};
    if (!allocate(call, c)) {
        snprintf(error, error_size, "out of memory for the output and a pool of states");
        decode_free(call);
        return false;
    }
    fill_pool(call, c);
    call->args = decode_args(call, c);
    call->args.backend = backend;
    call->args.num_threads = threads;
    if (backend == FLASH_KDA_BACKEND_CUDA && !copy_to_device(call, error, error_size)) {
        decode_free(call);
        return false;
    }
    return true;
}

bool decode_launch(const struct decode_call *call, void *stream, char *error, size_t error_size) {
    flash_kda_decode_args args = call->args;
    args.stream = stream;
    if (flash_kda_decode(&args) != FLASH_KDA_OK) {
        snprintf(error, error_size, "%s", flash_kda_last_error());
        return false;
    }
    return true;
}

bool decode_fetch(const struct decode_call *call, char *error, size_t error_size) {
    return !call->copies ||
           (device_wait(error, error_size) && device_copies_fetch(call->copies, error, error_size));
}

int64_t decode_bytes(const struct decode_call *call) {
    const flash_kda_decode_args *a = &call->args;
    const DLTensor *tensors[] = {a->q, a->k, a->v, a->g, a->beta, a->A_log, a->dt_bias, a->out};
    int64_t sum = 0, columns = call->way == DECODE_STATE_EACH ? a->state_indices->shape[1] : 1;
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++) {
        int64_t bytes = tensors[i] ? tensors[i]->dtype.bits / 8 : 0;
        for (int dim = 0; tensors[i] && dim < tensors[i]->ndim; dim++) {
            bytes *= tensors[i]->shape[dim];
        }
        sum += bytes;
    }
    int64_t states = (int64_t)tensor_bytes(&call->state) / columns;
    return sum + states + (call->way == DECODE_STATE_KEPT ? 0 : columns * states);
}

void decode_free(struct decode_call *call) {
    tensor_free(&call->out);
    tensor_free(&call->state);
    tensor_free(&call->state_indices);
    device_copies_free(call->copies);
    call->copies = NULL;
}
