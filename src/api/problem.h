/* SPDX-License-Identifier: MIT */
/* Prefill after all checks: what every backend receives, and the one reading of its index tensors. */
#ifndef KDA_API_PROBLEM_H
#define KDA_API_PROBLEM_H

#include "api/fused.h"
#include "api/tokens.h"

struct kda_prefill {
    union {
        struct kda_tokens base;
        struct {
            KDA_TOKENS_MEMBERS
        };
    };
    struct kda_tensor initial_state, final_state, state_indices, has_initial_state;
    struct kda_tensor checkpoints, checkpoint_cu_starts, checkpoint_indices, checkpoint_offsets;
    int64_t checkpoint_every;
    int64_t slots; /* of the states, with state_indices */
    bool has_padding_slot;
    int64_t padding_slot;          /* if it has one: in state_indices the same as -1 */
    const struct kda_fused *fused; /* NULL: nothing stands around it. Not for device code */
};

/* Where the tokens and the state of sequence n are, its slot kept within the states. */
KDA_INLINE struct kda_sequence kda_sequence(const struct kda_prefill *p, int64_t n) {
    struct kda_sequence s = kda_tokens_of(&p->base, n);
    if (p->state_indices.data) {
        s.slot = kda_index(&p->state_indices, n, 0);
        s.slot = s.slot < p->slots && !(p->has_padding_slot && s.slot == p->padding_slot) ? s.slot : -1;
    }
    s.from_zero = !p->initial_state.data || kda_starts_from_zero(&p->has_initial_state, n);
    return s;
}

/* State of a slot of initial_state or final_state; data is NULL if t was not given. */
KDA_INLINE struct kda_state kda_state_at(const struct kda_prefill *p, const struct kda_tensor *t, int64_t slot,
                                         int64_t head) {
    return kda_state_in(&p->base, t, slot, head);
}

/* The state that a head of sequence n starts from, given its slot; data is NULL where that is zero. */
KDA_INLINE struct kda_state kda_state_before(const struct kda_prefill *p, int64_t n, int64_t slot,
                                             int64_t head) {
    struct kda_state none = {NULL, KDA_F32, 0, false};
    return kda_starts_from_zero(&p->has_initial_state, n) ? none
                                                          : kda_state_at(p, &p->initial_state, slot, head);
}

/* checkpoint_cu_starts[n], kept within the rows that there are: indices in device memory are not checked before. */
KDA_INLINE int64_t kda_checkpoint_start(const struct kda_prefill *p, int64_t n) {
    int64_t rows = p->checkpoint_indices.data ? p->checkpoint_indices.shape[0] : p->checkpoints.shape[0];
    return kda_clamp(kda_index(&p->checkpoint_cu_starts, n, 0), 0, rows);
}

/* Rows of checkpoints that sequence n has. */
KDA_INLINE int64_t kda_checkpoint_count(const struct kda_prefill *p, int64_t n) {
    if (p->checkpoint_offsets.data)
        return p->checkpoint_offsets.rank > 1 ? p->checkpoint_offsets.shape[1] : 1;
    if (p->checkpoint_cu_starts.data)
        return kda_checkpoint_start(p, n + 1) - kda_checkpoint_start(p, n);
    return p->checkpoints.shape[1];
}

/* The smallest checkpoint position of sequence n after token `position`, or INT64_MAX. */
KDA_INLINE int64_t kda_next_checkpoint(const struct kda_prefill *p, int64_t n, int64_t position) {
    int64_t next = INT64_MAX;
    if (!p->checkpoints.data)
        return next;
    int64_t count = kda_checkpoint_count(p, n);
    if (p->checkpoint_offsets.data) {
        for (int64_t j = 0; j < count; j++) {
            int64_t offset = kda_index(&p->checkpoint_offsets, n, j);
            if (offset > position)
                next = kda_min64(next, offset);
        }
        return next;
    }
    int64_t length = kda_sequence(p, n).length, row = position / p->checkpoint_every;
    if (row < count && position < length)
        next = length / p->checkpoint_every > row ? (row + 1) * p->checkpoint_every : length;
    return next;
}

/* Row j of sequence n of checkpoints. */
KDA_INLINE struct kda_state kda_checkpoint_row(const struct kda_prefill *p, int64_t n, int64_t j,
                                               int64_t head) {
    struct kda_state s = kda_state_at(p, &p->checkpoints, 0, head);
    if (p->checkpoint_cu_starts.data) {
        int64_t row = kda_checkpoint_start(p, n) + j;
        if (p->checkpoint_indices.data)
            row = row >= 0 && row < p->checkpoint_indices.shape[0] ? kda_index(&p->checkpoint_indices, row, 0)
                                                                   : -1;
        if (row < 0 || row >= p->checkpoints.shape[0])
            s.data = NULL;
        else
            s.data += row * p->checkpoints.stride[0];
    } else {
        s.data += n * p->checkpoints.stride[0] + (p->checkpoints.rank > 4 ? j * p->checkpoints.stride[1] : 0);
    }
    return s;
}

/* Checkpoints of sequence n at `position`, one after another: start with *cursor = 0; data is NULL when there
 * is no further one. */
KDA_INLINE struct kda_state kda_checkpoint_at(const struct kda_prefill *p, int64_t n, int64_t position,
                                              int64_t head, int64_t *cursor) {
    struct kda_state none = {NULL, KDA_F32, 0, false};
    if (!p->checkpoints.data)
        return none;
    int64_t count = kda_checkpoint_count(p, n);
    if (p->checkpoint_offsets.data) {
        while (*cursor < count) {
            int64_t j = (*cursor)++;
            if (kda_index(&p->checkpoint_offsets, n, j) == position)
                return kda_checkpoint_row(p, n, j, head);
        }
        return none;
    }
    if (*cursor || position == 0)
        return none;
    *cursor = 1;
    int64_t row = (position - 1) / p->checkpoint_every;
    bool here = position % p->checkpoint_every == 0 || position == kda_sequence(p, n).length;
    return here && row < count ? kda_checkpoint_row(p, n, row, head) : none;
}

#endif
