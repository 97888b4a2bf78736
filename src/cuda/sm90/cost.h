/* SPDX-License-Identifier: MIT */
/* Into how many segments sequences are split, so that few chains use many multiprocessors (docs/maths.md). */
#ifndef KDA_CUDA_SM90_COST_H
#define KDA_CUDA_SM90_COST_H

#include "cuda/plan.h"

/* What the choice depends on. */
struct kda_segment_problem {
    int64_t chains, chunks; /* chunks of an average sequence */
    bool packed;            /* some are longer, some shorter */
    bool may_split;         /* exactly, at whole chunks */
    double kept_every;      /* chunks from one checkpoint to the next; 0: there are none */
    int ctas_per_chain;     /* CTAs that a chain's columns of V take */
    int ctas_per_identity;  /* CTAs that the columns of a segment's A take */
    int processors;         /* multiprocessors, each of which holds two CTAs */
};

/* The number of segments that the cost model expects to be fastest for the general schedule: 1, or at least
 * 3. */
int kda_general_segments(const struct kda_segment_problem *problem);

/* The same for the cluster schedule, where two multiprocessors work one chain or segment at a time: 1, or at
 * least 2. *microseconds becomes the time that the model expects. */
int kda_cluster_segments(const struct kda_segment_problem *problem, double *microseconds);

/* The microseconds that the model expects of the persistent schedule, where a CTA has a multiprocessor to
 * itself. */
double kda_persistent_cost(const struct kda_segment_problem *problem);

/* How many stream-K ranges to use, each long enough to be worth it: at most one for a multiprocessor. 0:
 * none. */
int kda_stream_k_ranges(const struct kda_segment_problem *problem);

/* Does it pay to probe? Where gates are strong, ranges replace kernels that take `otherwise` microseconds. */
bool kda_stream_k_pays(const struct kda_segment_problem *problem, int ranges, double otherwise);

#endif
