/* SPDX-License-Identifier: MIT */
/*
 * The cost model of cutting sequences into segments, in microseconds, fitted to what an H200 does with K = V = 128.
 *
 * Uncut, a chain's steps follow each other. Cut, a first pass finds each segment's (A, B), which takes its columns of A
 * beside those of V, a scan gives every segment its true state, and a second pass writes the outputs. Before either,
 * every multiprocessor prepares operands. The fused kernel needs none of this, but its steps take longer.
 */
#include "cuda/segments.h"

/* One step of every CTA: alone on its multiprocessor, and beside another. */
struct step {
    double alone, beside;
};
/* What depends on the form of the operands. */
static const struct form {
    double prepare; /* a chunk of one head, on one multiprocessor */
    struct step with_outputs, summarising;
} general = {2.7, {1.2, 2.0}, {0.95, 1.4}}, tiles = {1.0, {1.0, 1.6}, {0.8, 1.3}};
#define STEP_FUSED 2.75
#define SCAN_STEP  2.5
#define LAUNCH     7.5 /* another kernel, and its ramp */
/* The longest sequence of a packed batch, in average ones, and what it costs that CTAs do not end together. */
#define LONGEST   2.0
#define IMBALANCE 1.15
enum { MIN_CHUNKS = 4 /* of a segment */ };

static double steps(struct step step, int64_t chunks, int64_t ctas, int processors) {
    int64_t waves = (ctas + 2 * processors - 1) / (2 * processors);
    bool alone = ctas <= processors;
    return (double)chunks * (alone ? step.alone : step.beside * (double)waves);
}

static const struct form *form_of(const struct kda_segment_problem *p) { return p->tiles ? &tiles : &general; }

static double cost(const struct kda_segment_problem *p, int segments) {
    struct step with_outputs = form_of(p)->with_outputs, summarising = form_of(p)->summarising;
    if (segments == 1)
        return steps(with_outputs, p->chunks, p->chains * p->value_parts, p->processors);
    int64_t each = (p->chunks + segments - 1) / segments;
    int64_t summed = p->chains * ((segments - 2) * (p->value_parts + p->identity_parts) + p->value_parts);
    return steps(summarising, each, summed, p->processors) +
           steps(with_outputs, each, p->chains * segments * p->value_parts, p->processors) +
           (segments - 2) * SCAN_STEP + 2 * LAUNCH;
}

int kda_segments(const struct kda_segment_problem *problem, double *microseconds) {
    int best = 1;
    *microseconds = cost(problem, 1);
    for (int n = 3; problem->may_cut && n <= KDA_CUDA_MAX_SEGMENTS && problem->chunks / n >= MIN_CHUNKS; n++)
        if (cost(problem, n) < *microseconds) {
            best = n;
            *microseconds = cost(problem, n);
        }
    *microseconds +=
        (double)(problem->chains * problem->chunks) * form_of(problem)->prepare / problem->processors + LAUNCH;
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
