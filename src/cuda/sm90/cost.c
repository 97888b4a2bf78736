/* SPDX-License-Identifier: MIT */
/*
 * The cost model of cutting sequences into segments, in microseconds, fitted to what an H200 does with K = V = 128.
 *
 * Uncut, a chain's steps follow each other. Cut, a first pass finds each segment's (A, B), which takes its columns of A
 * beside those of V, a scan gives every segment its true state, and a second pass writes the outputs. Before either,
 * every multiprocessor prepares operands. The fused kernel needs none of this, but its steps take longer.
 */
#include "cuda/sm90/cost.h"

/* A step of every CTA: with one warpgroup of consumers to a multiprocessor, and with two. */
struct step {
    double alone, beside;
};
static const struct step WITH_OUTPUTS = {1.2, 2.0}, SUMMARISING = {0.95, 1.4};
#define PREPARE    2.7 /* a chunk of one head, on one multiprocessor */
#define STEP_FUSED 2.15
#define BEGIN      8.2 /* of a CTA's chain or segment, and its end */
#define SCAN_STEP  2.1
#define LAUNCH     3.75 /* a kernel, and its ramp */
/* Of pairs: a step, uncut and cut; where they are cut, a segment's beginning and end with those of the kernels behind, and its
 * composition. What is not of first segments has the identity to be taken through, too, and its outputs corrected. */
#define STEP_PAIR    1.395
#define STEP_CUT     1.74
#define BEGIN_CUT    13.5
#define COMPOSE_STEP 0.4
#define NOT_FIRST    1.78 /* a chunk, on one multiprocessor */
/* Of parts: a step; all kernels and the first chunk's identity; looking, in vain. */
#define STEP_PART 2.40
#define SPREAD    30.0
#define FRUITLESS 9.0
/* The longest sequence of a packed batch, in average ones, and what it costs that CTAs do not end together. */
#define LONGEST   2.4
#define IMBALANCE 1.15
enum { MIN_CHUNKS = 4 /* of a segment */, MIN_PART = 3 };

static double steps(struct step step, int64_t chunks, int64_t ctas, int processors) {
    int64_t waves = (ctas + 2 * processors - 1) / (2 * processors);
    return (double)waves * ((double)chunks * (ctas <= processors ? step.alone : step.beside) + BEGIN);
}

static double cost(const struct kda_segment_problem *p, int segments) {
    double prepare = (double)(p->chains * p->chunks) * PREPARE / p->processors + LAUNCH;
    if (segments == 1)
        return prepare + steps(WITH_OUTPUTS, p->chunks, p->chains * p->value_parts, p->processors) + LAUNCH;
    int64_t each = (p->chunks + segments - 1) / segments;
    int64_t summed = p->chains * ((segments - 2) * (p->value_parts + p->identity_parts) + p->value_parts);
    return prepare + steps(SUMMARISING, each, summed, p->processors) +
           steps(WITH_OUTPUTS, each, p->chains * segments * p->value_parts, p->processors) +
           (segments - 2) * SCAN_STEP + 3 * LAUNCH;
}

int kda_segments(const struct kda_segment_problem *problem) {
    int best = 1;
    for (int n = 3; problem->may_cut && n <= KDA_MAX_SEGMENTS && problem->chunks / n >= MIN_CHUNKS; n++)
        if (cost(problem, n) < cost(problem, best))
            best = n;
    return best;
}

static double cost_of_pairs(const struct kda_segment_problem *p, int segments) {
    double longest = (double)p->chunks * (p->packed ? LONGEST : 1);
    int64_t pairs = p->processors / 2, waves = (p->chains * segments + pairs - 1) / pairs;
    if (segments == 1)
        return (double)waves * (longest * STEP_PAIR + BEGIN) + LAUNCH;
    int64_t each = ((int64_t)longest + segments - 1) / segments;
    double others = (double)(p->chains * p->chunks) * (segments - 1) / segments;
    double first = (double)waves * ((double)each * STEP_CUT + BEGIN_CUT) + segments * COMPOSE_STEP + 3 * LAUNCH;
    return first + (p->checkpoints ? (double)waves * ((double)each * STEP_PAIR + BEGIN)
                                   : others * NOT_FIRST / p->processors);
}

int kda_pairs(const struct kda_segment_problem *problem, double *microseconds) {
    int best = 1;
    *microseconds = cost_of_pairs(problem, 1);
    for (int n = 2; problem->may_cut && n <= KDA_MAX_SEGMENTS && n <= problem->chunks; n++)
        if (cost_of_pairs(problem, n) < *microseconds) {
            best = n;
            *microseconds = cost_of_pairs(problem, n);
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

int kda_parts(const struct kda_segment_problem *problem) {
    int64_t parts = problem->chains * problem->chunks / MIN_PART;
    int most = problem->processors < KDA_MAX_PARTS ? problem->processors : KDA_MAX_PARTS;
    return parts < 2 ? 0 : parts < most ? (int)parts : most;
}

bool kda_spread_pays(const struct kda_segment_problem *problem, int parts, double otherwise) {
    if (!parts)
        return false;
    double each = (double)(problem->chains * problem->chunks) / parts, chains = (double)problem->chains / parts;
    return each * STEP_PART + chains * BEGIN + SPREAD + FRUITLESS < otherwise;
}
