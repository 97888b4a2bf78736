/* SPDX-License-Identifier: MIT */
/* What can be wrong with any tensor. Every test of errors lists those that it tries, and the tensors that they do not make
 * wrong. */
#ifndef API_FAULTS_H
#define API_FAULTS_H

#include "fixture.h"

struct fault {
    const char *name;
    void (*apply)(struct fixture_tensor *t);
    unsigned
        except; /* BITs of tensors that the fault does not make wrong, or that are reported under another name */
};

#define BIT(argument) (1u << (argument))

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
