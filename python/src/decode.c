/* SPDX-License-Identifier: MIT */
/* Decode, from Python's arguments to the library's. */
#include "call.h"

#define MEMBER(name) CALL_MEMBER(flash_kda_decode_args, name)

static const struct call_tensor tensors[] = {
    {MEMBER(q), CALL_READ},
    {MEMBER(k), CALL_READ},
    {MEMBER(v), CALL_READ},
    {MEMBER(g), CALL_READ},
    {MEMBER(beta), CALL_READ},
    {MEMBER(A_log), CALL_READ},
    {MEMBER(dt_bias), CALL_READ},
    {MEMBER(out), CALL_WRITTEN},
    {MEMBER(cu_seqlens), CALL_READ},
    {MEMBER(accepted), CALL_READ},
    {MEMBER(state), CALL_STATE},
    {MEMBER(state_indices), CALL_READ},
    {MEMBER(num_accepted_tokens), CALL_READ},
    {MEMBER(q_conv_weight), CALL_READ},
    {MEMBER(q_conv_bias), CALL_READ},
    {MEMBER(q_conv_state), CALL_STATE},
    {MEMBER(k_conv_weight), CALL_READ},
    {MEMBER(k_conv_bias), CALL_READ},
    {MEMBER(k_conv_state), CALL_STATE},
    {MEMBER(v_conv_weight), CALL_READ},
    {MEMBER(v_conv_bias), CALL_READ},
    {MEMBER(v_conv_state), CALL_STATE},
    {MEMBER(norm_weight), CALL_READ},
    {MEMBER(norm_gate), CALL_READ},
    {MEMBER(has_initial_state), CALL_READ},
};

static const struct call_option options[] = {
    {MEMBER(gate), CALL_CHOICE},      {MEMBER(lower_bound), CALL_NUMBER},
    {MEMBER(beta_mode), CALL_CHOICE}, {MEMBER(scale), CALL_NUMBER},
    {MEMBER(flags), CALL_FLAGS},      {MEMBER(state_layout), CALL_CHOICE},
    {MEMBER(backend), CALL_CHOICE},   {MEMBER(num_threads), CALL_INT32},
    {MEMBER(max_tokens), CALL_INT64}, {MEMBER(norm_activation), CALL_CHOICE},
    {MEMBER(norm_eps), CALL_NUMBER},  {MEMBER(padding_slot), CALL_INT64},
};

static void init(union call_args *args) { args->decode = (flash_kda_decode_args)FLASH_KDA_DECODE_ARGS_INIT; }

/* No workspace is used. */
static flash_kda_status run(const union call_args *args, void *workspace, size_t bytes) {
    (void)workspace;
    (void)bytes;
    return flash_kda_decode(&args->decode);
}

static flash_kda_status workspace_size(const union call_args *args, size_t *bytes) {
    (void)args;
    *bytes = 0;
    return FLASH_KDA_OK;
}

static flash_kda_status describe(const union call_args *args, char *text, size_t size) {
    return flash_kda_decode_describe(&args->decode, text, size);
}

enum { TENSORS = sizeof tensors / sizeof *tensors, OPTIONS = sizeof options / sizeof *options };
_Static_assert((int)TENSORS <= (int)CALL_TENSORS, "more tensors than a call has room for");
static PyObject *names[TENSORS + OPTIONS];
const struct call_operation call_decode = {.name = "decode",
                                           .tensors = tensors,
                                           .tensor_count = TENSORS,
                                           .options = options,
                                           .option_count = OPTIONS,
                                           .names = names,
                                           .stream = offsetof(flash_kda_decode_args, stream),
                                           .init = init,
                                           .run = run,
                                           .workspace_size = workspace_size,
                                           .describe = describe};
