/* SPDX-License-Identifier: MIT */
/* What is right: how large the error ratio of a result may be. */
#ifndef FLASHKDA_CHECK_H
#define FLASHKDA_CHECK_H

#include "compare.h"
#include "trial.h"

struct tolerance {
    double output, state, checkpoints, dt_bias; /* error ratios */
    double A_log;                               /* by the measure of A_log_error() */
};

/* How far the result of this trial may be from that of the oracle. */
struct tolerance trial_tolerance(const struct trial *trial, const struct trial *oracle);

struct comparison {
    double error_ratio, tolerance;
    bool passed;
};

/* Compares tensors of one shape. What is not finite fails. */
struct comparison compare(const struct tensor *value, const struct tensor *reference, double tolerance);

#endif
