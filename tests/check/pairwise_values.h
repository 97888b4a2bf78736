/* SPDX-License-Identifier: MIT */
/* Values of options that prefill, decode and backward share in their pairwise cases. */
#ifndef CHECK_PAIRWISE_VALUES_H
#define CHECK_PAIRWISE_VALUES_H

#include "flash_kda.h"

#include <stdbool.h>

static const struct {
    flash_kda_gate gate;
    bool A_log, dt_bias;
    const char *name;
} gates[] = {{FLASH_KDA_GATE_NONE, false, false, "none"},
             {FLASH_KDA_GATE_SOFTPLUS, false, false, "softplus"},
             {FLASH_KDA_GATE_SOFTPLUS, true, false, "softplus+A_log"},
             {FLASH_KDA_GATE_SOFTPLUS, false, true, "softplus+dt_bias"},
             {FLASH_KDA_GATE_SOFTPLUS, true, true, "softplus+A_log+dt_bias"},
             {FLASH_KDA_GATE_SIGMOID, false, false, "sigmoid"},
             {FLASH_KDA_GATE_SIGMOID, true, false, "sigmoid+A_log"},
             {FLASH_KDA_GATE_SIGMOID, false, true, "sigmoid+dt_bias"},
             {FLASH_KDA_GATE_SIGMOID, true, true, "sigmoid+A_log+dt_bias"}};

static const char *const beta_names[] = {"given", "sigmoid", "2 sigmoid"};
static const char *const spacing_names[] = {"compact", "fused", "heads first", "repeat"};
static const int64_t ratios[] = {1, 2, 4}; /* HV / H */
static const int thread_counts[] = {1, 2, 5};
static const double scales[] = {0, 0.3};

#endif
