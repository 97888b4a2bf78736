/* SPDX-License-Identifier: MIT */
/* Tensors for checks: a DLTensor inside a block with guard zones before, after and between its rows.
 * The whole block starts as poison: bytes of 0xff, which are NaN in every float type and -1 in integers, so
 * that reading padding spoils the result and writing it is seen. */
#ifndef CHECK_TENSOR_H
#define CHECK_TENSOR_H

#include <dlpack/dlpack.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TENSOR_MAX_DIMS = 5 };

enum spacing {
    SPACING_COMPACT,     /* strides NULL */
    SPACING_FUSED,       /* gaps after every row, head and token, as in a slice of a fused projection */
    SPACING_HEADS_FIRST, /* a [B, H, T, D] buffer seen as [B, T, H, D] */
    SPACING_REPEAT,      /* fused, with stride 0 in one dimension */
};

struct tensor {
    DLTensor dl;
    int64_t shape[TENSOR_MAX_DIMS], strides[TENSOR_MAX_DIMS];
    unsigned char *block; /* everything allocated; NULL: no such tensor */
    size_t block_bytes;
};

extern const DLDataType TYPE_FP32, TYPE_FP16, TYPE_BF16, TYPE_INT32, TYPE_INT64;
bool type_equal(DLDataType a, DLDataType b);
const char *type_name(DLDataType type);
/* Half the distance between numbers of a type around x: what rounding to nearest may cost. */
double type_half_ulp(DLDataType type, double x);

struct tensor_layout {
    enum spacing spacing;
    int repeat_dim;  /* SPACING_REPEAT: the dimension of stride 0 */
    bool loose_last; /* the last dimension may have a stride too */
};

void tensor_make(struct tensor *t, DLDataType type, int ndim, const int64_t *shape,
                 struct tensor_layout layout);
/* A copy of t, padding included, with the same strides. */
void tensor_clone(struct tensor *copy, const struct tensor *t);
void tensor_free(struct tensor *t);

/* Offset in elements of the i-th element in row-major order. */
int64_t tensor_offset(const struct tensor *t, int64_t i);
int64_t tensor_count(const struct tensor *t);
double tensor_get(const struct tensor *t, int64_t i);
void tensor_set(struct tensor *t, int64_t i, double value);
/* Fills with one value. */
void tensor_fill(struct tensor *t, double value);

/* A part of a tensor, in its memory. */
struct tensor_view {
    DLTensor dl;
    int64_t shape[TENSOR_MAX_DIMS], strides[TENSOR_MAX_DIMS];
};

/* All of t. */
void tensor_view_make(struct tensor_view *v, const struct tensor *t);
/* Only first .. first + length - 1 of a dimension. */
void tensor_view_skip(struct tensor_view *v, int dim, int64_t first, int64_t length);

/* Whether the two blocks of a written tensor hold the same bytes, leaving out the elements of leading row r
 * where written[r] or also_written[r]; a row is everything under the first `lead` dimensions. Either list may
 * be NULL. The last dimension is contiguous. */
bool tensor_unchanged(const struct tensor *now, const struct tensor *before, int lead, const bool *written,
                      const bool *also_written);

#endif
