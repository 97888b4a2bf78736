/* SPDX-License-Identifier: MIT */
/* The arguments of one call, from Python's to the library's. */
#include "call.h"

/* ---- Tensors ----------------------------------------------------------------------------------- */

bool call_read_tensors(const struct call_member *members, int count, PyObject *const *arguments, void *args,
                       DLTensor *tensors) {
    for (int i = 0; i < count; i++) {
        if (arguments[i] == Py_None)
            continue;
        if (!array_view(arguments[i], members[i].name, members[i].written, &tensors[i]))
            return false;
        *(const DLTensor **)(void *)((char *)args + members[i].member) = &tensors[i];
    }
    return true;
}

static int written(const struct call_member *members, int count, PyObject *const *arguments) {
    int found = 0;
    for (int i = 0; i < count; i++)
        found += members[i].written && (!arguments || arguments[i] != Py_None);
    return found;
}

PyObject *call_written(const struct call_member *members, int count, PyObject *const *arguments) {
    PyObject *arrays = PyTuple_New(written(members, count, arguments));
    int n = 0;
    for (int i = 0; arrays && i < count; i++)
        if (members[i].written && arguments[i] != Py_None)
            PyTuple_SetItem(arrays, n++, Py_NewRef(arguments[i]));
    return arrays;
}

PyObject *call_names(const struct call_member *members, int count, bool only_written) {
    PyObject *names = PyTuple_New(only_written ? written(members, count, NULL) : count);
    int n = 0;
    for (int i = 0; names && i < count; i++) {
        if (only_written && !members[i].written)
            continue;
        PyObject *name = PyUnicode_FromString(members[i].name);
        if (!name || PyTuple_SetItem(names, n++, name))
            Py_CLEAR(names);
    }
    return names;
}

/* ---- Numbers ----------------------------------------------------------------------------------- */

bool call_read_number(PyObject *object, const char *name, double *out) {
    *out = PyFloat_AsDouble(object);
    if (!PyErr_Occurred())
        return true;
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s is %R; expected a number", name, object);
    return false;
}

bool call_read_integer(PyObject *object, const char *name, long long least, long long most, long long *out) {
    *out = PyLong_AsLongLong(object);
    if (!PyErr_Occurred() && *out >= least && *out <= most)
        return true;
    bool too_large = !PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_OverflowError);
    PyErr_Clear();
    if (too_large)
        PyErr_Format(PyExc_ValueError, "%s is %R; expected %lld to %lld", name, object, least, most);
    else
        PyErr_Format(PyExc_TypeError, "%s is %R; expected an integer", name, object);
    return false;
}

bool call_read_stream(PyObject *object, const DLTensor *q, const struct dlpack1_exchange *exchange,
                      void **stream) {
    DLDevice device = q ? q->device : (DLDevice){kDLCPU, 0};
    if (object != Py_None) {
        *stream = PyLong_AsVoidPtr(object);
        return !PyErr_Occurred();
    }
    if (device.device_type == kDLCPU || !exchange)
        return true;
    return exchange->current_stream(device.device_type, device.device_id, stream) == 0;
}

/* ---- Prefill ----------------------------------------------------------------------------------- */

#define MEMBER(name) CALL_MEMBER(flash_kda_prefill_args, name)

const struct call_member call_members[CALL_TENSORS] = {
    {MEMBER(q), false},
    {MEMBER(k), false},
    {MEMBER(v), false},
    {MEMBER(g), false},
    {MEMBER(beta), false},
    {MEMBER(A_log), false},
    {MEMBER(dt_bias), false},
    {MEMBER(out), true},
    {MEMBER(cu_seqlens), false},
    {MEMBER(initial_state), false},
    {MEMBER(final_state), true},
    {MEMBER(state_indices), false},
    {MEMBER(checkpoints), true},
    {MEMBER(checkpoint_cu_starts), false},
    {MEMBER(checkpoint_indices), false},
    {MEMBER(checkpoint_offsets), false},
};

static bool read_options(struct call *call, PyObject *const *arguments) {
    flash_kda_prefill_args *args = &call->args;
    long long gate, beta_mode, flags, layout, every, backend, threads;
    if (!call_read_integer(arguments[0], "gate", 0, INT32_MAX, &gate) ||
        !call_read_number(arguments[1], "lower_bound", &args->lower_bound) ||
        !call_read_integer(arguments[2], "beta_mode", 0, INT32_MAX, &beta_mode) ||
        !call_read_number(arguments[3], "scale", &args->scale) ||
        !call_read_integer(arguments[4], "flags", 0, UINT32_MAX, &flags) ||
        !call_read_integer(arguments[5], "state_layout", 0, INT32_MAX, &layout) ||
        !call_read_integer(arguments[6], "checkpoint_every", INT64_MIN, INT64_MAX, &every) ||
        !call_read_integer(arguments[7], "backend", 0, INT32_MAX, &backend) ||
        !call_read_integer(arguments[8], "num_threads", INT32_MIN, INT32_MAX, &threads))
        return false;
    args->gate = (flash_kda_gate)gate;
    args->beta_mode = (flash_kda_beta)beta_mode;
    args->flags = (uint32_t)flags;
    args->state_layout = (flash_kda_state_layout)layout;
    args->checkpoint_every = every;
    args->backend = (flash_kda_backend)backend;
    args->num_threads = (int32_t)threads;
    call->workspace = arguments[10];
    return call_read_stream(arguments[9], args->q, call->exchange, &args->stream);
}

enum { CALL_OPTIONS = 11 };

bool call_read(struct call *call, PyObject *const *arguments, Py_ssize_t count) {
    if (count != CALL_TENSORS + CALL_OPTIONS) {
        PyErr_Format(PyExc_TypeError, "%zd arguments; expected %d", count, CALL_TENSORS + CALL_OPTIONS);
        return false;
    }
    call->args = (flash_kda_prefill_args)FLASH_KDA_PREFILL_ARGS_INIT;
    call->exchange = array_exchange(Py_TYPE(arguments[0]));
    return call_read_tensors(call_members, CALL_TENSORS, arguments, &call->args, call->tensors) &&
           read_options(call, arguments + CALL_TENSORS);
}

PyObject *call_raise(flash_kda_status status) {
    PyObject *exception = status == FLASH_KDA_ERROR_UNSUPPORTED     ? PyExc_NotImplementedError
                          : status == FLASH_KDA_ERROR_CUDA          ? PyExc_RuntimeError
                          : status == FLASH_KDA_ERROR_OUT_OF_MEMORY ? PyExc_MemoryError
                                                                    : PyExc_ValueError;
    PyErr_SetString(exception, flash_kda_last_error());
    return NULL;
}
