/* SPDX-License-Identifier: MIT */
/* Tensors in host memory: a DLTensor with room for its shape and strides, so not to be copied or moved.
 * For checks it lies in a block with guard zones before, after and between its rows. The whole block starts as poison:
 * bytes of 0xff, which are NaN in every float type and -1 in integers, so that reading padding spoils the result and
 * writing it is seen. */
#ifndef BENCH_TENSOR_H
#define BENCH_TENSOR_H

#include <dlpack/dlpack.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TENSOR_MAX_DIMS = 5 };

/* All zero: absent. */
struct tensor {
    DLTensor dl;
    int64_t shape[TENSOR_MAX_DIMS], strides[TENSOR_MAX_DIMS];
    bool compact;
    unsigned char *block; /* everything allocated; NULL: the memory is somebody else's */
    size_t block_bytes;
};

/* ---- Types of numbers -------------------------------------------------------------------------- */

extern const DLDataType TYPE_FP32, TYPE_FP16, TYPE_BF16, TYPE_INT32, TYPE_INT64, TYPE_INT8, TYPE_BOOL;
bool type_equal(DLDataType a, DLDataType b);
size_t type_size(DLDataType type);
/* "fp32", "fp16", "bf16", "int32", "int64", "int8" or "bool". */
const char *type_name(DLDataType type);
/* The float type of that name; false if there is none. */
bool type_named(const char *name, DLDataType *type);
/* The nearest value of a float type. */
double type_round(DLDataType type, double value);
/* Half the distance between numbers of a type around x: what rounding to nearest may cost. */
double type_half_ulp(DLDataType type, double x);

/* ---- Memory ------------------------------------------------------------------------------------ */

/* Zeroed memory for a compact tensor. False if it does not fit in memory. */
bool tensor_alloc(struct tensor *t, DLDataType type, int ndim, const int64_t *shape);
/* A compact tensor in somebody else's memory. */
void tensor_wrap(struct tensor *t, DLDataType type, int ndim, const int64_t *shape, void *data);

enum spacing {
    SPACING_COMPACT,     /* strides NULL */
    SPACING_FUSED,       /* gaps after every row, head and token, as in a slice of a fused projection */
    SPACING_HEADS_FIRST, /* a [B, H, T, D] buffer seen as [B, T, H, D] */
    SPACING_REPEAT,      /* fused, with stride 0 in one dimension */
};

struct tensor_layout {
    enum spacing spacing;
    int repeat_dim;  /* SPACING_REPEAT: the dimension of stride 0 */
    bool loose_last; /* the last dimension may have a stride too */
};

/* For checks: poisoned, between guards. Leaves the program if there is no memory. */
void tensor_make(struct tensor *t, DLDataType type, int ndim, const int64_t *shape,
                 struct tensor_layout layout);
/* A copy of t, padding included, with the same strides. */
void tensor_clone(struct tensor *copy, const struct tensor *t);
void tensor_free(struct tensor *t);

/* Zeroed memory for so many things. Leaves the program if there is none. */
void *must_allocate(int64_t count, size_t size);

/* ---- Elements ---------------------------------------------------------------------------------- */

bool tensor_present(const struct tensor *t);
int64_t tensor_count(const struct tensor *t); /* elements */
size_t tensor_bytes(const struct tensor *t);  /* of them all */
/* Element i in row-major order. */
double tensor_get(const struct tensor *t, int64_t i);
/* Stores the nearest value of the tensor's type. */
void tensor_set(struct tensor *t, int64_t i, double value);
/* Fills with one value. */
void tensor_fill(struct tensor *t, double value);

/* Bytes from the first element of any tensor to after its last. */
size_t tensor_extent(const DLTensor *t);

/* ---- Views ------------------------------------------------------------------------------------- */

/* All of a tensor, of any device, in its memory. */
void tensor_view(struct tensor *view, const DLTensor *t);
/* Keeps first .. first + length - 1 of one dimension of a view. */
void tensor_narrow(struct tensor *view, int dim, int64_t first, int64_t length);

/* ---- Bytes ------------------------------------------------------------------------------------- */

/* Do two blocks hold the same bytes? */
bool tensor_same(const struct tensor *a, const struct tensor *b);

/* Whether the two blocks of a written tensor hold the same bytes, leaving out the elements of leading row r
 * where written[r] or also_written[r]; a row is everything under the first `lead` dimensions. Either list may
 * be NULL. The last dimension is contiguous. */
bool tensor_unchanged(const struct tensor *now, const struct tensor *before, int lead, const bool *written,
                      const bool *also_written);

#endif
