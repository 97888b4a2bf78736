/* SPDX-License-Identifier: MIT */
/* The arguments of one call, from Python's to the library's. */
#include "call.h"

#include <string.h>

/* ---- Names ------------------------------------------------------------------------------------- */

bool call_prepare(const struct call_operation *operation) {
    for (int i = 0; i < operation->tensor_count + operation->option_count; i++) {
        int option = i - operation->tensor_count;
        operation->names[i] = PyUnicode_InternFromString(option < 0 ? operation->tensors[i].name
                                                                    : operation->options[option].name);
        if (!operation->names[i])
            return false;
    }
    return true;
}

/* Where a name is among `count`. Python interns the names in its source, so that in most cases it is the very object that
 * follows the one before. -1: an exception is set. */
static int find(const char *operation, PyObject *const *names, int count, int before, PyObject *name) {
    if (before + 1 < count && names[before + 1] == name)
        return before + 1;
    for (int i = 0; i < count; i++)
        if (names[i] == name)
            return i;
    for (int i = 0; PyUnicode_Check(name) && i < count; i++)
        if (PyUnicode_Compare(names[i], name) == 0)
            return i;
    PyErr_Format(PyExc_TypeError, "%s takes nothing named %R", operation, name);
    return -1;
}

static bool is_dict(PyObject *given) {
    if (!PyDict_Check(given))
        PyErr_Format(PyExc_TypeError, "%R is given; expected a dict from names", given);
    return PyDict_Check(given);
}

/* ---- Tensors ----------------------------------------------------------------------------------- */

static bool is_written(const struct call *call, int i) {
    enum call_access access = call->operation->tensors[i].access;
    return access == CALL_WRITTEN || (access == CALL_STATE && !call->keep_states);
}

/* Points members to views of the arrays in a dict from names. */
static bool read_tensors(struct call *call, PyObject *given) {
    const struct call_operation *operation = call->operation;
    PyObject *name, *array;
    Py_ssize_t next = 0;
    int i = -1;
    memset(call->arrays, 0, (size_t)operation->tensor_count * sizeof *call->arrays);
    if (!is_dict(given))
        return false;
    while (PyDict_Next(given, &next, &name, &array)) {
        i = find(operation->name, operation->names, operation->tensor_count, i, name);
        if (i < 0)
            return false;
        if (array == Py_None)
            continue;
        const struct call_tensor *tensor = &operation->tensors[i];
        if (!array_view(array, tensor->name, is_written(call, i), &call->tensors[i]))
            return false;
        *(const DLTensor **)(void *)((char *)&call->args + tensor->member) = &call->tensors[i];
        call->arrays[i] = array;
    }
    return true;
}

PyObject *call_written(const struct call *call) {
    int count = 0, n = 0, tensors = call->operation->tensor_count;
    for (int i = 0; i < tensors; i++)
        count += call->arrays[i] && is_written(call, i);
    PyObject *written = PyTuple_New(count);
    for (int i = 0; written && i < tensors; i++)
        if (call->arrays[i] && is_written(call, i))
            PyTuple_SetItem(written, n++, Py_NewRef(call->arrays[i]));
    return written;
}

PyObject *call_names(const struct call_operation *operation, bool only_written) {
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < operation->tensor_count; i++)
        if ((!only_written || operation->tensors[i].access != CALL_READ) &&
            PyList_Append(list, operation->names[i]))
            Py_CLEAR(list);
    PyObject *names = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return names;
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

/* Enums are stored as the 32-bit integers that they are. */
_Static_assert(sizeof(flash_kda_gate) == sizeof(int32_t), "an enum is not an int");

static bool read_option(const struct call_option *option, PyObject *object, void *member) {
    static const struct {
        long long least, most;
    } ranges[] = {
        [CALL_CHOICE] = {0, INT32_MAX},
        [CALL_FLAGS] = {0, UINT32_MAX},
        [CALL_INT32] = {INT32_MIN, INT32_MAX},
        [CALL_INT64] = {INT64_MIN, INT64_MAX},
    };
    if (option->kind == CALL_NUMBER)
        return read_number(object, option->name, member);
    long long value;
    if (!read_integer(object, option->name, ranges[option->kind].least, ranges[option->kind].most, &value))
        return false;
    if (option->kind == CALL_INT64)
        *(int64_t *)member = value;
    else
        memcpy(member, &(uint32_t){(uint32_t)value}, sizeof(uint32_t));
    return true;
}

static bool read_options(struct call *call, PyObject *given) {
    const struct call_operation *operation = call->operation;
    PyObject *const *names = operation->names + operation->tensor_count;
    PyObject *name, *value;
    Py_ssize_t next = 0;
    int i = -1;
    if (!is_dict(given))
        return false;
    while (PyDict_Next(given, &next, &name, &value)) {
        i = find(operation->name, names, operation->option_count, i, name);
        if (i < 0)
            return false;
        const struct call_option *option = &operation->options[i];
        void *member = (char *)&call->args + option->member;
        if (!read_option(option, value, member))
            return false;
        if (option->kind == CALL_FLAGS)
            call->keep_states = *(uint32_t *)member & FLASH_KDA_KEEP_STATE;
    }
    return true;
}

static bool read_stream(struct call *call, PyObject *object) {
    void **stream = (void **)(void *)((char *)&call->args + call->operation->stream);
    DLDevice device = call->arrays[0] ? call->tensors[0].device : (DLDevice){kDLCPU, 0};
    if (object != Py_None) {
        *stream = PyLong_AsVoidPtr(object);
        return !PyErr_Occurred();
    }
    if (device.device_type == kDLCPU || !call->exchange)
        return true;
    return call->exchange->current_stream(device.device_type, device.device_id, stream) == 0;
}

/* ---- A call ------------------------------------------------------------------------------------ */

bool call_read(struct call *call, const struct call_operation *operation, PyObject *const *arguments,
               Py_ssize_t count) {
    enum { ARGUMENTS = 4 };
    if (count != ARGUMENTS) {
        PyErr_Format(PyExc_TypeError, "%zd arguments; expected tensors, options, stream and workspace", count);
        return false;
    }
    call->operation = operation;
    call->workspace = arguments[3];
    call->keep_states = false;
    operation->init(&call->args);
    if (!read_options(call, arguments[1]) || !read_tensors(call, arguments[0]))
        return false;
    call->exchange = call->arrays[0] ? array_exchange(Py_TYPE(call->arrays[0])) : NULL;
    return read_stream(call, arguments[2]);
}

PyObject *call_raise(flash_kda_status status) {
    PyObject *exception = status == FLASH_KDA_ERROR_UNSUPPORTED     ? PyExc_NotImplementedError
                          : status == FLASH_KDA_ERROR_CUDA          ? PyExc_RuntimeError
                          : status == FLASH_KDA_ERROR_OUT_OF_MEMORY ? PyExc_MemoryError
                                                                    : PyExc_ValueError;
    PyErr_SetString(exception, flash_kda_last_error());
    return NULL;
}
