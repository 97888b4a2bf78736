/* SPDX-License-Identifier: MIT */
/*
 * The cost model, in microseconds, fitted to what an H200 does with K = V = 128.
 *
 * In the general schedule all multiprocessors first prepare operands. Unsplit, a chain's steps then follow each
 * other. Split, a first pass finds each segment's (A, B), working the columns of A beside those of V; a scan
 * gives every segment its true state; a second pass writes the outputs. The persistent schedule needs none of
 * this, but its steps take longer.
 */
#include "cuda/sm90/cost.h"

/* A step of every CTA: with one consumer warpgroup on a multiprocessor, and with two. */
struct step {
    double alone, beside;
};
static const struct step WITH_OUTPUTS = {1.2, 2.0}, SUMMARISING = {0.95, 1.4};
#define PREPARE         2.7 /* a chunk of one head, on one multiprocessor */
#define STEP_PERSISTENT 2.15
#define BEGIN           8.2 /* the start and the end of a CTA's chain or segment */
#define SCAN_STEP       2.1
#define LAUNCH          3.75 /* a kernel's launch and ramp */
/* Cluster schedule: time per chunk, unsplit and split; start-up per segment, with that of the kernels after it;
 * a segment's step of the scan. Later segments also propagate the identity and have history added, NOT_FIRST
 * per chunk. */
#define STEP_CLUSTER      1.395
#define STEP_SPLIT        1.74
#define BEGIN_SPLIT       13.5
#define CLUSTER_SCAN_STEP 0.4
#define NOT_FIRST         1.78 /* on one multiprocessor */
/* A checkpoint: stored by a step; of segments that are not first, also finished, on one multiprocessor. */
#define KEEP   0.6
#define FINISH 4.5
/* Stream-K: time per chunk; all its kernels and the identity through the first chunk; a probe in vain. */
#define STEP_RANGE 2.40
#define STREAM_K   30.0
#define FRUITLESS  9.0
/* A packed batch: its longest sequence, in average ones; what it costs that CTAs do not end together. */
#define LONGEST   2.4
#define IMBALANCE 1.15
enum { MIN_CHUNKS = 4 /* of a segment */, MIN_RANGE = 3 };

static double steps(struct step step, int64_t chunks, int64_t ctas, int processors) {
    int64_t waves = (ctas + 2 * processors - 1) / (2 * processors);
    return (double)waves * ((double)chunks * (ctas <= processors ? step.alone : step.beside) + BEGIN);
}

static double general_cost(const struct kda_segment_problem *p, int segments) {
    double prepare = (double)(p->chains * p->chunks) * PREPARE / p->processors + LAUNCH;
    if (segments == 1)
        return prepare + steps(WITH_OUTPUTS, p->chunks, p->chains * p->ctas_per_chain, p->processors) + LAUNCH;
    int64_t each = (p->chunks + segments - 1) / segments;
    int64_t summed =
        p->chains * ((segments - 2) * (p->ctas_per_chain + p->ctas_per_identity) + p->ctas_per_chain);
    return prepare + steps(SUMMARISING, each, summed, p->processors) +
           steps(WITH_OUTPUTS, each, p->chains * segments * p->ctas_per_chain, p->processors) +
           (segments - 2) * SCAN_STEP + 3 * LAUNCH;
}

int kda_general_segments(const struct kda_segment_problem *problem) {
    int best = 1;
    for (int n = 3; problem->may_split && n <= KDA_MAX_SEGMENTS && problem->chunks / n >= MIN_CHUNKS; n++)
        if (general_cost(problem, n) < general_cost(problem, best))
            best = n;
    return best;
}

/* So many microseconds more for a chunk, where each checkpoint takes so many. */
static double kept(const struct kda_segment_problem *p, double checkpoint) {
    return p->kept_every > 0 ? checkpoint / p->kept_every : 0;
}

static double cluster_cost(const struct kda_segment_problem *p, int segments) {
    double longest = (double)p->chunks * (p->packed ? LONGEST : 1);
    int64_t clusters = p->processors / 2, waves = (p->chains * segments + clusters - 1) / clusters;
    if (segments == 1)
        return (double)waves * (longest * (STEP_CLUSTER + kept(p, KEEP)) + BEGIN) + LAUNCH;
    int64_t each = ((int64_t)longest + segments - 1) / segments;
    double others = (double)(p->chains * p->chunks) * (segments - 1) / segments;
    return (double)waves * ((double)each * (STEP_SPLIT + kept(p, KEEP)) + BEGIN_SPLIT) +
           segments * CLUSTER_SCAN_STEP + 3 * LAUNCH + others * (NOT_FIRST + kept(p, FINISH)) / p->processors;
}

int kda_cluster_segments(const struct kda_segment_problem *problem, double *microseconds) {
    int best = 1;
    *microseconds = cluster_cost(problem, 1);
    for (int n = 2; problem->may_split && n <= KDA_MAX_SEGMENTS && n <= problem->chunks; n++)
        if (cluster_cost(problem, n) < *microseconds) {
            best = n;
            *microseconds = cluster_cost(problem, n);
        }
    return best;
}

double kda_persistent_cost(const struct kda_segment_problem *problem) {
    double chunks = (double)problem->chunks, step = STEP_PERSISTENT + kept(problem, KEEP);
    double each = chunks * step + BEGIN;
    int64_t rounds = (problem->chains + problem->processors - 1) / problem->processors;
    if (!problem->packed)
        return (double)rounds * each + LAUNCH;
    double even = (double)problem->chains / problem->processors * each * IMBALANCE;
    double longest = LONGEST * chunks * step;
    return (even > longest ? even : longest) + LAUNCH;
}

int kda_stream_k_ranges(const struct kda_segment_problem *problem) {
    int64_t ranges = problem->chains * problem->chunks / MIN_RANGE;
    int most = problem->processors < KDA_MAX_RANGES ? problem->processors : KDA_MAX_RANGES;
    return ranges < 2 ? 0 : ranges < most ? (int)ranges : most;
}

bool kda_stream_k_pays(const struct kda_segment_problem *problem, int ranges, double otherwise) {
    if (!ranges)
        return false;
    double each = (double)(problem->chains * problem->chunks) / ranges,
           chains = (double)problem->chains / ranges;
    return each * STEP_RANGE + chains * BEGIN + STREAM_K + FRUITLESS < otherwise;
}
