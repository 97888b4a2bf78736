/* SPDX-License-Identifier: MIT */
/* A small valid call of prefill with every argument given, for tests to break one at a time. */
#ifndef API_FIXTURE_H
#define API_FIXTURE_H

#include "flash_kda.h"

#include <stdbool.h>

/* X(place in the enum, member of the arguments). ARG_CHECKPOINT_OFFSETS is not part of the valid call;
 * fixture_use_offsets() exchanges it for the others. Nor is what struct 0.1 did not have. */
/* clang-format off */
#define FIXTURE_TENSORS(X) \
    X(ARG_Q, q) X(ARG_K, k) X(ARG_V, v) X(ARG_G, g) X(ARG_BETA, beta) X(ARG_A_LOG, A_log) \
    X(ARG_DT_BIAS, dt_bias) X(ARG_OUT, out) X(ARG_CU_SEQLENS, cu_seqlens) \
    X(ARG_INITIAL_STATE, initial_state) X(ARG_FINAL_STATE, final_state) \
    X(ARG_STATE_INDICES, state_indices) X(ARG_CHECKPOINTS, checkpoints) \
    X(ARG_CHECKPOINT_CU_STARTS, checkpoint_cu_starts) X(ARG_CHECKPOINT_INDICES, checkpoint_indices) \
    X(ARG_CHECKPOINT_OFFSETS, checkpoint_offsets) X(ARG_HAS_INITIAL_STATE, has_initial_state) \
    X(ARG_Q_CONV_WEIGHT, q_conv_weight) X(ARG_Q_CONV_BIAS, q_conv_bias) X(ARG_Q_CONV_STATE, q_conv_state) \
    X(ARG_K_CONV_WEIGHT, k_conv_weight) X(ARG_K_CONV_BIAS, k_conv_bias) X(ARG_K_CONV_STATE, k_conv_state) \
    X(ARG_V_CONV_WEIGHT, v_conv_weight) X(ARG_V_CONV_BIAS, v_conv_bias) X(ARG_V_CONV_STATE, v_conv_state) \
    X(ARG_NORM_WEIGHT, norm_weight) X(ARG_NORM_GATE, norm_gate)
/* clang-format on */

#define FIXTURE_PLACE(place, member) place,
enum argument { FIXTURE_TENSORS(FIXTURE_PLACE) ARGUMENTS };

extern const char *const argument_names[ARGUMENTS];

enum { FIXTURE_DIMS = 5, FIXTURE_BYTES = 8192, FIXTURE_WORKSPACE = 1 << 20 };

/* Sizes of the valid call: three sequences of 2, 0 and 4 tokens, five slots, four checkpoint rows. */
enum { FIXTURE_T = 6, FIXTURE_H = 2, FIXTURE_HV = 4, FIXTURE_K = 8, FIXTURE_V = 4, FIXTURE_N = 3 };
enum { FIXTURE_SLOTS = 5, FIXTURE_EVERY = 2, FIXTURE_ROWS = 3, FIXTURE_PLACES = 4, FIXTURE_C = 2 };

struct fixture_tensor {
    DLTensor dl;
    int64_t shape[FIXTURE_DIMS], strides[FIXTURE_DIMS];
    union {
        unsigned char bytes[FIXTURE_BYTES];
        float fp32[FIXTURE_BYTES / 4];
        int32_t int32[FIXTURE_BYTES / 4];
        int64_t int64[FIXTURE_BYTES / 8];
    } memory;
};

struct fixture {
    flash_kda_prefill_args args;
    struct fixture_tensor tensor[ARGUMENTS];
    void *workspace; /* what is handed to prefill */
    size_t workspace_bytes;
    unsigned char workspace_memory[FIXTURE_WORKSPACE];
};

/* For the caller to free. */
struct fixture *fixture_new(void);

/* The member of args that holds a tensor. */
const DLTensor **fixture_member(struct fixture *f, enum argument argument);

/* Dense instead of packed: no cu_seqlens, B = 1; checkpoints [B, rows, HV, V, K], nothing indexed. */
void fixture_make_dense(struct fixture *f);
/* Checkpoints at offsets [N, C] instead of every n tokens. */
void fixture_use_offsets(struct fixture *f);
/* The second of three sequences starts from zero. */
void fixture_use_has_initial_state(struct fixture *f);
/* Convolutions of q, k and v, with their states, and a gated norm. */
void fixture_use_fused(struct fixture *f);
/* Makes a tensor's strides its compact ones, written out. */
void fixture_spell_strides(struct fixture_tensor *t);

/* Whether no byte of any tensor differs between two fixtures. */
bool fixture_same_memory(const struct fixture *a, const struct fixture *b);

flash_kda_status fixture_prefill(struct fixture *f);

#endif
