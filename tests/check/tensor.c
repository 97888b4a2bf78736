/* SPDX-License-Identifier: MIT */
/* Guarded tensors and the number types they hold, written without the compiler's own half types. */
#include "tensor.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD_BYTES = 256, POISON = 0xff };

const DLDataType TYPE_FP32 = {kDLFloat, 32, 1};
const DLDataType TYPE_FP16 = {kDLFloat, 16, 1};
const DLDataType TYPE_BF16 = {kDLBfloat, 16, 1};
const DLDataType TYPE_INT32 = {kDLInt, 32, 1};
const DLDataType TYPE_INT64 = {kDLInt, 64, 1};

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

const char *type_name(DLDataType type) {
    if (type.code == kDLInt)
        return type.bits == 32 ? "int32" : "int64";
    if (type.code == kDLBfloat)
        return "bf16";
    return type.bits == 32 ? "fp32" : "fp16";
}

double type_half_ulp(DLDataType type, double x) {
    struct float_format f = float_format(type);
    int exponent = x == 0 ? f.min_exponent : ilogb(x);
    return ldexp(1, (exponent > f.min_exponent ? exponent : f.min_exponent) - f.digits);
}

static double round_to(DLDataType type, double x) {
    if (!isfinite(x) || x == 0)
        return x;
    double ulp = 2 * type_half_ulp(type, x);
    return nearbyint(x / ulp) * ulp;
}

static uint16_t encode_fp16(double x) {
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    x = fabs(round_to(TYPE_FP16, x));
    if (isnan(x))
        return sign | 0x7e00;
    if (x >= 65536)
        return sign | 0x7c00;
    if (x < 0x1p-14)
        return sign | (uint16_t)(x * 0x1p24);
    int exponent = ilogb(x);
    return sign | (uint16_t)((unsigned)(exponent + 15) << 10 | (unsigned)(ldexp(x, 10 - exponent) - 1024));
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
    float rounded = (float)round_to(TYPE_BF16, x);
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static double decode_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return (double)x;
}

/* ---- Layout ------------------------------------------------------------------------------------ */

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
    t->dl.strides = layout.spacing == SPACING_COMPACT ? NULL : t->strides;
}

static size_t item_bytes(const struct tensor *t) { return t->dl.dtype.bits / 8; }

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
    t->block = malloc(t->block_bytes);
    if (!t->block) {
        fprintf(stderr, "out of memory: %zu bytes for a test tensor\n", t->block_bytes);
        exit(2);
    }
    memset(t->block, POISON, t->block_bytes);
    point_into_block(t);
}

void tensor_clone(struct tensor *copy, const struct tensor *t) {
    *copy = *t;
    copy->block = malloc(t->block_bytes);
    if (!copy->block) {
        fprintf(stderr, "out of memory: %zu bytes for a test tensor\n", t->block_bytes);
        exit(2);
    }
    memcpy(copy->block, t->block, t->block_bytes);
    point_into_block(copy);
    if (t->dl.strides)
        copy->dl.strides = copy->strides;
}

void tensor_free(struct tensor *t) {
    free(t->block);
    *t = (struct tensor){0};
}

/* ---- Elements ---------------------------------------------------------------------------------- */

int64_t tensor_count(const struct tensor *t) {
    int64_t count = 1;
    for (int d = 0; d < t->dl.ndim; d++)
        count *= t->shape[d];
    return count;
}

int64_t tensor_offset(const struct tensor *t, int64_t i) {
    int64_t offset = 0;
    for (int d = t->dl.ndim - 1; d >= 0; d--) {
        offset += i % t->shape[d] * t->strides[d];
        i /= t->shape[d];
    }
    return offset;
}

static unsigned char *element(const struct tensor *t, int64_t i) {
    return (unsigned char *)t->dl.data + t->dl.byte_offset + (size_t)tensor_offset(t, i) * item_bytes(t);
}

double tensor_get(const struct tensor *t, int64_t i) {
    union {
        float fp32;
        uint16_t half;
        int32_t int32;
        int64_t int64;
    } x;
    memcpy(&x, element(t, i), item_bytes(t));
    if (t->dl.dtype.code == kDLInt)
        return t->dl.dtype.bits == 32 ? x.int32 : (double)x.int64;
    if (t->dl.dtype.code == kDLBfloat)
        return decode_bf16(x.half);
    return t->dl.dtype.bits == 32 ? (double)x.fp32 : decode_fp16(x.half);
}

void tensor_set(struct tensor *t, int64_t i, double value) {
    float fp32 = (float)value;
    uint16_t half = t->dl.dtype.code == kDLBfloat ? encode_bf16(value) : encode_fp16(value);
    int64_t int64 = t->dl.dtype.code == kDLInt ? (int64_t)value : 0;
    int32_t int32 = (int32_t)int64;
    const void *source = &half;
    if (t->dl.dtype.code == kDLInt)
        source = t->dl.dtype.bits == 32 ? (const void *)&int32 : (const void *)&int64;
    else if (t->dl.dtype.bits == 32)
        source = &fp32;
    memcpy(element(t, i), source, item_bytes(t));
}

void tensor_fill(struct tensor *t, double value) {
    for (int64_t i = 0; i < tensor_count(t); i++)
        tensor_set(t, i, value);
}

/* ---- Views ------------------------------------------------------------------------------------- */

void tensor_view_make(struct tensor_view *v, const struct tensor *t) {
    v->dl = t->dl;
    memcpy(v->shape, t->shape, sizeof v->shape);
    memcpy(v->strides, t->strides, sizeof v->strides);
    v->dl.shape = v->shape;
    v->dl.strides = v->strides;
}

void tensor_view_skip(struct tensor_view *v, int dim, int64_t first, int64_t length) {
    v->dl.byte_offset += (uint64_t)(first * v->strides[dim]) * v->dl.dtype.bits / 8;
    v->shape[dim] = length;
}

/* ---- Untouched bytes --------------------------------------------------------------------------- */

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
