/* SPDX-License-Identifier: MIT */
/*
 * The cost model of cutting sequences into segments, in microseconds, fitted to what an H200 does with K = V = 128.
 *
 * Uncut, a chain's steps follow each other. Cut, a first pass finds each segment's (A, B), which takes its columns of A
 * beside those of V, a scan gives every segment its true state, and a second pass writes the outputs. Before either,
 * every multiprocessor prepares operands. The fused kernel needs none of this, but its steps take longer.
 */
#include "cuda/segments.h"

/* A step of every CTA: with one warpgroup of consumers to a multiprocessor, and with two. */
struct step {
    double alone, beside;
};
/* What depends on the form of the operands. */
static const struct form {
    double prepare; /* a chunk of one head, on one multiprocessor */
    struct step with_outputs, summarising;
} general = {2.7, {1.2, 2.0}, {0.95, 1.4}}, tiles = {2.25, {1.2, 2.0}, {0.85, 1.36}};
#define STEP_FUSED 2.35
#define BEGIN      8.2 /* of a CTA's chain or segment, and its end */
#define SCAN_STEP  2.1
#define LAUNCH     3.75 /* a kernel, and its ramp */
/* The longest sequence of a packed batch, in average ones, and what it costs that CTAs do not end together. */
#define LONGEST   2.4
#define IMBALANCE 1.15
enum { MIN_CHUNKS = 4 /* of a segment */ };

static double steps(struct step step, int64_t chunks, int64_t ctas, int processors) {
    int64_t waves = (ctas + 2 * processors - 1) / (2 * processors);
    return (double)waves * ((double)chunks * (ctas <= processors ? step.alone : step.beside) + BEGIN);
}

static double cost(const struct kda_segment_problem *p, int segments) {
    const struct form *form = p->tiles ? &tiles : &general;
    double prepare = (double)(p->chains * p->chunks) * form->prepare / p->processors + LAUNCH;
    if (segments == 1)
        return prepare + steps(form->with_outputs, p->chunks, p->chains * p->value_parts, p->processors) +
               LAUNCH;
    int64_t each = (p->chunks + segments - 1) / segments;
    int64_t summed = p->chains * ((segments - 2) * (p->value_parts + p->identity_parts) + p->value_parts);
    return prepare + steps(form->summarising, each, summed, p->processors) +
           steps(form->with_outputs, each, p->chains * segments * p->value_parts, p->processors) +
           (segments - 2) * SCAN_STEP + 3 * LAUNCH;
}

int kda_segments(const struct kda_segment_problem *problem, double *microseconds) {
    int best = 1;
    *microseconds = cost(problem, 1);
    for (int n = 3; problem->may_cut && n <= KDA_CUDA_MAX_SEGMENTS && problem->chunks / n >= MIN_CHUNKS; n++)
        if (cost(problem, n) < *microseconds) {
            best = n;
            *microseconds = cost(problem, n);
        }
    return best;
}

double kda_fused_cost(const struct kda_segment_problem *problem) {
    double chunks = (double)problem->chunks, each = chunks * STEP_FUSED + BEGIN;
    int64_t rounds = (problem->chains + problem->processors - 1) / problem->processors;
    if (!problem->packed)
        return (double)rounds * each + LAUNCH;
    double even = (double)problem->chains / problem->processors * each * IMBALANCE;
    double longest = LONGEST * chunks * STEP_FUSED;
    return (even > longest ? even : longest) + LAUNCH;
}
