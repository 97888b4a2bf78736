/* SPDX-License-Identifier: MIT */
/* The families of decode's cases, one function each. */
#ifndef CHECK_DECODE_FAMILIES_H
#define CHECK_DECODE_FAMILIES_H

#include "check.h"

void decode_shapes(struct check *check);    /* token counts, head dims */
void decode_pairwise(struct check *check);  /* all options together */
void decode_traps(struct check *check);     /* numerical traps */
void decode_nonfinite(struct check *check); /* one NaN or infinity, in every tensor */
void decode_fused(struct check *check);     /* convolutions in front, a norm after */
void decode_properties(
    struct check *check);               /* token by token, verified or committed: what prefill makes of it */
void decode_drift(struct check *check); /* very many tokens, with gates that do not change */
void decode_soak(struct check *check);  /* sequences that join, leave, are preempted and resume */
void decode_cuda(struct check *check);  /* graphs, wild indices: the CUDA backend alone */
void decode_after(struct check *check); /* the same: right after a call that writes what it reads */

#endif
