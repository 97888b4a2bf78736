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

union call_args {
    flash_kda_prefill_args prefill;
    flash_kda_decode_args decode;
    flash_kda_backward_args backward;
};

/* An operation of the library, in a file of its own. */
struct call_operation {
    const char *name;
    const struct call_tensor *tensors; /* the first is q */
    int tensor_count;
    const struct call_option *options;
    int option_count;
    PyObject **names; /* as Python strings: the tensors', then the options'; call_prepare() makes them */
    size_t stream;    /* where that member is */
    void (*init)(union call_args *args);
    flash_kda_status (*run)(const union call_args *args, void *workspace, size_t bytes);
    flash_kda_status (*workspace_size)(const union call_args *args, size_t *bytes);
    flash_kda_status (*describe)(const union call_args *args, char *text, size_t size);
};

extern const struct call_operation call_prefill, call_decode, call_backward;

enum { CALL_TENSORS = 28 }; /* of any operation, at most */

struct call {
    const struct call_operation *operation;
    union call_args args;
    DLTensor tensors[CALL_TENSORS]; /* in the order of the operation's; the first is q */
    PyObject *arrays[CALL_TENSORS]; /* borrowed; NULL where there is none */
    bool keep_states;
    const struct dlpack1_exchange *exchange; /* of q's framework, or NULL */
    PyObject *workspace;                     /* None, an array, or a function from bytes to an array */
};

/* Once, before the first call. false: an exception is set. */
bool call_prepare(const struct call_operation *operation);

/* Fills *call from four arguments: dicts of tensors and of options, stream (None: the current one of q's framework) and
 * workspace. What is None or not there is as in FLASH_KDA_.._ARGS_INIT. false: an exception that names the argument is
 * set. */
bool call_read(struct call *call, const struct call_operation *operation, PyObject *const *arguments,
               Py_ssize_t count);

/* Those of the arrays that a call has written to, as a tuple. */
PyObject *call_written(const struct call *call);

/* The names of tensors, as a tuple: of all, or of those that are written. */
PyObject *call_names(const struct call_operation *operation, bool only_written);

/* Raises what belongs to a status other than FLASH_KDA_OK, with the library's sentence. Returns NULL. */
PyObject *call_raise(flash_kda_status status);

#endif
