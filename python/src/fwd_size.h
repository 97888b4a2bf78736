/* SPDX-License-Identifier: MIT */
/* The scratch memory of a FlashKDA call, from its sizes alone. */
#ifndef KDA_PYTHON_FWD_SIZE_H
#define KDA_PYTHON_FWD_SIZE_H

#include "call.h"

/* Arguments: T_total, H, N. Bytes for bf16 tensors with K = V = 128, on the GPU where there is one. */
PyObject *fwd_workspace_size(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

#endif
