/* SPDX-License-Identifier: MIT */
/*
 * What stands around a prefill on a GPU: a kernel that convolves q, k and v, the prefill's own kernels on what that has
 * written, and a kernel that takes rows of out through the norm and writes the convolutions' states. They serve every
 * level.
 */
#ifndef KDA_CUDA_FUSED_H
#define KDA_CUDA_FUSED_H

#include "api/problem.h"
#include "cuda/device.h"

/* A CTA convolves this many tokens of some channels. */
enum { KDA_CONV_TOKENS = 32, KDA_LEAST_CONV_TOKENS = 8 };

struct kda_cuda_fused {
    struct kda_prefill inner; /* between: q, k and v as they are convolved, out before the norm */
    size_t bytes;             /* of the workspace, at its beginning */
    int conv_tokens;          /* of a CTA; 0: nothing is convolved */
    bool finishes;            /* there is a norm, or a state of a convolution */
    bool overlaps;            /* the last kernel begins while the one before it ends */
};

/* workspace: NULL while only its size counts. */
void kda_cuda_plan_fused(const struct kda_prefill *p, const struct kda_cuda_device *device, void *workspace,
                         struct kda_cuda_fused *fused);

#endif
