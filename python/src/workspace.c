/* SPDX-License-Identifier: MIT */
/* Scratch memory for one call. */
#include "workspace.h"

#include <stdlib.h>
#include <string.h>

/* Of a framework's reason the first line is kept. */
static bool out_of_memory(size_t bytes, const char *reason) {
    PyObject *line = PyUnicode_DecodeUTF8(reason, (Py_ssize_t)strcspn(reason, "\n"), "replace");
    if (line)
        PyErr_Format(PyExc_MemoryError, "workspace of %zu bytes on the device of q could not be allocated: %U",
                     bytes, line);
    Py_XDECREF(line);
    return false;
}

static void keep_reason(void *context, const char *kind, const char *message) {
    (void)kind;
    out_of_memory(*(size_t *)context, message);
}

static bool take_from_framework(struct workspace *w, const struct call *call, size_t bytes) {
    int64_t shape = (int64_t)bytes;
    DLTensor prototype = {
        .device = call->tensors[0].device, .ndim = 1, .dtype = {kDLUInt, 8, 1}, .shape = &shape};
    if (!call->exchange)
        return out_of_memory(bytes, "no allocator is given");
    if (call->exchange->allocate(&prototype, &w->managed, &bytes, keep_reason))
        return false;
    w->memory = (char *)w->managed->tensor.data + w->managed->tensor.byte_offset;
    w->bytes = bytes;
    return true;
}

static bool is_contiguous(const DLTensor *t) {
    int64_t compact = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->strides && t->shape[i] > 1 && t->strides[i] != compact)
            return false;
        compact *= t->shape[i];
    }
    return true;
}

static bool take_array(struct workspace *w, const struct call *call, PyObject *array) {
    DLTensor t;
    if (!array_view(array, "workspace", true, &t))
        return false;
    DLDevice here = t.device, there = call->tensors[0].device;
    if (here.device_type != there.device_type || here.device_id != there.device_id) {
        PyErr_Format(PyExc_ValueError, "workspace is on DLPack device %d:%d; expected %d:%d, where q is",
                     (int)here.device_type, here.device_id, (int)there.device_type, there.device_id);
        return false;
    }
    if (!is_contiguous(&t)) {
        PyErr_SetString(PyExc_ValueError, "workspace has strides; expected a contiguous array");
        return false;
    }
    w->bytes = (size_t)(t.dtype.bits * t.dtype.lanes / 8);
    for (int i = 0; i < t.ndim; i++)
        w->bytes *= (size_t)t.shape[i];
    w->memory = w->bytes ? (char *)t.data + t.byte_offset : NULL;
    return true;
}

static bool take_from_function(struct workspace *w, const struct call *call, size_t bytes) {
    PyObject *array = PyObject_CallFunction(call->workspace, "n", (Py_ssize_t)bytes);
    if (!array || !take_array(w, call, array)) {
        Py_XDECREF(array);
        return false;
    }
    w->array = array;
    return true;
}

bool workspace_take(struct workspace *w, const struct call *call, size_t bytes) {
    *w = (struct workspace){0};
    if (call->workspace != Py_None && !PyCallable_Check(call->workspace))
        return take_array(w, call, call->workspace);
    if (!bytes)
        return true;
    if (call->tensors[0].device.device_type == kDLCPU) {
        w->memory = w->host = malloc(bytes);
        w->bytes = bytes;
        return w->host || out_of_memory(bytes, "malloc() has no more");
    }
    return call->workspace == Py_None ? take_from_framework(w, call, bytes)
                                      : take_from_function(w, call, bytes);
}

void *workspace_at_hand(const struct call *call, size_t *bytes) {
    static _Thread_local unsigned char memory[128 << 10];
    if (call->workspace != Py_None || !call->arrays[0] || call->tensors[0].device.device_type != kDLCPU)
        return NULL;
    *bytes = sizeof memory;
    return memory;
}

void workspace_drop(struct workspace *w) {
    free(w->host);
    if (w->managed && w->managed->deleter)
        w->managed->deleter(w->managed);
    Py_XDECREF(w->array);
}
