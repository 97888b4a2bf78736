/* SPDX-License-Identifier: MIT */
/* Into how many segments sequences are split so that few chains use many multiprocessors (docs/maths.md). */
#ifndef KDA_CUDA_SM90_COST_H
#define KDA_CUDA_SM90_COST_H

#include "cuda/plan.h"

/* What the choice depends on. */
struct kda_segment_problem {
    int64_t chains, chunks; /* chunks of an average sequence */
    bool packed;            /* some are longer, some shorter */
    bool may_split;         /* exactly, at whole chunks */
    bool checkpoints;       /* states within segments are asked for */
    int ctas_per_chain;     /* CTAs that a chain's columns of V take */
    int ctas_per_identity;  /* CTAs that the columns of a segment's A take */
    int processors;         /* multiprocessors, each of which holds two CTAs */
};

/* 1, or the number of segments, at least 3, that the cost model below expects to be fastest with prepared operands. */
int kda_general_segments(const struct kda_segment_problem *problem);

/* The same for pairs of multiprocessors, each of which works one chain or segment at a time: 1, or at least 2;
 * *microseconds becomes what it expects of the kernels. */
int kda_cluster_segments(const struct kda_segment_problem *problem, double *microseconds);

/* What it expects of the fused kernel, which works a chain in one CTA, one CTA on a multiprocessor. */
double kda_persistent_cost(const struct kda_segment_problem *problem);

/* Ranges of all chains end to end, at most one to a multiprocessor, that are long enough to be worth it; 0: none. Where gates
 * are strong they are worked instead of all else, which takes `otherwise`: does it pay to look? */
int kda_stream_k_ranges(const struct kda_segment_problem *problem);
bool kda_stream_k_pays(const struct kda_segment_problem *problem, int ranges, double otherwise);

#endif
