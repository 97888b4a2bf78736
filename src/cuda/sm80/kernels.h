/* SPDX-License-Identifier: MIT */
/* The kernels of the portable CUDA level (sm_80 and later), as the host code calls them. */
#ifndef KDA_CUDA_SM80_KERNELS_H
#define KDA_CUDA_SM80_KERNELS_H

#include "api/decode_problem.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of the operands of one chunk of one value head. */
size_t kda_sm80_operands_size(int64_t key_dim);

/* Writes the operands of `chunks` chunks (operands.cuh) of every value head: [HV][chunks]. */
cudaError_t kda_sm80_prepare(const struct kda_prefill *p, int64_t chunks, void *operands, cudaStream_t stream);

/* Takes every state through its chunks: writes out, final_state and checkpoints at whole chunks. */
cudaError_t kda_sm80_chain(const struct kda_prefill *p, int64_t chunks, const void *operands,
                           cudaStream_t stream);

/* Takes every state through its sequence's tokens. aligned: every row of the states is whole pieces of 16 bytes. */
cudaError_t kda_sm80_decode(const struct kda_decode *d, bool aligned);

/* The same between convolutions and a norm, as far as they are given. */
cudaError_t kda_sm80_decode_fused(const struct kda_decode *d, bool aligned);

#ifdef __cplusplus
}
#endif

#endif
