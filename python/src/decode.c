/* SPDX-License-Identifier: MIT */
/* Decode, from Python's arguments to the library's. */
#include "decode.h"

#include "call.h"

#include <string.h>

#define MEMBER(name) CALL_MEMBER(flash_kda_decode_args, name)

static const struct call_member members[] = {
    {MEMBER(q), false},
    {MEMBER(k), false},
    {MEMBER(v), false},
    {MEMBER(g), false},
    {MEMBER(beta), false},
    {MEMBER(A_log), false},
    {MEMBER(dt_bias), false},
    {MEMBER(out), true},
    {MEMBER(cu_seqlens), false},
    {MEMBER(accepted), false},
    {MEMBER(state), true},
    {MEMBER(state_indices), false},
    {MEMBER(num_accepted_tokens), false},
    {MEMBER(q_conv_weight), false},
    {MEMBER(q_conv_bias), false},
    {MEMBER(q_conv_state), true},
    {MEMBER(k_conv_weight), false},
    {MEMBER(k_conv_bias), false},
    {MEMBER(k_conv_state), true},
    {MEMBER(v_conv_weight), false},
    {MEMBER(v_conv_bias), false},
    {MEMBER(v_conv_state), true},
    {MEMBER(norm_weight), false},
    {MEMBER(norm_gate), false},
};

enum { TENSORS = sizeof members / sizeof *members, OUT = 7, OPTIONS = 13 };

PyObject *decode_tensor_names(bool only_written) { return call_names(members, TENSORS, only_written); }

struct decode_call {
    flash_kda_decode_args args;
    struct call_member members[TENSORS]; /* which of them are written depends on the flags */
    DLTensor tensors[TENSORS];
};

static bool read_options(flash_kda_decode_args *args, PyObject *const *arguments) {
    long long gate, beta_mode, flags, layout, max_tokens, backend, threads, activation;
    if (!call_read_integer(arguments[0], "gate", 0, INT32_MAX, &gate) ||
        !call_read_number(arguments[1], "lower_bound", &args->lower_bound) ||
        !call_read_integer(arguments[2], "beta_mode", 0, INT32_MAX, &beta_mode) ||
        !call_read_number(arguments[3], "scale", &args->scale) ||
        !call_read_integer(arguments[4], "flags", 0, UINT32_MAX, &flags) ||
        !call_read_integer(arguments[5], "state_layout", 0, INT32_MAX, &layout) ||
        !call_read_integer(arguments[6], "max_tokens", INT64_MIN, INT64_MAX, &max_tokens) ||
        !call_read_integer(arguments[7], "backend", 0, INT32_MAX, &backend) ||
        !call_read_integer(arguments[8], "num_threads", INT32_MIN, INT32_MAX, &threads) ||
        !call_read_integer(arguments[9], "norm_activation", 0, INT32_MAX, &activation) ||
        !call_read_number(arguments[10], "norm_eps", &args->norm_eps))
        return false;
    args->gate = (flash_kda_gate)gate;
    args->beta_mode = (flash_kda_beta)beta_mode;
    args->flags = (uint32_t)flags;
    args->state_layout = (flash_kda_state_layout)layout;
    args->max_tokens = max_tokens;
    args->backend = (flash_kda_backend)backend;
    args->num_threads = (int32_t)threads;
    args->norm_activation = (flash_kda_norm_activation)activation;
    return true;
}

static bool read_call(struct decode_call *call, PyObject *const *arguments, Py_ssize_t count) {
    if (count != TENSORS + OPTIONS) {
        PyErr_Format(PyExc_TypeError, "%zd arguments; expected %d", count, TENSORS + OPTIONS);
        return false;
    }
    call->args = (flash_kda_decode_args)FLASH_KDA_DECODE_ARGS_INIT;
    if (!read_options(&call->args, arguments + TENSORS))
        return false;
    memcpy(call->members, members, sizeof members);
    for (int i = 0; i < TENSORS; i++) /* the others are states */
        call->members[i].written &= i == OUT || !(call->args.flags & FLASH_KDA_KEEP_STATE);
    return call_read_tensors(call->members, TENSORS, arguments, &call->args, call->tensors) &&
           call_read_stream(arguments[TENSORS + 11], call->args.q, array_exchange(Py_TYPE(arguments[0])),
                            &call->args.stream);
}

PyObject *decode(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    (void)module;
    struct decode_call call;
    flash_kda_status status = FLASH_KDA_OK;
    if (!read_call(&call, arguments, count))
        return NULL;
    Py_BEGIN_ALLOW_THREADS status = flash_kda_decode(&call.args);
    Py_END_ALLOW_THREADS return status ? call_raise(status) : call_written(call.members, TENSORS, arguments);
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
