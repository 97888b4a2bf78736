/* SPDX-License-Identifier: MIT */
/* Sequences that begin or go on in other calls: what prefill and backward, which goes the other way, have in common. */
#ifndef KDA_API_BORDER_H
#define KDA_API_BORDER_H

#include "api/tokens.h"

struct kda_border {
    flash_kda_phase phase;
    struct kda_tensor
        awaiting_rows; /* wait for a state from elsewhere: incoming_rows; in backward outgoing_rows */
    struct kda_tensor giving_rows; /* elsewhere a state of theirs is waited for: the other ones */
    struct kda_tensor summaries;   /* of each giving row, fp32: [S, HV, V + K, K]; in backward [C, HV, V, K] */
    struct kda_tensor states; /* of each awaiting row, fp32 [.., HV, V, K]; may not be given while beginning */
};

/* What a call does with a sequence. */
enum kda_work {
    KDA_WORK_NONE,
    KDA_WORK_ALL,
    KDA_WORK_SUMMARY, /* only finds what it does to any state */
};

/* Place of sequence n in awaiting_rows or giving_rows; -1 if it is in none. */
KDA_INLINE int64_t kda_place_of(const struct kda_tensor *rows, int64_t n) {
    for (int64_t i = 0; rows->data && i < rows->shape[0]; i++)
        if (kda_index(rows, i, 0) == n)
            return i;
    return -1;
}

KDA_INLINE enum kda_work kda_work_on(const struct kda_border *x, int64_t n) {
    if (x->phase == FLASH_KDA_PHASE_WHOLE)
        return KDA_WORK_ALL;
    bool awaits = kda_place_of(&x->awaiting_rows, n) >= 0;
    if (x->phase == FLASH_KDA_PHASE_FINISH)
        return awaits ? KDA_WORK_ALL : KDA_WORK_NONE;
    if (!awaits)
        return KDA_WORK_ALL;
    return kda_place_of(&x->giving_rows, n) >= 0 ? KDA_WORK_SUMMARY : KDA_WORK_NONE;
}

/* What a call's description says of its phase. */
static inline const char *kda_phase_text(const struct kda_border *x) {
    static const char *const texts[] = {"", ", begins", ", finishes"};
    return texts[x->phase];
}

/* Where the summary of sequence n goes, or the state that it waited for comes from, if this phase has to do with it; -1 if
 * not. */
KDA_INLINE int64_t kda_summary_of(const struct kda_border *x, int64_t n) {
    return x->phase == FLASH_KDA_PHASE_BEGIN ? kda_place_of(&x->giving_rows, n) : -1;
}

KDA_INLINE int64_t kda_awaited_by(const struct kda_border *x, int64_t n) {
    return x->phase == FLASH_KDA_PHASE_FINISH ? kda_place_of(&x->awaiting_rows, n) : -1;
}

/* The two parts of a prefill's summary: B as a state of V columns, M as one of K. */
KDA_INLINE struct kda_state kda_summary_bias(const struct kda_tokens *x, const struct kda_border *border,
                                             int64_t place, int64_t head) {
    return kda_state_in(x, &border->summaries, place, head);
}

KDA_INLINE struct kda_state kda_summary_transition(const struct kda_tokens *x, const struct kda_border *border,
                                                   int64_t place, int64_t head) {
    struct kda_state s = kda_state_in(x, &border->summaries, place, head);
    s.data += x->value_dim * (s.v_first ? s.stride : (int64_t)sizeof(float));
    return s;
}

#endif
