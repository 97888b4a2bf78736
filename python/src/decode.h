/* SPDX-License-Identifier: MIT */
/* Decode, from Python's arguments to the library's. */
#ifndef KDA_PYTHON_DECODE_H
#define KDA_PYTHON_DECODE_H

#include "python.h"

#include <stdbool.h>

/* Positional arguments: the tensors that decode_tensor_names() names, then gate, lower_bound, beta_mode, scale, flags,
 * state_layout, max_tokens, backend, num_threads, norm_activation, norm_eps, stream (None: the current one of q's
 * framework) and a workspace, which decode has no use for. decode() returns the arrays that were written. */
PyObject *decode(PyObject *module, PyObject *const *arguments, Py_ssize_t count);
PyObject *decode_describe(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

PyObject *decode_tensor_names(bool only_written);

#endif
