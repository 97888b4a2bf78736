/* SPDX-License-Identifier: MIT */
/* Guarded tensors and the number types they hold, written without the compiler's own half types. */
#include "tensor.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    GUARD_BYTES = 256,
    POISON = 0xff,
    ALIGNMENT = 64, /* of allocated tensors: a cache line, and the widest vector */
};

const DLDataType TYPE_FP32 = {kDLFloat, 32, 1};
const DLDataType TYPE_FP16 = {kDLFloat, 16, 1};
const DLDataType TYPE_BF16 = {kDLBfloat, 16, 1};
const DLDataType TYPE_INT32 = {kDLInt, 32, 1};
const DLDataType TYPE_INT64 = {kDLInt, 64, 1};
const DLDataType TYPE_INT8 = {kDLInt, 8, 1};
const DLDataType TYPE_BOOL = {6, 8, 1}; /* kDLBool, which older headers of DLPack do not have */

/* ---- Number types ------------------------------------------------------------------------------ */

struct float_format {
    int digits, min_exponent; /* significand bits with the hidden one; exponent of the smallest normal */
};

static struct float_format float_format(DLDataType type) {
    if (type_equal(type, TYPE_FP16))
        return (struct float_format){11, -14};
    if (type_equal(type, TYPE_BF16))
        return (struct float_format){8, -126};
    return (struct float_format){24, -126};
}

bool type_equal(DLDataType a, DLDataType b) {
    return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

static bool is_float(DLDataType type) { return type.code == kDLFloat || type.code == kDLBfloat; }

const char *type_name(DLDataType type) {
    if (!is_float(type))
        return type.bits == 32 ? "int32" : type.bits == 64 ? "int64" : type.code == kDLInt ? "int8" : "bool";
    if (type.code == kDLBfloat)
        return "bf16";
    return type.bits == 32 ? "fp32" : "fp16";
}

size_t type_size(DLDataType type) { return type.bits / 8u; }

bool type_named(const char *name, DLDataType *type) {
    const DLDataType floats[] = {TYPE_FP32, TYPE_FP16, TYPE_BF16};
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++)
        if (!strcmp(name, type_name(floats[i]))) {
            *type = floats[i];
            return true;
        }
    return false;
}

double type_half_ulp(DLDataType type, double x) {
    struct float_format f = float_format(type);
    int exponent = x == 0 ? f.min_exponent : ilogb(x);
    return ldexp(1, (exponent > f.min_exponent ? exponent : f.min_exponent) - f.digits);
}

static uint16_t encode_fp16(double x) {
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    double size = fabs(x);
    if (isnan(size))
        return 0x7e00;
    int exponent = -13; /* below 2^-14 the step no longer shrinks */
    if (size >= 0x1p-14)
        frexp(size, &exponent);
    /* Units of the last place; the sum below carries into the exponent where rounding does. */
    double units = size >= 65536 ? INFINITY : nearbyint(ldexp(size, 11 - exponent));
    uint32_t bits = units < INFINITY ? (uint32_t)(exponent + 13) * 1024 + (uint32_t)units : 0x7c00;
    return sign | (uint16_t)(bits < 0x7c00 ? bits : 0x7c00);
}

static double decode_fp16(uint16_t bits) {
    double sign = bits & 0x8000 ? -1 : 1;
    int exponent = bits >> 10 & 31;
    int fraction = bits & 1023;
    if (exponent == 31)
        return fraction ? (double)NAN : sign * (double)INFINITY;
    return sign * (exponent ? ldexp(fraction + 1024, exponent - 25) : ldexp(fraction, -24));
}

static uint16_t encode_bf16(double x) {
    float single = (float)x;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    return isnan(x) ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static double decode_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return (double)x;
}

double type_round(DLDataType type, double value) {
    if (type.bits == 32)
        return (double)(float)value;
    return type.code == kDLBfloat ? decode_bf16(encode_bf16(value)) : decode_fp16(encode_fp16(value));
}

/* ---- Layout ------------------------------------------------------------------------------------ */

void *must_allocate(int64_t count, size_t size) {
    void *memory = calloc(count > 0 ? (size_t)count : 1, size);
    if (!memory) {
        fprintf(stderr, "out of memory: %lld times %zu bytes for a test\n", (long long)count, size);
        exit(2);
    }
    return memory;
}

static int64_t at_least_one(int64_t n) { return n > 0 ? n : 1; }

/* Strides of a buffer in row-major order, or with dimensions 1 and 2 exchanged; every step leaves a gap that
 * keeps rows unaligned. */
static void spread(struct tensor *t, bool exchange, int64_t gap, int64_t last_stride) {
    int64_t stride = last_stride;
    for (int i = t->dl.ndim - 1; i >= 0; i--) {
        int d = exchange && (i == 1 || i == 2) ? 3 - i : i;
        t->strides[d] = stride;
        stride = stride * at_least_one(t->shape[d]) + gap;
    }
}

static void choose_strides(struct tensor *t, struct tensor_layout layout) {
    int64_t gap = layout.spacing == SPACING_COMPACT ? 0 : 3;
    bool exchange = layout.spacing == SPACING_HEADS_FIRST && t->dl.ndim >= 3;
    spread(t, exchange, gap, layout.loose_last && gap ? 2 : 1);
    if (layout.spacing == SPACING_REPEAT)
        t->strides[layout.repeat_dim] = 0;
    t->compact = layout.spacing == SPACING_COMPACT;
    t->dl.strides = t->compact ? NULL : t->strides;
}

static size_t item_bytes(const struct tensor *t) { return type_size(t->dl.dtype); }

static void point_into_block(struct tensor *t) {
    t->dl.shape = t->shape;
    t->dl.data = t->block + GUARD_BYTES;
}

void tensor_make(struct tensor *t, DLDataType type, int ndim, const int64_t *shape,
                 struct tensor_layout layout) {
    *t = (struct tensor){.dl = {.device = {kDLCPU, 0}, .ndim = ndim, .dtype = type}};
    int64_t extent = 1;
    memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
    choose_strides(t, layout);
    for (int d = 0; d < ndim; d++)
        extent += (at_least_one(shape[d]) - 1) * t->strides[d];
    t->dl.byte_offset = layout.spacing == SPACING_COMPACT ? 0 : 3 * item_bytes(t);
    t->block_bytes = 2 * (size_t)GUARD_BYTES + t->dl.byte_offset + (size_t)extent * item_bytes(t);
    t->block = must_allocate(1, t->block_bytes);
    memset(t->block, POISON, t->block_bytes);
    point_into_block(t);
}

void tensor_clone(struct tensor *copy, const struct tensor *t) {
    *copy = *t;
    copy->block = must_allocate(1, t->block_bytes);
    if (t->block) /* else it is absent */
        memcpy(copy->block, t->block, t->block_bytes);
    point_into_block(copy);
    if (t->dl.strides)
        copy->dl.strides = copy->strides;
}

void tensor_wrap(struct tensor *t, DLDataType type, int ndim, const int64_t *shape, void *data) {
    *t = (struct tensor){.dl = {.data = data, .device = {kDLCPU, 0}, .ndim = ndim, .dtype = type},
                         .compact = true};
    memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
    spread(t, false, 0, 1);
    t->dl.shape = t->shape;
    t->dl.strides = t->strides;
}

bool tensor_alloc(struct tensor *t, DLDataType type, int ndim, const int64_t *shape) {
    size_t bytes = type_size(type);
    for (int i = 0; i < ndim; i++)
        if (__builtin_mul_overflow(bytes, (size_t)at_least_one(shape[i]), &bytes))
            return false;
    if (bytes > PTRDIFF_MAX - ALIGNMENT)
        return false;
    size_t size = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void *memory = aligned_alloc(ALIGNMENT, size);
    if (!memory)
        return false;
    memset(memory, 0, size);
    tensor_wrap(t, type, ndim, shape, memory);
    t->block = memory;
    t->block_bytes = size;
    return true;
}

void tensor_free(struct tensor *t) {
    free(t->block);
    *t = (struct tensor){0};
}

/* ---- Elements ---------------------------------------------------------------------------------- */

bool tensor_present(const struct tensor *t) { return t->dl.data != NULL; }

int64_t tensor_count(const struct tensor *t) {
    int64_t count = 1;
    for (int d = 0; d < t->dl.ndim; d++)
        count *= t->shape[d];
    return count;
}

size_t tensor_bytes(const struct tensor *t) { return (size_t)tensor_count(t) * item_bytes(t); }

static int64_t offset_of(const struct tensor *t, int64_t i) {
    int64_t offset = t->compact ? i : 0;
    for (int d = t->dl.ndim - 1; !t->compact && d >= 0; d--) {
        offset += i % t->shape[d] * t->strides[d];
        i /= t->shape[d];
    }
    return offset;
}

static unsigned char *element(const struct tensor *t, int64_t i) {
    return (unsigned char *)t->dl.data + t->dl.byte_offset + (size_t)offset_of(t, i) * item_bytes(t);
}

double tensor_get(const struct tensor *t, int64_t i) {
    union {
        float fp32;
        uint16_t half;
        int8_t int8;
        int32_t int32;
        int64_t int64;
    } x;
    memcpy(&x, element(t, i), item_bytes(t));
    if (!is_float(t->dl.dtype))
        return t->dl.dtype.bits == 32 ? x.int32 : t->dl.dtype.bits == 8 ? x.int8 : (double)x.int64;
    if (t->dl.dtype.code == kDLBfloat)
        return decode_bf16(x.half);
    return t->dl.dtype.bits == 32 ? (double)x.fp32 : decode_fp16(x.half);
}

void tensor_set(struct tensor *t, int64_t i, double value) {
    float fp32 = (float)value;
    uint16_t half = t->dl.dtype.code == kDLBfloat ? encode_bf16(value) : encode_fp16(value);
    int64_t int64 = is_float(t->dl.dtype) ? 0 : (int64_t)value;
    int32_t int32 = (int32_t)int64;
    int8_t int8 = (int8_t)int64;
    const void *source = &half;
    if (!is_float(t->dl.dtype))
        source = t->dl.dtype.bits == 32  ? (const void *)&int32
                 : t->dl.dtype.bits == 8 ? (const void *)&int8
                                         : (const void *)&int64;
    else if (t->dl.dtype.bits == 32)
        source = &fp32;
    memcpy(element(t, i), source, item_bytes(t));
}

void tensor_fill(struct tensor *t, double value) {
    for (int64_t i = 0; i < tensor_count(t); i++)
        tensor_set(t, i, value);
}

size_t tensor_extent(const DLTensor *t) {
    int64_t elements = 1, compact = 1;
    for (int d = t->ndim - 1; d >= 0; d--) {
        if (t->shape[d] == 0)
            return 0;
        elements += (t->shape[d] - 1) * (t->strides ? t->strides[d] : compact);
        compact *= t->shape[d];
    }
    return (size_t)elements * type_size(t->dtype);
}

/* ---- Views ------------------------------------------------------------------------------------- */

/* Do its elements lie side by side, in order? */
static bool is_compact(const struct tensor *t) {
    int64_t stride = 1;
    for (int d = t->dl.ndim - 1; d >= 0; d--) {
        if (t->shape[d] != 1 && t->strides[d] != stride)
            return false;
        stride *= at_least_one(t->shape[d]);
    }
    return true;
}

void tensor_view(struct tensor *view, const DLTensor *t) {
    *view = (struct tensor){.dl = *t};
    memcpy(view->shape, t->shape, (size_t)t->ndim * sizeof *t->shape);
    if (t->strides)
        memcpy(view->strides, t->strides, (size_t)t->ndim * sizeof *t->strides);
    else
        spread(view, false, 0, 1);
    view->dl.shape = view->shape;
    view->dl.strides = view->strides;
    view->compact = is_compact(view);
}

void tensor_narrow(struct tensor *view, int dim, int64_t first, int64_t length) {
    view->dl.byte_offset += (uint64_t)(first * view->strides[dim]) * item_bytes(view);
    view->shape[dim] = length;
    view->compact = is_compact(view);
}

/* ---- Bytes ------------------------------------------------------------------------------------- */

bool tensor_same(const struct tensor *a, const struct tensor *b) {
    return !a->block || memcmp(a->block, b->block, a->block_bytes) == 0;
}

bool tensor_unchanged(const struct tensor *now, const struct tensor *before, int lead, const bool *written,
                      const bool *also_written) {
    struct tensor forgiving;
    tensor_clone(&forgiving, before);
    int64_t rows = 1;
    for (int d = 0; d < lead; d++)
        rows *= now->shape[d];
    int64_t row_count = rows ? tensor_count(now) / rows : 0, run = now->shape[now->dl.ndim - 1];
    for (int64_t r = 0; r < rows; r++) {
        if (!(written && written[r]) && !(also_written && also_written[r]))
            continue;
        for (int64_t i = r * row_count; i < (r + 1) * row_count; i += run)
            memcpy(element(&forgiving, i), element(now, i), (size_t)run * item_bytes(now));
    }
    bool same = memcmp(now->block, forgiving.block, now->block_bytes) == 0;
    tensor_free(&forgiving);
    return same;
}
