/* SPDX-License-Identifier: MIT */
/* Compares one case of prefill on every level under test with its expected results. */
#ifndef CHECK_PREFILL_COMPARE_H
#define CHECK_PREFILL_COMPARE_H

#include "check.h"
#include "prefill_case.h"

/* Runs, compares, reports and, where asked for, times a case. */
void prefill_compare(struct check *check, const struct prefill_case *c);

/* RMS(x - ref) / RMS(ref) over the written rows; infinite if x is not finite, NaN if ref is not. With
 * forgive_rounding, half a unit in the last place is taken off every difference of a 16-bit x. */
double prefill_error(const struct tensor *x, const struct tensor *ref, const struct prefill_output *o,
                     bool forgive_rounding);

#endif
