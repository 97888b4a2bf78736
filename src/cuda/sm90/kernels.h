/* SPDX-License-Identifier: MIT */
/* The kernels of the Hopper level (sm_90a), as the host code calls them. */
#ifndef KDA_CUDA_SM90_KERNELS_H
#define KDA_CUDA_SM90_KERNELS_H

#include "api/decode_problem.h"
#include "cuda/sm90/plan.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The kernels of prefill: each as the plan's launch says, in the memory of the plan. */
typedef cudaError_t kda_sm90_launcher(const struct kda_prefill *p, const struct kda_plan *plan,
                                      const struct kda_launch *launch, const struct kda_sm90_memory *memory);

/* General: takes states through prepared operands. config: warpgroups of consumers. The same on segments, in three kernels: no
 * sequence may be split at checkpoints between whole chunks. */
kda_sm90_launcher kda_sm90_general, kda_sm90_general_local, kda_sm90_general_scan, kda_sm90_general_resume;

/* Stream-K, where gates are so strong that every chain forgets its past within a chunk: probes the gates where chains are
 * split; works the ranges, if it saw none that is slow; verifies, and finishes what can be. The kernels that follow leave out
 * the chains that these did. */
kda_sm90_launcher kda_sm90_probe, kda_sm90_ranges, kda_sm90_fixup;

/* All of prefill in one kernel. config: CTAs of a multiprocessor. */
kda_sm90_launcher kda_sm90_persistent;

/* Two CTAs to a chain; where sequences are split, to a segment, from the states that the scan left. _again: only chains with a
 * segment that may grow a state, whole. */
kda_sm90_launcher kda_sm90_cluster, kda_sm90_cluster_again;

/* What becomes of every segment from zero, and of the identity; the true states, the one after the sequence included; the
 * outputs that these add. config: columns of V of a CTA, in eights; CTAs that share a segment. */
kda_sm90_launcher kda_sm90_cluster_local, kda_sm90_cluster_scan, kda_sm90_add_history;

/* Is kda_sm90_decode made for this problem, whose states' rows are whole pieces of 16 bytes? Of every sequence one token, no index
 * tensor but state_indices, bits that may depend on the batch; K = 128 and V a multiple of it; states V first, columns
 * one after another, and few if in fp32; q, k, v, g, beta and out in bf16, A_log and dt_bias in fp32. */
bool kda_sm90_decode_takes(const struct kda_decode *d, int processors);

/* As kda_sm80_decode. */
cudaError_t kda_sm90_decode(const struct kda_decode *d, int processors);

#ifdef __cplusplus
}
#endif

#endif
