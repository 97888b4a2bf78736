/* SPDX-License-Identifier: MIT */
/* Convolutions before and a gated norm after, written once more: what is right for prefill and decode fused with them. */
#ifndef CHECK_FUSED_H
#define CHECK_FUSED_H

#include "flash_kda.h"
#include "random.h"
#include "tensor.h"

#define FUSED_NORM_EPS 1e-5

enum { CONV_WIDTH = 4, CONV_PAST = CONV_WIDTH - 1, CONVOLUTIONS = 3 };

/* Which of q, k and v have a convolution, whether its channels have a bias, how its parameters and states are stored;
 * and the norm. */
struct fused_options {
    bool conv[CONVOLUTIONS], conv_bias;
    DLDataType conv_type;
    bool norm, norm_gate;
    flash_kda_norm_activation norm_activation;
    const char *name;
};

/* All kinds of it. */
enum { FUSED_KINDS = 7 };
extern const struct fused_options fused_kinds[FUSED_KINDS];

/* One convolution: of q, k or v. */
struct fused_convolution {
    struct tensor raw;                 /* what the call reads; the problem's q, k or v is what becomes of it */
    struct tensor weight, bias, state; /* state: as it is before a call */
};

/* Moves a tensor, which points to its own shape. */
void fused_move(struct tensor *to, struct tensor *from);

/* Weights and, if asked for, a bias of the channels of conv->raw. */
void fused_make_weights(struct fused_convolution *conv, const struct fused_options *o, struct random *r);
/* States, all NaN. Their last two dimensions lie either way round. */
void fused_make_states(struct fused_convolution *conv, const struct fused_options *o, int64_t slots,
                       bool exchange);

/* A channel's output from its inputs, the oldest first. */
double fused_convolve(const struct fused_convolution *conv, int64_t channel, const double inputs[CONV_WIDTH]);

/* The rows of out [.., V] after the norm; gate may be absent. */
void fused_norm(const struct fused_options *o, const struct tensor *weight, const struct tensor *gate,
                int64_t V, struct tensor *out);

#endif
