/* SPDX-License-Identifier: MIT */
/* Decode, from Python's arguments to the library's. */
#ifndef KDA_PYTHON_DECODE_H
#define KDA_PYTHON_DECODE_H

#include "call.h"

extern const struct call_operation call_decode;

/* Four arguments, as call_read() takes. decode() returns the arrays that were written. */
PyObject *decode(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *decode_describe(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

#endif
