/* SPDX-License-Identifier: MIT */
/* The oracle's decode: the token recurrence in fp64, one head after the other, a few columns of its state at a time. */
#include "api/backend.h"
#include "api/status.h"
#include "reference/fused.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

enum { COLUMNS = 32 };

/* After all heads, for several may read one channel. */
static void advance_convolutions(const struct kda_decode *d, int64_t n) {
    const struct kda_tensor *const inputs[] = {&d->tokens.q, &d->tokens.k, &d->tokens.v};
    const struct kda_sequence s = kda_decode_sequence(d, n);
    for (int i = 0; i < KDA_CONVOLUTIONS && s.slot >= 0; i++)
        for (int64_t head = 0; kda_convolution_of(&d->fused, i)->weight.data && head < inputs[i]->shape[2];
             head++)
            for (int64_t c = 0; c < inputs[i]->shape[3]; c++)
                kda_conv_advance(d, inputs[i], kda_convolution_of(&d->fused, i), n, &s, head, c);
}

/* ---- The recurrence ------------------------------------------------------------------------------ */

/* One head of one sequence. */
struct chain {
    int64_t n, head;
    struct kda_sequence s;
    double mean_square[FLASH_KDA_MAX_DECODE_TOKENS]; /* of each token's outputs */
    double *S;                                       /* [K][COLUMNS] */
};

/* Takes columns of the state through the tokens; only adds up mean squares, or writes. */
static void run_columns(const struct kda_decode *d, struct chain *chain, struct kda_columns columns,
                        bool writes) {
    const struct kda_tokens *p = &d->tokens;
    const struct kda_sequence *s = &chain->s;
    double *S = chain->S, u[COLUMNS];
    const struct kda_state none = {.data = NULL};
    kda_load_state(p, s->from_zero ? none : kda_state_in(p, &d->state, s->slot, chain->head), columns, S);
    for (int64_t t = 0; t < s->length; t++) {
        const struct kda_token x = kda_load_fused_token(p, &d->fused, s, t, chain->head);
        for (int64_t j = 0; j < columns.count; j++)
            u[j] = kda_load_input(&p->v, &d->v_conv, s, t, chain->head, columns.first + j);
        kda_recur(p, &x, columns.count, S, u);
        for (int64_t j = 0; j < columns.count; j++) {
            int64_t column = columns.first + j;
            if (!writes)
                chain->mean_square[t] += u[j] * u[j] / (double)p->value_dim;
            else if (p->out.data)
                kda_store(kda_row(&p->out, s->batch, s->first + t, chain->head), p->out.dtype, column,
                          (float)kda_normed(&d->fused, s, t, chain->head, column, u[j], chain->mean_square[t]));
        }
        int64_t slot = writes ? kda_decode_written_slot(d, chain->n, s, t) : -1;
        if (slot >= 0)
            kda_store_state(p, kda_state_in(p, &d->state, slot, chain->head), columns, S);
    }
}

static void run_head(const struct kda_decode *d, struct chain *chain, bool writes) {
    int64_t V = d->tokens.value_dim;
    for (int64_t first = 0; first < V; first += COLUMNS)
        run_columns(d, chain, (struct kda_columns){first, kda_min64(COLUMNS, V - first)}, writes);
}

flash_kda_status kda_reference_decode(const struct kda_decode *d) {
    size_t bytes = (size_t)d->tokens.key_dim * COLUMNS * sizeof(double);
    double *S = malloc(bytes);
    if (!S)
        return kda_fail(FLASH_KDA_ERROR_OUT_OF_MEMORY, "decode could not allocate %zu bytes of scratch", bytes);
    for (int64_t n = 0; n < d->tokens.sequences; n++) {
        const struct kda_sequence s = kda_decode_sequence(d, n);
        for (int64_t head = 0; head < d->tokens.value_heads && s.slot >= 0; head++) {
            struct chain chain = {.n = n, .head = head, .s = s, .S = S};
            if (d->norm_weight.data)
                run_head(d, &chain, false);
            run_head(d, &chain, true);
        }
        advance_convolutions(d, n);
    }
    free(S);
    return FLASH_KDA_OK;
}

flash_kda_status kda_reference_decode_describe(const struct kda_decode *d, char *text, size_t size) {
    snprintf(text, size, "reference: token recurrence in fp64, %" PRId64 " heads on 1 thread",
             d->tokens.sequences * d->tokens.value_heads);
    return FLASH_KDA_OK;
}
