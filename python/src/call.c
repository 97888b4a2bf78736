/* SPDX-License-Identifier: MIT */
/* The arguments of one call, from Python's to the library's. */
#include "call.h"

#include <stddef.h>

/* ---- Tensors ----------------------------------------------------------------------------------- */

#define MEMBER(name) #name, offsetof(flash_kda_prefill_args, name)

static const struct {
    const char *name;
    size_t member; /* of flash_kda_prefill_args: where its const DLTensor * is */
    bool written;
} tensors[CALL_TENSORS] = {
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

const char *call_tensor_name(int i) { return tensors[i].name; }

static bool read_tensors(struct call *call, PyObject *const *arguments) {
    for (int i = 0; i < CALL_TENSORS; i++) {
        if (arguments[i] == Py_None)
            continue;
        if (!array_view(arguments[i], tensors[i].name, tensors[i].written, &call->tensors[i]))
            return false;
        *(const DLTensor **)(void *)((char *)&call->args + tensors[i].member) = &call->tensors[i];
    }
    call->exchange = array_exchange(Py_TYPE(arguments[0]));
    return true;
}

/* ---- Numbers ----------------------------------------------------------------------------------- */

static bool read_number(PyObject *object, const char *name, double *out) {
    *out = PyFloat_AsDouble(object);
    if (!PyErr_Occurred())
        return true;
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s is %R; expected a number", name, object);
    return false;
}

static bool read_integer(PyObject *object, const char *name, long long least, long long most, long long *out) {
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

/* The stream that is given, or else the framework's current one on q's device. */
static bool read_stream(PyObject *object, struct call *call) {
    DLDevice device = call->args.q ? call->args.q->device : (DLDevice){kDLCPU, 0};
    if (object != Py_None) {
        call->args.stream = PyLong_AsVoidPtr(object);
        return !PyErr_Occurred();
    }
    if (device.device_type == kDLCPU || !call->exchange)
        return true;
    return call->exchange->current_stream(device.device_type, device.device_id, &call->args.stream) == 0;
}

static bool read_options(struct call *call, PyObject *const *arguments) {
    flash_kda_prefill_args *args = &call->args;
    long long gate, beta_mode, flags, layout, every, backend, threads;
    if (!read_integer(arguments[0], "gate", 0, INT32_MAX, &gate) ||
        !read_number(arguments[1], "lower_bound", &args->lower_bound) ||
        !read_integer(arguments[2], "beta_mode", 0, INT32_MAX, &beta_mode) ||
        !read_number(arguments[3], "scale", &args->scale) ||
        !read_integer(arguments[4], "flags", 0, UINT32_MAX, &flags) ||
        !read_integer(arguments[5], "state_layout", 0, INT32_MAX, &layout) ||
        !read_integer(arguments[6], "checkpoint_every", INT64_MIN, INT64_MAX, &every) ||
        !read_integer(arguments[7], "backend", 0, INT32_MAX, &backend) ||
        !read_integer(arguments[8], "num_threads", INT32_MIN, INT32_MAX, &threads))
        return false;
    args->gate = (flash_kda_gate)gate;
    args->beta_mode = (flash_kda_beta)beta_mode;
    args->flags = (uint32_t)flags;
    args->state_layout = (flash_kda_state_layout)layout;
    args->checkpoint_every = every;
    args->backend = (flash_kda_backend)backend;
    args->num_threads = (int32_t)threads;
    call->workspace = arguments[10];
    return read_stream(arguments[9], call);
}

/* ---- The whole --------------------------------------------------------------------------------- */

enum { CALL_OPTIONS = 11 };

bool call_read(struct call *call, PyObject *const *arguments, Py_ssize_t count) {
    if (count != CALL_TENSORS + CALL_OPTIONS) {
        PyErr_Format(PyExc_TypeError, "%zd arguments; expected %d", count, CALL_TENSORS + CALL_OPTIONS);
        return false;
    }
    call->args = (flash_kda_prefill_args)FLASH_KDA_PREFILL_ARGS_INIT;
    return read_tensors(call, arguments) && read_options(call, arguments + CALL_TENSORS);
}

PyObject *call_raise(flash_kda_status status) {
    PyObject *exception = status == FLASH_KDA_ERROR_UNSUPPORTED ? PyExc_NotImplementedError
                          : status == FLASH_KDA_ERROR_CUDA      ? PyExc_RuntimeError
                                                                : PyExc_ValueError;
    PyErr_SetString(exception, flash_kda_last_error());
    return NULL;
}
