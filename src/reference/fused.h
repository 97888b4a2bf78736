/* SPDX-License-Identifier: MIT */
/* What stands around the recurrence, in fp64. */
#ifndef KDA_REFERENCE_FUSED_H
#define KDA_REFERENCE_FUSED_H

#include "api/convolution.h"
#include "reference/recurrence.h"

/* Element c of a head of q, k or v at token t: convolved and through SiLU if it has a convolution. */
double kda_load_input(const struct kda_tensor *x, const struct kda_convolution *conv,
                      const struct kda_sequence *s, int64_t t, int64_t head, int64_t c);

/* The token as kda_load_token has it, from convolved q and k. */
struct kda_token kda_load_fused_token(const struct kda_tokens *p, const struct kda_fused *fused,
                                      const struct kda_sequence *s, int64_t t, int64_t head);

/* What element j of a row of out is after the norm, if there is one, from the recurrence's o and the mean square of the
 * row. */
double kda_normed(const struct kda_fused *fused, const struct kda_sequence *s, int64_t t, int64_t head,
                  int64_t j, double o, double mean_square);

#endif
