/* SPDX-License-Identifier: MIT */
/* One call on a case, with the memory it needs, to be run as often as wanted. What fails returns false, with failure(). */
#ifndef FLASHKDA_TRIAL_H
#define FLASHKDA_TRIAL_H

#include "call.h"
#include "case.h"

/* What becomes of decode's states: written back after the last token, left as they are, or written after each token to a slot
 * of its own. */
enum decode_way { DECODE_IN_PLACE, DECODE_STATE_KEPT, DECODE_STATE_EACH };

/* Their names, ended by NULL; the index is the value. */
extern const char *const decode_way_names[];

/* Backward's gradients that have the heads of q or of g in their third dimension. */
enum { TRIAL_DQ, TRIAL_DK, TRIAL_DG, TRIAL_DBETA, TRIAL_GRADIENTS };

/* Holds struct tensor: not to be copied or moved. */
struct trial {
    const struct kda_case *c; /* must outlive it */
    struct tensor out;        /* [B, T, HV, V] */
    struct tensor
        state; /* of prefill: final states [N, HV, V, K] or [N, HV, K, V]; of decode: as many for each sequence as
                            it writes states, or 1 */
    struct tensor
        checkpoints; /* of prefill, [B, rows, HV, V, K] or [B, rows, HV, K, V]; absent if the case has none */
    struct tensor state_indices; /* of decode, [B] or [B, T] */
    /* Of a fused prefill: weights of the convolutions of q, k and v, which start from zero and keep no states; and the
     * norm's. */
    struct tensor conv_weight[3], norm_weight, norm_gate;
    /* Of backward: dO as given; what is written beside out and state, which are dv and d_initial_state. */
    struct tensor d_out, gradients[TRIAL_GRADIENTS];
    enum decode_way way;
    bool
        by_token; /* set by the caller: what prefill is to run goes through decode, one token after the other */
    struct call call;
};

/* Prefill, of a fused case between convolutions and a norm gated by a sigmoid, whose values are the same for the same
 * channel, token and head of any case. The oracle's states and checkpoints are fp32, others as the case says. On failure
 * nothing is left to free. */
bool trial_prefill(struct trial *trial, const struct kda_case *c, DLDataType out_type,
                   flash_kda_backend backend, int32_t threads);

/* Decode of a dense case with an initial state, whose dtype the states keep. On failure as above. */
bool trial_decode(struct trial *trial, const struct kda_case *c, enum decode_way way, flash_kda_backend backend,
                  int32_t threads);

/* Backward, of a random gradient of out, which is the same for the same token, head and column of any case; with the states
 * that prefill keeps if the case keeps some. The oracle's gradients are fp32, others of the inputs' dtype. On failure as
 * above. */
bool trial_backward(struct trial *trial, const struct kda_case *c, flash_kda_backend backend, int32_t threads);

/* Runs it once; *seconds is how long the call took, copies between memories not counted. */
bool trial_run(struct trial *trial, double *seconds);

/* What runs it, in a line as the library says it, and the level alone. */
bool trial_describe(const struct trial *trial, char *text, size_t size);
bool trial_level(const struct trial *trial, char level[16]);

/* The states after the last token, a view: of every sequence one. */
void trial_last_states(const struct trial *trial, struct tensor *states);

/* Bytes that it must move: every tensor once, every state once for each time it is read or written. */
int64_t trial_bytes(const struct trial *trial);

void trial_free(struct trial *trial);

#endif
