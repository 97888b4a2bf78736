/* SPDX-License-Identifier: MIT */
/* The public entries of prefill: every argument is checked here, before anything is written. */
#include "api/args.h"
#include "api/check.h"

#include <string.h>

/* ---- Tensors ----------------------------------------------------------------------------------- */

static flash_kda_status check_slot_indices(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    if (a->state_indices) {
        const int64_t like[1] = {p->sequences};
        if (!a->initial_state && !a->final_state && !a->q_conv_state && !a->k_conv_state && !a->v_conv_state)
            return INVALID(
                "state_indices is given without initial_state, final_state and states of convolutions; "
                "expected one of them");
        TRY(kda_check_indices(a->state_indices, "state_indices", "[N]", 1, like, &a->q->device,
                              &p->state_indices));
    }
    TRY(kda_check_padding_slot(a->flags, a->padding_slot, a->state_indices));
    p->has_padding_slot = a->flags & FLASH_KDA_PADDING_SLOT;
    p->padding_slot = a->padding_slot;
    return FLASH_KDA_OK;
}

/* Convolutions, whose states have the slots of the others, and the norm. */
static flash_kda_status check_fused(const flash_kda_prefill_args *a, struct kda_prefill *p,
                                    struct kda_fused *fused) {
    int64_t slots = p->initial_state.data   ? p->initial_state.shape[0]
                    : p->final_state.data   ? p->final_state.shape[0]
                    : p->state_indices.data ? -1
                                            : p->sequences;
    const struct kda_fused_args args = KDA_FUSED_ARGS(a, .slots = slots, .written = true);
    TRY(kda_check_fused(&args, &p->base, &a->q->device, fused));
    if (kda_has_convolution(fused) || fused->norm_weight.data)
        p->fused = fused;
    for (int i = 0; i < KDA_CONVOLUTIONS && slots < 0; i++)
        if (kda_convolution_of(fused, i)->state.data)
            slots = kda_convolution_of(fused, i)->state.shape[0];
    p->slots = slots;
    return FLASH_KDA_OK;
}

static flash_kda_status check_states(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    const DLDevice *device = &a->q->device;
    int64_t slots = p->state_indices.data ? -1 : p->sequences;
    const char *form = slots < 0 ? kda_state_form(&p->base, "[slots, HV, V, K]", "[slots, HV, K, V]")
                                 : kda_state_form(&p->base, "[N, HV, V, K]", "[N, HV, K, V]");
    if (a->initial_state) {
        TRY(kda_check_state(a->initial_state, "initial_state", form, KDA_DTYPES_STATE, 4, slots, 0, device,
                            false, &p->base, &p->initial_state));
        slots = p->initial_state.shape[0];
    }
    if (a->has_initial_state && !a->initial_state)
        return INVALID("has_initial_state is given without initial_state; expected NULL");
    TRY(kda_check_has_initial_state(a->has_initial_state, &p->base, device, &p->has_initial_state));
    if (a->final_state)
        TRY(kda_check_state(a->final_state, "final_state", form, KDA_DTYPES_STATE, 4, slots, 0, device, true,
                            &p->base, &p->final_state));
    return FLASH_KDA_OK;
}

static flash_kda_status check_checkpoints_at_offsets(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    const DLDevice *device = &a->q->device;
    int rank = a->checkpoint_offsets->ndim == 2 ? 2 : 1;
    const int64_t like[2] = {p->sequences, -1};
    TRY(kda_check_indices(a->checkpoint_offsets, "checkpoint_offsets", rank == 2 ? "[N, C]" : "[N] or [N, C]",
                          rank, like, device, &p->checkpoint_offsets));
    int64_t columns = rank == 2 ? p->checkpoint_offsets.shape[1] : 1;
    TRY(kda_check_state(a->checkpoints, "checkpoints",
                        rank == 2 ? kda_state_form(&p->base, "[N, C, HV, V, K]", "[N, C, HV, K, V]")
                                  : kda_state_form(&p->base, "[N, HV, V, K]", "[N, HV, K, V]"),
                        KDA_DTYPES_STATE, rank + 3, p->sequences, columns, device, true, &p->base,
                        &p->checkpoints));
    for (int64_t n = 0; p->on_host && columns && n < p->sequences; n++)
        for (int64_t j = 0; j < columns; j++) {
            int64_t offset = kda_index(&p->checkpoint_offsets, n, j), length = kda_sequence(p, n).length;
            if (offset < -1 || offset > length)
                return INVALID(
                    "checkpoint_offsets of sequence %lld holds %lld; expected 0 to its length %lld, or -1",
                    (long long)n, (long long)offset, (long long)length);
        }
    return FLASH_KDA_OK;
}

static flash_kda_status check_checkpoints(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    bool every = a->checkpoint_every > 0, offsets = a->checkpoint_offsets;
    if (!a->checkpoints && (every || offsets || a->checkpoint_cu_starts || a->checkpoint_indices))
        return INVALID("checkpoints is NULL; expected a tensor with %s",
                       every     ? "checkpoint_every"
                       : offsets ? "checkpoint_offsets"
                                 : "checkpoint_cu_starts and checkpoint_indices");
    if (!a->checkpoints)
        return FLASH_KDA_OK;
    if (every == offsets)
        return INVALID(
            "checkpoints is given with %s checkpoint_every and checkpoint_offsets; expected one of them",
            every ? "both" : "neither");
    if (a->checkpoint_cu_starts && !(every && a->cu_seqlens))
        return INVALID("checkpoint_cu_starts is given without %s; expected NULL",
                       every ? "cu_seqlens" : "checkpoint_every");
    if (a->checkpoint_indices && !a->checkpoint_cu_starts)
        return INVALID("checkpoint_indices is given without checkpoint_cu_starts; expected NULL");
    if (!every)
        return check_checkpoints_at_offsets(a, p);
    const struct kda_checkpoint_args rows = {a->checkpoints, a->checkpoint_cu_starts, a->checkpoint_indices,
                                             true};
    return kda_check_checkpoint_rows(&rows, &a->q->device, p);
}

static flash_kda_status check_border(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    const struct kda_border_args border = {.phase = a->phase,
                                           .awaiting_name = "incoming_rows",
                                           .awaiting_form = "[C]",
                                           .giving_name = "outgoing_rows",
                                           .giving_form = "[S]",
                                           .awaiting_rows = a->incoming_rows,
                                           .giving_rows = a->outgoing_rows,
                                           .summaries = a->summaries,
                                           .states = a->incoming,
                                           .with_transitions = true};
    if (a->phase != FLASH_KDA_PHASE_WHOLE && p->fused)
        return INVALID("%s is given with %s; expected NULL: convolutions and norm are the caller's there",
                       a->norm_weight     ? "norm_weight"
                       : a->q_conv_weight ? "q_conv_weight"
                       : a->k_conv_weight ? "k_conv_weight"
                                          : "v_conv_weight",
                       a->phase == FLASH_KDA_PHASE_BEGIN ? "FLASH_KDA_PHASE_BEGIN" : "FLASH_KDA_PHASE_FINISH");
    return kda_check_border(&border, &a->q->device, &p->base, &p->border);
}

/* ---- Memory ------------------------------------------------------------------------------------ */

static bool shared_pool(const struct kda_prefill *p) {
    return p->state_indices.data && p->checkpoint_indices.data && p->final_state.data &&
           kda_tensors_identical(&p->final_state, &p->checkpoints);
}

/* Those that are written first. */
enum { WRITTEN = 4 + KDA_CONVOLUTIONS, TENSORS = 21 + KDA_FUSED_TENSORS };

static void list_tensors(const struct kda_prefill *p, const struct kda_tensor *list[TENSORS]) {
    static const struct kda_fused none = {.norm_eps = 0};
    enum { FIRST = 4 };
    const struct kda_tensor *const all[TENSORS - FIRST - KDA_FUSED_TENSORS] = {&p->q,
                                                                               &p->k,
                                                                               &p->v,
                                                                               &p->g,
                                                                               &p->beta,
                                                                               &p->A_log,
                                                                               &p->dt_bias,
                                                                               &p->initial_state,
                                                                               &p->cu_seqlens,
                                                                               &p->state_indices,
                                                                               &p->has_initial_state,
                                                                               &p->checkpoint_cu_starts,
                                                                               &p->checkpoint_indices,
                                                                               &p->checkpoint_offsets,
                                                                               &p->border.awaiting_rows,
                                                                               &p->border.giving_rows,
                                                                               &p->border.states};
    list[0] = &p->out;
    list[1] = &p->final_state;
    list[2] = &p->checkpoints;
    list[3] = &p->border.summaries;
    kda_list_fused(p->fused ? p->fused : &none, list + FIRST);
    memcpy(list + FIRST + KDA_FUSED_TENSORS, all, sizeof all);
}

/* No written tensor overlaps another argument, but for the two exceptions that the header names. */
static flash_kda_status check_aliasing(const struct kda_prefill *p) {
    const struct kda_tensor *all[TENSORS];
    bool in_place = p->final_state.data && p->initial_state.data &&
                    kda_tensors_identical(&p->final_state, &p->initial_state);
    bool pool = shared_pool(p);
    list_tensors(p, all);
    for (int i = 0; i < WRITTEN; i++)
        for (int j = i + 1; j < TENSORS; j++) {
            bool state = all[j] == &p->initial_state;
            bool states = all[i] == &p->final_state && state && in_place;
            bool of_pool = all[i] == &p->final_state || all[i] == &p->checkpoints;
            bool slots = pool && of_pool && (all[j] == &p->checkpoints || (state && in_place));
            if (!states && !slots)
                TRY(kda_check_overlap(all[i], all[j],
                                      state && all[i] == &p->final_state
                                          ? ", or the very same tensor to update it in place"
                                          : ""));
        }
    return FLASH_KDA_OK;
}

/* Marks the slots that t names in `seen`, one bit a slot. padding: what names none, beside -1. */
static flash_kda_status check_slots(const struct kda_tensor *t, int64_t slots, int64_t padding,
                                    unsigned char *seen) {
    for (int64_t i = 0; i < t->shape[0]; i++) {
        int64_t slot = kda_index(t, i, 0);
        if (slot == padding)
            continue;
        if (slot < -1 || slot >= slots)
            return INVALID("%s[%lld] is %lld; expected 0 to %lld, or -1", t->name, (long long)i,
                           (long long)slot, (long long)slots - 1);
        if (slot >= 0 && seen && seen[slot / 8] >> slot % 8 & 1)
            return INVALID("%s[%lld] is %lld, a slot that is used twice; expected each slot once", t->name,
                           (long long)i, (long long)slot);
        if (slot >= 0 && seen)
            seen[slot / 8] |= (unsigned char)(1u << slot % 8);
    }
    return FLASH_KDA_OK;
}

static size_t slot_bytes(const struct kda_prefill *p) {
    int64_t slots = 0;
    if (!p->on_host)
        return 0;
    if (p->state_indices.data)
        slots = p->slots;
    if (p->checkpoint_indices.data && p->checkpoints.shape[0] > slots)
        slots = p->checkpoints.shape[0];
    return (size_t)(slots / 8 + (slots > 0));
}

/* Indices in range and, given scratch of slot_bytes(), none used twice. */
static flash_kda_status check_all_slots(const struct kda_prefill *p, unsigned char *seen) {
    if (!p->on_host)
        return FLASH_KDA_OK;
    if (seen)
        memset(seen, 0, slot_bytes(p));
    if (p->state_indices.data)
        TRY(check_slots(&p->state_indices, p->slots, p->has_padding_slot ? p->padding_slot : -1, seen));
    if (p->checkpoint_indices.data) {
        if (seen && !shared_pool(p))
            memset(seen, 0, slot_bytes(p));
        TRY(check_slots(&p->checkpoint_indices, p->checkpoints.shape[0], -1, seen));
    }
    return FLASH_KDA_OK;
}

/* ---- Entries ----------------------------------------------------------------------------------- */

/* Checks everything that needs no workspace; describes the problem in *p, with *fused, and its backend in *backend. */
static flash_kda_status check_all(const flash_kda_prefill_args *given, struct kda_prefill *p,
                                  struct kda_fused *fused, const struct kda_backend **backend) {
    static const struct kda_args_type type = {.name = "flash_kda_prefill_args",
                                              .init = "FLASH_KDA_PREFILL_ARGS_INIT",
                                              .least = offsetof(flash_kda_prefill_args, gate),
                                              .size = sizeof(flash_kda_prefill_args)};
    flash_kda_prefill_args args;
    TRY(kda_args_read(given, &type, &args));
    if (args.checkpoint_every < 0)
        return INVALID("checkpoint_every is %lld; expected 0 or more", (long long)args.checkpoint_every);
    memset(p, 0, sizeof *p);
    memset(fused, 0, sizeof *fused);
    p->checkpoint_every = args.checkpoint_every;
    const struct kda_token_args tokens =
        KDA_TOKEN_ARGS(&args, .out = args.out, .needs_out = true,
                       .known_flags = FLASH_KDA_QK_NORM | FLASH_KDA_BATCH_INVARIANT | FLASH_KDA_PADDING_SLOT);
    TRY(kda_check_tokens(&tokens, &p->base, backend));
    TRY(check_slot_indices(&args, p));
    TRY(check_states(&args, p));
    TRY(check_fused(&args, p, fused));
    TRY(check_checkpoints(&args, p));
    TRY(check_border(&args, p));
    TRY(check_all_slots(p, NULL));
    return check_aliasing(p);
}

/* Scratch of the slot check and of the backend are used one after the other. */
static flash_kda_status workspace_size(const struct kda_prefill *p, const struct kda_backend *backend,
                                       size_t *bytes) {
    size_t needed = 0;
    TRY(backend->prefill_workspace_size(p, &needed));
    if (slot_bytes(p) > needed)
        needed = slot_bytes(p);
    *bytes = kda_with_alignment(needed);
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_prefill_workspace_size(const flash_kda_prefill_args *args, size_t *bytes) {
    struct kda_prefill p;
    struct kda_fused fused;
    const struct kda_backend *backend = NULL;
    if (!bytes)
        return INVALID("bytes is NULL; expected where to write the size");
    TRY(check_all(args, &p, &fused, &backend));
    return workspace_size(&p, backend, bytes);
}

flash_kda_status flash_kda_prefill(const flash_kda_prefill_args *args, void *workspace,
                                   size_t workspace_bytes) {
    struct kda_prefill p;
    struct kda_fused fused;
    const struct kda_backend *backend = NULL;
    const struct kda_tensor *tensors[TENSORS];
    size_t needed = 0;
    TRY(check_all(args, &p, &fused, &backend));
    TRY(workspace_size(&p, backend, &needed));
    list_tensors(&p, tensors);
    unsigned char *aligned = NULL;
    TRY(kda_check_workspace(tensors, TENSORS, workspace, workspace_bytes, needed, &aligned));
    TRY(check_all_slots(&p, aligned));
    bool keeps = p.final_state.data || p.checkpoints.data || (p.fused && kda_has_convolution(p.fused));
    bool nothing_to_write = p.tokens == 0 && !keeps;
    bool begins = p.border.phase == FLASH_KDA_PHASE_BEGIN && p.border.summaries.data;
    if ((nothing_to_write || p.sequences == 0) && !begins)
        return FLASH_KDA_OK;
    if (p.on_host)
        kda_clear_summaries(&p.base, &p.border);
    return backend->prefill(&p, aligned);
}

flash_kda_status flash_kda_prefill_describe(const flash_kda_prefill_args *args, char *text, size_t size) {
    struct kda_prefill p;
    struct kda_fused fused;
    const struct kda_backend *backend = NULL;
    if (!text || !size)
        return INVALID("text is NULL or of size 0; expected where to write");
    TRY(check_all(args, &p, &fused, &backend));
    return backend->prefill_describe(&p, text, size);
}
