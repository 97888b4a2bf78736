/* SPDX-License-Identifier: MIT */
/* The valid call that the API tests start from. */
#include "fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME(place, member) #member,
const char *const argument_names[ARGUMENTS] = {FIXTURE_TENSORS(NAME)};

static const DLDataType fp32 = {kDLFloat, 32, 1}, int32 = {kDLInt, 32, 1}, int64 = {kDLInt, 64, 1};

enum { POISON = 0xa5, ALL_INPUTS = ARG_DT_BIAS + 1 };

static void set_tensor(struct fixture *f, enum argument argument, DLDataType type, int ndim,
                       const int64_t *shape) {
    struct fixture_tensor *t = &f->tensor[argument];
    t->dl = (DLTensor){
        .data = t->memory.bytes, .device = {kDLCPU, 0}, .ndim = ndim, .dtype = type, .shape = t->shape};
    memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
    memset(t->memory.bytes, POISON, sizeof t->memory.bytes);
    *fixture_member(f, argument) = &t->dl;
}

static void set_floats(struct fixture *f) {
    for (int argument = 0; argument < ALL_INPUTS; argument++)
        for (int i = 0; i < FIXTURE_BYTES / 4; i++)
            f->tensor[argument].memory.fp32[i] = (float)(i * 7 % 13 - 6) / 8;
    for (int i = 0; i < FIXTURE_BYTES / 4; i++)
        f->tensor[ARG_INITIAL_STATE].memory.fp32[i] = (float)(i % 5) / 4;
}

static void set_indices(struct fixture *f) {
    static const int32_t cu_seqlens[] = {0, 2, 2, 6}, slots[] = {4, 0, 2}, starts[] = {0, 1, 1, 3},
                         rows[] = {2, 0, 1};
    static const int64_t offsets[] = {1, 2, 0, -1, 4, 3};
    memcpy(f->tensor[ARG_CU_SEQLENS].memory.int32, cu_seqlens, sizeof cu_seqlens);
    memcpy(f->tensor[ARG_STATE_INDICES].memory.int32, slots, sizeof slots);
    memcpy(f->tensor[ARG_CHECKPOINT_CU_STARTS].memory.int32, starts, sizeof starts);
    memcpy(f->tensor[ARG_CHECKPOINT_INDICES].memory.int32, rows, sizeof rows);
    memcpy(f->tensor[ARG_CHECKPOINT_OFFSETS].memory.int64, offsets, sizeof offsets);
}

struct fixture *fixture_new(void) {
    enum { T = FIXTURE_T, H = FIXTURE_H, HV = FIXTURE_HV, K = FIXTURE_K, V = FIXTURE_V, N = FIXTURE_N };
    struct fixture *f = calloc(1, sizeof *f);
    if (!f) {
        fprintf(stderr, "out of memory for a fixture\n");
        exit(2);
    }
    f->args = (flash_kda_prefill_args)FLASH_KDA_PREFILL_ARGS_INIT;
    f->args.gate = FLASH_KDA_GATE_SIGMOID;
    f->args.lower_bound = -5;
    f->args.beta_mode = FLASH_KDA_BETA_SIGMOID;
    f->args.flags = FLASH_KDA_QK_NORM;
    f->args.checkpoint_every = FIXTURE_EVERY;
    set_tensor(f, ARG_Q, fp32, 4, (int64_t[]){1, T, H, K});
    set_tensor(f, ARG_K, fp32, 4, (int64_t[]){1, T, H, K});
    set_tensor(f, ARG_V, fp32, 4, (int64_t[]){1, T, HV, V});
    set_tensor(f, ARG_G, fp32, 4, (int64_t[]){1, T, HV, K});
    set_tensor(f, ARG_BETA, fp32, 3, (int64_t[]){1, T, HV});
    set_tensor(f, ARG_A_LOG, fp32, 1, (int64_t[]){HV});
    set_tensor(f, ARG_DT_BIAS, fp32, 2, (int64_t[]){HV, K});
    set_tensor(f, ARG_OUT, fp32, 4, (int64_t[]){1, T, HV, V});
    set_tensor(f, ARG_CU_SEQLENS, int32, 1, (int64_t[]){N + 1});
    set_tensor(f, ARG_INITIAL_STATE, fp32, 4, (int64_t[]){FIXTURE_SLOTS, HV, V, K});
    set_tensor(f, ARG_FINAL_STATE, fp32, 4, (int64_t[]){FIXTURE_SLOTS, HV, V, K});
    set_tensor(f, ARG_STATE_INDICES, int32, 1, (int64_t[]){N});
    set_tensor(f, ARG_CHECKPOINTS, fp32, 4, (int64_t[]){FIXTURE_PLACES, HV, V, K});
    set_tensor(f, ARG_CHECKPOINT_CU_STARTS, int32, 1, (int64_t[]){N + 1});
    set_tensor(f, ARG_CHECKPOINT_INDICES, int32, 1, (int64_t[]){FIXTURE_ROWS});
    set_tensor(f, ARG_CHECKPOINT_OFFSETS, int64, 2, (int64_t[]){N, FIXTURE_C});
    f->args.checkpoint_offsets = NULL;
    set_floats(f);
    set_indices(f);
    f->workspace = f->workspace_memory;
    f->workspace_bytes = sizeof f->workspace_memory;
    return f;
}

const DLTensor **fixture_member(struct fixture *f, enum argument argument) {
    flash_kda_prefill_args *a = &f->args;
#define MEMBER(place, member) &a->member,
    const DLTensor **const members[ARGUMENTS] = {FIXTURE_TENSORS(MEMBER)};
    return members[argument];
}

static void set_shape(struct fixture_tensor *t, int ndim, const int64_t *shape) {
    t->dl.ndim = ndim;
    memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
}

void fixture_make_dense(struct fixture *f) {
    f->args.cu_seqlens = f->args.state_indices = f->args.checkpoint_cu_starts = f->args.checkpoint_indices =
        NULL;
    f->tensor[ARG_INITIAL_STATE].shape[0] = f->tensor[ARG_FINAL_STATE].shape[0] = 1;
    set_shape(&f->tensor[ARG_CHECKPOINTS], 5, (int64_t[]){1, 3, FIXTURE_HV, FIXTURE_V, FIXTURE_K});
}

void fixture_use_offsets(struct fixture *f) {
    f->args.checkpoint_every = 0;
    f->args.checkpoint_cu_starts = f->args.checkpoint_indices = NULL;
    f->args.checkpoint_offsets = &f->tensor[ARG_CHECKPOINT_OFFSETS].dl;
    set_shape(&f->tensor[ARG_CHECKPOINTS], 5,
              (int64_t[]){FIXTURE_N, FIXTURE_C, FIXTURE_HV, FIXTURE_V, FIXTURE_K});
}

void fixture_use_has_initial_state(struct fixture *f) {
    static const int32_t has[] = {1, 0, 1};
    set_tensor(f, ARG_HAS_INITIAL_STATE, int32, 1, (int64_t[]){FIXTURE_N});
    memcpy(f->tensor[ARG_HAS_INITIAL_STATE].memory.int32, has, sizeof has);
}

void fixture_use_fused(struct fixture *f) {
    enum { T = FIXTURE_T, KEYS = FIXTURE_H * FIXTURE_K, VALUES = FIXTURE_HV * FIXTURE_V };
    for (int i = 0; i < 3; i++) {
        int64_t channels = i < 2 ? KEYS : VALUES;
        set_tensor(f, (enum argument)(ARG_Q_CONV_WEIGHT + 3 * i), fp32, 2, (int64_t[]){channels, 4});
        set_tensor(f, (enum argument)(ARG_Q_CONV_BIAS + 3 * i), fp32, 1, (int64_t[]){channels});
        set_tensor(f, (enum argument)(ARG_Q_CONV_STATE + 3 * i), fp32, 3,
                   (int64_t[]){FIXTURE_SLOTS, channels, 3});
    }
    set_tensor(f, ARG_NORM_WEIGHT, fp32, 1, (int64_t[]){FIXTURE_V});
    set_tensor(f, ARG_NORM_GATE, fp32, 4, (int64_t[]){1, T, FIXTURE_HV, FIXTURE_V});
    f->args.norm_eps = 1e-5;
    for (int argument = ARG_Q_CONV_WEIGHT; argument <= ARG_NORM_GATE; argument++)
        for (int i = 0; i < FIXTURE_BYTES / 4; i++)
            f->tensor[argument].memory.fp32[i] = (float)(i * 5 % 11 - 4) / 8;
}

void fixture_spell_strides(struct fixture_tensor *t) {
    int64_t stride = 1;
    for (int d = t->dl.ndim - 1; d >= 0; d--) {
        t->strides[d] = stride;
        stride *= t->shape[d];
    }
    t->dl.strides = t->strides;
}

bool fixture_same_memory(const struct fixture *a, const struct fixture *b) {
    for (int i = 0; i < ARGUMENTS; i++)
        if (memcmp(a->tensor[i].memory.bytes, b->tensor[i].memory.bytes, FIXTURE_BYTES) != 0)
            return false;
    return true;
}

flash_kda_status fixture_prefill(struct fixture *f) {
    return flash_kda_prefill(&f->args, f->workspace, f->workspace_bytes);
}
