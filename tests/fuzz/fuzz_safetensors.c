/* SPDX-License-Identifier: MIT */
/* libFuzzer target: any bytes as a safetensors file. What the reader accepts must lie inside the file. */
#include "failure.h"
#include "safetensors.h"

#include <stdlib.h>
#include <string.h>

static size_t dtype_size(enum safetensors_dtype dtype) {
    switch (dtype) {
    case SAFETENSORS_BOOL:
    case SAFETENSORS_U8:
    case SAFETENSORS_I8:
    case SAFETENSORS_F8_E4M3:
    case SAFETENSORS_F8_E5M2:
        return 1;
    case SAFETENSORS_U16:
    case SAFETENSORS_I16:
    case SAFETENSORS_F16:
    case SAFETENSORS_BF16:
        return 2;
    case SAFETENSORS_U32:
    case SAFETENSORS_I32:
    case SAFETENSORS_F32:
        return 4;
    case SAFETENSORS_U64:
    case SAFETENSORS_I64:
    case SAFETENSORS_F64:
        return 8;
    }
    abort();
}

static void must(bool holds) {
    if (!holds)
        abort();
}

static void check_tensor(const struct safetensors_tensor *t, const uint8_t *data, size_t size) {
    const uint8_t *begin = t->data;
    size_t bytes = dtype_size(t->dtype);
    must(t->name && t->rank >= 0 && t->rank <= SAFETENSORS_MAX_RANK);
    for (int i = 0; i < t->rank; i++) {
        must(t->shape[i] >= 0);
        must(!__builtin_mul_overflow(bytes, (size_t)t->shape[i], &bytes));
    }
    must(bytes == t->size && t->size <= size);
    if (t->size)
        must(begin >= data && begin <= data + size - t->size);
    must(safetensors_dtype_name(t->dtype) != NULL);
}

/* What a reader of the file does next: looks tensors up by name, and metadata. */
static void check_file(const struct safetensors *file, const uint8_t *data, size_t size) {
    for (size_t i = 0; i < file->count; i++) {
        check_tensor(&file->tensors[i], data, size);
        const struct safetensors_tensor *found = safetensors_find(file, file->tensors[i].name);
        must(found && !strcmp(found->name, file->tensors[i].name));
    }
    must(!safetensors_find(file, "no tensor of this name"));
    const char *gate = safetensors_metadata(file, "gate");
    must(!gate || strlen(gate) <= size);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    /* A copy of exactly the size, so that reading past its end is seen. */
    uint8_t *data = malloc(size ? size : 1);
    struct safetensors file;
    if (!data)
        abort();
    memcpy(data, input, size);
    failed("%s", "");
    if (safetensors_parse(data, size, &file)) {
        check_file(&file, data, size);
        safetensors_free(&file);
    } else {
        must(failure()[0] != '\0' && !strchr(failure(), '\n'));
    }
    free(data);
    return 0;
}
