/* SPDX-License-Identifier: MIT */
/* A DLTensor after its checks: host addresses and byte strides. */
#ifndef KDA_API_TENSOR_H
#define KDA_API_TENSOR_H

#include "api/dtype.h"
#include "flash_kda.h"

#include <stdbool.h>

enum { KDA_MAX_RANK = 5 };

struct kda_tensor {
    const char *name; /* of the argument, for messages */
    char *data;       /* NULL: the argument was not given */
    enum kda_dtype dtype;
    int rank;
    int64_t shape[KDA_MAX_RANK];
    int64_t stride[KDA_MAX_RANK]; /* bytes */
};

/* What an argument is expected to be. */
struct kda_tensor_spec {
    const char *name;
    const char *form; /* the shape in the header's letters, "[B, T, H, K]" */
    unsigned dtypes;  /* bit i: enum kda_dtype i is allowed */
    int rank;
    const int64_t *shape;     /* expected size of each dimension; -1: any */
    bool last_dim_contiguous; /* as every tensor that is read in rows */
    bool written;             /* no two elements may share memory */
    const DLDevice *device;   /* where the other tensors are */
};

#define KDA_DTYPES_FLOAT (1u << KDA_F32 | 1u << KDA_F16 | 1u << KDA_BF16)
#define KDA_DTYPES_STATE (1u << KDA_F32 | 1u << KDA_BF16)
#define KDA_DTYPES_INDEX (1u << KDA_I32 | 1u << KDA_I64)
#define KDA_DTYPES_FLAG  (1u << KDA_BOOL | 1u << KDA_I8 | 1u << KDA_I32)

/* Checks t against spec and describes it in *out. */
flash_kda_status kda_tensor_check(const DLTensor *t, const struct kda_tensor_spec *spec,
                                  struct kda_tensor *out);

/* Do the two share a byte? Tensors that only interleave, as slices of one fused projection, do not. */
bool kda_tensors_overlap(const struct kda_tensor *a, const struct kda_tensor *b);

/* Same address, dtype, shape and strides. */
bool kda_tensors_identical(const struct kda_tensor *a, const struct kda_tensor *b);

/* Bytes from the first element to the end of the last; 0 if there is none. */
int64_t kda_tensor_extent(const struct kda_tensor *t);

/* Element i of an index tensor of rank 1, or (i, j) of rank 2. */
KDA_INLINE int64_t kda_index(const struct kda_tensor *t, int64_t i, int64_t j) {
    const char *address = t->data + i * t->stride[0] + (t->rank > 1 ? j * t->stride[1] : 0);
    return t->dtype == KDA_I32 ? *(const int32_t *)(const void *)address
                               : *(const int64_t *)(const void *)address;
}

/* Element i of a tensor of flags of rank 1. */
KDA_INLINE bool kda_flag(const struct kda_tensor *t, int64_t i) {
    const char *address = t->data + i * t->stride[0];
    return t->dtype == KDA_I32 ? *(const int32_t *)(const void *)address != 0 : *address != 0;
}

#endif
