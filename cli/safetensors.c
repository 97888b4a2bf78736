/* SPDX-License-Identifier: MIT */
/* The safetensors container. A file is an 8-byte little-endian header length, a JSON object that gives each
 * tensor's dtype, shape and byte range, and the bytes; the ranges cover the bytes without hole or overlap. */
#include "safetensors.h"

#include "failure.h"
#include "file.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LENGTH_BYTES = 8 };

/* jansson refuses NUL in a key, so that names are C strings. */
static const size_t parse_flags = JSON_REJECT_DUPLICATES;
static const char metadata_key[] = "__metadata__";

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [SAFETENSORS_BOOL] = {"BOOL", 1}, [SAFETENSORS_U8] = {"U8", 1},
    [SAFETENSORS_I8] = {"I8", 1},     [SAFETENSORS_F8_E4M3] = {"F8_E4M3", 1},
    [SAFETENSORS_U16] = {"U16", 2},   [SAFETENSORS_F8_E5M2] = {"F8_E5M2", 1},
    [SAFETENSORS_I16] = {"I16", 2},   [SAFETENSORS_F16] = {"F16", 2},
    [SAFETENSORS_BF16] = {"BF16", 2}, [SAFETENSORS_U32] = {"U32", 4},
    [SAFETENSORS_I32] = {"I32", 4},   [SAFETENSORS_F32] = {"F32", 4},
    [SAFETENSORS_U64] = {"U64", 8},   [SAFETENSORS_I64] = {"I64", 8},
    [SAFETENSORS_F64] = {"F64", 8},
};

const char *safetensors_dtype_name(enum safetensors_dtype dtype) { return dtypes[dtype].name; }

static bool parse_dtype(const json_t *value, enum safetensors_dtype *dtype) {
    const char *name = json_string_value(value);
    for (size_t i = 0; name && i < sizeof dtypes / sizeof dtypes[0]; i++) {
        if (strcmp(name, dtypes[i].name) == 0) {
            *dtype = (enum safetensors_dtype)i;
            return true;
        }
    }
    return false;
}

static bool parse_shape(const json_t *value, struct safetensors_tensor *tensor) {
    if (!json_is_array(value))
        return failed("tensor '%.64s' has no shape", tensor->name);
    if (json_array_size(value) > SAFETENSORS_MAX_RANK) {
        return failed("tensor '%.64s' has %zu dimensions, at most %d are supported", tensor->name,
                      json_array_size(value), SAFETENSORS_MAX_RANK);
    }
    tensor->rank = (int)json_array_size(value);
    for (int i = 0; i < tensor->rank; i++) {
        const json_t *extent = json_array_get(value, (size_t)i);
        if (!json_is_integer(extent) || json_integer_value(extent) < 0) {
            return failed("tensor '%.64s': dimension %d of the shape is not a whole number from 0 up",
                          tensor->name, i);
        }
        tensor->shape[i] = json_integer_value(extent);
    }
    return true;
}

/* Bytes of the tensor; false where the product does not fit, zero extents counted as one, so that every
 * partial product of an accepted shape fits too. */
static bool shape_bytes(const struct safetensors_tensor *tensor, size_t *bytes) {
    size_t product = dtypes[tensor->dtype].size;
    bool empty = false;
    for (int i = 0; i < tensor->rank; i++) {
        empty = empty || tensor->shape[i] == 0;
        if (tensor->shape[i] > 0 && __builtin_mul_overflow(product, (size_t)tensor->shape[i], &product))
            return false;
    }
    *bytes = empty ? 0 : product;
    return product <= INT64_MAX;
}

static bool parse_range(const json_t *value, const uint8_t *data, size_t size,
                        struct safetensors_tensor *tensor) {
    const json_t *first = json_array_get(value, 0);
    const json_t *last = json_array_get(value, 1);
    if (json_array_size(value) != 2 || !json_is_integer(first) || !json_is_integer(last))
        return failed("tensor '%.64s': data_offsets is not a pair of whole numbers", tensor->name);
    json_int_t begin = json_integer_value(first), end = json_integer_value(last);
    if (begin < 0 || end < begin || (uint64_t)end > size) {
        return failed("tensor '%.64s': data_offsets [%" PRId64 ", %" PRId64
                      "] do not lie in the %zu bytes of data",
                      tensor->name, (int64_t)begin, (int64_t)end, size);
    }
    tensor->data = data + begin;
    tensor->size = (size_t)(end - begin);
    return true;
}

static bool parse_tensor(const json_t *value, const uint8_t *data, size_t size,
                         struct safetensors_tensor *tensor) {
    if (!json_is_object(value))
        return failed("tensor '%.64s' is not described by a JSON object", tensor->name);
    if (!parse_dtype(json_object_get(value, "dtype"), &tensor->dtype)) {
        const char *dtype = json_string_value(json_object_get(value, "dtype"));
        return failed("tensor '%.64s' has an unknown dtype '%.16s'", tensor->name, dtype ? dtype : "");
    }
    size_t bytes = 0;
    if (!parse_shape(json_object_get(value, "shape"), tensor) ||
        !parse_range(json_object_get(value, "data_offsets"), data, size, tensor))
        return false;
    if (!shape_bytes(tensor, &bytes))
        return failed("tensor '%.64s': the product of its shape overflows", tensor->name);
    if (bytes != tensor->size) {
        return failed("tensor '%.64s': its shape needs %zu bytes, its data_offsets give %zu", tensor->name,
                      bytes, tensor->size);
    }
    return true;
}

static bool check_metadata(json_t *metadata) {
    const char *key = NULL;
    json_t *value = NULL;
    if (!json_is_object(metadata))
        return failed("%s is not a JSON object", metadata_key);
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value))
            return failed("metadata '%.64s' is not a string", key);
    }
    return true;
}

static int compare_by_data(const void *a, const void *b) {
    const struct safetensors_tensor *left = a, *right = b;
    if (left->data != right->data)
        return (const uint8_t *)left->data < (const uint8_t *)right->data ? -1 : 1;
    return (left->size > right->size) - (left->size < right->size); /* empty ones first */
}

/* Sorts the tensors by their data and checks that they cover it. */
static bool check_cover(struct safetensors *file, const uint8_t *data, size_t size) {
    qsort(file->tensors, file->count, sizeof *file->tensors, compare_by_data);
    size_t covered = 0;
    for (size_t i = 0; i < file->count; i++) {
        const struct safetensors_tensor *tensor = &file->tensors[i];
        size_t begin = (size_t)((const uint8_t *)tensor->data - data);
        if (begin != covered) {
            return failed("the data of tensor '%.64s' %s", tensor->name,
                          begin < covered ? "overlaps that of another" : "comes after a hole in the data");
        }
        covered += tensor->size;
    }
    return covered == size || failed("%zu bytes after the last tensor's data", size - covered);
}

static bool parse_tensors(const uint8_t *data, size_t size, struct safetensors *file) {
    /* One more than needed where there is metadata; never 0. */
    file->tensors = calloc(json_object_size(file->header) + 1, sizeof *file->tensors);
    if (!file->tensors)
        return failed("out of memory for its header");
    const char *name = NULL;
    json_t *value = NULL;
    json_object_foreach(file->header, name, value) {
        if (strcmp(name, metadata_key) == 0) {
            if (!check_metadata(value))
                return false;
            continue;
        }
        struct safetensors_tensor *tensor = &file->tensors[file->count++];
        tensor->name = name;
        if (!parse_tensor(value, data, size, tensor))
            return false;
    }
    return check_cover(file, data, size);
}

static bool read_header_length(const uint8_t *data, size_t size, size_t *length) {
    if (size < LENGTH_BYTES)
        return failed("not a safetensors file: only %zu bytes long", size);
    uint64_t value = 0;
    for (int i = LENGTH_BYTES - 1; i >= 0; i--)
        value = value << 8 | data[i];
    if (value > SAFETENSORS_MAX_HEADER) {
        return failed("not a safetensors file: a header of %" PRIu64 " bytes, at most %d are allowed", value,
                      SAFETENSORS_MAX_HEADER);
    }
    if (value > size - LENGTH_BYTES)
        return failed("truncated: a header of %" PRIu64 " bytes in a file of %zu", value, size);
    *length = (size_t)value;
    return true;
}

bool safetensors_parse(const uint8_t *data, size_t size, struct safetensors *file) {
    *file = (struct safetensors){0};
    size_t length = 0;
    if (!read_header_length(data, size, &length))
        return false;
    const uint8_t *header = data + LENGTH_BYTES, *tensors = header + length;
    if (length == 0 || header[0] != '{')
        return failed("not a safetensors file: its header does not begin with '{'");
    json_error_t reason;
    file->header = json_loadb((const char *)header, length, parse_flags, &reason);
    if (!file->header)
        return failed("its header is no valid JSON: %s (at byte %d)", reason.text, reason.position);
    if (!parse_tensors(tensors, size - LENGTH_BYTES - length, file)) {
        safetensors_free(file);
        return false;
    }
    return true;
}

void safetensors_free(struct safetensors *file) {
    free(file->tensors);
    json_decref(file->header);
    *file = (struct safetensors){0};
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name) {
    for (size_t i = 0; i < file->count; i++)
        if (strcmp(file->tensors[i].name, name) == 0)
            return &file->tensors[i];
    return NULL;
}

const char *safetensors_metadata(const struct safetensors *file, const char *key) {
    return json_string_value(json_object_get(json_object_get(file->header, metadata_key), key));
}

/* ---- Writing ----------------------------------------------------------------------------------- */

static json_t *describe_tensor(const struct safetensors_tensor *tensor, size_t begin) {
    json_t *shape = json_array();
    size_t end = begin + tensor->size;
    for (int i = 0; i < tensor->rank; i++)
        json_array_append_new(shape, json_integer(tensor->shape[i]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtypes[tensor->dtype].name, "shape", shape,
                     "data_offsets", (json_int_t)begin, (json_int_t)end);
}

/* The header's text, padded with spaces so that the data begins at a multiple of its own alignment. */
static char *header_text(const struct safetensors_tensor *tensors, size_t count, json_t *metadata,
                         size_t *length) {
    json_t *header = json_object();
    json_object_set(header, metadata_key, metadata);
    size_t begin = 0;
    for (size_t i = 0; i < count; i++) {
        json_object_set_new(header, tensors[i].name, describe_tensor(&tensors[i], begin));
        begin += tensors[i].size;
    }
    char *compact = json_dumps(header, JSON_COMPACT);
    json_decref(header);
    if (!compact)
        return NULL;
    size_t used = strlen(compact);
    *length = (used + LENGTH_BYTES - 1) / LENGTH_BYTES * LENGTH_BYTES;
    char *text = malloc(*length + 1);
    if (text)
        snprintf(text, *length + 1, "%-*s", (int)*length, compact);
    free(compact);
    return text;
}

bool safetensors_write(const char *path, const struct safetensors_tensor *tensors, size_t count,
                       json_t *metadata) {
    size_t length = 0;
    char *header = header_text(tensors, count, metadata, &length);
    if (!header)
        return failed("%s: out of memory for its header", path);
    uint8_t prefix[LENGTH_BYTES];
    for (int i = 0; i < LENGTH_BYTES; i++)
        prefix[i] = (uint8_t)((uint64_t)length >> 8 * i);
    struct new_file file;
    bool good = new_file_open(&file, path);
    if (good) {
        new_file_write(&file, prefix, sizeof prefix);
        new_file_write(&file, header, length);
        for (size_t i = 0; i < count; i++)
            new_file_write(&file, tensors[i].data, tensors[i].size);
        good = new_file_commit(&file);
    }
    free(header);
    return good;
}
