/* SPDX-License-Identifier: MIT */
/* The public entries of backward: every argument is checked here, before anything is written. */
#include "api/args.h"
#include "api/backward_problem.h"
#include "api/check.h"

#include <string.h>

/* ---- Tensors ----------------------------------------------------------------------------------- */

static flash_kda_status check_checkpoints(const flash_kda_backward_args *a, struct kda_prefill *p) {
    if (!a->checkpoints && (a->checkpoint_every || a->checkpoint_cu_starts))
        return INVALID("checkpoints is NULL; expected a tensor with %s",
                       a->checkpoint_every ? "checkpoint_every" : "checkpoint_cu_starts");
    if (!a->checkpoints)
        return FLASH_KDA_OK;
    if (a->checkpoint_every == 0)
        return INVALID("checkpoint_every is 0 with checkpoints; expected the tokens from one to the next");
    if (a->checkpoint_cu_starts && !a->cu_seqlens)
        return INVALID("checkpoint_cu_starts is given without cu_seqlens; expected NULL");
    const struct kda_checkpoint_args rows = {.rows = a->checkpoints, .cu_starts = a->checkpoint_cu_starts};
    return kda_check_checkpoint_rows(&rows, &a->q->device, p);
}

/* initial_state, final_state's gradient or initial_state's. */
static flash_kda_status check_state(const flash_kda_backward_args *a, const DLTensor *t, const char *name,
                                    bool written, const struct kda_tokens *x, struct kda_tensor *out) {
    if (!t)
        return FLASH_KDA_OK;
    return kda_check_state(t, name, kda_state_form(x, "[N, HV, V, K]", "[N, HV, K, V]"), KDA_DTYPES_STATE, 4,
                           x->sequences, 0, &a->q->device, written, x, out);
}

static flash_kda_status check_states(const flash_kda_backward_args *a, struct kda_backward *b) {
    const struct kda_tokens *x = &b->forward.base;
    TRY(check_state(a, a->initial_state, "initial_state", false, x, &b->forward.initial_state));
    TRY(check_state(a, a->d_final_state, "d_final_state", false, x, &b->d_final_state));
    return check_state(a, a->d_initial_state, "d_initial_state", true, x, &b->d_initial_state);
}

/* A gradient that is read or written in the shape of what it belongs to. */
struct gradient {
    const char *name, *form;
    const DLTensor *given;
    int rank;
    const int64_t *shape;
    bool any_stride, read;
    struct kda_tensor *out;
};

static flash_kda_status check_gradients(const flash_kda_backward_args *a, struct kda_backward *b) {
    const struct kda_tokens *x = &b->forward.base;
    const int64_t like_q[4] = {x->batches, x->tokens, x->heads, x->key_dim};
    const int64_t like_v[4] = {x->batches, x->tokens, x->value_heads, x->value_dim};
    const int64_t like_g[4] = {x->batches, x->tokens, x->value_heads, x->key_dim};
    const struct gradient gradients[] = {
        {"d_out", "[B, T, HV, V]", a->d_out, 4, like_v, false, true, &b->d_out},
        {"dq", "[B, T, H, K]", a->dq, 4, like_q, false, false, &b->dq},
        {"dk", "[B, T, H, K]", a->dk, 4, like_q, false, false, &b->dk},
        {"dv", "[B, T, HV, V]", a->dv, 4, like_v, false, false, &b->dv},
        {"dg", "[B, T, HV, K]", a->dg, 4, like_g, false, false, &b->dg},
        {"dbeta", "[B, T, HV]", a->dbeta, 3, like_g, true, false, &b->dbeta},
        {"dA_log", "[HV]", a->dA_log, 1, like_g + 2, true, false, &b->dA_log},
        {"d_dt_bias", "[HV, K]", a->d_dt_bias, 2, like_g + 2, false, false, &b->d_dt_bias},
    };
    if (!a->d_out && !a->d_final_state && !a->outgoing_rows)
        return INVALID("d_out is NULL without d_final_state; expected one of them");
    if (a->dA_log && !a->A_log)
        return INVALID("dA_log is given without A_log; expected NULL");
    if (a->d_dt_bias && !a->dt_bias)
        return INVALID("d_dt_bias is given without dt_bias; expected NULL");
    for (size_t i = 0; i < sizeof gradients / sizeof *gradients; i++) {
        const struct gradient *d = &gradients[i];
        struct kda_tensor_spec spec = kda_floats(d->name, d->form, d->rank, d->shape, &a->q->device);
        spec.last_dim_contiguous = !d->any_stride;
        spec.written = !d->read;
        if (d->given)
            TRY(kda_tensor_check(d->given, &spec, d->out));
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_border(const flash_kda_backward_args *a, struct kda_backward *b) {
    const struct kda_border_args border = {.phase = a->phase,
                                           .awaiting_name = "outgoing_rows",
                                           .awaiting_form = "[S]",
                                           .giving_name = "incoming_rows",
                                           .giving_form = "[C]",
                                           .awaiting_rows = a->outgoing_rows,
                                           .giving_rows = a->incoming_rows,
                                           .summaries = a->summaries,
                                           .states = a->incoming};
    return kda_check_border(&border, &a->q->device, &b->forward.base, &b->border);
}

/* ---- Memory ------------------------------------------------------------------------------------ */

/* Those that are written first. */
enum { WRITTEN = 9, TENSORS = 25 };

static void list_tensors(const struct kda_backward *b, const struct kda_tensor *list[TENSORS]) {
    const struct kda_prefill *p = &b->forward;
    const struct kda_tensor *const all[TENSORS] = {&b->dq,
                                                   &b->dk,
                                                   &b->dv,
                                                   &b->dg,
                                                   &b->dbeta,
                                                   &b->dA_log,
                                                   &b->d_dt_bias,
                                                   &b->d_initial_state,
                                                   &b->border.summaries,
                                                   &b->d_out,
                                                   &b->d_final_state,
                                                   &p->q,
                                                   &p->k,
                                                   &p->v,
                                                   &p->g,
                                                   &p->beta,
                                                   &p->A_log,
                                                   &p->dt_bias,
                                                   &p->cu_seqlens,
                                                   &p->initial_state,
                                                   &p->checkpoints,
                                                   &p->checkpoint_cu_starts,
                                                   &b->border.awaiting_rows,
                                                   &b->border.giving_rows,
                                                   &b->border.states};
    memcpy(list, all, sizeof all);
}

/* No written tensor overlaps another argument, but for the exception that the header names. */
static flash_kda_status check_aliasing(const struct kda_backward *b) {
    const struct kda_tensor *all[TENSORS];
    list_tensors(b, all);
    for (int i = 0; i < WRITTEN; i++)
        for (int j = i + 1; j < TENSORS; j++) {
            bool states = all[i] == &b->d_initial_state && all[j] == &b->d_final_state;
            if (!states || !kda_tensors_identical(all[i], all[j]))
                TRY(kda_check_overlap(all[i], all[j],
                                      states ? ", or the very same tensor to update it in place" : ""));
        }
    return FLASH_KDA_OK;
}

/* ---- Entries ----------------------------------------------------------------------------------- */

/* Checks everything that needs no workspace; describes the problem in *b and its backend in *backend. */
static flash_kda_status check_all(const flash_kda_backward_args *given, struct kda_backward *b,
                                  const struct kda_backend **backend) {
    enum { CHECKPOINT_STEP = 32 };
    static const struct kda_args_type type = {.name = "flash_kda_backward_args",
                                              .init = "FLASH_KDA_BACKWARD_ARGS_INIT",
                                              .least = offsetof(flash_kda_backward_args, d_out),
                                              .size = sizeof(flash_kda_backward_args)};
    flash_kda_backward_args args;
    TRY(kda_args_read(given, &type, &args));
    if (args.checkpoint_every < 0 || args.checkpoint_every % CHECKPOINT_STEP)
        return INVALID("checkpoint_every is %lld; expected 0 or a multiple of %d",
                       (long long)args.checkpoint_every, CHECKPOINT_STEP);
    memset(b, 0, sizeof *b);
    b->forward.checkpoint_every = args.checkpoint_every;
    const struct kda_token_args tokens =
        KDA_TOKEN_ARGS(&args, .known_flags = FLASH_KDA_QK_NORM | FLASH_KDA_BATCH_INVARIANT);
    TRY(kda_check_tokens(&tokens, &b->forward.base, backend));
    TRY(check_states(&args, b));
    TRY(check_checkpoints(&args, &b->forward));
    TRY(check_gradients(&args, b));
    TRY(check_border(&args, b));
    return check_aliasing(b);
}

static flash_kda_status workspace_size(const struct kda_backward *b, const struct kda_backend *backend,
                                       size_t *bytes) {
    size_t needed = 0;
    TRY(backend->backward_workspace_size(b, &needed));
    *bytes = kda_with_alignment(needed);
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_backward_workspace_size(const flash_kda_backward_args *args, size_t *bytes) {
    struct kda_backward b;
    const struct kda_backend *backend = NULL;
    if (!bytes)
        return INVALID("bytes is NULL; expected where to write the size");
    TRY(check_all(args, &b, &backend));
    return workspace_size(&b, backend, bytes);
}

flash_kda_status flash_kda_backward(const flash_kda_backward_args *args, void *workspace,
                                    size_t workspace_bytes) {
    struct kda_backward b;
    const struct kda_backend *backend = NULL;
    const struct kda_tensor *tensors[TENSORS];
    unsigned char *aligned = NULL;
    size_t needed = 0;
    TRY(check_all(args, &b, &backend));
    TRY(workspace_size(&b, backend, &needed));
    list_tensors(&b, tensors);
    TRY(kda_check_workspace(tensors, TENSORS, workspace, workspace_bytes, needed, &aligned));
    if (b.forward.on_host)
        kda_clear_summaries(&b.forward.base, &b.border);
    return backend->backward(&b, aligned);
}

flash_kda_status flash_kda_backward_describe(const flash_kda_backward_args *args, char *text, size_t size) {
    struct kda_backward b;
    const struct kda_backend *backend = NULL;
    if (!text || !size)
        return INVALID("text is NULL or of size 0; expected where to write");
    TRY(check_all(args, &b, &backend));
    return backend->backward_describe(&b, text, size);
}
