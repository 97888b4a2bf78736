/* SPDX-License-Identifier: MIT */
/* The oracle's decode: the token recurrence in fp64, one head after the other, a few columns of its state at a time. */
#include "api/backend.h"
#include "reference/recurrence.h"

#include <inttypes.h>
#include <stdio.h>

enum { COLUMNS = 32 };

static void store_out(const struct kda_prefill *p, int64_t batch, int64_t token, int64_t head,
                      struct kda_columns columns, const double *o) {
    for (int64_t j = 0; p->out.data && j < columns.count; j++)
        kda_store(kda_row(&p->out, batch, token, head), p->out.dtype, columns.first + j, (float)o[j]);
}

/* Takes columns of the state of one head through the tokens of sequence n. */
static void run_columns(const struct kda_decode *d, int64_t n, int64_t head, struct kda_columns columns) {
    const struct kda_prefill *p = &d->tokens;
    const struct kda_sequence s = kda_decode_sequence(d, n);
    double S[KDA_REFERENCE_MAX_K * COLUMNS], u[COLUMNS];
    kda_load_state(p, kda_state_at(p, &d->state, s.slot, head), columns, S);
    for (int64_t t = 0; t < s.length; t++) {
        const struct kda_token x = kda_load_token(p, s.batch, s.first + t, head);
        const char *v = kda_row(&p->v, s.batch, s.first + t, head);
        for (int64_t j = 0; j < columns.count; j++)
            u[j] = kda_load(v, p->v.dtype, columns.first + j);
        kda_recur(p, &x, columns.count, S, u);
        store_out(p, s.batch, s.first + t, head, columns, u);
        int64_t slot = kda_decode_written_slot(d, n, &s, t);
        if (slot >= 0)
            kda_store_state(p, kda_state_at(p, &d->state, slot, head), columns, S);
    }
}

flash_kda_status kda_reference_decode(const struct kda_decode *d) {
    const struct kda_prefill *p = &d->tokens;
    for (int64_t n = 0; n < p->sequences; n++)
        for (int64_t head = 0; head < p->value_heads && kda_decode_sequence(d, n).slot >= 0; head++)
            for (int64_t first = 0; first < p->value_dim; first += COLUMNS) {
                const struct kda_columns columns = {first, kda_min64(COLUMNS, p->value_dim - first)};
                run_columns(d, n, head, columns);
            }
    return FLASH_KDA_OK;
}

flash_kda_status kda_reference_decode_describe(const struct kda_decode *d, char *text, size_t size) {
    snprintf(text, size, "reference: token recurrence in fp64, %" PRId64 " heads on 1 thread",
             d->tokens.sequences * d->tokens.value_heads);
    return FLASH_KDA_OK;
}
