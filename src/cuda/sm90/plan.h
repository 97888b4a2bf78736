/* SPDX-License-Identifier: MIT */
/* What Hopper's level takes, how it plans that, and what lies in its workspace. Plain host code: no device is needed. */
#ifndef KDA_CUDA_SM90_PLAN_H
#define KDA_CUDA_SM90_PLAN_H

#include "api/workspace.h"
#include "cuda/override.h"
#include "cuda/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Columns of V or of A that a CTA of the general kernels works, or half of what it works. */
enum { KDA_SM90_GENERAL_COLUMNS = 64 };

/* K and V of chains that stream-K and clusters work. */
enum { KDA_SM90_DIM = 128 };

/* Columns of A, O_A and O_B that share an exponent: a consumer warp's. */
enum { KDA_SM90_EXPONENT_COLUMNS = 16, KDA_SM90_EXPONENTS = KDA_SM90_DIM / KDA_SM90_EXPONENT_COLUMNS };

/* Columns of V that a CTA scans: of the general schedule; of clusters, times launch.config. */
enum { KDA_SM90_GENERAL_SCAN_COLUMNS = 8, KDA_SM90_CLUSTER_SCAN_COLUMNS = 8 };

/* add_history: warps of a CTA, CTAs of a multiprocessor, and tokens that a warp works at a time. */
enum { KDA_SM90_HISTORY_WARPS = 8, KDA_SM90_HISTORY_CTAS = 2, KDA_SM90_HISTORY_TOKENS = 16 };

/* Segments that every sequence is split into, and the memory of their summaries (general/summaries.cuh). */
struct kda_sm90_general_memory {
    int count; /* 1: not split, no memory needed */
    float *summaries;
    float *growth; /* [chains][count]: log2, a bound of what a segment's A grows a state by */
};

/* What is measured where a chain is split, of each consumer warp's columns: log2 of the largest element of the state before,
 * of the first chunk's A, and of the state from zero, the smaller of what it is after that chunk and in the end. */
struct kda_sm90_proof {
    int16_t before[KDA_SM90_EXPONENTS], A[KDA_SM90_EXPONENTS], kept[KDA_SM90_EXPONENTS];
};

/* Prefill where gates are so strong that every chain forgets its past within a chunk, wherever it is split: all chains, end
 * to end, in equal ranges, one to a multiprocessor. A range begins from zero. That its past was forgotten is measured; where it
 * was not, the call is left to other kernels. */
struct kda_sm90_stream_k {
    struct kda_stream_k split; /* without ranges there is none of this, and nothing else is needed */
    int32_t *outcome;
    uint8_t *pending;              /* [N][HV]: is the chain split, if that is the outcome */
    int32_t *probes;               /* [ranges], before all others */
    struct kda_slice *firsts;      /* [ranges] */
    struct kda_sm90_proof *proofs; /* [ranges] */
    uint16_t *states;  /* bf16 [ranges][V K], before the range, as threads have them (stream_k/ranges.cuh) */
    uint16_t *outputs; /* O_A, bf16 [ranges][32][K], of the range's first chunk */
    float *finals;     /* [chains, or ranges if fewer][V K], after ranges that a chain ends with */
};

/* Memory of prefill by pairs of multiprocessors where sequences are split: segment s takes a state S to A S + B, and its
 * outputs are those from zero, O_B, and O_A S. All sequences have as many segments; chains = sequences * value heads. A
 * exponent is a log2, of what its elements are to be multiplied by. Of a first segment there is nothing but B. */
struct kda_sm90_cluster_memory {
    int segments;    /* of every sequence; 1: not split, nothing else is needed */
    int64_t skipped; /* tokens that outputs begin after: of a first segment, where all have as many */
    float *
        local_states; /* [chains][segments][V][K]; of a first segment the state after it (cluster/segments.cuh) */
    uint16_t
        *transitions; /* fp16 [chains][segments - 1], columns of A as rows of a swizzled tile (operands.cuh) */
    int16_t *transition_exponents; /* [chains][segments - 1][K / 16], of 16 columns of A each */
    uint16_t *outputs;         /* O_A, fp16 [B][T - skipped][HV][K]. O_B is in `out`, as fp16 in exponents */
    int16_t *output_exponents; /* [HV][chunks][(K + V) / 16]: of 16 columns of O_A each, then of O_B */
    int16_t *state_exponents;  /* [chains][segments][V], of S before a segment */
    uint32_t
        *grown; /* [chains][segments]: not 0 where a given beta is not between 0 and 2; NULL: it cannot be */
    bool again; /* for kda_sm90_pairs: only chains with such a segment, whole */
};

/* All that a plan's kernels share. */
struct kda_sm90_memory {
    void *operands; /* general: [HV][chunks] (operands.cuh) */
    struct kda_sm90_general_memory general;
    struct kda_sm90_stream_k stream_k;
    struct kda_sm90_cluster_memory cluster;
};

/* Places what the plan needs in the workspace; returns its bytes. NULL: only counts them. */
size_t kda_sm90_lay_out(const struct kda_prefill *p, const struct kda_plan *plan, char *workspace,
                        struct kda_sm90_memory *memory);

/* Can the level run this problem? It needs K <= 128, V a multiple of 64, and v in bf16 with rows that start at multiples of
 * 16 bytes. */
bool kda_sm90_takes(const struct kda_prefill *p);

/* Of a problem that it takes. */
void kda_sm90_plan(const struct kda_prefill *p, int multiprocessors, const struct kda_override *override,
                   struct kda_plan *plan);

#ifdef __cplusplus
}
#endif

#endif
