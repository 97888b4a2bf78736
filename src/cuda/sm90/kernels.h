/* SPDX-License-Identifier: MIT */
/* The kernels of the Hopper level (sm_90a), as the host code calls them. */
#ifndef KDA_CUDA_SM90_KERNELS_H
#define KDA_CUDA_SM90_KERNELS_H

#include "api/decode_problem.h"
#include "cuda/spread.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Segments that every sequence is cut into, and the memory of their summaries (summaries.cuh). */
struct kda_sm90_segments {
    int count; /* 1: not cut, no memory needed */
    float *summaries;
    float *growth; /* [chains][count]: log2, a bound of what a segment's A grows a state by */
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

/* Can operands have the form of three tiles? K = V = 64 or 128, q, k, v and g in bf16 with rows that start at multiples of 16
 * bytes, outputs of 2 bytes likewise, normalised q and k, the sigmoid gate or, for 128, the softplus gate. */
bool kda_sm90_has_tiles(const struct kda_prefill *p);

/* K and V of chains in that form that can be cut or worked by pairs: of all kernels below but kda_sm90_fused. */
enum { KDA_SM90_CUT_DIM = 128 };

/* Columns of A, O_A and O_B that share a unit: a consumer warp's. */
enum { KDA_SM90_UNIT_COLUMNS = 16, KDA_SM90_UNITS = KDA_SM90_CUT_DIM / KDA_SM90_UNIT_COLUMNS };

/* What is measured where a chain is cut, of each consumer warp's columns: log2 of the largest element of the state before,
 * of the first chunk's A, and of the state from zero, the smaller of what it is behind that chunk and in the end. */
struct kda_sm90_proof {
    int16_t before[KDA_SM90_UNITS], A[KDA_SM90_UNITS], kept[KDA_SM90_UNITS];
};

/* Prefill where gates are so strong that every chain forgets its past within a chunk, wherever it is cut: all chains, end
 * to end, in equal parts, one to a multiprocessor. A part begins from zero. That its past was forgotten is measured; where it
 * was not, the call is left to other kernels. */
struct kda_sm90_spread {
    struct kda_spread all; /* without parts there is none of this, and nothing else is needed */
    int32_t *verdict;
    uint8_t *left;                 /* [N][HV]: is the chain cut, if that is the verdict */
    int32_t *looks;                /* [parts], before all others */
    struct kda_stretch *firsts;    /* [parts] */
    struct kda_sm90_proof *proofs; /* [parts] */
    uint16_t *states;              /* bf16 [parts][V K], before the part, as threads have them (spread.cuh) */
    uint16_t *outputs;             /* O_A, bf16 [parts][32][K], of the part's first chunk */
    float *finals;                 /* [chains, or parts if fewer][V K], behind parts that a chain ends with */
};

/* Looks at the gates where chains would be cut; works the parts, if it saw none that is slow; judges, and finishes what can
 * be. */
cudaError_t kda_sm90_look(const struct kda_prefill *p, struct kda_sm90_spread spread, cudaStream_t stream);
cudaError_t kda_sm90_fused_parts(const struct kda_prefill *p, struct kda_sm90_spread spread,
                                 cudaStream_t stream);
cudaError_t kda_sm90_join(const struct kda_prefill *p, struct kda_sm90_spread spread, cudaStream_t stream);

/* In that form, all of prefill in one kernel, without a workspace. This and all that follow leave out chains that were done
 * by `spread`, behind whose kernels they are launched. */
cudaError_t kda_sm90_fused(const struct kda_prefill *p, struct kda_sm90_spread spread, int processors,
                           cudaStream_t stream);

/* Memory of prefill by pairs of multiprocessors where sequences are cut: segment s takes a state S to A S + B, and its
 * outputs are those from zero, O_B, and O_A S. All sequences have as many segments; chains = sequences * value heads. A
 * unit is a log2, of what its elements are to be multiplied by. Of a first segment there is nothing but B. */
struct kda_sm90_cut {
    int segments;      /* of every sequence; 1: not cut, nothing else is needed */
    int64_t skipped;   /* tokens that outputs begin behind: of a first segment, where all have as many */
    float *B;          /* [chains][segments][V][K]; of a first segment the state behind it (cut.cuh) */
    uint16_t *A;       /* fp16 [chains][segments - 1], columns of A as rows of a swizzled tile (operands.cuh) */
    int16_t *A_units;  /* [chains][segments - 1][K / 16], of 16 columns of A each */
    uint16_t *outputs; /* O_A, fp16 [B][T - skipped][HV][K]. O_B is in `out`, as fp16 in units */
    int16_t *output_units; /* [HV][chunks][(K + V) / 16]: of 16 columns of O_A each, then of O_B */
    int16_t *state_units;  /* [chains][segments][V], of S before a segment */
    uint32_t
        *grown; /* [chains][segments]: not 0 where a given beta is not between 0 and 2; NULL: it cannot be */
    bool again; /* for kda_sm90_pairs: only chains with such a segment, whole */
};

/* In that form, two multiprocessors to a chain, without a workspace where it is not cut; where it is, to a segment, from the
 * states that `cut` has. */
cudaError_t kda_sm90_pairs(const struct kda_prefill *p, struct kda_sm90_spread spread, struct kda_sm90_cut cut,
                           cudaStream_t stream);

/* In that form, what becomes of every segment from zero, and of the identity; the true states, the one behind the sequence
 * included; the outputs that these add. `chunks` as for the operands. */
cudaError_t kda_sm90_pairs_cut(const struct kda_prefill *p, struct kda_sm90_spread spread, int64_t chunks,
                               struct kda_sm90_cut cut, cudaStream_t stream);
cudaError_t kda_sm90_compose(const struct kda_prefill *p, struct kda_sm90_spread spread,
                             struct kda_sm90_cut cut, cudaStream_t stream);
cudaError_t kda_sm90_correct(const struct kda_prefill *p, struct kda_sm90_spread spread, int64_t chunks,
                             struct kda_sm90_cut cut, int processors, cudaStream_t stream);

/* Is kda_sm90_decode made for this problem, whose states' rows are whole pieces of 16 bytes? Of every sequence one token, no index
 * tensor but state_indices, bits that may depend on the batch; K = 128 and V a multiple of it; states V first, columns
 * one behind another, and few if in fp32; q, k, v, g, beta and out in bf16, A_log and dt_bias in fp32. */
bool kda_sm90_decode_takes(const struct kda_decode *d, int processors);

/* As kda_sm80_decode. */
cudaError_t kda_sm90_decode(const struct kda_decode *d, int processors);

#ifdef __cplusplus
}
#endif

#endif
