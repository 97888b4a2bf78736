/* SPDX-License-Identifier: MIT */
/* A case fed to decode token by token, as a served model would. */
#include "feed.h"

#include <stdio.h>
#include <string.h>

enum { BY_TOKEN = 6 };

/* The arguments of a few tokens of a call, in the memory of all of them, which may be on a device. */
struct part {
    DLTensor tensors[BY_TOKEN], state; /* q, k, v, g, beta, out */
    int64_t shapes[BY_TOKEN][TENSOR_MAX_RANK], state_shape[TENSOR_MAX_RANK];
};

/* Entries first .. first + count - 1 of a dimension of t, which has strides. */
static void slice(DLTensor *t, int64_t *shape, int dim, int64_t first, int64_t count) {
    if (t->shape != shape) {
        memcpy(shape, t->shape, (size_t)t->ndim * sizeof *shape);
        t->shape = shape;
    }
    t->byte_offset += (uint64_t)(first * t->strides[dim]) * t->dtype.bits / 8;
    shape[dim] = count;
}

static void part_make(struct part *part, const struct prefill_call *call, int64_t batch, int64_t batches,
                      int64_t token, int64_t tokens) {
    const flash_kda_prefill_args *a = &call->args;
    const DLTensor *all[BY_TOKEN] = {a->q, a->k, a->v, a->g, a->beta, a->out};
    for (int i = 0; i < BY_TOKEN; i++) {
        part->tensors[i] = *all[i];
        slice(&part->tensors[i], part->shapes[i], 0, batch, batches);
        slice(&part->tensors[i], part->shapes[i], 1, token, tokens);
    }
    part->state = *a->final_state;
}

static flash_kda_decode_args decode_args(const struct prefill_call *call, const struct part *part) {
    const flash_kda_prefill_args *a = &call->args;
    flash_kda_decode_args args = FLASH_KDA_DECODE_ARGS_INIT;
    args.q = &part->tensors[0];
    args.k = &part->tensors[1];
    args.v = &part->tensors[2];
    args.g = &part->tensors[3];
    args.beta = &part->tensors[4];
    args.out = &part->tensors[5];
    args.A_log = a->A_log;
    args.dt_bias = a->dt_bias;
    args.gate = a->gate;
    args.lower_bound = a->lower_bound;
    args.beta_mode = a->beta_mode;
    args.scale = a->scale;
    args.flags = a->flags;
    args.state_layout = a->state_layout;
    args.state = &part->state;
    args.backend = a->backend;
    args.num_threads = a->num_threads;
    return args;
}

/* The first token of sequence n, of all sequences if they are dense. */
static void first_token(struct part *part, const struct prefill_call *call, const struct kda_case *c, int64_t n,
                        int64_t token) {
    bool packed = tensor_present(&c->cu_seqlens);
    part_make(part, call, 0, packed ? 1 : c->batch, token, 1);
    if (packed) {
        slice(&part->state, part->state_shape, 0, n, 1);
    }
}

static flash_kda_status feed_sequence(const struct prefill_call *call, const struct kda_case *c, int64_t n,
                                      int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
        struct part part;
        first_token(&part, call, c, n, token);
        const flash_kda_decode_args args = decode_args(call, &part);
        flash_kda_status status = flash_kda_decode(&args);
        if (status != FLASH_KDA_OK) {
            return status;
        }
    }
    return FLASH_KDA_OK;
}

/* Sequences without tokens pass their states through prefill. */
static flash_kda_status reset_states(const struct prefill_call *call, const struct kda_case *c) {
    struct part part;
    part_make(&part, call, 0, c->sequences, 0, 0);
    flash_kda_prefill_args args = call->args;
    args.q = &part.tensors[0];
    args.k = &part.tensors[1];
    args.v = &part.tensors[2];
    args.g = &part.tensors[3];
    args.beta = &part.tensors[4];
    args.out = &part.tensors[5];
    args.cu_seqlens = NULL;
    args.checkpoints = NULL;
    args.checkpoint_every = 0;
    return flash_kda_prefill(&args, call->workspace, call->workspace_bytes);
}

flash_kda_status feed_tokens(const struct prefill_call *call, const struct kda_case *c) {
    flash_kda_status status = reset_states(call, c);
    if (!tensor_present(&c->cu_seqlens)) {
        return status != FLASH_KDA_OK ? status : feed_sequence(call, c, 0, 0, c->tokens);
    }
    for (int64_t n = 0; status == FLASH_KDA_OK && n < c->sequences; n++) {
        status =
            feed_sequence(call, c, n, tensor_get_int(&c->cu_seqlens, n), tensor_get_int(&c->cu_seqlens, n + 1));
    }
    return status;
}

flash_kda_status feed_describe(const struct prefill_call *call, const struct kda_case *c, char *text,
                               size_t size) {
    struct part part;
    char ran_on[256];
    first_token(&part, call, c, 0, 0);
    const flash_kda_decode_args args = decode_args(call, &part);
    flash_kda_status status = flash_kda_decode_describe(&args, ran_on, sizeof ran_on);
    snprintf(text, size, "%s; decode, token by token", status == FLASH_KDA_OK ? ran_on : "");
    return status;
}
