/* SPDX-License-Identifier: MIT */
/* Prefill, from Python's arguments to the library's. */
#include "call.h"

#define MEMBER(name) CALL_MEMBER(flash_kda_prefill_args, name)

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
    {MEMBER(initial_state), CALL_READ},
    {MEMBER(final_state), CALL_WRITTEN},
    {MEMBER(state_indices), CALL_READ},
    {MEMBER(checkpoints), CALL_WRITTEN},
    {MEMBER(checkpoint_cu_starts), CALL_READ},
    {MEMBER(checkpoint_indices), CALL_READ},
    {MEMBER(checkpoint_offsets), CALL_READ},
    {MEMBER(has_initial_state), CALL_READ},
    {MEMBER(q_conv_weight), CALL_READ},
    {MEMBER(q_conv_bias), CALL_READ},
    {MEMBER(q_conv_state), CALL_WRITTEN},
    {MEMBER(k_conv_weight), CALL_READ},
    {MEMBER(k_conv_bias), CALL_READ},
    {MEMBER(k_conv_state), CALL_WRITTEN},
    {MEMBER(v_conv_weight), CALL_READ},
    {MEMBER(v_conv_bias), CALL_READ},
    {MEMBER(v_conv_state), CALL_WRITTEN},
    {MEMBER(norm_weight), CALL_READ},
    {MEMBER(norm_gate), CALL_READ},
};

static const struct call_option options[] = {
    {MEMBER(gate), CALL_CHOICE},
    {MEMBER(lower_bound), CALL_NUMBER},
    {MEMBER(beta_mode), CALL_CHOICE},
    {MEMBER(scale), CALL_NUMBER},
    {MEMBER(flags), CALL_FLAGS},
    {MEMBER(state_layout), CALL_CHOICE},
    {MEMBER(backend), CALL_CHOICE},
    {MEMBER(num_threads), CALL_INT32},
    {MEMBER(checkpoint_every), CALL_INT64},
    {MEMBER(padding_slot), CALL_INT64},
    {MEMBER(norm_activation), CALL_CHOICE},
    {MEMBER(norm_eps), CALL_NUMBER},
};

static void init(union call_args *args) { args->prefill = (flash_kda_prefill_args)FLASH_KDA_PREFILL_ARGS_INIT; }

static flash_kda_status run(const union call_args *args, void *workspace, size_t bytes) {
    return flash_kda_prefill(&args->prefill, workspace, bytes);
}

static flash_kda_status workspace_size(const union call_args *args, size_t *bytes) {
    return flash_kda_prefill_workspace_size(&args->prefill, bytes);
}

static flash_kda_status describe(const union call_args *args, char *text, size_t size) {
    return flash_kda_prefill_describe(&args->prefill, text, size);
}

enum { TENSORS = sizeof tensors / sizeof *tensors, OPTIONS = sizeof options / sizeof *options };
_Static_assert((int)TENSORS <= (int)CALL_TENSORS, "more tensors than a call has room for");
static PyObject *names[TENSORS + OPTIONS];
const struct call_operation call_prefill = {.name = "prefill",
                                            .tensors = tensors,
                                            .tensor_count = TENSORS,
                                            .options = options,
                                            .option_count = OPTIONS,
                                            .names = names,
                                            .stream = offsetof(flash_kda_prefill_args, stream),
                                            .init = init,
                                            .run = run,
                                            .workspace_size = workspace_size,
                                            .describe = describe};
