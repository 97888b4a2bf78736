/* SPDX-License-Identifier: MIT */
/* Checks of one tensor, and of two tensors against each other. */
#include "api/tensor.h"

#include "api/status.h"

#include <stdio.h>

struct text {
    char characters[160];
};

static struct text shape_text(const int64_t *shape, int rank) {
    struct text text = {"["};
    size_t used = 1;
    for (int i = 0; i < rank && used < sizeof text.characters - 24; i++)
        used += (size_t)snprintf(text.characters + used, sizeof text.characters - used, "%s%lld", i ? ", " : "",
                                 (long long)shape[i]);
    snprintf(text.characters + used, sizeof text.characters - used, "]");
    return text;
}

static struct text dtypes_text(unsigned dtypes) {
    static const char *const names[] = {"float32", "float16", "bfloat16", "int32", "int64", "bool", "int8"};
    struct text text = {""};
    size_t used = 0;
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (dtypes >> i & 1)
            used += (size_t)snprintf(text.characters + used, sizeof text.characters - used, "%s%s",
                                     !used               ? ""
                                     : dtypes >> (i + 1) ? ", "
                                                         : " or ",
                                     names[i]);
    return text;
}

/* As array libraries write it: "float64". */
static struct text dtype_text(DLDataType t) {
    /* By DLPack's code. Those up to complex come in several sizes. */
    enum { SIZED = 6 };
    static const char *const names[] = {"int",
                                        "uint",
                                        "float",
                                        "opaque",
                                        "bfloat",
                                        "complex",
                                        "bool",
                                        "float8_e3m4",
                                        "float8_e4m3",
                                        "float8_e4m3b11fnuz",
                                        "float8_e4m3fn",
                                        "float8_e4m3fnuz",
                                        "float8_e5m2",
                                        "float8_e5m2fnuz",
                                        "float8_e8m0fnu",
                                        "float6_e2m3fn",
                                        "float6_e3m2fn",
                                        "float4_e2m1fn"};
    struct text text;
    size_t size = sizeof text.characters, used;
    if (t.code < SIZED)
        used = (size_t)snprintf(text.characters, size, "%s%d", names[t.code], t.bits);
    else if (t.code < sizeof names / sizeof *names)
        used = (size_t)snprintf(text.characters, size, "%s", names[t.code]);
    else
        used = (size_t)snprintf(text.characters, size, "of DLPack code %d, %d bits", t.code, t.bits);
    if (t.lanes != 1)
        snprintf(text.characters + used, size - used, " in vectors of %d", t.lanes);
    return text;
}

enum { DLPACK_BOOL = 6 }; /* kDLBool of headers from 0.8 on */

/* KDA's name of a DLPack dtype, or -1. */
static int dtype_of(DLDataType t) {
    if (t.lanes != 1)
        return -1;
    if (t.code == kDLFloat)
        return t.bits == 32 ? (int)KDA_F32 : t.bits == 16 ? (int)KDA_F16 : -1;
    if (t.code == kDLBfloat)
        return t.bits == 16 ? (int)KDA_BF16 : -1;
    if (t.code == kDLInt)
        return t.bits == 32 ? (int)KDA_I32 : t.bits == 64 ? (int)KDA_I64 : t.bits == 8 ? (int)KDA_I8 : -1;
    if (t.code == DLPACK_BOOL)
        return t.bits == 8 ? (int)KDA_BOOL : -1;
    return -1;
}

static flash_kda_status check_shape(const DLTensor *t, const struct kda_tensor_spec *spec) {
    if (t->ndim != spec->rank)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT, "%s has %d dimensions; expected %d, %s", spec->name,
                        t->ndim, spec->rank, spec->form);
    if (!t->shape)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT, "%s has no shape (NULL); expected %s", spec->name,
                        spec->form);
    for (int i = 0; i < t->ndim; i++)
        if (t->shape[i] < 0 || (spec->shape[i] >= 0 && t->shape[i] != spec->shape[i])) {
            struct text expected = shape_text(spec->shape, spec->rank);
            return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT, "%s has shape %s; expected %s = %s%s", spec->name,
                            shape_text(t->shape, t->ndim).characters, spec->form, expected.characters,
                            t->shape[i] < 0 ? ", no size below 0" : "");
        }
    return FLASH_KDA_OK;
}

/* Byte strides, none negative, whose extent can be addressed. */
static flash_kda_status check_strides(const DLTensor *t, const struct kda_tensor_spec *spec,
                                      struct kda_tensor *out) {
    int64_t size = (int64_t)kda_dtype_size(out->dtype), compact = 1, extent = size;
    bool empty = false;
    for (int i = t->ndim - 1; i >= 0; i--) {
        int64_t stride = t->strides ? t->strides[i] : compact, reach;
        if (stride < 0)
            return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                            "%s has stride %lld in dimension %d; expected no negative stride", spec->name,
                            (long long)stride, i);
        if (i == t->ndim - 1 && spec->last_dim_contiguous && stride != 1 && t->shape[i] > 1)
            return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                            "%s has stride %lld in its last dimension; expected 1, contiguous", spec->name,
                            (long long)stride);
        empty |= t->shape[i] == 0;
        if (__builtin_mul_overflow(compact, t->shape[i] ? t->shape[i] : 1, &compact) ||
            __builtin_mul_overflow(stride, size, &out->stride[i]) ||
            __builtin_mul_overflow(out->stride[i], t->shape[i] ? t->shape[i] - 1 : 0, &reach) ||
            __builtin_add_overflow(extent, reach, &extent) || extent > INT64_MAX / 4 ||
            compact > INT64_MAX / 32)
            return kda_fail(
                FLASH_KDA_ERROR_INVALID_ARGUMENT,
                "%s has shape %s, whose size in bytes overflows; expected one that can be addressed",
                spec->name, shape_text(t->shape, t->ndim).characters);
    }
    if (!empty && !t->data)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT, "%s has data NULL; expected memory for shape %s",
                        spec->name, shape_text(t->shape, t->ndim).characters);
    return FLASH_KDA_OK;
}

/* Dimensions from the smallest stride to the largest; of equal ones, the smaller dimension first. */
static void sort_dimensions(const struct kda_tensor *t, int *order) {
    for (int n = 0; n < t->rank; n++) {
        int at = n;
        for (; at > 0; at--) {
            int before = order[at - 1];
            if (t->stride[before] < t->stride[n] ||
                (t->stride[before] == t->stride[n] && t->shape[before] <= t->shape[n]))
                break;
            order[at] = before;
        }
        order[at] = n;
    }
}

/* A sufficient test: every dimension steps over all that the dimensions of smaller stride reach. */
static flash_kda_status check_written_once(const struct kda_tensor *t) {
    int order[KDA_MAX_RANK] = {0};
    int64_t size = (int64_t)kda_dtype_size(t->dtype), reach = size;
    sort_dimensions(t, order);
    for (int n = 0; n < t->rank; n++) {
        int64_t stride = t->stride[order[n]], shape = t->shape[order[n]];
        if (shape <= 1)
            continue;
        if (stride < reach)
            return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                            "%s has stride %lld in dimension %d, so that elements share memory; expected each "
                            "element of a written tensor to have its own",
                            t->name, (long long)(stride / size), order[n]);
        reach += stride * (shape - 1);
    }
    return FLASH_KDA_OK;
}

flash_kda_status kda_tensor_check(const DLTensor *t, const struct kda_tensor_spec *spec,
                                  struct kda_tensor *out) {
    flash_kda_status status = check_shape(t, spec);
    if (status)
        return status;
    int dtype = dtype_of(t->dtype);
    if (dtype < 0 || !(spec->dtypes >> dtype & 1))
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT, "%s has dtype %s; expected %s", spec->name,
                        dtype_text(t->dtype).characters, dtypes_text(spec->dtypes).characters);
    if (t->device.device_type != spec->device->device_type || t->device.device_id != spec->device->device_id)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                        "%s is on DLPack device %d:%d; expected %d:%d, where q is", spec->name,
                        (int)t->device.device_type, t->device.device_id, (int)spec->device->device_type,
                        spec->device->device_id);
    *out = (struct kda_tensor){.name = spec->name, .dtype = (enum kda_dtype)dtype, .rank = t->ndim};
    for (int i = 0; i < t->ndim; i++)
        out->shape[i] = t->shape[i];
    status = check_strides(t, spec, out);
    if (status)
        return status;
    /* An empty tensor may come without memory; "given" must still be told from "not given". */
    static char no_memory[8];
    out->data = t->data ? (char *)t->data + t->byte_offset : no_memory;
    if ((uintptr_t)out->data % kda_dtype_size(out->dtype))
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                        "%s is at address %p; expected one aligned to its %zu-byte elements", spec->name,
                        (void *)out->data, kda_dtype_size(out->dtype));
    return spec->written ? check_written_once(out) : FLASH_KDA_OK;
}

int64_t kda_tensor_extent(const struct kda_tensor *t) {
    int64_t extent = (int64_t)kda_dtype_size(t->dtype);
    for (int i = 0; i < t->rank; i++) {
        if (t->shape[i] == 0)
            return 0;
        extent += t->stride[i] * (t->shape[i] - 1);
    }
    return extent;
}

/* Do two tensors [B, T, ...] lie beside each other in rows of the same pitch? */
static bool interleaved(const struct kda_tensor *a, const struct kda_tensor *b) {
    if (a->rank < 3 || b->rank < 3 || a->stride[1] != b->stride[1] || a->stride[1] == 0)
        return false;
    int64_t pitch = a->stride[1], inner[2];
    const struct kda_tensor *both[2] = {a, b};
    for (int i = 0; i < 2; i++) {
        const struct kda_tensor *t = both[i];
        if (t->shape[0] > 1 && t->stride[0] % pitch)
            return false;
        inner[i] = (int64_t)kda_dtype_size(t->dtype);
        for (int d = 2; d < t->rank; d++)
            inner[i] += t->stride[d] * (t->shape[d] - 1);
        if (inner[i] > pitch)
            return false;
    }
    int64_t offset = ((b->data - a->data) % pitch + pitch) % pitch;
    return offset >= inner[0] && offset + inner[1] <= pitch;
}

/* A tensor's dimensions of more than one element, from the largest stride to the smallest, and what the last `rank` of
 * them reach. */
struct extents {
    int rank;
    int64_t stride[KDA_MAX_RANK], shape[KDA_MAX_RANK], size;
};

static struct extents extents_of(const struct kda_tensor *t) {
    struct extents e = {.rank = 0, .size = (int64_t)kda_dtype_size(t->dtype)};
    int order[KDA_MAX_RANK] = {0};
    sort_dimensions(t, order);
    for (int i = t->rank - 1; i >= 0; i--)
        if (t->shape[order[i]] > 1) {
            e.stride[e.rank] = t->stride[order[i]];
            e.shape[e.rank++] = t->shape[order[i]];
        }
    return e;
}

static int64_t reach(const struct extents *e, int from) {
    int64_t bytes = e->size;
    for (int i = from; i < e->rank; i++)
        bytes += e->stride[i] * (e->shape[i] - 1);
    return bytes;
}

/* Do two tensors step through memory together, each in its own part of every step? A step is a page that both have a part
 * of, then perhaps a row within it, and so on. */
static bool paged(const struct kda_tensor *a, const struct kda_tensor *b) {
    const struct extents in_a = extents_of(a), in_b = extents_of(b);
    int64_t offset = b->data - a->data;
    for (int d = 0; d < in_a.rank && d < in_b.rank && in_a.stride[d] == in_b.stride[d]; d++) {
        int64_t step = in_a.stride[d], of_a = reach(&in_a, d + 1), of_b = reach(&in_b, d + 1);
        if (!step)
            return false;
        /* The parts of b that lie nearest to one of a, after its beginning and before it. */
        int64_t after = (offset % step + step) % step, before = after - step;
        bool meets_after = after < of_a, meets_before = -before < of_b;
        if (!meets_after && !meets_before)
            return true;
        if ((meets_after && meets_before) || after + step < of_a || step - before < of_b)
            return false;
        offset = meets_after ? after : before;
    }
    return false;
}

bool kda_tensors_overlap(const struct kda_tensor *a, const struct kda_tensor *b) {
    int64_t a_bytes = kda_tensor_extent(a), b_bytes = kda_tensor_extent(b);
    if (!a_bytes || !b_bytes || a->data + a_bytes <= b->data || b->data + b_bytes <= a->data)
        return false;
    return !interleaved(a, b) && !paged(a, b);
}

bool kda_tensors_identical(const struct kda_tensor *a, const struct kda_tensor *b) {
    if (a->data != b->data || a->dtype != b->dtype || a->rank != b->rank)
        return false;
    for (int i = 0; i < a->rank; i++)
        if (a->shape[i] != b->shape[i] || (a->shape[i] > 1 && a->stride[i] != b->stride[i]))
            return false;
    return true;
}
