/* SPDX-License-Identifier: MIT */
/* What stands around a prefill, as its kernels read it: parameters in fp32, in the order of the vectors. */
#ifndef KDA_CPU_FUSED_H
#define KDA_CPU_FUSED_H

#include "api/problem.h"
#include "api/workspace.h"

struct kda_cpu_fused {
    const struct kda_fused *args;
    int64_t padded[KDA_CONVOLUTIONS]; /* channels of a head of q, k and v, padded */
    float *taps
        [KDA_CONVOLUTIONS]; /* [heads][KDA_CONV_WIDTH + 1][padded]: weights and bias; NULL: no convolution */
    float *norm_weight;     /* [padded[2]]; NULL: no norm */
};

/* Memory for it, where p is fused. */
void kda_cpu_lay_out_fused(const struct kda_prefill *p, struct kda_arena *arena, struct kda_cpu_fused *fused);

void kda_cpu_fill_fused(const struct kda_prefill *p, struct kda_cpu_fused *fused);

/* States of convolutions after the call, in pieces: a head of q, k or v of a sequence each. */
int64_t kda_cpu_conv_pieces(const struct kda_prefill *p);
void kda_cpu_conv_piece(const struct kda_prefill *p, int64_t piece);

#endif
