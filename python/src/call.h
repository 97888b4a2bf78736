/* SPDX-License-Identifier: MIT */
/* The arguments of one call, from Python's to the library's. */
#ifndef KDA_PYTHON_CALL_H
#define KDA_PYTHON_CALL_H

#include "array.h"
#include "flash_kda.h"

#include <stddef.h>

/* A tensor among the arguments of an operation. */
struct call_member {
    const char *name;
    size_t member; /* of its argument struct: where the const DLTensor * is */
    bool written;
};

#define CALL_MEMBER(args, name) #name, offsetof(args, name)

/* Points the members of *args to views of `count` arrays, tensors[count]; None leaves NULL. false: an exception that names
 * the argument is set. */
bool call_read_tensors(const struct call_member *members, int count, PyObject *const *arguments, void *args,
                       DLTensor *tensors);

/* Numbers among the arguments. false: an exception that names the argument is set. */
bool call_read_number(PyObject *object, const char *name, double *out);
bool call_read_integer(PyObject *object, const char *name, long long least, long long most, long long *out);

/* The stream that is given, or with None the framework's current one on q's device. false: an exception is set. */
bool call_read_stream(PyObject *object, const DLTensor *q, const struct dlpack1_exchange *exchange,
                      void **stream);

/* Those of the arrays that a call has written to, as a tuple. */
PyObject *call_written(const struct call_member *members, int count, PyObject *const *arguments);

/* The names of tensors, as a tuple: of all, or of those that are written. */
PyObject *call_names(const struct call_member *members, int count, bool only_written);

/* ---- Prefill ----------------------------------------------------------------------------------- */

enum { CALL_TENSORS = 16 };

extern const struct call_member call_members[CALL_TENSORS];

struct call {
    flash_kda_prefill_args args;
    DLTensor tensors[CALL_TENSORS];
    const struct dlpack1_exchange *exchange; /* of q's framework, or NULL */
    PyObject *workspace;                     /* None, an array, or a function from bytes to an array */
};

/* Fills *call from the positional arguments: the tensors, then gate, lower_bound, beta_mode, scale, flags, state_layout,
 * checkpoint_every, backend, num_threads, stream (None: the current one of q's framework) and workspace. false: an
 * exception is set. */
bool call_read(struct call *call, PyObject *const *arguments, Py_ssize_t count);

/* Raises what belongs to a status other than FLASH_KDA_OK, with the library's sentence. Returns NULL. */
PyObject *call_raise(flash_kda_status status);

#endif
