/* SPDX-License-Identifier: MIT */
/* Python's C interface, restricted to what is stable from Python 3.10 on. */
#ifndef KDA_PYTHON_PYTHON_H
#define KDA_PYTHON_PYTHON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifndef Py_LIMITED_API
#error "built without Py_LIMITED_API, which one wheel for every Python needs"
#endif

#endif
