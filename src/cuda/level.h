/* SPDX-License-Identifier: MIT */
/* The levels of the CUDA backend: one row each, one folder each. */
#ifndef KDA_CUDA_LEVEL_H
#define KDA_CUDA_LEVEL_H

#include "api/decode_problem.h"
#include "cuda/backward_plan.h"
#include "cuda/device.h"

/* How one decode runs: in one kernel. */
struct kda_decode_plan {
    const char *kernel, *does; /* its name, and what it does in words */
    int multiprocessors;
    bool aligned; /* every row of the states is whole pieces of 16 bytes */
};

/* Do convolutions or a norm stand around the recurrence? */
bool kda_decode_is_fused(const struct kda_decode *d);

struct kda_cuda_level {
    const char *name;
    bool (*runs_on)(const struct kda_cuda_device *device);

    /* Prefill. takes: does the level take this problem? plan: completes a plan that kda_plan_begin has started.
     * launch: launches the plan's kernel number i. */
    bool (*takes)(const struct kda_prefill *p);
    void (*plan)(const struct kda_prefill *p, int multiprocessors, const struct kda_override *override,
                 struct kda_plan *plan);
    cudaError_t (*launch)(const struct kda_prefill *p, const struct kda_plan *plan, int i, void *workspace);

    /* Decode, likewise. The caller has filled in what the problem and the device say. */
    bool (*decode_takes)(const struct kda_decode *d, const struct kda_decode_plan *plan);
    void (*decode_plan)(const struct kda_decode *d, struct kda_decode_plan *plan);
    cudaError_t (*decode)(const struct kda_decode *d, const struct kda_decode_plan *plan);

    /* Backward, likewise; takes is NULL in a level that has none. plan: completes a plan that kda_backward_plan_begin
     * has started. launch_at: launch number i of the plan, below its count. */
    bool (*backward_takes)(const struct kda_backward *b);
    void (*backward_plan)(const struct kda_backward *b, struct kda_backward_plan *plan);
    struct kda_backward_launch (*backward_launch_at)(const struct kda_backward *b,
                                                     const struct kda_backward_plan *plan, int i);
    cudaError_t (*backward_launch)(const struct kda_backward *b, const struct kda_backward_plan *plan,
                                   const struct kda_backward_launch *launch, void *workspace);
};

extern const struct kda_cuda_level kda_sm80_level;
#ifdef KDA_WITH_SM90
extern const struct kda_cuda_level kda_sm90_level;
#endif

/* Best first, up to NULL. The last one takes every problem. */
extern const struct kda_cuda_level *const kda_cuda_levels[];

/* May a call use this level? An override forbids the levels above the one that it names. */
bool kda_level_allowed(const struct kda_cuda_level *level, const struct kda_cuda_device *device);

#endif
