/* SPDX-License-Identifier: MIT */
/* Tensor maps: what the copy engine needs to know of tensors to move a chunk's rows of one head. */
#ifndef KDA_CUDA_SM90_TENSOR_MAPS_H
#define KDA_CUDA_SM90_TENSOR_MAPS_H

#include "api/backward_problem.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Maps of tensors [B, T, heads, dim] with elements of 2 bytes. A copy brings [32 tokens][64 channels], swizzled
 * by 128 bytes, with zeros for tokens after T; or it takes [32 tokens][16 channels] of out away, swizzled by
 * 32. Coordinates: channel, head, token, batch. */
struct kda_sm90_maps {
    CUtensorMap q, k, v, g, out;
};

/* Of backward's tensors; gradients are taken away as q, k, v and g are brought. */
struct kda_sm90_backward_maps {
    CUtensorMap q, k, v, g, d_out, dq, dk, dv, dg;
};

/* Does the driver have the function that makes maps? */
bool kda_sm90_can_make_maps(void);

/* Makes the maps of a problem that the level plans with them. Does not access the device. */
cudaError_t kda_sm90_map(const struct kda_prefill *p, struct kda_sm90_maps *maps);
cudaError_t kda_sm90_map_backward(const struct kda_backward *b, struct kda_sm90_backward_maps *maps);

#ifdef __cplusplus
}
#endif

#endif
