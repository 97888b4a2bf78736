/* SPDX-License-Identifier: MIT */
/* What the environment asks of the CUDA backend: a level, and a way of it (docs/hopper.md). */
#ifndef KDA_CUDA_WISH_H
#define KDA_CUDA_WISH_H

#include "api/status.h"

#include <stdbool.h>

/* The name of the environment variable that asks for it. */
#define KDA_CUDA_VARIABLE "FLASH_KDA_CUDA"

struct kda_cuda_wish {
    bool sm80, sm90; /* neither: any level */
    bool fused, pairs, spread;
    int segments; /* 0: as is fastest */
};

/* Reads the variable's value; NULL and "" ask for nothing. */
flash_kda_status kda_cuda_read_wish(struct kda_cuda_wish *wish, const char *value);

#endif
