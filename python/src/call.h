/* SPDX-License-Identifier: MIT */
/* The arguments of one call, from Python's to the library's. */
#ifndef KDA_PYTHON_CALL_H
#define KDA_PYTHON_CALL_H

#include "array.h"
#include "flash_kda.h"

#include <stddef.h>

/* A tensor among the arguments of an operation, under the name of its member. */
enum call_access { CALL_READ, CALL_WRITTEN, CALL_STATE }; /* a state is written unless the call keeps states */
struct call_tensor {
    const char *name;
    size_t member; /* of the argument struct: where the const DLTensor * is */
    enum call_access access;
};

/* A number among them, likewise. */
enum call_kind { CALL_NUMBER, CALL_CHOICE, CALL_FLAGS, CALL_INT32, CALL_INT64 };
struct call_option {
    const char *name;
    size_t member;
    enum call_kind kind;
};

#define CALL_MEMBER(args, name) #name, offsetof(args, name)

struct call_operation {
    const char *name;
    const struct call_tensor *tensors; /* the first is q */
    int tensor_count;
    const struct call_option *options;
    int option_count;
    PyObject **names; /* as Python strings: the tensors', then the options'; call_prepare() makes them */
};

/* Once, before the first call. false: an exception is set. */
bool call_prepare(const struct call_operation *operation);

/* Points the members of *args to views of the arrays in a dict from names; None and what is not there leave NULL. Views go to
 * tensors[], the arrays themselves, borrowed, to arrays[]. false: an exception that names the argument is set. */
bool call_read_tensors(const struct call_operation *operation, PyObject *given, bool keep_states, void *args,
                       DLTensor *tensors, PyObject **arrays);

/* Numbers from a dict from names; what is not there stays as it is in *args. false: as above. */
bool call_read_options(const struct call_operation *operation, PyObject *given, void *args);

/* The stream that is given, or with None the framework's current one on q's device. false: an exception is set. */
bool call_read_stream(PyObject *object, const DLTensor *q, const struct dlpack1_exchange *exchange,
                      void **stream);

/* Those of the arrays that a call has written to, as a tuple. */
PyObject *call_written(const struct call_operation *operation, PyObject *const *arrays, bool keep_states);

/* The names of tensors, as a tuple: of all, or of those that are written. */
PyObject *call_names(const struct call_operation *operation, bool only_written);

/* ---- Prefill ----------------------------------------------------------------------------------- */

enum { CALL_TENSORS = 16 };

extern const struct call_operation call_prefill;

struct call {
    flash_kda_prefill_args args;
    DLTensor tensors[CALL_TENSORS];
    PyObject *arrays[CALL_TENSORS];
    const struct dlpack1_exchange *exchange; /* of q's framework, or NULL */
    PyObject *workspace;                     /* None, an array, or a function from bytes to an array */
};

/* Fills *call from four arguments: dicts of tensors and of options, stream (None: the current one of q's framework) and
 * workspace. false: an exception is set. */
bool call_read(struct call *call, PyObject *const *arguments, Py_ssize_t count);

/* What every entry takes. false: an exception is set. */
enum { CALL_ARGUMENTS = 4 };
bool call_count(Py_ssize_t count);

/* Raises what belongs to a status other than FLASH_KDA_OK, with the library's sentence. Returns NULL. */
PyObject *call_raise(flash_kda_status status);

#endif
