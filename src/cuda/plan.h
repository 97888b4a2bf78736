/* SPDX-License-Identifier: MIT */
/*
 * How a GPU runs one prefill: the kernels, their order and their grids. A level makes the plan once a call from
 * what the host knows; it reads nothing from the device. docs/hopper.md describes the schedules.
 */
#ifndef KDA_CUDA_PLAN_H
#define KDA_CUDA_PLAN_H

#include "cuda/stream_k.h"

#include <stddef.h>

/* How the work on chains is divided among CTAs. A chain is one sequence of one value head. */
enum kda_schedule {
    KDA_SCHEDULE_ANY,        /* in an override: the fastest one */
    KDA_SCHEDULE_GENERAL,    /* one kernel prepares all operands, another takes states through them */
    KDA_SCHEDULE_PERSISTENT, /* each CTA works chain after chain, in one kernel */
    KDA_SCHEDULE_CLUSTER,    /* a cluster of two CTAs works a chain, or a segment of one */
};

enum kda_kernel {
    KDA_KERNEL_PREPARE, /* the operands of all chunks */
    KDA_KERNEL_GENERAL,
    KDA_KERNEL_GENERAL_LOCAL, /* on segments: (A, B) of each, the scan to true states, outputs from these */
    KDA_KERNEL_GENERAL_SCAN,
    KDA_KERNEL_GENERAL_RESUME,
    KDA_KERNEL_PROBE, /* stream-K: probe the gates at splits, work the ranges, verify and fix up */
    KDA_KERNEL_RANGES,
    KDA_KERNEL_FIXUP,
    KDA_KERNEL_PERSISTENT,
    KDA_KERNEL_CLUSTER,
    KDA_KERNEL_CLUSTER_LOCAL, /* on segments: each from zero, the scan to true states, their history added */
    KDA_KERNEL_CLUSTER_SCAN,
    KDA_KERNEL_ADD_HISTORY,
    KDA_KERNEL_TAKE_INCOMING, /* a state from another call; what a chain's segments together do to any state */
    KDA_KERNEL_CLUSTER_SUMMARIES,
    KDA_KERNEL_CLUSTER_AGAIN, /* whole chains, where a segment may have grown a state */
    KDA_KERNELS
};

struct kda_launch {
    enum kda_kernel kernel;
    unsigned grid[2]; /* CTAs */
    int config;       /* one of the kernel's configurations (kernels.h), 0 where there is only one */
    bool overlaps;    /* starts while the kernel before it ends: programmatic dependent launch */
};

enum { KDA_MAX_LAUNCHES = 8, KDA_MAX_SEGMENTS = 64 };

struct kda_plan {
    const char *level;
    enum kda_schedule schedule;
    int segments;                 /* of every sequence; 1: no sequence is split */
    struct kda_stream_k stream_k; /* stream-K runs before the schedule; without ranges it does not */
    int64_t chunks;               /* of all sequences, for one head, as chunks.h numbers them */
    int count;
    struct kda_launch launches[KDA_MAX_LAUNCHES];
    size_t workspace; /* bytes */
};

/* Starts a plan without launches. */
struct kda_plan kda_plan_begin(const struct kda_prefill *p, const char *level);

void kda_add_launch(struct kda_plan *plan, struct kda_launch launch);

const char *kda_kernel_name(enum kda_kernel kernel);

/* Writes the plan's kernels and grids as one line. */
void kda_plan_kernels(const struct kda_plan *plan, char *text, size_t size);

#endif
