/* SPDX-License-Identifier: MIT */
/* What may stand around the recurrence of prefill and decode, after all checks: short convolutions before, a norm after. */
#ifndef KDA_API_FUSED_H
#define KDA_API_FUSED_H

#include "api/tensor.h"

enum { KDA_CONV_WIDTH = 4, KDA_CONV_PAST = KDA_CONV_WIDTH - 1, KDA_MAX_NORM_DIM = 1024 };

/* The convolution of q, k or v; weight.data is NULL without one. */
struct kda_convolution {
    struct kda_tensor weight; /* [channels, KDA_CONV_WIDTH] */
    struct kda_tensor bias;   /* [channels], or not given */
    struct kda_tensor
        state; /* [slots, channels, KDA_CONV_PAST], in any strides: inputs before, the oldest first.
                                 A prefill may have none */
};

/* Members in a macro, so that struct kda_decode has them as its own and as a struct kda_fused. */
#define KDA_FUSED_MEMBERS                                                                \
    struct kda_convolution q_conv, k_conv, v_conv;                                       \
    struct kda_tensor norm_weight, norm_gate; /* [V], [B, T, HV, V]; may not be given */ \
    flash_kda_norm_activation norm_activation;                                           \
    float norm_eps;

struct kda_fused {
    KDA_FUSED_MEMBERS
};

enum { KDA_CONVOLUTIONS = 3 };

/* That of q, k or v, by number. */
static inline const struct kda_convolution *kda_convolution_of(const struct kda_fused *f, int i) {
    return i == 0 ? &f->q_conv : i == 1 ? &f->k_conv : &f->v_conv;
}

static inline bool kda_has_convolution(const struct kda_fused *f) {
    return f->q_conv.weight.data || f->k_conv.weight.data || f->v_conv.weight.data;
}

/* What there is of it, for descriptions: ", between convolutions and a norm", or nothing. f may be NULL. */
const char *kda_fused_words(const struct kda_fused *f);

#endif
