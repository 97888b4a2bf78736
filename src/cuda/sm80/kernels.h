/* SPDX-License-Identifier: MIT */
/* The kernels of the portable CUDA level (sm_80 and later), as the host code calls them. */
#ifndef KDA_CUDA_SM80_KERNELS_H
#define KDA_CUDA_SM80_KERNELS_H

#include "api/decode_problem.h"
#include "cuda/backward_plan.h"
#include "cuda/fused.h"
#include "cuda/plan.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The kernels of prefill. operands: [HV][chunks] (operands.cuh), as numbered in chunks.h. */
typedef cudaError_t kda_sm80_launcher(const struct kda_prefill *p, const struct kda_plan *plan,
                                      const struct kda_launch *launch, void *operands);

/* Writes the operands of all chunks of every value head. */
kda_sm80_launcher kda_sm80_prepare;

/* Takes every state through its chunks: writes out, final_state and checkpoints. */
kda_sm80_launcher kda_sm80_general;

/* Before a prefill's kernels: writes q, k and v as they are convolved. After them, at every level: the norm of out, and
 * the states of the convolutions. */
cudaError_t kda_sm80_convolve(const struct kda_prefill *p, const struct kda_cuda_fused *fused);
cudaError_t kda_sm80_finish(const struct kda_prefill *p, const struct kda_cuda_fused *fused);

/* Takes every state through its sequence's tokens. aligned: the states' rows are whole pieces of 16 bytes. */
cudaError_t kda_sm80_decode(const struct kda_decode *d, bool aligned);

/* The same between convolutions and a norm, those of them that are given. */
cudaError_t kda_sm80_decode_fused(const struct kda_decode *d, bool aligned);

/* The PTX that the level's kernels on the current device were made of: 80 for sm_80's. */
cudaError_t kda_sm80_ptx_version(int *version);

/* The kernels of backward (backward_plan.h). */
typedef cudaError_t kda_sm80_backward_launcher(const struct kda_backward *b,
                                               const struct kda_backward_plan *plan,
                                               const struct kda_backward_launch *launch, void *workspace);
kda_sm80_backward_launcher kda_sm80_backward_prepare, kda_sm80_backward_states, kda_sm80_backward_chains,
    kda_sm80_backward_gradients, kda_sm80_backward_sums;

#ifdef __cplusplus
}
#endif

#endif
