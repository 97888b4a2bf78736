/* SPDX-License-Identifier: MIT */
/* Python arrays as DLTensors. */
#ifndef KDA_PYTHON_ARRAY_H
#define KDA_PYTHON_ARRAY_H

#include "dlpack1.h"
#include "python.h"

#include <stdbool.h>

/* Describes an array in *tensor, which holds as long as the object does. The object is a DLPack capsule, or an array of
 * a framework that has DLPack's C exchange. false: an exception that names the argument is set. */
bool array_view(PyObject *object, const char *name, bool written, DLTensor *tensor);

/* The exchange table of an array's framework; NULL, without an exception, if it has none. */
const struct dlpack1_exchange *array_exchange(PyTypeObject *type);

/* A capsule of 16-bit integers is made one of bf16, which numpy cannot export. */
PyObject *array_as_bfloat16(PyObject *module, PyObject *capsule);

#endif
