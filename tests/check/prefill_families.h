/* SPDX-License-Identifier: MIT */
/* The families of prefill's cases, one function each. */
#ifndef CHECK_PREFILL_FAMILIES_H
#define CHECK_PREFILL_FAMILIES_H

#include "check.h"

void prefill_lengths(struct check *check);    /* odd lengths, empty sequences, head dims, segments */
void prefill_marks(struct check *check);      /* sequences from zero, a padding slot, int64 indices */
void prefill_fused(struct check *check);      /* convolutions before and a gated norm after */
void prefill_pairwise(struct check *check);   /* all options together */
void prefill_traps(struct check *check);      /* numerical traps of a few hundred tokens */
void prefill_nonfinite(struct check *check);  /* one NaN or infinity, in every tensor */
void prefill_properties(struct check *check); /* batch invariance, carried state */
void prefill_cuda(struct check *check);       /* graphs, wild indices, devices: the CUDA backend alone */
void prefill_long(struct check *check);       /* accuracy table, traps of thousands of tokens, speed */

#endif
