/* SPDX-License-Identifier: MIT */
/* A KDA problem in host memory: everything that prefill reads, and the answer where it is known. */
#ifndef FLASHKDA_CASE_H
#define FLASHKDA_CASE_H

#include "tensor.h"

#include <flash_kda.h>

enum { CASE_REGIME_SIZE = 32 };

/* Names of flash_kda_gate, flash_kda_beta and flash_kda_state_layout, ended by NULL; the index is the value. */
extern const char *const gate_names[], *const beta_names[], *const state_layout_names[];

/* The index of a name in such a list, or -1. */
int name_index(const char *const *names, const char *name);

/* Shapes as in flash_kda.h, always with B; the state with N. Holds struct tensor: not to be copied or moved.
 * All zero: empty. */
struct kda_case {
    int64_t batch, tokens, heads, value_heads, key_dim, value_dim, sequences;
    bool without_batch;            /* its file has no B (which is 1): q is [T, H, K] */
    bool without_sequences;        /* its file has no N (which is 1): states are [HV, V, K] */
    char regime[CASE_REGIME_SIZE]; /* what kind of input this is; see check.h */

    struct tensor q, k, v, g, beta, A_log, dt_bias;
    struct tensor cu_seqlens, initial_state;    /* may be absent, like A_log and dt_bias */
    struct tensor expected_out, expected_state; /* the known answer; may be absent */

    flash_kda_gate gate;
    double lower_bound;
    flash_kda_beta beta_mode;
    double scale;
    uint32_t flags;
    flash_kda_state_layout state_layout;
    bool bf16_state;          /* of the final state */
    int64_t checkpoint_every; /* tokens between states that are kept, of a dense case; 0: none is */
    bool fused;               /* prefill is between convolutions and a gated norm (trial.h) */
};

void case_free(struct kda_case *c);

/* Arguments of prefill that read the case; out, final_state and how to compute are left to the caller. */
flash_kda_prefill_args case_args(const struct kda_case *c);

/* The shape of its output [B, T, HV, V] and of its final states [N, HV, V, K] or [N, HV, K, V]. */
void case_out_shape(const struct kda_case *c, int64_t shape[TENSOR_MAX_DIMS]);
void case_state_shape(const struct kda_case *c, int64_t shape[TENSOR_MAX_DIMS]);

/* Rows of checkpoints of each sequence. */
int64_t case_checkpoint_rows(const struct kda_case *c);

/* The first tokens and query/key heads of a case, in the memory of the whole one; without a known answer. Packed
 * sequences are cut where the tokens end. False if out of memory. */
bool case_prefix(struct kda_case *prefix, const struct kda_case *c, int64_t tokens, int64_t heads);

#endif
