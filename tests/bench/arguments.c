/* SPDX-License-Identifier: MIT */
#include "arguments.h"

#include <string.h>

struct arguments arguments_of_prefill(const flash_kda_prefill_args *args) {
    return (struct arguments){.kind = KIND_PREFILL, .prefill = *args};
}

struct arguments arguments_of_decode(const flash_kda_decode_args *args) {
    return (struct arguments){.kind = KIND_DECODE, .decode = *args};
}

struct arguments arguments_of_backward(const flash_kda_backward_args *args) {
    return (struct arguments){.kind = KIND_BACKWARD, .backward = *args};
}

flash_kda_backend arguments_backend(const struct arguments *a) {
    return a->kind == KIND_DECODE     ? a->decode.backend
           : a->kind == KIND_BACKWARD ? a->backward.backend
                                      : a->prefill.backend;
}

int prefill_list(flash_kda_prefill_args *a, struct argument list[MAX_ARGUMENTS]) {
    const struct argument all[PREFILL_ARGUMENTS] = {{"out", &a->out, true},
                                                    {"final_state", &a->final_state, true},
                                                    {"checkpoints", &a->checkpoints, true},
                                                    {"q_conv_state", &a->q_conv_state, true},
                                                    {"k_conv_state", &a->k_conv_state, true},
                                                    {"v_conv_state", &a->v_conv_state, true},
                                                    {"q", &a->q, false},
                                                    {"k", &a->k, false},
                                                    {"v", &a->v, false},
                                                    {"g", &a->g, false},
                                                    {"beta", &a->beta, false},
                                                    {"A_log", &a->A_log, false},
                                                    {"dt_bias", &a->dt_bias, false},
                                                    {"cu_seqlens", &a->cu_seqlens, false},
                                                    {"initial_state", &a->initial_state, false},
                                                    {"state_indices", &a->state_indices, false},
                                                    {"has_initial_state", &a->has_initial_state, false},
                                                    {"checkpoint_cu_starts", &a->checkpoint_cu_starts, false},
                                                    {"checkpoint_indices", &a->checkpoint_indices, false},
                                                    {"checkpoint_offsets", &a->checkpoint_offsets, false},
                                                    {"q_conv_weight", &a->q_conv_weight, false},
                                                    {"q_conv_bias", &a->q_conv_bias, false},
                                                    {"k_conv_weight", &a->k_conv_weight, false},
                                                    {"k_conv_bias", &a->k_conv_bias, false},
                                                    {"v_conv_weight", &a->v_conv_weight, false},
                                                    {"v_conv_bias", &a->v_conv_bias, false},
                                                    {"norm_weight", &a->norm_weight, false},
                                                    {"norm_gate", &a->norm_gate, false}};
    memcpy(list, all, sizeof all);
    return PREFILL_ARGUMENTS;
}

int decode_list(flash_kda_decode_args *a, struct argument list[MAX_ARGUMENTS]) {
    bool writes = !(a->flags & FLASH_KDA_KEEP_STATE);
    const struct argument all[DECODE_ARGUMENTS] = {{"out", &a->out, true},
                                                   {"state", &a->state, writes},
                                                   {"q_conv_state", &a->q_conv_state, writes},
                                                   {"k_conv_state", &a->k_conv_state, writes},
                                                   {"v_conv_state", &a->v_conv_state, writes},
                                                   {"q", &a->q, false},
                                                   {"k", &a->k, false},
                                                   {"v", &a->v, false},
                                                   {"g", &a->g, false},
                                                   {"beta", &a->beta, false},
                                                   {"A_log", &a->A_log, false},
                                                   {"dt_bias", &a->dt_bias, false},
                                                   {"cu_seqlens", &a->cu_seqlens, false},
                                                   {"accepted", &a->accepted, false},
                                                   {"state_indices", &a->state_indices, false},
                                                   {"num_accepted_tokens", &a->num_accepted_tokens, false},
                                                   {"has_initial_state", &a->has_initial_state, false},
                                                   {"q_conv_weight", &a->q_conv_weight, false},
                                                   {"q_conv_bias", &a->q_conv_bias, false},
                                                   {"k_conv_weight", &a->k_conv_weight, false},
                                                   {"k_conv_bias", &a->k_conv_bias, false},
                                                   {"v_conv_weight", &a->v_conv_weight, false},
                                                   {"v_conv_bias", &a->v_conv_bias, false},
                                                   {"norm_weight", &a->norm_weight, false},
                                                   {"norm_gate", &a->norm_gate, false}};
    memcpy(list, all, sizeof all);
    return DECODE_ARGUMENTS;
}

int backward_list(flash_kda_backward_args *a, struct argument list[MAX_ARGUMENTS]) {
    const struct argument all[BACKWARD_ARGUMENTS] = {{"dq", &a->dq, true},
                                                     {"dk", &a->dk, true},
                                                     {"dv", &a->dv, true},
                                                     {"dg", &a->dg, true},
                                                     {"dbeta", &a->dbeta, true},
                                                     {"dA_log", &a->dA_log, true},
                                                     {"d_dt_bias", &a->d_dt_bias, true},
                                                     {"d_initial_state", &a->d_initial_state, true},
                                                     {"d_out", &a->d_out, false},
                                                     {"d_final_state", &a->d_final_state, false},
                                                     {"q", &a->q, false},
                                                     {"k", &a->k, false},
                                                     {"v", &a->v, false},
                                                     {"g", &a->g, false},
                                                     {"beta", &a->beta, false},
                                                     {"A_log", &a->A_log, false},
                                                     {"dt_bias", &a->dt_bias, false},
                                                     {"cu_seqlens", &a->cu_seqlens, false},
                                                     {"initial_state", &a->initial_state, false},
                                                     {"checkpoints", &a->checkpoints, false},
                                                     {"checkpoint_cu_starts", &a->checkpoint_cu_starts, false}};
    memcpy(list, all, sizeof all);
    return BACKWARD_ARGUMENTS;
}

int arguments_list(struct arguments *a, struct argument list[MAX_ARGUMENTS]) {
    return a->kind == KIND_DECODE     ? decode_list(&a->decode, list)
           : a->kind == KIND_BACKWARD ? backward_list(&a->backward, list)
                                      : prefill_list(&a->prefill, list);
}

/* ---- One tensor -------------------------------------------------------------------------------- */

static struct tensor *find(const struct argument *list, int count, const char *name) {
    for (int i = 0; i < count; i++)
        if (!strcmp(list[i].name, name))
            return (struct tensor *)*list[i].tensor;
    return NULL;
}

struct tensor *prefill_tensor(const flash_kda_prefill_args *a, const char *name) {
    flash_kda_prefill_args args = *a;
    struct argument list[MAX_ARGUMENTS];
    int count = prefill_list(&args, list);
    return find(list, count, name);
}

struct tensor *decode_tensor(const flash_kda_decode_args *a, const char *name) {
    flash_kda_decode_args args = *a;
    struct argument list[MAX_ARGUMENTS];
    int count = decode_list(&args, list);
    return find(list, count, name);
}

/* ---- From one call to another ------------------------------------------------------------------ */

flash_kda_backward_args backward_of_prefill(const flash_kda_prefill_args *args) {
    flash_kda_backward_args a = FLASH_KDA_BACKWARD_ARGS_INIT;
    a.q = args->q;
    a.k = args->k;
    a.v = args->v;
    a.g = args->g;
    a.beta = args->beta;
    a.A_log = args->A_log;
    a.dt_bias = args->dt_bias;
    a.gate = args->gate;
    a.lower_bound = args->lower_bound;
    a.beta_mode = args->beta_mode;
    a.scale = args->scale;
    a.flags = args->flags & ~(uint32_t)FLASH_KDA_PADDING_SLOT;
    a.cu_seqlens = args->cu_seqlens;
    a.state_layout = args->state_layout;
    a.initial_state = args->initial_state;
    a.num_threads = args->num_threads;
    return a;
}

flash_kda_decode_args decode_of_prefill(const flash_kda_prefill_args *args) {
    return (flash_kda_decode_args){.struct_size = sizeof(flash_kda_decode_args),
                                   .q = args->q,
                                   .k = args->k,
                                   .v = args->v,
                                   .g = args->g,
                                   .beta = args->beta,
                                   .A_log = args->A_log,
                                   .dt_bias = args->dt_bias,
                                   .out = args->out,
                                   .gate = args->gate,
                                   .lower_bound = args->lower_bound,
                                   .beta_mode = args->beta_mode,
                                   .scale = args->scale,
                                   .flags = args->flags,
                                   .cu_seqlens = args->cu_seqlens,
                                   .state_layout = args->state_layout,
                                   .state = args->final_state,
                                   .backend = args->backend,
                                   .num_threads = args->num_threads,
                                   .stream = args->stream,
                                   .has_initial_state = args->has_initial_state,
                                   .padding_slot = args->padding_slot};
}

static void narrow(const DLTensor **const tensors[TOKEN_ARGUMENTS], struct tensor *views, int dim,
                   int64_t first, int64_t count) {
    for (int i = 0; i < TOKEN_ARGUMENTS; i++)
        if (*tensors[i]) {
            if (*tensors[i] != &views[i].dl)
                tensor_view(&views[i], *tensors[i]);
            tensor_narrow(&views[i], dim, first, count);
            *tensors[i] = &views[i].dl;
        }
}

void prefill_narrow(flash_kda_prefill_args *a, struct tensor views[TOKEN_ARGUMENTS], int dim, int64_t first,
                    int64_t count) {
    const DLTensor **const tensors[TOKEN_ARGUMENTS] = {&a->q, &a->k, &a->v, &a->g, &a->beta, &a->out};
    narrow(tensors, views, dim, first, count);
}

void decode_narrow(flash_kda_decode_args *a, struct tensor views[TOKEN_ARGUMENTS], int dim, int64_t first,
                   int64_t count) {
    const DLTensor **const tensors[TOKEN_ARGUMENTS] = {&a->q, &a->k, &a->v, &a->g, &a->beta, &a->out};
    narrow(tensors, views, dim, first, count);
}
