/* SPDX-License-Identifier: MIT */
/* Cases of any size from a captured one: its tokens and heads again and again. */
#ifndef FLASHKDA_CAPTURED_H
#define FLASHKDA_CAPTURED_H

#include "generate.h"

/* Sets what the file of a spec says: the regime to captured, the gate, the dtype, the head dims. A spec without a
 * file stays as it is. On failure returns false, with failure(). */
bool captured_describe(struct case_spec *spec);

/* Makes the case of such a spec: a random one where there is no file; else tokens and heads of the file, again and
 * again, with what it does not hold, lengths and an initial state, as in a random one. On failure as above, and
 * leaves nothing to free. */
bool captured_generate(struct kda_case *c, const struct case_spec *spec);

#endif
