/* SPDX-License-Identifier: MIT */
/* What the library says of calls whose tensors nobody reads. */
#ifndef KDA_PYTHON_UNREAD_H
#define KDA_PYTHON_UNREAD_H

#include "call.h"

/* Scratch memory of a FlashKDA call. Arguments: T_total, H, N. Bytes for bf16 tensors with K = V = 128, on the GPU where
 * there is one. */
PyObject *fwd_workspace_size(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

/* Can a backend, cpu or cuda, run backward here? */
PyObject *backward_available(PyObject *module, PyObject *backend);

#endif
