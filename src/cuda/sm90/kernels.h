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

/* Columns of A, O_A and O_B that share a unit: a consumer warp's. */
enum { KDA_SM90_UNIT_COLUMNS = 16 };

/* Memory of prefill by pairs of multiprocessors where sequences are cut: segment s takes a state S to A S + B, and its
 * outputs are those from zero, O_B, and O_A S. All sequences have as many segments; chains = sequences * value heads. A
 * unit is a log2, of what its elements are to be multiplied by. Of a first segment there is nothing but B. */
struct kda_sm90_cut {
    int segments;          /* of every sequence; 1: not cut, nothing else is needed */
    float *B;              /* [chains][segments][V][K]; of a first segment the state behind it */
    uint16_t *A;           /* fp16 [chains][segments], columns of A as rows of a swizzled tile (operands.cuh) */
    int16_t *A_units;      /* [chains][segments][K / 16], of 16 columns of A each */
    uint16_t *outputs;     /* O_A, fp16 [B][T][HV][K]. O_B is in `out`, as fp16 in units */
    int16_t *output_units; /* [HV][chunks][(K + V) / 16]: of 16 columns of O_A each, then of O_B */
    uint16_t *states;      /* fp16 [chains][segments][V][K]: S before a segment */
    int16_t *state_units;  /* [chains][segments][V] */
};

/* In that form, two multiprocessors to a chain, without a workspace where it is not cut; where it is, to a segment, from the
 * states that `cut` has. */
cudaError_t kda_sm90_pairs(const struct kda_prefill *p, struct kda_sm90_cut cut, cudaStream_t stream);

/* In that form, what becomes of every segment from zero, and of the identity; the true states, the one behind the sequence
 * included; the outputs that these add. `chunks` as for the operands. */
cudaError_t kda_sm90_pairs_cut(const struct kda_prefill *p, int64_t chunks, struct kda_sm90_cut cut,
                               cudaStream_t stream);
cudaError_t kda_sm90_compose(const struct kda_prefill *p, struct kda_sm90_cut cut, cudaStream_t stream);
cudaError_t kda_sm90_correct(const struct kda_prefill *p, int64_t chunks, struct kda_sm90_cut cut,
                             int processors, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
