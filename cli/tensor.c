/* SPDX-License-Identifier: MIT */
/* Tensors in host memory: allocation, dtypes, values by index. */
#include "tensor.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 64 }; /* of allocated tensors: a cache line, and the widest vector */

const DLDataType dtype_fp32 = {kDLFloat, 32, 1}, dtype_fp16 = {kDLFloat, 16, 1},
                 dtype_bf16 = {kDLBfloat, 16, 1}, dtype_int32 = {kDLInt, 32, 1}, dtype_int64 = {kDLInt, 64, 1};

bool dtype_equal(DLDataType a, DLDataType b) {
    return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

size_t dtype_size(DLDataType dtype) { return dtype.bits / 8u; }

const char *dtype_name(DLDataType dtype) {
    if (dtype.code == kDLInt) {
        return dtype.bits == 32 ? "int32" : "int64";
    }
    return dtype.code == kDLBfloat ? "bf16" : dtype.bits == 16 ? "fp16" : "fp32";
}

bool dtype_from_name(const char *name, DLDataType *dtype) {
    const DLDataType floats[] = {dtype_fp32, dtype_fp16, dtype_bf16};
    for (size_t i = 0; i < sizeof floats / sizeof floats[0]; i++) {
        if (strcmp(name, dtype_name(floats[i])) == 0) {
            *dtype = floats[i];
            return true;
        }
    }
    return false;
}

void tensor_wrap(struct tensor *tensor, DLDataType dtype, int rank, const int64_t *shape, void *data) {
    *tensor = (struct tensor){.compact = true};
    int64_t stride = 1;
    for (int i = rank - 1; i >= 0; i--) {
        tensor->shape[i] = shape[i];
        tensor->strides[i] = stride;
        stride *= shape[i] > 0 ? shape[i] : 1;
    }
    tensor->dl = (DLTensor){.data = data,
                            .device = {kDLCPU, 0},
                            .ndim = rank,
                            .dtype = dtype,
                            .shape = tensor->shape,
                            .strides = tensor->strides};
}

bool tensor_alloc(struct tensor *tensor, DLDataType dtype, int rank, const int64_t *shape) {
    size_t bytes = dtype_size(dtype);
    bool empty = false;
    for (int i = 0; i < rank; i++) {
        empty = empty || shape[i] == 0;
        if (shape[i] > 0 && __builtin_mul_overflow(bytes, (size_t)shape[i], &bytes)) {
            return false;
        }
    }
    if (bytes > PTRDIFF_MAX - ALIGNMENT) {
        return false;
    }
    /* One element too many where the tensor is empty: its data must not be NULL. */
    size_t size = empty ? ALIGNMENT : (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void *memory = aligned_alloc(ALIGNMENT, size);
    if (!memory) {
        return false;
    }
    memset(memory, 0, size);
    tensor_wrap(tensor, dtype, rank, shape, memory);
    tensor->memory = memory;
    return true;
}

void tensor_view(struct tensor *view, const struct tensor *tensor, int dim, int64_t extent) {
    *view = *tensor;
    view->memory = NULL;
    view->dl.shape = view->shape;
    view->dl.strides = view->strides;
    view->shape[dim] = extent;
    for (int i = 0; i < dim; i++) {
        view->compact = view->compact && (view->shape[i] == 1 || extent == tensor->shape[dim]);
    }
}

void tensor_free(struct tensor *tensor) {
    free(tensor->memory);
    *tensor = (struct tensor){0};
}

bool tensor_present(const struct tensor *tensor) { return tensor->dl.data != NULL; }

int64_t tensor_count(const struct tensor *tensor) {
    int64_t count = 1;
    for (int i = 0; i < tensor->dl.ndim; i++) {
        count *= tensor->shape[i];
    }
    return count;
}

size_t tensor_bytes(const struct tensor *tensor) {
    return (size_t)tensor_count(tensor) * dtype_size(tensor->dl.dtype);
}

static void *element(const struct tensor *tensor, int64_t i) {
    int64_t offset = tensor->compact ? i : 0;
    for (int dim = tensor->dl.ndim - 1; !tensor->compact && dim >= 0; dim--) {
        offset += i % tensor->shape[dim] * tensor->strides[dim];
        i /= tensor->shape[dim];
    }
    return (char *)tensor->dl.data + (size_t)offset * dtype_size(tensor->dl.dtype);
}

static double fp16_value(uint16_t bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double size = exponent == 0    ? ldexp(mantissa, -24)
                  : exponent == 31 ? (mantissa ? (double)NAN : (double)INFINITY)
                                   : ldexp(mantissa + 1024, exponent - 25);
    return bits >> 15 ? -size : size;
}

static uint16_t fp16_bits(double value) {
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    double size = fabs(value);
    if (isnan(size)) {
        return 0x7e00;
    }
    int exponent = -13; /* below 2^-14 the step no longer shrinks */
    if (size >= 0x1p-14) {
        frexp(size, &exponent);
    }
    /* Units of the last place; the sum below carries into the exponent where rounding does. */
    double units = size >= 65536 ? INFINITY : nearbyint(ldexp(size, 11 - exponent));
    uint32_t bits = units < INFINITY ? (uint32_t)(exponent + 13) * 1024 + (uint32_t)units : 0x7c00;
    return sign | (uint16_t)(bits < 0x7c00 ? bits : 0x7c00);
}

static double bf16_value(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value = 0;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static uint16_t bf16_bits(double value) {
    float single = (float)value;
    uint32_t wide = 0;
    memcpy(&wide, &single, sizeof wide);
    return isnan(value) ? 0x7fc0 : (uint16_t)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

double dtype_round(DLDataType dtype, double value) {
    if (dtype.bits == 32) {
        return (float)value;
    }
    return dtype.code == kDLBfloat ? bf16_value(bf16_bits(value)) : fp16_value(fp16_bits(value));
}

double tensor_get(const struct tensor *tensor, int64_t i) {
    const void *source = element(tensor, i);
    if (dtype_equal(tensor->dl.dtype, dtype_fp32)) {
        return *(const float *)source;
    }
    uint16_t bits = *(const uint16_t *)source;
    return tensor->dl.dtype.code == kDLBfloat ? bf16_value(bits) : fp16_value(bits);
}

int64_t tensor_get_int(const struct tensor *tensor, int64_t i) {
    const void *source = element(tensor, i);
    return tensor->dl.dtype.bits == 32 ? *(const int32_t *)source : *(const int64_t *)source;
}

void tensor_set(struct tensor *tensor, int64_t i, double value) {
    void *target = element(tensor, i);
    if (dtype_equal(tensor->dl.dtype, dtype_fp32)) {
        *(float *)target = (float)value;
    } else {
        *(uint16_t *)target = tensor->dl.dtype.code == kDLBfloat ? bf16_bits(value) : fp16_bits(value);
    }
}
