/* SPDX-License-Identifier: MIT */
/* Where sequences, states and checkpoints are: the one reading of the index tensors. */
#include "api/problem.h"

struct kda_sequence kda_sequence(const struct kda_prefill *p, int64_t n) {
    struct kda_sequence s = {.batch = n, .first = 0, .length = p->tokens, .slot = n};
    if (p->cu_seqlens.data) {
        s.batch = 0;
        s.first = kda_index(&p->cu_seqlens, n, 0);
        s.length = kda_index(&p->cu_seqlens, n + 1, 0) - s.first;
    }
    if (p->state_indices.data)
        s.slot = kda_index(&p->state_indices, n, 0);
    return s;
}

struct kda_state kda_state_at(const struct kda_prefill *p, const struct kda_tensor *t, int64_t slot,
                              int64_t head) {
    struct kda_state s = {.data = NULL};
    if (t->data) {
        int outer = t->rank - 3;
        s = (struct kda_state){.data = t->data + slot * t->stride[0] + head * t->stride[outer],
                               .dtype = t->dtype,
                               .stride = t->stride[outer + 1],
                               .v_first = p->state_layout == FLASH_KDA_STATE_V_FIRST};
    }
    return s;
}

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* Rows of checkpoints that sequence n has. */
static int64_t checkpoint_count(const struct kda_prefill *p, int64_t n) {
    if (p->checkpoint_offsets.data)
        return p->checkpoint_offsets.rank > 1 ? p->checkpoint_offsets.shape[1] : 1;
    if (p->checkpoint_cu_starts.data)
        return kda_index(&p->checkpoint_cu_starts, n + 1, 0) - kda_index(&p->checkpoint_cu_starts, n, 0);
    return p->checkpoints.shape[1];
}

int64_t kda_next_checkpoint(const struct kda_prefill *p, int64_t n, int64_t position) {
    int64_t next = INT64_MAX;
    if (!p->checkpoints.data)
        return next;
    int64_t count = checkpoint_count(p, n);
    if (p->checkpoint_offsets.data) {
        for (int64_t j = 0; j < count; j++) {
            int64_t offset = kda_index(&p->checkpoint_offsets, n, j);
            if (offset > position)
                next = min64(next, offset);
        }
        return next;
    }
    int64_t length = kda_sequence(p, n).length, row = position / p->checkpoint_every;
    if (row < count && position < length)
        next = length / p->checkpoint_every > row ? (row + 1) * p->checkpoint_every : length;
    return next;
}

/* Row j of sequence n of checkpoints. */
static struct kda_state checkpoint_row(const struct kda_prefill *p, int64_t n, int64_t j, int64_t head) {
    struct kda_state s = kda_state_at(p, &p->checkpoints, 0, head);
    if (p->checkpoint_cu_starts.data) {
        int64_t row = kda_index(&p->checkpoint_cu_starts, n, 0) + j;
        if (p->checkpoint_indices.data)
            row = kda_index(&p->checkpoint_indices, row, 0);
        if (row < 0)
            s.data = NULL;
        else
            s.data += row * p->checkpoints.stride[0];
    } else {
        s.data += n * p->checkpoints.stride[0] + (p->checkpoints.rank > 4 ? j * p->checkpoints.stride[1] : 0);
    }
    return s;
}

struct kda_state kda_checkpoint_at(const struct kda_prefill *p, int64_t n, int64_t position, int64_t head,
                                   int64_t *cursor) {
    struct kda_state none = {.data = NULL};
    if (!p->checkpoints.data)
        return none;
    int64_t count = checkpoint_count(p, n);
    if (p->checkpoint_offsets.data) {
        while (*cursor < count) {
            int64_t j = (*cursor)++;
            if (kda_index(&p->checkpoint_offsets, n, j) == position)
                return checkpoint_row(p, n, j, head);
        }
        return none;
    }
    if (*cursor || position == 0)
        return none;
    *cursor = 1;
    int64_t row = (position - 1) / p->checkpoint_every;
    bool here = position % p->checkpoint_every == 0 || position == kda_sequence(p, n).length;
    return here && row < count ? checkpoint_row(p, n, row, head) : none;
}
