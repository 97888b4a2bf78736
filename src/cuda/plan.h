/* SPDX-License-Identifier: MIT */
/*
 * How a GPU runs one prefill: which kernels, in which order, on which grids. A level makes the plan once a call, from what
 * the host knows, and reads no device. docs/hopper.md describes the schedules.
 */
#ifndef KDA_CUDA_PLAN_H
#define KDA_CUDA_PLAN_H

#include "cuda/stream_k.h"

#include <stddef.h>

/* Who works a chain: a sequence's tokens of one value head. */
enum kda_schedule {
    KDA_SCHEDULE_ANY,        /* of an override: as is fastest */
    KDA_SCHEDULE_GENERAL,    /* one kernel prepares all operands, another takes the states through them */
    KDA_SCHEDULE_PERSISTENT, /* CTAs that stay, each of which works chain after chain in one kernel */
    KDA_SCHEDULE_CLUSTER,    /* two CTAs of a cluster a chain, or a segment of one */
};

enum kda_kernel {
    KDA_KERNEL_PREPARE, /* operands of all chunks */
    KDA_KERNEL_GENERAL,
    KDA_KERNEL_GENERAL_LOCAL, /* what segments make of a state, the scan, and their outputs from the true states */
    KDA_KERNEL_GENERAL_SCAN,
    KDA_KERNEL_GENERAL_RESUME,
    KDA_KERNEL_PROBE, /* stream-K: probes whether gates are strong where chains are split, works ranges, verifies */
    KDA_KERNEL_RANGES,
    KDA_KERNEL_FIXUP,
    KDA_KERNEL_PERSISTENT,
    KDA_KERNEL_CLUSTER,
    KDA_KERNEL_CLUSTER_LOCAL, /* segments from zero, the scan of their states, what those add to the outputs */
    KDA_KERNEL_CLUSTER_SCAN,
    KDA_KERNEL_ADD_HISTORY,
    KDA_KERNEL_CLUSTER_AGAIN, /* chains whose segments may grow a state, whole */
    KDA_KERNELS
};

struct kda_launch {
    enum kda_kernel kernel;
    unsigned grid[2]; /* CTAs */
    int config;       /* which of the kernel's configurations, 0 where there is one (kernels.h) */
    bool overlaps;    /* begins while the kernel before it ends: programmatic dependent launch */
};

enum { KDA_MAX_LAUNCHES = 8, KDA_MAX_SEGMENTS = 64 };

struct kda_plan {
    const char *level;
    enum kda_schedule schedule;
    int segments;                 /* of every sequence; 1: not split */
    struct kda_stream_k stream_k; /* stream-K, tried before the schedule; without ranges it is not */
    int64_t chunks;               /* of all sequences, of one head, as chunks.h numbers them */
    int count;
    struct kda_launch launches[KDA_MAX_LAUNCHES];
    size_t workspace; /* bytes */
};

/* A plan without launches. */
struct kda_plan kda_plan_begin(const struct kda_prefill *p, const char *level);

void kda_add_launch(struct kda_plan *plan, struct kda_launch launch);

const char *kda_kernel_name(enum kda_kernel kernel);

/* The plan's kernels and grids in a line. */
void kda_plan_kernels(const struct kda_plan *plan, char *text, size_t size);

#endif
