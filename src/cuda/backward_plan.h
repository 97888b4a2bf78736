/* SPDX-License-Identifier: MIT */
/* How a GPU runs one backward: launches in their order. A level makes the plan once a call from what the host knows;
 * it reads nothing from the device. */
#ifndef KDA_CUDA_BACKWARD_PLAN_H
#define KDA_CUDA_BACKWARD_PLAN_H

#include "cuda/segments.h"

#include <stddef.h>

/* Launch number i of a plan. */
struct kda_backward_launch {
    int kernel; /* one of the level's own */
    const char *name;
    unsigned grid[2]; /* CTAs */
    int64_t slab;
    bool overlaps; /* with the launch before it (launch.cuh) */
};

struct kda_backward_plan {
    const char *level;
    int multiprocessors;
    /* Segments, of `segment` tokens each: all of them, of one head, and as many as are worked at a time, a slab. */
    int64_t segment, segments, slab_segments, slabs;
    bool finds_states;    /* those at segments are found again: prefill kept none there */
    bool needs_gradients; /* of q, k, g and beta, or sums over g's; else only of values and states */
    bool needs_sums;      /* dA_log or d_dt_bias */
    bool overlaps;        /* launches may: the device has programmatic dependent launch */
    int count;            /* launches */
    size_t workspace;     /* bytes */
};

/* Starts a plan: what follows from the problem and the device alone. */
struct kda_backward_plan kda_backward_plan_begin(const struct kda_backward *b, const char *level,
                                                 int multiprocessors, bool overlaps);

#endif
