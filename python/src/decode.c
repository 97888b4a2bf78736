/* SPDX-License-Identifier: MIT */
/* Decode, from Python's arguments to the library's. */
#include "decode.h"

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
};

static const struct call_option options[] = {
    {MEMBER(gate), CALL_CHOICE},      {MEMBER(lower_bound), CALL_NUMBER},
    {MEMBER(beta_mode), CALL_CHOICE}, {MEMBER(scale), CALL_NUMBER},
    {MEMBER(flags), CALL_FLAGS},      {MEMBER(state_layout), CALL_CHOICE},
    {MEMBER(backend), CALL_CHOICE},   {MEMBER(num_threads), CALL_INT32},
    {MEMBER(max_tokens), CALL_INT64}, {MEMBER(norm_activation), CALL_CHOICE},
    {MEMBER(norm_eps), CALL_NUMBER},
};

enum { TENSORS = sizeof tensors / sizeof *tensors, OPTIONS = sizeof options / sizeof *options };
static PyObject *names[TENSORS + OPTIONS];
const struct call_operation call_decode = {"decode", tensors, TENSORS, options, OPTIONS, names};

struct decode_call {
    flash_kda_decode_args args;
    DLTensor tensors[TENSORS];
    PyObject *arrays[TENSORS];
    bool keep_states;
};

/* The workspace is not used. */
static bool read_call(struct decode_call *call, PyObject *const *arguments, Py_ssize_t count) {
    if (!call_count(count))
        return false;
    call->args = (flash_kda_decode_args)FLASH_KDA_DECODE_ARGS_INIT;
    if (!call_read_options(&call_decode, arguments[1], &call->args))
        return false;
    call->keep_states = call->args.flags & FLASH_KDA_KEEP_STATE;
    if (!call_read_tensors(&call_decode, arguments[0], call->keep_states, &call->args, call->tensors,
                           call->arrays))
        return false;
    return call_read_stream(arguments[2], call->args.q,
                            call->arrays[0] ? array_exchange(Py_TYPE(call->arrays[0])) : NULL,
                            &call->args.stream);
}

PyObject *decode(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    (void)module;
    struct decode_call call;
    flash_kda_status status = FLASH_KDA_OK;
    if (!read_call(&call, arguments, count))
        return NULL;
    Py_BEGIN_ALLOW_THREADS status = flash_kda_decode(&call.args);
    Py_END_ALLOW_THREADS return status ? call_raise(status)
                                       : call_written(&call_decode, call.arrays, call.keep_states);
}

PyObject *decode_describe(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    (void)module;
    struct decode_call call;
    char text[512];
    if (!read_call(&call, arguments, count))
        return NULL;
    flash_kda_status status = flash_kda_decode_describe(&call.args, text, sizeof text);
    return status ? call_raise(status) : PyUnicode_FromString(text);
}
