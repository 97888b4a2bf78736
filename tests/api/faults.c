/* SPDX-License-Identifier: MIT */
/* What can be wrong with any tensor. */
#include "faults.h"

#include <stdio.h>

size_t list_fault_cases(struct CMUnitTest *tests, struct fault_case *cases, CMUnitTestFunction test,
                        const struct fault *faults, int fault_count, const char *const *names,
                        int tensor_count) {
    size_t count = 0;
    for (int i = 0; i < fault_count; i++)
        for (int argument = 0; argument < tensor_count; argument++) {
            struct fault_case *c = &cases[count];
            if (faults[i].except >> argument & 1)
                continue;
            c->argument = argument;
            c->fault = &faults[i];
            snprintf(c->name, sizeof c->name, "%s: %s", names[argument], faults[i].name);
            tests[count++] = (struct CMUnitTest){.name = c->name, .test_func = test, .initial_state = c};
        }
    return count;
}

void rank_too_high(struct fixture_tensor *t) { t->shape[t->dl.ndim++] = 1; }
void rank_zero(struct fixture_tensor *t) { t->dl.ndim = 0; }
void rank_negative(struct fixture_tensor *t) { t->dl.ndim = -1; }
void rank_huge(struct fixture_tensor *t) { t->dl.ndim = INT32_MAX; }
void shape_missing(struct fixture_tensor *t) { t->dl.shape = NULL; }
void data_missing(struct fixture_tensor *t) { t->dl.data = NULL; }
void first_dim_wrong(struct fixture_tensor *t) { t->shape[0]++; }
void second_dim_wrong(struct fixture_tensor *t) { t->shape[t->dl.ndim > 1]++; }
void last_dim_wrong(struct fixture_tensor *t) { t->shape[t->dl.ndim - 1]++; }
void dim_negative(struct fixture_tensor *t) { t->shape[0] = -1; }
void dim_lowest(struct fixture_tensor *t) { t->shape[t->dl.ndim - 1] = INT64_MIN; }

/* Sets the stride of dimension d, with the compact ones written out. */
static void set_stride(struct fixture_tensor *t, int d, int64_t stride) {
    fixture_spell_strides(t);
    t->strides[d] = stride;
}

void stride_negative(struct fixture_tensor *t) {
    fixture_spell_strides(t);
    t->strides[0] = -t->strides[0];
}
void last_stride_negative(struct fixture_tensor *t) { set_stride(t, t->dl.ndim - 1, -1); }
void last_stride_two(struct fixture_tensor *t) { set_stride(t, t->dl.ndim - 1, 2); }
void last_stride_zero(struct fixture_tensor *t) { set_stride(t, t->dl.ndim - 1, 0); }
void elements_shared(struct fixture_tensor *t) { set_stride(t, t->dl.ndim > 1, 0); }
/* The first dimension may be of size 1, where a stride means nothing. */
void rows_share_memory(struct fixture_tensor *t) { set_stride(t, t->dl.ndim - 3, 0); }
void rows_overlap(struct fixture_tensor *t) {
    fixture_spell_strides(t);
    t->strides[t->dl.ndim - 3] -= 1;
}
void stride_overflows(struct fixture_tensor *t) { set_stride(t, t->dl.ndim > 1, INT64_MAX / 2); }

static void set_dtype(struct fixture_tensor *t, uint8_t code, uint8_t bits) {
    t->dl.dtype = (DLDataType){code, bits, 1};
}

void dtype_uint8(struct fixture_tensor *t) { set_dtype(t, kDLUInt, 8); }
void dtype_uint32(struct fixture_tensor *t) { set_dtype(t, kDLUInt, 32); }
void dtype_int32(struct fixture_tensor *t) { set_dtype(t, kDLInt, 32); }
void dtype_int64(struct fixture_tensor *t) { set_dtype(t, kDLInt, 64); }
void dtype_fp16(struct fixture_tensor *t) { set_dtype(t, kDLFloat, 16); }
void dtype_fp32(struct fixture_tensor *t) { set_dtype(t, kDLFloat, 32); }
void dtype_fp64(struct fixture_tensor *t) { set_dtype(t, kDLFloat, 64); }
void dtype_lanes(struct fixture_tensor *t) { t->dl.dtype.lanes = 2; }
void dtype_no_lanes(struct fixture_tensor *t) { t->dl.dtype.lanes = 0; }

void misaligned(struct fixture_tensor *t) { t->dl.byte_offset = 1; }
void elsewhere(struct fixture_tensor *t) { t->dl.device.device_type = kDLCUDA; }
