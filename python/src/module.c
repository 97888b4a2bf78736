/* SPDX-License-Identifier: MIT */
/* The module libflashkda._C: the library's entries, for the Python code beside it. */
#include "call.h"
#include "unread.h"
#include "workspace.h"

typedef PyObject *(*fast_function)(PyObject *, PyObject *const *, Py_ssize_t);

/* ---- Operations -------------------------------------------------------------------------------- */

static PyObject *run(const struct call_operation *operation, PyObject *const *arguments, Py_ssize_t count) {
    struct call call;
    struct workspace workspace;
    size_t bytes = 0;
    flash_kda_status status = FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL;
    if (!call_read(&call, operation, arguments, count))
        return NULL;
    /* Most small calls need no more than this, and not to ask saves them checking every argument twice. */
    void *at_hand = workspace_at_hand(&call, &bytes);
    if (at_hand) {
        Py_BEGIN_ALLOW_THREADS status = operation->run(&call.args, at_hand, bytes);
        Py_END_ALLOW_THREADS
    }
    if (status == FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL)
        status = operation->workspace_size(&call.args, &bytes);
    else if (!status)
        return call_written(&call);
    if (status)
        return call_raise(status);
    if (!workspace_take(&workspace, &call, bytes))
        return NULL;
    Py_BEGIN_ALLOW_THREADS status = operation->run(&call.args, workspace.memory, workspace.bytes);
    Py_END_ALLOW_THREADS workspace_drop(&workspace);
    return status ? call_raise(status) : call_written(&call);
}

static PyObject *workspace_size(const struct call_operation *operation, PyObject *const *arguments,
                                Py_ssize_t count) {
    struct call call;
    size_t bytes = 0;
    if (!call_read(&call, operation, arguments, count))
        return NULL;
    flash_kda_status status = operation->workspace_size(&call.args, &bytes);
    return status ? call_raise(status) : PyLong_FromSize_t(bytes);
}

static PyObject *describe(const struct call_operation *operation, PyObject *const *arguments,
                          Py_ssize_t count) {
    struct call call;
    char text[512];
    if (!call_read(&call, operation, arguments, count))
        return NULL;
    flash_kda_status status = operation->describe(&call.args, text, sizeof text);
    return status ? call_raise(status) : PyUnicode_FromString(text);
}

/* An entry of the module: what is done with which operation. */
#define ENTRY(name, done, operation)                                                        \
    static PyObject *name(PyObject *module, PyObject *const *arguments, Py_ssize_t count) { \
        (void)module;                                                                       \
        return done(&(operation), arguments, count);                                        \
    }

ENTRY(prefill, run, call_prefill)
ENTRY(prefill_workspace_size, workspace_size, call_prefill)
ENTRY(prefill_describe, describe, call_prefill)
ENTRY(decode, run, call_decode)
ENTRY(decode_describe, describe, call_decode)
ENTRY(backward, run, call_backward)
ENTRY(backward_describe, describe, call_backward)
ENTRY(prefill_half, run, call_prefill_half)
ENTRY(prefill_half_workspace_size, workspace_size, call_prefill_half)
ENTRY(backward_half, run, call_backward_half)
ENTRY(backward_half_workspace_size, workspace_size, call_backward_half)
ENTRY(fold, run, call_fold)

/* ---- What this build and this machine have ----------------------------------------------------- */

static PyObject *has_exchange(PyObject *module, PyObject *type) {
    (void)module;
    return PyBool_FromLong(PyType_Check(type) && array_exchange((PyTypeObject *)type));
}

/* Does a function of one argument answer true for any array in a dict? None is not asked, and what the function cannot
 * take answers no. */
static PyObject *any_true(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    (void)module;
    if (count != 2 || !PyDict_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "expected a function and a dict");
        return NULL;
    }
    PyObject *name, *array; /* borrowed */
    Py_ssize_t next = 0;
    bool found = false;
    while (!found && PyDict_Next(arguments[1], &next, &name, &array)) {
        if (array == Py_None)
            continue;
        PyObject *answer = PyObject_CallFunctionObjArgs(arguments[0], array, NULL);
        found = answer == Py_True;
        if (answer)
            Py_DECREF(answer);
        else
            PyErr_Clear();
    }
    return PyBool_FromLong(found);
}

static PyObject *backend_available(PyObject *module, PyObject *backend) {
    (void)module;
    long value = PyLong_AsLong(backend);
    if (value == -1 && PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(flash_kda_backend_available((flash_kda_backend)value));
}

static PyObject *cpu_levels(PyObject *module, PyObject *nothing) {
    (void)module;
    (void)nothing;
    PyObject *list = PyList_New(0);
    for (const char *const *level = flash_kda_cpu_levels(); list && *level; level++) {
        PyObject *name = PyUnicode_FromString(*level);
        if (!name || PyList_Append(list, name))
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *cpu_level(PyObject *module, PyObject *nothing) {
    (void)module;
    (void)nothing;
    const char *level = flash_kda_cpu_level();
    return level ? PyUnicode_FromString(level) : call_raise(FLASH_KDA_ERROR_UNSUPPORTED);
}

/* ---- The module -------------------------------------------------------------------------------- */

#define FAST(name) \
    { #name, (PyCFunction)(void (*)(void))(fast_function)(name), METH_FASTCALL, NULL }

static PyMethodDef methods[] = {
    FAST(prefill),
    FAST(prefill_workspace_size),
    FAST(prefill_describe),
    FAST(decode),
    FAST(decode_describe),
    FAST(backward),
    FAST(backward_describe),
    FAST(prefill_half),
    FAST(prefill_half_workspace_size),
    FAST(backward_half),
    FAST(backward_half_workspace_size),
    FAST(fold),
    FAST(fwd_workspace_size),
    FAST(any_true),
    {"as_bfloat16", array_as_bfloat16, METH_O, NULL},
    {"has_exchange", has_exchange, METH_O, NULL},
    {"backend_available", backend_available, METH_O, NULL},
    {"backward_available", backward_available, METH_O, NULL},
    {"cpu_levels", cpu_levels, METH_NOARGS, NULL},
    {"cpu_level", cpu_level, METH_NOARGS, NULL},
    {0},
};

/* Adds a tuple of names, and drops it. */
static int add_tuple(PyObject *module, const char *name, PyObject *tuple) {
    int failed = !tuple || PyModule_AddObjectRef(module, name, tuple);
    Py_XDECREF(tuple);
    return failed ? -1 : 0;
}

/* Dicts from the names that Python callers use to the header's values. */
static int add_names(PyObject *module) {
    PyObject *backends = PyDict_New();
    for (int i = 0; backends && flash_kda_backend_name((flash_kda_backend)i); i++) {
        PyObject *value = PyLong_FromLong(i);
        if (!value || PyDict_SetItemString(backends, flash_kda_backend_name((flash_kda_backend)i), value))
            Py_CLEAR(backends);
        Py_XDECREF(value);
    }
    const struct {
        const char *name;
        PyObject *dict;
    } dicts[] = {
        {"BACKENDS", backends},
        {"GATES", Py_BuildValue("{s:i,s:i,s:i}", "none", FLASH_KDA_GATE_NONE, "softplus",
                                FLASH_KDA_GATE_SOFTPLUS, "sigmoid", FLASH_KDA_GATE_SIGMOID)},
        {"BETA_MODES", Py_BuildValue("{s:i,s:i,s:i}", "given", FLASH_KDA_BETA_GIVEN, "sigmoid",
                                     FLASH_KDA_BETA_SIGMOID, "twice_sigmoid", FLASH_KDA_BETA_TWICE_SIGMOID)},
        {"PHASES", Py_BuildValue("{s:i,s:i,s:i}", "whole", FLASH_KDA_PHASE_WHOLE, "begin",
                                 FLASH_KDA_PHASE_BEGIN, "finish", FLASH_KDA_PHASE_FINISH)},
        {"NORM_ACTIVATIONS",
         Py_BuildValue("{s:i,s:i}", "sigmoid", FLASH_KDA_NORM_SIGMOID, "silu", FLASH_KDA_NORM_SILU)},
        {"STATE_LAYOUTS",
         Py_BuildValue("{s:i,s:i}", "v_first", FLASH_KDA_STATE_V_FIRST, "k_first", FLASH_KDA_STATE_K_FIRST)},
    };
    int failed = 0;
    for (size_t i = 0; i < sizeof dicts / sizeof *dicts; i++) {
        failed |= !dicts[i].dict || PyModule_AddObjectRef(module, dicts[i].name, dicts[i].dict);
        Py_XDECREF(dicts[i].dict);
    }
    return failed ? -1 : 0;
}

static int execute(PyObject *module) {
    if (!call_prepare(&call_prefill) || !call_prepare(&call_decode) || !call_prepare(&call_backward) ||
        !call_prepare(&call_prefill_half) || !call_prepare(&call_backward_half) || !call_prepare(&call_fold) ||
        PyModule_AddIntConstant(module, "FOLD_ADJOINT", FLASH_KDA_FOLD_ADJOINT) ||
        PyModule_AddStringConstant(module, "VERSION", flash_kda_version()) ||
        PyModule_AddIntConstant(module, "QK_NORM", FLASH_KDA_QK_NORM) ||
        PyModule_AddIntConstant(module, "BATCH_INVARIANT", FLASH_KDA_BATCH_INVARIANT) ||
        PyModule_AddIntConstant(module, "KEEP_STATE", FLASH_KDA_KEEP_STATE) ||
        PyModule_AddIntConstant(module, "PADDING_SLOT", FLASH_KDA_PADDING_SLOT) ||
        PyModule_AddIntConstant(module, "MAX_DECODE_TOKENS", FLASH_KDA_MAX_DECODE_TOKENS) ||
        add_tuple(module, "TENSORS", call_names(&call_prefill, false)) ||
        add_tuple(module, "WRITTEN", call_names(&call_prefill, true)) ||
        add_tuple(module, "DECODE_TENSORS", call_names(&call_decode, false)) ||
        add_tuple(module, "DECODE_WRITTEN", call_names(&call_decode, true)) ||
        add_tuple(module, "BACKWARD_TENSORS", call_names(&call_backward, false)) ||
        add_tuple(module, "BACKWARD_WRITTEN", call_names(&call_backward, true)))
        return -1;
    return add_names(module) ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)execute}, {0}};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "libflashkda._C", .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit__C(void);
PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&definition); }
