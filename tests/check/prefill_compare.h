/* SPDX-License-Identifier: MIT */
/* Compares one case of prefill on every level under test with its expected results. */
#ifndef CHECK_PREFILL_COMPARE_H
#define CHECK_PREFILL_COMPARE_H

#include "check.h"
#include "prefill_case.h"

/* Runs, compares, reports and, where asked for, times a case. */
void prefill_compare(struct check *check, const struct prefill_case *c);

/* What a property looks at on one level, given what the oracle makes of the case. Reports. */
typedef void prefill_property(struct check *check, struct prefill_problem *p,
                              const struct prefill_results *exact, const char *level, const void *context);

/* Makes a case, runs the oracle, then the property on every level under test. */
void prefill_examine(struct check *check, const struct prefill_case *c, prefill_property *property,
                     const void *context);

/* RMS(x - ref) / RMS(ref) over the written rows; infinite if x is not finite, NaN if ref is not. With
 * forgive_rounding, half a unit in the last place is taken off every difference of a 16-bit x. */
double prefill_error(const struct tensor *x, const struct tensor *ref, const struct prefill_output *o,
                     bool forgive_rounding);

#endif
