/* SPDX-License-Identifier: MIT */
/* Which problems Hopper's level takes, how it plans them, and what lies in its workspace. Plain host code: no
 * device is needed. */
#ifndef KDA_CUDA_SM90_PLAN_H
#define KDA_CUDA_SM90_PLAN_H

#include "api/workspace.h"
#include "cuda/override.h"
#include "cuda/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Columns of V or of A that a consumer warpgroup of the general kernels works. A CTA has one such group or
 * two. */
enum { KDA_SM90_GENERAL_COLUMNS = 64 };

/* K and V that stream-K and the cluster schedule are made for. */
enum { KDA_SM90_DIM = 128 };

/* A consumer warp's columns of A, O_A and O_B, which share an exponent. */
enum { KDA_SM90_EXPONENT_COLUMNS = 16, KDA_SM90_EXPONENTS = KDA_SM90_DIM / KDA_SM90_EXPONENT_COLUMNS };

/* Columns of V that a CTA scans: in the general schedule; in the cluster schedule, times launch.config. */
enum { KDA_SM90_GENERAL_SCAN_COLUMNS = 8, KDA_SM90_CLUSTER_SCAN_COLUMNS = 8 };

/* cluster_summaries: rows of B, or of M, that a CTA takes through all segments. */
enum { KDA_SM90_SUMMARY_ROWS = 16 };

/* add_history: warps of a CTA, CTAs on a multiprocessor, and tokens that a warp works at a time. */
enum { KDA_SM90_HISTORY_WARPS = 8, KDA_SM90_HISTORY_CTAS = 2, KDA_SM90_HISTORY_TOKENS = 16 };

/* The segments of every sequence, and the memory of their summaries (general/summaries.cuh). */
struct kda_sm90_general_memory {
    int count; /* 1: no sequence is split, and no memory is needed */
    float *summaries;
    float *growth; /* [chains][count]: log2 of a bound on what a segment's A grows a state by */
};

/* What is measured at a split, for the columns of each consumer warp: log2 of the largest element of the state
 * before the split, of A of the first chunk after it, and of the local state. `kept` is the smaller of the
 * local state's sizes after that chunk and at the end. */
struct kda_sm90_proof {
    int16_t before[KDA_SM90_EXPONENTS], A[KDA_SM90_EXPONENTS], kept[KDA_SM90_EXPONENTS];
};

/* Stream-K's memory. Where gates are so strong that every chain forgets its past within a chunk, all chains are
 * worked end to end in equal ranges, one for a multiprocessor. A range begins from a zero state. That its past
 * was forgotten is measured; where it was not, the chain is left to the schedule's kernels. */
struct kda_sm90_stream_k {
    struct kda_stream_k split; /* without ranges nothing else is needed */
    int32_t *outcome;
    uint8_t *pending;              /* [N][HV]: is the chain pending, if the outcome is SPLIT_CHAINS */
    int32_t *probes;               /* [ranges]: what the probe saw */
    struct kda_slice *firsts;      /* [ranges]: the slice that each begins with */
    struct kda_sm90_proof *proofs; /* [ranges] */
    uint16_t *states;  /* bf16 [ranges][V K]: the state before each, as threads have it (stream_k/ranges.cuh) */
    uint16_t *outputs; /* O_A of each range's first chunk, bf16 [ranges][32][K] */
    float *finals;     /* [chains, or ranges if fewer][V K]: final states of split chains */
};

/* The cluster schedule's memory where sequences are split. Segment s takes a state S to A S + B. Its outputs
 * are O_B, those from a zero state, plus O_A S. All sequences have as many segments; chains = sequences * value
 * heads. Elements that have an exponent are to be multiplied by 2^exponent. First segments start from the true
 * state and have no A. */
struct kda_sm90_cluster_memory {
    int segments;    /* of every sequence; 1: no sequence is split, and nothing else is needed */
    int64_t skipped; /* tokens in front that O_A lacks: those of a first segment, where all have as many */
    /* [chains][segments][V][K]: B; of a first segment the state after it (cluster/segments.cuh). */
    float *local_states;
    /* fp16 [chains][segments - 1]: columns of A as rows of a swizzled tile (operands.cuh). */
    uint16_t *transitions;
    int16_t *transition_exponents; /* [chains][segments - 1][K / 16]: for 16 columns of A each */
    uint16_t *outputs;             /* O_A, fp16 [B][T - skipped][HV][K]; O_B lies in `out` as scaled fp16 */
    int16_t *output_exponents;     /* [HV][chunks][(K + V) / 16]: for 16 columns of O_A each, then of O_B */
    int16_t *state_exponents;      /* [chains][segments][V]: of the state before a segment */
    /* [chains][segments]: 0 where a given beta is between 0 and 2; NULL: no segment can grow a state. */
    uint32_t *grown;
    /* fp16 [HV][checkpoints][2][128 128]: B and A up to each checkpoint, but for those in first segments
     * (cluster/kept.cuh); NULL: no checkpoint is asked for. Then their exponents, [2][8] of each. */
    uint16_t *kept;
    int16_t *kept_exponents;
    bool again; /* kernel cluster_again: only chains that have such a segment, whole */
};

/* What all kernels of a plan share. */
struct kda_sm90_memory {
    void *operands; /* general: [HV][chunks] (operands.cuh) */
    struct kda_sm90_general_memory general;
    struct kda_sm90_stream_k stream_k;
    struct kda_sm90_cluster_memory cluster;
};

/* Lays out what the plan needs in the workspace and returns the bytes. NULL: only counts them. */
size_t kda_sm90_lay_out(const struct kda_prefill *p, const struct kda_plan *plan, void *workspace,
                        struct kda_sm90_memory *memory);

/* Can the copy engine move a tensor's rows, of elements of 2 bytes? */
bool kda_sm90_can_map(const struct kda_tensor *t);

/* Can the level run this problem? It needs K <= 128, V a multiple of 64, and v in bf16 with rows that start at
 * multiples of 16 bytes. Of a prefill in two halves it takes what the cluster schedule can split. */
bool kda_sm90_takes(const struct kda_prefill *p);

/* Plans a problem that the level takes. */
void kda_sm90_plan(const struct kda_prefill *p, int multiprocessors, const struct kda_override *override,
                   struct kda_plan *plan);

#ifdef __cplusplus
}
#endif

#endif
