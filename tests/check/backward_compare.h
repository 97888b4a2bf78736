/* SPDX-License-Identifier: MIT */
/* Compares one case of backward on every level under test with its expected results; and the families of cases. */
#ifndef CHECK_BACKWARD_COMPARE_H
#define CHECK_BACKWARD_COMPARE_H

#include "backward_case.h"
#include "check.h"

/* Runs, compares, reports and, where asked for, times a case. */
void backward_compare(struct check *check, const struct backward_case *c);

void backward_pairwise(struct check *check);   /* all options together */
void backward_tiles(struct check *check);      /* what models are trained with */
void backward_traps(struct check *check);      /* odd lengths and head dims, numerical traps */
void backward_properties(struct check *check); /* identities, powers of two, gradients not asked for */
void backward_cuda(struct check *check);       /* what holds on CUDA alone */
void backward_long(struct check *check);       /* thousands of tokens */

#endif
