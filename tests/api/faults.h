/* SPDX-License-Identifier: MIT */
/* What can be wrong with any tensor. Every test of errors lists those that it tries, and the tensors that they do not make
 * wrong; each is then a test of its own. */
#ifndef API_FAULTS_H
#define API_FAULTS_H

#include "fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
/* cmocka.h wants the four above first. */
#include <cmocka.h>

struct fault {
    const char *name;
    void (*apply)(struct fixture_tensor *t);
    unsigned
        except; /* BITs of tensors that the fault does not make wrong, or that are reported under another name */
};

#define BIT(argument) (1u << (argument))

/* One fault of one tensor: what a test gets as its state. */
struct fault_case {
    char name[100];
    int argument;
    const struct fault *fault;
};

/* Writes a test for every fault of every tensor that it makes wrong; returns how many. tests and cases have room for
 * fault_count times tensor_count. */
size_t list_fault_cases(struct CMUnitTest *tests, struct fault_case *cases, CMUnitTestFunction test,
                        const struct fault *faults, int fault_count, const char *const *names,
                        int tensor_count);

void rank_too_high(struct fixture_tensor *t);
void rank_zero(struct fixture_tensor *t);
void rank_negative(struct fixture_tensor *t);
void rank_huge(struct fixture_tensor *t);
void shape_missing(struct fixture_tensor *t);
void data_missing(struct fixture_tensor *t);
void first_dim_wrong(struct fixture_tensor *t);
void second_dim_wrong(struct fixture_tensor *t);
void last_dim_wrong(struct fixture_tensor *t);
void dim_negative(struct fixture_tensor *t);
void dim_lowest(struct fixture_tensor *t);
void stride_negative(struct fixture_tensor *t);
void last_stride_negative(struct fixture_tensor *t);
void last_stride_two(struct fixture_tensor *t);
void last_stride_zero(struct fixture_tensor *t);
void elements_shared(struct fixture_tensor *t);
void rows_share_memory(struct fixture_tensor *t); /* of a tensor of rank 3 or more */
void rows_overlap(struct fixture_tensor *t);      /* likewise */
void stride_overflows(struct fixture_tensor *t);
void dtype_uint8(struct fixture_tensor *t);
void dtype_uint32(struct fixture_tensor *t);
void dtype_int32(struct fixture_tensor *t);
void dtype_int64(struct fixture_tensor *t);
void dtype_fp16(struct fixture_tensor *t);
void dtype_fp32(struct fixture_tensor *t);
void dtype_fp64(struct fixture_tensor *t);
void dtype_lanes(struct fixture_tensor *t);
void dtype_no_lanes(struct fixture_tensor *t);
void misaligned(struct fixture_tensor *t);
void elsewhere(struct fixture_tensor *t);

#endif
