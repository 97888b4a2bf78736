/* SPDX-License-Identifier: MIT */
/* The kernels of the Hopper level (sm_90a), as the host code calls them. */
#ifndef KDA_CUDA_SM90_KERNELS_H
#define KDA_CUDA_SM90_KERNELS_H

#include "api/problem.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Segments that every sequence is cut into, and the memory of their summaries (summaries.cuh). */
struct kda_sm90_segments {
    int count; /* 1: not cut, no memory needed */
    float *summaries;
};

/* Can kda_sm90_chain take this problem? It needs K <= 128, V a multiple of 64, and v in bf16 with rows that start at
 * multiples of 16 bytes. */
bool kda_sm90_takes(const struct kda_prefill *p);

/* CTAs that `columns` columns of V or A take. */
int kda_sm90_parts(int64_t columns);

/* As kda_sm80_chain. `processors`: multiprocessors of the device, which decide how V is shared out. */
cudaError_t kda_sm90_chain(const struct kda_prefill *p, int64_t chunks, const void *operands, int processors,
                           cudaStream_t stream);

/* The same on segments, in three kernels. No sequence may be cut at checkpoints between whole chunks. */
cudaError_t kda_sm90_summarise(const struct kda_prefill *p, int64_t chunks, const void *operands,
                               struct kda_sm90_segments segments, cudaStream_t stream);
cudaError_t kda_sm90_scan(const struct kda_prefill *p, struct kda_sm90_segments segments, cudaStream_t stream);
cudaError_t kda_sm90_resume(const struct kda_prefill *p, int64_t chunks, const void *operands,
                            struct kda_sm90_segments segments, cudaStream_t stream);

/* Can operands have the form of three tiles? K = V = 128, q, k, v and g in bf16 with rows that start at multiples of 16
 * bytes, outputs of 2 bytes likewise, normalised q and k, the bounded gate. */
bool kda_sm90_has_tiles(const struct kda_prefill *p);

/* In that form, all of prefill in one kernel, without a workspace. */
cudaError_t kda_sm90_fused(const struct kda_prefill *p, int processors, cudaStream_t stream);

/* In that form, bytes of the operands of one chunk of one value head. */
size_t kda_sm90_tiles_size(void);

/* In that form, as the kernels above and as kda_sm80_prepare; kda_sm90_scan serves both. */
cudaError_t kda_sm90_tiles_prepare(const struct kda_prefill *p, int64_t chunks, void *operands, int processors,
                                   cudaStream_t stream);
cudaError_t kda_sm90_tiles_chain(const struct kda_prefill *p, int64_t chunks, const void *operands,
                                 int processors, cudaStream_t stream);
cudaError_t kda_sm90_tiles_summarise(const struct kda_prefill *p, int64_t chunks, const void *operands,
                                     struct kda_sm90_segments segments, int processors, cudaStream_t stream);
cudaError_t kda_sm90_tiles_resume(const struct kda_prefill *p, int64_t chunks, const void *operands,
                                  struct kda_sm90_segments segments, int processors, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
