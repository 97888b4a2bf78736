/* SPDX-License-Identifier: MIT */
/* The kernels of the Hopper level (sm_90a), as the host code calls them. */
#ifndef KDA_CUDA_SM90_KERNELS_H
#define KDA_CUDA_SM90_KERNELS_H

#include "api/decode_problem.h"
#include "cuda/sm90/backward/plan.h"
#include "cuda/sm90/plan.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The kernels of prefill. Each runs as the plan's launch says, in the plan's memory. */
typedef cudaError_t kda_sm90_launcher(const struct kda_prefill *p, const struct kda_plan *plan,
                                      const struct kda_launch *launch, const struct kda_sm90_memory *memory);

/* General: takes states through prepared operands. config: consumer warpgroups. The three others do the same on
 * segments, where no checkpoint lies between whole chunks. */
kda_sm90_launcher kda_sm90_general, kda_sm90_general_local, kda_sm90_general_scan, kda_sm90_general_resume;

/* Stream-K: probe the gates at each split; if all are strong, process the ranges; verify and fix up. It is for
 * gates so strong that every chain forgets its past within a chunk. The schedule's kernels then work the chains
 * that are pending. */
kda_sm90_launcher kda_sm90_probe, kda_sm90_ranges, kda_sm90_fixup;

/* All of prefill in one kernel. config: CTAs on a multiprocessor. */
kda_sm90_launcher kda_sm90_persistent;

/* A cluster of two CTAs works a chain. _again: where sequences are split, chains with a segment that may grow a state,
 * whole. */
kda_sm90_launcher kda_sm90_cluster, kda_sm90_cluster_again;

/* Local pass; scan to true states, final ones included; outputs += O_A S, checkpoints = B + A S. config: of the scan,
 * a CTA's columns of V in eights; of add_history, the CTAs that share a segment. */
kda_sm90_launcher kda_sm90_cluster_local, kda_sm90_cluster_scan, kda_sm90_add_history;

/* For sequences that begin or go on in other calls: before the scan, the state that has come in goes to where it starts from;
 * after the local pass, what all segments of a chain do to any state becomes its summary. */
kda_sm90_launcher kda_sm90_take_incoming, kda_sm90_cluster_summaries;

/* Does kda_sm90_decode take this problem, whose states' rows are whole pieces of 16 bytes? It needs one token
 * in every sequence, no index tensor but state_indices, and bits that may depend on the batch; K = 128 and V a
 * multiple of it; states V first with contiguous columns, and few states if they are in fp32; q, k, v, g, beta
 * and out in bf16, A_log and dt_bias in fp32. */
bool kda_sm90_decode_takes(const struct kda_decode *d, int processors);

/* As kda_sm80_decode. */
cudaError_t kda_sm90_decode(const struct kda_decode *d, int processors);

/* The kernels of backward (backward/plan.h). */
typedef cudaError_t kda_sm90_backward_launcher(const struct kda_backward *b,
                                               const struct kda_backward_plan *plan,
                                               const struct kda_launch *launch,
                                               const struct kda_sm90_backward_memory *memory);
kda_sm90_backward_launcher kda_sm90_backward_prepare, kda_sm90_backward_adjoint, kda_sm90_backward_gradients,
    kda_sm90_backward_sums, kda_sm90_backward_heads;

#ifdef __cplusplus
}
#endif

#endif
