/* SPDX-License-Identifier: MIT */
/* What is right: the error ratio, and how large it may be. */
#ifndef FLASHKDA_CHECK_H
#define FLASHKDA_CHECK_H

#include "call.h"

struct tolerance {
    double output, state, checkpoints; /* error ratios */
};

/* How far the result of this call may be from that of the oracle. */
struct tolerance call_tolerance(const struct prefill_call *call, const struct prefill_call *oracle,
                                const char *regime);

/* The error ratio of an exact tensor rounded to a dtype. */
double rounding_error(const struct tensor *exact, DLDataType dtype);

struct comparison {
    double error_ratio; /* RMS(value - reference) / RMS(reference); infinite where that is no number */
    double tolerance;
    bool passed;
};

/* Compares tensors of one shape. What is not finite fails. */
struct comparison compare(const struct tensor *value, const struct tensor *reference, double tolerance);

/* How many elements are NaN or infinite. */
int64_t count_non_finite(const struct tensor *tensor);

#endif
