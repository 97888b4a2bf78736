/* SPDX-License-Identifier: MIT */
/* Decode after all checks: what every backend receives, and the one reading of its index tensors. */
#ifndef KDA_API_DECODE_PROBLEM_H
#define KDA_API_DECODE_PROBLEM_H

#include "api/fused.h"
#include "api/tokens.h"

struct kda_decode {
    struct kda_tokens tokens;
    struct kda_tensor state;               /* [slots, HV, V, K] or, K first, [slots, HV, K, V] */
    struct kda_tensor state_indices;       /* [N] or [N, C]; or not given: slot n */
    struct kda_tensor num_accepted_tokens; /* [N]; only with state_indices [N, C] */
    struct kda_tensor accepted;            /* [N] */
    struct kda_tensor has_initial_state;   /* [N] */
    int64_t max_tokens;                    /* of one sequence, 0 to FLASH_KDA_MAX_DECODE_TOKENS */
    bool keep_state;                       /* states are only read */
    bool has_padding_slot;
    int64_t padding_slot; /* if it has one: in state_indices the same as -1 */
    union {
        struct kda_fused fused;
        struct {
            KDA_FUSED_MEMBERS
        };
    };
};

/* The slot in column `column` of sequence n's row of state_indices; -1 for what is no slot of the pool. */
KDA_INLINE int64_t kda_decode_slot(const struct kda_decode *d, int64_t n, int64_t column) {
    int64_t slot = d->state_indices.data ? kda_index(&d->state_indices, n, column) : n;
    bool padding = d->has_padding_slot && slot == d->padding_slot;
    return slot >= 0 && slot < d->state.shape[0] && !padding ? slot : -1;
}

/* Is a state written after every token, to a slot of its own? */
KDA_INLINE bool kda_decode_writes_each(const struct kda_decode *d) { return d->state_indices.rank == 2; }

/* Where the tokens of sequence n are, how many are to be processed, and the slot its state is read from. Indices in device
 * memory are not checked before a call: here they are kept within the tensors. */
KDA_INLINE struct kda_sequence kda_decode_sequence(const struct kda_decode *d, int64_t n) {
    struct kda_sequence s = kda_tokens_of(&d->tokens, n);
    int64_t column = 0;
    if (d->num_accepted_tokens.data)
        column = kda_clamp(kda_index(&d->num_accepted_tokens, n, 0), 1, d->state_indices.shape[1]) - 1;
    s.slot = kda_decode_slot(d, n, column);
    s.from_zero = kda_starts_from_zero(&d->has_initial_state, n);
    s.length = kda_min64(s.length, d->max_tokens);
    if (d->accepted.data)
        s.length = kda_clamp(kda_index(&d->accepted, n, 0), 0, s.length);
    return s;
}

/* The slot that the state of sequence n is written to after its token t, the first being 0; -1: it is not. */
KDA_INLINE int64_t kda_decode_written_slot(const struct kda_decode *d, int64_t n, const struct kda_sequence *s,
                                           int64_t t) {
    if (d->keep_state || s->slot < 0)
        return -1;
    if (kda_decode_writes_each(d))
        return t < d->state_indices.shape[1] ? kda_decode_slot(d, n, t) : -1;
    return t + 1 == s->length ? s->slot : -1;
}

#endif
