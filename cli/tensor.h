/* SPDX-License-Identifier: MIT */
/* Tensors in host memory: allocation, dtypes, values by index. */
#ifndef FLASHKDA_TENSOR_H
#define FLASHKDA_TENSOR_H

#include <dlpack/dlpack.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TENSOR_MAX_RANK = 5 };

/* A DLTensor with room for its shape and strides, so it must not be copied or moved. All zero: absent. */
struct tensor {
    DLTensor dl;
    int64_t shape[TENSOR_MAX_RANK];
    int64_t strides[TENSOR_MAX_RANK];
    bool compact;
    void *memory; /* freed by tensor_free(); NULL where dl.data is somebody else's */
};

extern const DLDataType dtype_fp32, dtype_fp16, dtype_bf16, dtype_int32, dtype_int64;

bool dtype_equal(DLDataType a, DLDataType b);
size_t dtype_size(DLDataType dtype);

/* "fp32", "fp16", "bf16", "int32" or "int64". */
const char *dtype_name(DLDataType dtype);

/* The float dtype of that name; false if there is none. */
bool dtype_from_name(const char *name, DLDataType *dtype);

/* The nearest value of a float dtype. */
double dtype_round(DLDataType dtype, double value);

/* Zeroed memory for a compact tensor. False if it does not fit in memory. */
bool tensor_alloc(struct tensor *tensor, DLDataType dtype, int rank, const int64_t *shape);

/* A compact tensor in somebody else's memory. */
void tensor_wrap(struct tensor *tensor, DLDataType dtype, int rank, const int64_t *shape, void *data);

/* The first extent entries of dimension dim of another tensor, in its memory. */
void tensor_view(struct tensor *view, const struct tensor *tensor, int dim, int64_t extent);

void tensor_free(struct tensor *tensor);

bool tensor_present(const struct tensor *tensor);
int64_t tensor_count(const struct tensor *tensor); /* elements */
size_t tensor_bytes(const struct tensor *tensor);

/* Element i of a tensor, counted as if it were compact. */
double tensor_get(const struct tensor *tensor, int64_t i);
int64_t tensor_get_int(const struct tensor *tensor, int64_t i);

/* Stores the nearest value of the tensor's dtype. */
void tensor_set(struct tensor *tensor, int64_t i, double value);

#endif
