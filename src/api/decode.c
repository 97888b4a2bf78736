/* SPDX-License-Identifier: MIT */
/* The public entries of decode: every argument is checked here, before anything is written. */
#include "api/args.h"
#include "api/check.h"
#include "api/decode_problem.h"

#include <string.h>

/* ---- Tensors ----------------------------------------------------------------------------------- */

static flash_kda_status check_max_tokens(const flash_kda_decode_args *a, struct kda_decode *d) {
    if (!a->cu_seqlens) {
        if (a->max_tokens)
            return INVALID("max_tokens is %lld without cu_seqlens; expected 0", (long long)a->max_tokens);
        if (d->tokens.tokens > FLASH_KDA_MAX_DECODE_TOKENS)
            return INVALID("q has T = %lld tokens; expected at most %d", (long long)d->tokens.tokens,
                           FLASH_KDA_MAX_DECODE_TOKENS);
        d->max_tokens = d->tokens.tokens;
        return FLASH_KDA_OK;
    }
    if (a->max_tokens < 0 || a->max_tokens > FLASH_KDA_MAX_DECODE_TOKENS)
        return INVALID("max_tokens is %lld; expected 0 to %d", (long long)a->max_tokens,
                       FLASH_KDA_MAX_DECODE_TOKENS);
    d->max_tokens = a->max_tokens ? a->max_tokens : FLASH_KDA_MAX_DECODE_TOKENS;
    for (int64_t n = 0; d->tokens.on_host && n < d->tokens.sequences; n++) {
        int64_t length = kda_tokens_of(&d->tokens, n).length;
        if (length > d->max_tokens)
            return INVALID("cu_seqlens gives sequence %lld %lld tokens; expected at most %s = %lld",
                           (long long)n, (long long)length,
                           a->max_tokens ? "max_tokens" : "the most there can be", (long long)d->max_tokens);
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_accepted(const flash_kda_decode_args *a, struct kda_decode *d) {
    const int64_t like[1] = {d->tokens.sequences};
    if (!a->accepted)
        return FLASH_KDA_OK;
    return kda_check_indices(a->accepted, "accepted", "[N]", 1, like, &a->q->device, &d->accepted);
}

static flash_kda_status check_state_indices(const flash_kda_decode_args *a, struct kda_decode *d) {
    const DLDevice *device = &a->q->device;
    const int64_t like[2] = {d->tokens.sequences, -1};
    bool each = a->state_indices && a->state_indices->ndim == 2;
    if (a->num_accepted_tokens && !each)
        return INVALID("num_accepted_tokens is given without state_indices [N, C]; expected NULL");
    TRY(kda_check_padding_slot(a->flags, a->padding_slot, a->state_indices));
    d->has_padding_slot = a->flags & FLASH_KDA_PADDING_SLOT;
    d->padding_slot = a->padding_slot;
    if (!a->state_indices)
        return FLASH_KDA_OK;
    TRY(kda_check_indices(a->state_indices, "state_indices", each ? "[N, C]" : "[N] or [N, C]", each ? 2 : 1,
                          like, device, &d->state_indices));
    if (each && d->state_indices.shape[1] < 1)
        return INVALID("state_indices has C = 0 columns; expected one for each token");
    if (a->num_accepted_tokens)
        TRY(kda_check_indices(a->num_accepted_tokens, "num_accepted_tokens", "[N]", 1, like, device,
                              &d->num_accepted_tokens));
    return FLASH_KDA_OK;
}

static flash_kda_status check_state(const flash_kda_decode_args *a, struct kda_decode *d) {
    const struct kda_tokens *p = &d->tokens;
    bool pool = a->state_indices;
    const char *form = pool ? kda_state_form(p, "[slots, HV, V, K]", "[slots, HV, K, V]")
                            : kda_state_form(p, "[N, HV, V, K]", "[N, HV, K, V]");
    if (!a->state)
        return INVALID("state is NULL; expected a tensor");
    TRY(kda_check_has_initial_state(a->has_initial_state, p, &a->q->device, &d->has_initial_state));
    d->keep_state = a->flags & FLASH_KDA_KEEP_STATE;
    if (d->keep_state && !a->out)
        return INVALID("out is NULL with FLASH_KDA_KEEP_STATE; expected a tensor, for nothing else is written");
    return kda_check_state(a->state, "state", form, KDA_DTYPES_FLOAT, 4, pool ? -1 : p->sequences, 0,
                           &a->q->device, !d->keep_state, p, &d->state);
}

/* ---- What the index tensors hold --------------------------------------------------------------- */

/* A sequence's values, unless it is padding, of which nothing is looked at. */
static flash_kda_status check_sequence(const struct kda_decode *d, int64_t n) {
    struct kda_sequence all = kda_tokens_of(&d->tokens, n);
    int64_t columns = kda_decode_writes_each(d) ? d->state_indices.shape[1] : FLASH_KDA_MAX_DECODE_TOKENS;
    if (kda_decode_sequence(d, n).slot < 0)
        return FLASH_KDA_OK;
    if (d->num_accepted_tokens.data) {
        int64_t column = kda_index(&d->num_accepted_tokens, n, 0);
        if (column < 1 || column > columns)
            return INVALID("num_accepted_tokens[%lld] is %lld; expected 1 to the %lld columns of state_indices",
                           (long long)n, (long long)column, (long long)columns);
    }
    if (d->accepted.data) {
        int64_t accepted = kda_index(&d->accepted, n, 0);
        if (accepted < 0 || accepted > all.length)
            return INVALID("accepted[%lld] is %lld; expected 0 to the %lld tokens of the sequence",
                           (long long)n, (long long)accepted, (long long)all.length);
    }
    if (all.length > columns)
        return INVALID("state_indices has %lld columns; expected one for each of the %lld tokens of sequence "
                       "%lld",
                       (long long)columns, (long long)all.length, (long long)n);
    return FLASH_KDA_OK;
}

enum { SLOTS_AT_ONCE = 1 << 15 }; /* a bit each on the stack */

/* No slot from `first` to `first` + SLOTS_AT_ONCE twice, of `slots` in all. */
static flash_kda_status check_distinct(const struct kda_decode *d, int64_t first, int64_t slots) {
    const struct kda_tensor *t = &d->state_indices;
    unsigned char seen[SLOTS_AT_ONCE / 8]; /* cleared as far as there are slots: most pools are small */
    memset(seen, 0, slots - first < SLOTS_AT_ONCE ? (size_t)(slots - first) / 8 + 1 : sizeof seen);
    int64_t columns = t->rank == 2 ? t->shape[1] : 1;
    for (int64_t i = 0; i < t->shape[0] * columns; i++) {
        int64_t slot = kda_decode_slot(d, i / columns, i % columns), bit = slot - first;
        if (slot < 0 || bit < 0 || bit >= SLOTS_AT_ONCE)
            continue;
        if (seen[bit / 8] >> bit % 8 & 1)
            return INVALID("%s of sequence %lld holds %lld, a slot that is used twice; expected each slot once",
                           t->name, (long long)(i / columns), (long long)slot);
        seen[bit / 8] |= (unsigned char)(1u << bit % 8);
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_slots(const struct kda_decode *d) {
    const struct kda_tensor *t = &d->state_indices;
    int64_t slots = d->state.shape[0], columns = t->rank == 2 ? t->shape[1] : 1;
    for (int64_t i = 0; i < t->shape[0] * columns; i++) {
        int64_t slot = kda_index(t, i / columns, i % columns);
        bool padding = slot == -1 || (d->has_padding_slot && slot == d->padding_slot);
        if (!padding && (slot < 0 || slot >= slots))
            return INVALID("state_indices of sequence %lld holds %lld; expected 0 to %lld, or -1",
                           (long long)(i / columns), (long long)slot, (long long)slots - 1);
    }
    for (int64_t first = 0; first < slots && !d->keep_state; first += SLOTS_AT_ONCE)
        TRY(check_distinct(d, first, slots));
    return FLASH_KDA_OK;
}

static flash_kda_status check_values(const struct kda_decode *d) {
    if (!d->tokens.on_host)
        return FLASH_KDA_OK;
    if (d->state_indices.data)
        TRY(check_slots(d));
    for (int64_t n = 0; n < d->tokens.sequences; n++)
        TRY(check_sequence(d, n));
    return FLASH_KDA_OK;
}

/* ---- Memory ------------------------------------------------------------------------------------ */

/* No written tensor overlaps another argument. */
static flash_kda_status check_aliasing(const struct kda_decode *d) {
    const struct kda_tokens *p = &d->tokens;
    const struct kda_tensor *const own[] = {&p->q,
                                            &p->k,
                                            &p->v,
                                            &p->g,
                                            &p->beta,
                                            &p->A_log,
                                            &p->dt_bias,
                                            &p->cu_seqlens,
                                            &d->accepted,
                                            &d->state_indices,
                                            &d->num_accepted_tokens,
                                            &d->has_initial_state};
    enum { OWN = sizeof own / sizeof *own, OUT = 1, STATES = 1 + KDA_CONVOLUTIONS };
    const struct kda_tensor *all[2 + KDA_FUSED_TENSORS + OWN] = {&p->out, &d->state};
    kda_list_fused(&d->fused, all + 2);
    memcpy(all + 2 + KDA_FUSED_TENSORS, own, sizeof own);
    int written = d->keep_state ? OUT : OUT + STATES;
    for (int i = 0; i < written; i++)
        for (int j = i + 1; j < 2 + KDA_FUSED_TENSORS + OWN; j++)
            TRY(kda_check_overlap(all[i], all[j], ""));
    return FLASH_KDA_OK;
}

/* ---- Entries ----------------------------------------------------------------------------------- */

static flash_kda_status check_all(const flash_kda_decode_args *given, struct kda_decode *d,
                                  const struct kda_backend **backend) {
    static const struct kda_args_type type = {.name = "flash_kda_decode_args",
                                              .init = "FLASH_KDA_DECODE_ARGS_INIT",
                                              .least = offsetof(flash_kda_decode_args, state_indices),
                                              .size = sizeof(flash_kda_decode_args)};
    flash_kda_decode_args args;
    TRY(kda_args_read(given, &type, &args));
    memset(d, 0, sizeof *d);
    const struct kda_token_args tokens =
        KDA_TOKEN_ARGS(&args, .out = args.out,
                       .known_flags = FLASH_KDA_QK_NORM | FLASH_KDA_BATCH_INVARIANT | FLASH_KDA_KEEP_STATE |
                                      FLASH_KDA_PADDING_SLOT);
    TRY(kda_check_tokens(&tokens, &d->tokens, backend));
    TRY(check_max_tokens(&args, d));
    TRY(check_accepted(&args, d));
    TRY(check_state_indices(&args, d));
    TRY(check_state(&args, d));
    const struct kda_fused_args fused =
        KDA_FUSED_ARGS(&args, .slots = d->state.shape[0], .needs_states = true, .written = !d->keep_state);
    TRY(kda_check_fused(&fused, &d->tokens, &args.q->device, &d->fused));
    TRY(check_values(d));
    return check_aliasing(d);
}

flash_kda_status flash_kda_decode(const flash_kda_decode_args *args) {
    struct kda_decode d;
    const struct kda_backend *backend = NULL;
    TRY(check_all(args, &d, &backend));
    if (d.max_tokens == 0 || d.tokens.tokens == 0 || d.tokens.sequences == 0)
        return FLASH_KDA_OK;
    return backend->decode(&d);
}

flash_kda_status flash_kda_decode_describe(const flash_kda_decode_args *args, char *text, size_t size) {
    struct kda_decode d;
    const struct kda_backend *backend = NULL;
    if (!text || !size)
        return INVALID("text is NULL or of size 0; expected where to write");
    TRY(check_all(args, &d, &backend));
    return backend->decode_describe(&d, text, size);
}
