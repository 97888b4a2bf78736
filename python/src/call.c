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

static bool is_written(const struct call_tensor *tensor, bool keep_states) {
    return tensor->access == CALL_WRITTEN || (tensor->access == CALL_STATE && !keep_states);
}

bool call_read_tensors(const struct call_operation *operation, PyObject *given, bool keep_states, void *args,
                       DLTensor *tensors, PyObject **arrays) {
    PyObject *name, *array;
    Py_ssize_t next = 0;
    int i = -1;
    memset(arrays, 0, (size_t)operation->tensor_count * sizeof *arrays);
    if (!is_dict(given))
        return false;
    while (PyDict_Next(given, &next, &name, &array)) {
        i = find(operation->name, operation->names, operation->tensor_count, i, name);
        if (i < 0)
            return false;
        if (array == Py_None)
            continue;
        const struct call_tensor *tensor = &operation->tensors[i];
        if (!array_view(array, tensor->name, is_written(tensor, keep_states), &tensors[i]))
            return false;
        *(const DLTensor **)(void *)((char *)args + tensor->member) = &tensors[i];
        arrays[i] = array;
    }
    return true;
}

PyObject *call_written(const struct call_operation *operation, PyObject *const *arrays, bool keep_states) {
    int count = 0, n = 0;
    for (int i = 0; i < operation->tensor_count; i++)
        count += arrays[i] && is_written(&operation->tensors[i], keep_states);
    PyObject *written = PyTuple_New(count);
    for (int i = 0; written && i < operation->tensor_count; i++)
        if (arrays[i] && is_written(&operation->tensors[i], keep_states))
            PyTuple_SetItem(written, n++, Py_NewRef(arrays[i]));
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

bool call_read_options(const struct call_operation *operation, PyObject *given, void *args) {
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
        if (!read_option(option, value, (char *)args + option->member))
            return false;
    }
    return true;
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

static const struct call_tensor tensors[CALL_TENSORS] = {
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
};

static const struct call_option options[] = {
    {MEMBER(gate), CALL_CHOICE},    {MEMBER(lower_bound), CALL_NUMBER}, {MEMBER(beta_mode), CALL_CHOICE},
    {MEMBER(scale), CALL_NUMBER},   {MEMBER(flags), CALL_FLAGS},        {MEMBER(state_layout), CALL_CHOICE},
    {MEMBER(backend), CALL_CHOICE}, {MEMBER(num_threads), CALL_INT32},  {MEMBER(checkpoint_every), CALL_INT64},
};

enum { OPTIONS = sizeof options / sizeof *options };
static PyObject *names[CALL_TENSORS + OPTIONS];
const struct call_operation call_prefill = {"prefill", tensors, CALL_TENSORS, options, OPTIONS, names};

bool call_count(Py_ssize_t count) {
    if (count != CALL_ARGUMENTS)
        PyErr_Format(PyExc_TypeError, "%zd arguments; expected tensors, options, stream and workspace", count);
    return count == CALL_ARGUMENTS;
}

bool call_read(struct call *call, PyObject *const *arguments, Py_ssize_t count) {
    if (!call_count(count))
        return false;
    call->args = (flash_kda_prefill_args)FLASH_KDA_PREFILL_ARGS_INIT;
    call->workspace = arguments[3];
    if (!call_read_tensors(&call_prefill, arguments[0], false, &call->args, call->tensors, call->arrays) ||
        !call_read_options(&call_prefill, arguments[1], &call->args))
        return false;
    call->exchange = call->arrays[0] ? array_exchange(Py_TYPE(call->arrays[0])) : NULL;
    return call_read_stream(arguments[2], call->args.q, call->exchange, &call->args.stream);
}

PyObject *call_raise(flash_kda_status status) {
    PyObject *exception = status == FLASH_KDA_ERROR_UNSUPPORTED     ? PyExc_NotImplementedError
                          : status == FLASH_KDA_ERROR_CUDA          ? PyExc_RuntimeError
                          : status == FLASH_KDA_ERROR_OUT_OF_MEMORY ? PyExc_MemoryError
                                                                    : PyExc_ValueError;
    PyErr_SetString(exception, flash_kda_last_error());
    return NULL;
}
