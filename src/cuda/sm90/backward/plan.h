/* SPDX-License-Identifier: MIT */
/* Which backwards Hopper's level takes, how it plans them, and what lies in their workspace. Plain host code: no
 * device is needed. */
#ifndef KDA_CUDA_SM90_BACKWARD_PLAN_H
#define KDA_CUDA_SM90_BACKWARD_PLAN_H

#include "cuda/backward_plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The kernels, in their order (config.cuh). */
enum kda_sm90_backward_kernel {
    KDA_SM90_BACKWARD_PREPARE,   /* the operands of all chunks */
    KDA_SM90_BACKWARD_ADJOINT,   /* R at chunks' ends, dv and the gradient of the first state */
    KDA_SM90_BACKWARD_GRADIENTS, /* of q, k, g and beta */
    KDA_SM90_BACKWARD_SUMS,      /* dA_log and d_dt_bias over segments */
    KDA_SM90_BACKWARD_HEADS      /* dq and dk over the value heads that share q and k */
};

/* K and V; tokens of a segment, which are four chunks. */
enum { KDA_SM90_BACKWARD_DIM = 128, KDA_SM90_BACKWARD_SEGMENT = 128, KDA_SM90_BACKWARD_CHUNKS = 4 };

/* Bytes of a chunk's operands (config.cuh). */
enum { KDA_SM90_BACKWARD_OPERANDS = 30720 };

/* The workspace. Segments and chunks of all sequences share one numbering (cuda/segments.h). */
struct kda_sm90_backward_memory {
    void *operands; /* [HV][4 segments]: of each chunk, without a state */
    uint32_t
        *adjoints;  /* R at each chunk's end, bf16 [HV][4 segments][128 x 128], in 8x8 matrices (config.cuh) */
    uint32_t *done; /* [HV][segments]: halves of V whose R and dX kernel adjoint has stored */
    float *sums;    /* [HV][segments][2][128]: what the segment adds to dA_log, by channel, and to d_dt_bias */
    float *queries,
        *keys; /* gradients of q and k by value head, [B T][HV][128]; only where heads share q and k */
};

/* Lays out the workspace and returns its bytes. NULL: only counts them. */
size_t kda_sm90_backward_lay_out(const struct kda_backward *b, const struct kda_backward_plan *plan,
                                 void *workspace, struct kda_sm90_backward_memory *memory);

/* It takes K = V = 128, a gate, and a prefill's checkpoints at every 128th token;
 * tensors in bf16 whose rows the copy engine can move; gradients of q, k, v, g and beta all asked for. */
bool kda_sm90_backward_takes(const struct kda_backward *b);
void kda_sm90_backward_plan(const struct kda_backward *b, struct kda_backward_plan *plan);
struct kda_backward_launch kda_sm90_backward_launch_at(const struct kda_backward *b,
                                                       const struct kda_backward_plan *plan, int i);

#ifdef __cplusplus
}
#endif

#endif
