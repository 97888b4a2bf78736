/* SPDX-License-Identifier: MIT */
/*
 * The cost model of cutting sequences into segments, in microseconds as measured on an H200.
 *
 * Uncut, a chain's steps follow each other. Cut, a first pass finds each segment's (A, B), which takes its columns of A
 * beside those of V, a scan gives every segment its true state, and a second pass writes the outputs. Before either,
 * every multiprocessor prepares operands. The fused kernel needs none of this, but its steps take longer.
 */
#include "cuda/segments.h"

/* One step of every CTA: alone on its multiprocessor, and beside another. */
#define STEP_ALONE  1.2
#define STEP_BESIDE 2.0
#define STEP_FUSED  2.75
#define PREPARE     2.7 /* a chunk of one head, on one multiprocessor */
#define SCAN_STEP   3.0
#define TWO_KERNELS 20.0 /* and their ramps */
/* The longest sequence of a packed batch, in average ones, and what it costs that CTAs do not end together. */
#define LONGEST   2.0
#define IMBALANCE 1.15
enum { MIN_CHUNKS = 4 /* of a segment */ };

static double steps(int64_t chunks, int64_t ctas, int processors) {
    int64_t waves = (ctas + 2 * processors - 1) / (2 * processors);
    bool alone = ctas <= processors;
    return (double)chunks * (alone ? STEP_ALONE : STEP_BESIDE * (double)waves);
}

static double cost(const struct kda_segment_problem *p, int segments) {
    if (segments == 1)
        return steps(p->chunks, p->chains * p->value_parts, p->processors);
    int64_t each = (p->chunks + segments - 1) / segments;
    int64_t summed = p->chains * ((segments - 2) * (p->value_parts + p->identity_parts) + p->value_parts);
    return steps(each, summed, p->processors) +
           steps(each, p->chains * segments * p->value_parts, p->processors) + (segments - 2) * SCAN_STEP +
           TWO_KERNELS;
}

int kda_segments(const struct kda_segment_problem *problem, double *microseconds) {
    int best = 1;
    *microseconds = cost(problem, 1);
    for (int n = 3; n <= KDA_CUDA_MAX_SEGMENTS && problem->chunks / n >= MIN_CHUNKS; n++)
        if (cost(problem, n) < *microseconds) {
            best = n;
            *microseconds = cost(problem, n);
        }
    *microseconds += (double)(problem->chains * problem->chunks) * PREPARE / problem->processors + TWO_KERNELS;
    return best;
}

double kda_fused_cost(const struct kda_segment_problem *problem) {
    double chunks = (double)problem->chunks, share = (double)problem->chains / problem->processors;
    int64_t rounds = (problem->chains + problem->processors - 1) / problem->processors;
    if (!problem->packed)
        return (double)rounds * chunks * STEP_FUSED;
    double even = share * chunks * IMBALANCE, longest = LONGEST * chunks;
    return (even > longest ? even : longest) * STEP_FUSED;
}
