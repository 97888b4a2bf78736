/* SPDX-License-Identifier: MIT */
/* Python arrays as DLTensors: by the framework's C exchange where it has one, by a capsule otherwise. */
#include "array.h"

/* ---- Exchange tables, by type ------------------------------------------------------------------ */

/* What a type's attribute said, kept because looking it up again costs more than the view itself. A type stays
 * referenced, so that its address keeps its meaning. */
enum { KNOWN_TYPES = 8 };
static struct {
    PyTypeObject *type;
    const struct dlpack1_exchange *exchange;
} known[KNOWN_TYPES];
static int known_count;

static const struct dlpack1_exchange *look_up(PyTypeObject *type) {
    const struct dlpack1_exchange *exchange = NULL;
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    if (capsule && PyCapsule_IsValid(capsule, DLPACK1_EXCHANGE_CAPSULE))
        exchange = PyCapsule_GetPointer(capsule, DLPACK1_EXCHANGE_CAPSULE);
    Py_XDECREF(capsule);
    PyErr_Clear();
    while (exchange && exchange->version.major != DLPACK1_MAJOR)
        exchange = exchange->previous;
    return exchange && exchange->view_object ? exchange : NULL;
}

const struct dlpack1_exchange *array_exchange(PyTypeObject *type) {
    for (int i = 0; i < known_count; i++)
        if (known[i].type == type)
            return known[i].exchange;
    const struct dlpack1_exchange *exchange = look_up(type);
    if (known_count < KNOWN_TYPES) {
        Py_INCREF(type);
        known[known_count].type = type;
        known[known_count++].exchange = exchange;
    }
    return exchange;
}

/* ---- Views ------------------------------------------------------------------------------------- */

/* The exception that the framework raised becomes one that names the argument and keeps its first line. */
static bool cannot_view(PyObject *object, const char *name) {
    PyObject *type = NULL, *value = NULL, *traceback = NULL;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *text = PyObject_Str(value ? value : (PyObject *)Py_TYPE(object));
    PyObject *lines = text ? PyUnicode_Splitlines(text, 0) : NULL;
    PyObject *line = lines ? PyList_GetItem(lines, 0) : NULL;
    PyErr_Format(PyExc_ValueError, "%s cannot be read as an array: %S", name,
                 line ? line : (PyObject *)Py_TYPE(object));
    Py_XDECREF(lines);
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return false;
}

static bool view_capsule(PyObject *capsule, const char *name, bool written, DLTensor *tensor) {
    if (PyCapsule_IsValid(capsule, DLPACK0_CAPSULE)) {
        *tensor = ((DLManagedTensor *)PyCapsule_GetPointer(capsule, DLPACK0_CAPSULE))->dl_tensor;
        return true;
    }
    if (!PyCapsule_IsValid(capsule, DLPACK1_CAPSULE)) {
        PyErr_Format(PyExc_TypeError, "%s is a capsule; expected an unused DLPack capsule", name);
        return false;
    }
    const struct dlpack1_managed *managed = PyCapsule_GetPointer(capsule, DLPACK1_CAPSULE);
    if (managed->version.major != DLPACK1_MAJOR) {
        PyErr_Format(PyExc_ValueError, "%s comes by DLPack %u; expected %d", name,
                     (unsigned)managed->version.major, DLPACK1_MAJOR);
        return false;
    }
    if (written && managed->flags & DLPACK1_READ_ONLY) {
        PyErr_Format(PyExc_ValueError, "%s is read-only; expected an array to write to", name);
        return false;
    }
    *tensor = managed->tensor;
    return true;
}

static bool view(PyObject *object, const char *name, bool written, DLTensor *tensor) {
    const struct dlpack1_exchange *exchange = array_exchange(Py_TYPE(object));
    if (exchange)
        return exchange->view_object(object, tensor) == 0 || cannot_view(object, name);
    if (PyCapsule_CheckExact(object))
        return view_capsule(object, name, written, tensor);
    PyErr_Format(PyExc_TypeError, "%s is of type %R; expected an array of the library that q is from", name,
                 Py_TYPE(object));
    return false;
}

bool array_view(PyObject *object, const char *name, bool written, DLTensor *tensor) {
    if (!view(object, name, written, tensor))
        return false;
    /* Strides of an array without elements mean nothing; numpy's may be 0. */
    for (int i = 0; i < tensor->ndim; i++)
        if (tensor->shape[i] == 0)
            tensor->strides = NULL;
    /* Page-locked host memory goes together with any other. */
    if (tensor->device.device_type == kDLCUDAHost)
        tensor->device = (DLDevice){kDLCPU, 0};
    return true;
}

PyObject *array_as_bfloat16(PyObject *module, PyObject *capsule) {
    (void)module;
    DLTensor *tensor = NULL;
    if (PyCapsule_IsValid(capsule, DLPACK0_CAPSULE))
        tensor = &((DLManagedTensor *)PyCapsule_GetPointer(capsule, DLPACK0_CAPSULE))->dl_tensor;
    else if (PyCapsule_IsValid(capsule, DLPACK1_CAPSULE))
        tensor = &((struct dlpack1_managed *)PyCapsule_GetPointer(capsule, DLPACK1_CAPSULE))->tensor;
    if (!tensor || tensor->dtype.bits != 16) {
        PyErr_SetString(PyExc_TypeError, "expected an unused DLPack capsule of 16-bit elements");
        return NULL;
    }
    tensor->dtype.code = kDLBfloat;
    Py_INCREF(capsule);
    return capsule;
}
