/* SPDX-License-Identifier: MIT */
/* The arguments of one call, from Python's to the library's. */
#ifndef KDA_PYTHON_CALL_H
#define KDA_PYTHON_CALL_H

#include "array.h"
#include "flash_kda.h"

enum { CALL_TENSORS = 16 };

struct call {
    flash_kda_prefill_args args;
    DLTensor tensors[CALL_TENSORS];
    const struct dlpack1_exchange *exchange; /* of q's framework, or NULL */
    PyObject *workspace;                     /* None, an array, or a function from bytes to an array */
};

/* Name of positional argument i, 0 <= i < CALL_TENSORS. */
const char *call_tensor_name(int i);

/* Fills *call from the positional arguments: the tensors, then gate, lower_bound, beta_mode, scale, flags, state_layout,
 * checkpoint_every, backend, num_threads, stream (None: the current one of q's framework) and workspace. false: an
 * exception is set. */
bool call_read(struct call *call, PyObject *const *arguments, Py_ssize_t count);

/* Raises what belongs to a status other than FLASH_KDA_OK, with the library's sentence. Returns NULL. */
PyObject *call_raise(flash_kda_status status);

#endif
