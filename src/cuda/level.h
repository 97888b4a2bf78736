/* SPDX-License-Identifier: MIT */
/* The levels of the CUDA backend: one row each, one folder each. */
#ifndef KDA_CUDA_LEVEL_H
#define KDA_CUDA_LEVEL_H

#include "api/decode_problem.h"
#include "cuda/device.h"

/* How one decode is run: by one kernel. */
struct kda_decode_plan {
    const char *kernel, *does; /* its name, and what it does in words */
    int multiprocessors;
    bool aligned; /* the states' rows are whole pieces of 16 bytes */
};

struct kda_cuda_level {
    const char *name;
    bool (*runs_on)(const struct kda_cuda_device *device);

    /* Prefill: whether it takes a problem; the plan, of which the level's name and the number of chunks are filled in; its
     * launch number i. */
    bool (*takes)(const struct kda_prefill *p);
    void (*plan)(const struct kda_prefill *p, int multiprocessors, const struct kda_override *override,
                 struct kda_plan *plan);
    cudaError_t (*launch)(const struct kda_prefill *p, const struct kda_plan *plan, int i, void *workspace);

    /* Decode. The plan comes with what the problem and the device say. */
    bool (*decode_plan)(const struct kda_decode *d, struct kda_decode_plan *plan); /* false: not taken */
    cudaError_t (*decode)(const struct kda_decode *d, const struct kda_decode_plan *plan);
};

extern const struct kda_cuda_level kda_sm80_level;
#ifdef KDA_WITH_SM90
extern const struct kda_cuda_level kda_sm90_level;
#endif

/* The best first, up to NULL. The last takes every problem. */
extern const struct kda_cuda_level *const kda_cuda_levels[];

/* May a call use this level? Nothing but its name may forbid it. */
bool kda_level_allowed(const struct kda_cuda_level *level, const struct kda_cuda_device *device);

#endif
