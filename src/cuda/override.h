/* SPDX-License-Identifier: MIT */
/* What FLASH_KDA_CUDA asks for: a level and one of its schedules, by the names that plans print. */
#ifndef KDA_CUDA_OVERRIDE_H
#define KDA_CUDA_OVERRIDE_H

#include "api/status.h"
#include "cuda/plan.h"

/* The name of the environment variable. */
#define KDA_CUDA_VARIABLE "FLASH_KDA_CUDA"

struct kda_override {
    const char *level; /* NULL: any */
    enum kda_schedule schedule;
    int segments;  /* 0: the fastest number */
    bool stream_k; /* stream-K before the schedule */
};

/* Reads the variable's value; NULL and "" ask for nothing. */
flash_kda_status kda_read_override(struct kda_override *override, const char *value);

/* The value that forces this plan, such as sm90/stream_k+cluster/4. */
void kda_plan_name(const struct kda_plan *plan, char *text, size_t size);

#endif
