/* SPDX-License-Identifier: MIT */
/* The safetensors container: a reader that trusts nothing in the file, and the writer. */
#ifndef FLASHKDA_SAFETENSORS_H
#define FLASHKDA_SAFETENSORS_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    SAFETENSORS_MAX_RANK = 8,
    SAFETENSORS_MAX_HEADER = 100 * 1000 * 1000, /* bytes; the format's own limit */
};

enum safetensors_dtype {
    SAFETENSORS_BOOL,
    SAFETENSORS_U8,
    SAFETENSORS_I8,
    SAFETENSORS_F8_E4M3,
    SAFETENSORS_F8_E5M2,
    SAFETENSORS_U16,
    SAFETENSORS_I16,
    SAFETENSORS_F16,
    SAFETENSORS_BF16,
    SAFETENSORS_U32,
    SAFETENSORS_I32,
    SAFETENSORS_F32,
    SAFETENSORS_U64,
    SAFETENSORS_I64,
    SAFETENSORS_F64,
};

/* "F32", and so on, as the format spells it. */
const char *safetensors_dtype_name(enum safetensors_dtype dtype);

struct safetensors_tensor {
    const char *name;
    enum safetensors_dtype dtype;
    int rank;
    int64_t shape[SAFETENSORS_MAX_RANK];
    const void *data; /* at any alignment; the bytes are little-endian */
    size_t size;      /* bytes: the product of the shape times the size of the dtype */
};

/* A parsed file. Names and metadata live in header, data in the buffer that was parsed. */
struct safetensors {
    json_t *header;
    struct safetensors_tensor *tensors; /* in the order of their data */
    size_t count;
};

/* Parses a whole file of size bytes in memory, which must outlive *file. On failure returns false, with failure(), and
 * leaves nothing to free. Reads nothing outside data[0 .. size - 1], whatever the bytes are. */
bool safetensors_parse(const uint8_t *data, size_t size, struct safetensors *file);

/* Frees what safetensors_parse() allocated. */
void safetensors_free(struct safetensors *file);

/* The tensor of that name, or NULL. */
const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name);

/* The metadata string of that key, or NULL. */
const char *safetensors_metadata(const struct safetensors *file, const char *key);

/* Writes a file of these tensors, in this order, and metadata, an object of strings. An existing file is
 * replaced only by the complete new one. On failure returns false, with failure(). */
bool safetensors_write(const char *path, const struct safetensors_tensor *tensors, size_t count,
                       json_t *metadata);

#endif
