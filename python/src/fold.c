/* SPDX-License-Identifier: MIT */
/* Fold, from Python's arguments to the library's. */
#include "call.h"

#define MEMBER(name) CALL_MEMBER(flash_kda_fold_args, name)

static const struct call_tensor tensors[] = {
    {MEMBER(bias), CALL_READ},          {MEMBER(transitions), CALL_READ},   {MEMBER(chains), CALL_READ},
    {MEMBER(initial_state), CALL_READ}, {MEMBER(state_indices), CALL_READ}, {MEMBER(states), CALL_WRITTEN},
    {MEMBER(prefixes), CALL_WRITTEN},
};

static const struct call_option options[] = {
    {MEMBER(flags), CALL_FLAGS},
    {MEMBER(state_layout), CALL_CHOICE},
    {MEMBER(backend), CALL_CHOICE},
    {MEMBER(num_threads), CALL_INT32},
};

static void init(union call_args *args) { args->fold = (flash_kda_fold_args)FLASH_KDA_FOLD_ARGS_INIT; }

/* No workspace is used. */
static flash_kda_status run(const union call_args *args, void *workspace, size_t bytes) {
    (void)workspace;
    (void)bytes;
    return flash_kda_fold(&args->fold);
}

static flash_kda_status workspace_size(const union call_args *args, size_t *bytes) {
    (void)args;
    *bytes = 0;
    return FLASH_KDA_OK;
}

static flash_kda_status describe(const union call_args *args, char *text, size_t size) {
    return flash_kda_fold_describe(&args->fold, text, size);
}

enum { TENSORS = sizeof tensors / sizeof *tensors, OPTIONS = sizeof options / sizeof *options };
_Static_assert((int)TENSORS <= (int)CALL_TENSORS, "more tensors than a call has room for");
static PyObject *names[TENSORS + OPTIONS];
const struct call_operation call_fold = {.name = "fold",
                                         .tensors = tensors,
                                         .tensor_count = TENSORS,
                                         .options = options,
                                         .option_count = OPTIONS,
                                         .names = names,
                                         .stream = offsetof(flash_kda_fold_args, stream),
                                         .init = init,
                                         .run = run,
                                         .workspace_size = workspace_size,
                                         .describe = describe};
