/* SPDX-License-Identifier: MIT */
/* The error ratio RMS(x - ref) / RMS(ref), in the making. */
#ifndef BENCH_COMPARE_H
#define BENCH_COMPARE_H

#include "tensor.h"

#include <flash_kda.h>

struct error {
    double differences, squares; /* over elements that are finite on both sides */
    int64_t count;               /* of these */
    int64_t spread;              /* x is not finite where ref is */
    int64_t lost;                /* x is finite where ref is not */
    int64_t wild;                /* neither is finite */
};

/* One element; `forgiven` is taken off the difference. */
void error_add(struct error *e, double x, double ref, double forgiven);

/* `count` elements of a row of x and of one of ref. With forgive_rounding half a unit in the last place, which rounding to
 * nearest may cost, is taken off every difference of a 16-bit x. */
void error_add_row(struct error *e, const struct tensor *x, int64_t row, const struct tensor *ref,
                   int64_t ref_row, int64_t count, bool forgive_rounding);

/* Over the finite elements; the RMS of ref counts as at least `smallest`. */
double error_ratio(const struct error *e, double smallest);

/* The verdict on all of x: NaN if ref is not finite somewhere, infinite if only x is not. */
double error_of_all(const struct error *e);

/* A whole tensor against one of its shape; NaN if one has more elements. */
double tensor_error(const struct tensor *x, const struct tensor *ref, bool forgive_rounding);

/* dA_log [HV] is a sum of terms of both signs: the largest |error| / sqrt(sum of squared terms) of a head, without what
 * rounding to nearest may cost. dg [B, T, HV, K] is exact and tells the terms; absent dt_bias is 0. */
double A_log_error(const struct tensor *x, const struct tensor *ref, flash_kda_gate gate,
                   const struct tensor *g, const struct tensor *dt_bias, const struct tensor *dg);

/* The error ratio of an exact tensor rounded to a type. */
double rounding_error(const struct tensor *exact, DLDataType type);

/* How many elements are NaN or infinite. */
int64_t count_non_finite(const struct tensor *t);

#endif
