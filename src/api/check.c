/* SPDX-License-Identifier: MIT */
/* Checks of what the arguments of prefill, decode and backward have in common. */
#include "api/check.h"

#include <float.h>
#include <math.h>

/* ---- Numbers ----------------------------------------------------------------------------------- */

static flash_kda_status check_options(const struct kda_token_args *a, struct kda_tokens *x) {
    if ((unsigned)a->gate > FLASH_KDA_GATE_SIGMOID)
        return INVALID("gate is %d; expected a flash_kda_gate", (int)a->gate);
    if ((unsigned)a->beta_mode > FLASH_KDA_BETA_TWICE_SIGMOID)
        return INVALID("beta_mode is %d; expected a flash_kda_beta", (int)a->beta_mode);
    if ((unsigned)a->state_layout > FLASH_KDA_STATE_K_FIRST)
        return INVALID("state_layout is %d; expected a flash_kda_state_layout", (int)a->state_layout);
    if (a->flags & ~a->known_flags)
        return INVALID("flags is 0x%x; expected only bits of flash_kda_flags that this call takes, 0x%x",
                       (unsigned)a->flags, (unsigned)a->known_flags);
    if (a->gate == FLASH_KDA_GATE_SIGMOID && !(a->lower_bound >= -5 && a->lower_bound < 0))
        return INVALID("lower_bound is %g; expected at least -5 and below 0 with FLASH_KDA_GATE_SIGMOID",
                       a->lower_bound);
    if (!(fabs(a->scale) <= FLT_MAX))
        return INVALID("scale is %g; expected a number that fp32 can hold, or 0 for 1 / sqrt(K)", a->scale);
    if (a->num_threads < 0 || a->num_threads > KDA_MAX_THREADS)
        return INVALID("num_threads is %d; expected 0 to %d", (int)a->num_threads, KDA_MAX_THREADS);
    x->gate = a->gate;
    x->lower_bound = (float)a->lower_bound;
    x->beta_mode = a->beta_mode;
    x->state_layout = a->state_layout;
    x->backend = a->backend;
    x->qk_norm = a->flags & FLASH_KDA_QK_NORM;
    x->batch_invariant = a->flags & FLASH_KDA_BATCH_INVARIANT;
    x->num_threads = a->num_threads;
    x->stream = a->stream;
    return FLASH_KDA_OK;
}

/* ---- Tensors of tokens ------------------------------------------------------------------------- */

static flash_kda_status check_required(const struct kda_token_args *a) {
    enum { OUT = 5 };
    const struct {
        const char *name;
        const DLTensor *tensor;
    } required[] = {{"q", a->q}, {"k", a->k}, {"v", a->v}, {"g", a->g}, {"beta", a->beta}, {"out", a->out}};
    for (size_t i = 0; i < sizeof required / sizeof *required; i++)
        if (!required[i].tensor && (a->needs_out || i != OUT))
            return INVALID("%s is NULL; expected a tensor", required[i].name);
    return FLASH_KDA_OK;
}

struct kda_tensor_spec kda_floats(const char *name, const char *form, int rank, const int64_t *shape,
                                  const DLDevice *device) {
    return (struct kda_tensor_spec){.name = name,
                                    .form = form,
                                    .dtypes = KDA_DTYPES_FLOAT,
                                    .rank = rank,
                                    .shape = shape,
                                    .last_dim_contiguous = true,
                                    .device = device};
}

static flash_kda_status check_gate_inputs(const struct kda_token_args *a, struct kda_tokens *x) {
    const int64_t like_g[4] = {x->batches, x->tokens, x->value_heads, x->key_dim};
    const int64_t *like_A_log = &like_g[2], *like_dt_bias = &like_g[2];
    const struct kda_tensor_spec g = kda_floats("g", "[B, T, HV, K]", 4, like_g, &a->q->device);
    const struct kda_tensor_spec dt_bias = kda_floats("dt_bias", "[HV, K]", 2, like_dt_bias, &a->q->device);
    struct kda_tensor_spec A_log = kda_floats("A_log", "[HV]", 1, like_A_log, &a->q->device);
    A_log.last_dim_contiguous = false;
    TRY(kda_tensor_check(a->g, &g, &x->g));
    if (x->gate == FLASH_KDA_GATE_NONE && (a->A_log || a->dt_bias))
        return INVALID("%s is given with FLASH_KDA_GATE_NONE, where g is the log decay itself; expected NULL",
                       a->A_log ? "A_log" : "dt_bias");
    if (a->A_log)
        TRY(kda_tensor_check(a->A_log, &A_log, &x->A_log));
    if (a->dt_bias)
        TRY(kda_tensor_check(a->dt_bias, &dt_bias, &x->dt_bias));
    return FLASH_KDA_OK;
}

static flash_kda_status check_inputs(const struct kda_token_args *a, struct kda_tokens *x) {
    const DLDevice *device = &a->q->device;
    const int64_t any[4] = {-1, -1, -1, -1};
    const struct kda_tensor_spec q = kda_floats("q", "[B, T, H, K]", 4, any, device);
    TRY(kda_tensor_check(a->q, &q, &x->q));
    int64_t B = x->batches = x->q.shape[0], T = x->tokens = x->q.shape[1];
    int64_t H = x->heads = x->q.shape[2], K = x->key_dim = x->q.shape[3];
    if (K < 1 || K > KDA_MAX_KEY_DIM)
        return INVALID("q has K = %lld; expected 1 to %d", (long long)K, KDA_MAX_KEY_DIM);
    const int64_t like_q[4] = {B, T, H, K}, values[4] = {B, T, -1, -1};
    const struct kda_tensor_spec k = kda_floats("k", "[B, T, H, K]", 4, like_q, device);
    const struct kda_tensor_spec v = kda_floats("v", "[B, T, HV, V]", 4, values, device);
    TRY(kda_tensor_check(a->k, &k, &x->k));
    TRY(kda_tensor_check(a->v, &v, &x->v));
    int64_t HV = x->value_heads = x->v.shape[2], V = x->value_dim = x->v.shape[3];
    if (V < 1 || V > INT32_MAX)
        return INVALID("v has V = %lld; expected 1 to %d", (long long)V, INT32_MAX);
    if (H < 1 || HV < 1 || HV % H)
        return INVALID("v has HV = %lld value heads; expected a positive multiple of the H = %lld heads of q",
                       (long long)HV, (long long)H);
    const int64_t like_v[4] = {B, T, HV, V};
    struct kda_tensor_spec beta = kda_floats("beta", "[B, T, HV]", 3, like_v, device);
    struct kda_tensor_spec out = kda_floats("out", "[B, T, HV, V]", 4, like_v, device);
    beta.last_dim_contiguous = false;
    out.written = true;
    TRY(check_gate_inputs(a, x));
    TRY(kda_tensor_check(a->beta, &beta, &x->beta));
    if (a->out)
        TRY(kda_tensor_check(a->out, &out, &x->out));
    x->scale = (float)(a->scale != 0 ? a->scale : 1 / sqrt((double)K));
    return FLASH_KDA_OK;
}

/* ---- Indices ----------------------------------------------------------------------------------- */

flash_kda_status kda_check_indices(const DLTensor *t, const char *name, const char *form, int rank,
                                   const int64_t *shape, const DLDevice *device, struct kda_tensor *out) {
    const struct kda_tensor_spec spec = {
        .name = name, .form = form, .dtypes = KDA_DTYPES_INDEX, .rank = rank, .shape = shape, .device = device};
    TRY(kda_tensor_check(t, &spec, out));
    if (out->shape[0] > 1 && out->stride[0] == 0)
        return INVALID("%s has stride 0 in dimension 0; expected a value of its own for each element", name);
    return FLASH_KDA_OK;
}

flash_kda_status kda_check_cumulative(const struct kda_tensor *t, int64_t end, const char *what) {
    int64_t last = 0;
    for (int64_t i = 0; i < t->shape[0]; i++) {
        int64_t value = kda_index(t, i, 0);
        if (i == 0 && value != 0)
            return INVALID("%s[0] is %lld; expected 0", t->name, (long long)value);
        if (value < last)
            return INVALID("%s[%lld] is %lld, below the %lld before it; expected never falling values", t->name,
                           (long long)i, (long long)value, (long long)last);
        if (value > end)
            return INVALID("%s[%lld] is %lld; expected at most %s = %lld", t->name, (long long)i,
                           (long long)value, what, (long long)end);
        last = value;
    }
    if (last != end)
        return INVALID("%s ends at %lld; expected %s = %lld", t->name, (long long)last, what, (long long)end);
    return FLASH_KDA_OK;
}

static flash_kda_status check_sequences(const struct kda_token_args *a, struct kda_tokens *x) {
    const DLDevice *device = &a->q->device;
    x->sequences = x->batches;
    if (a->cu_seqlens) {
        const int64_t any[1] = {-1};
        TRY(kda_check_indices(a->cu_seqlens, "cu_seqlens", "[N + 1]", 1, any, device, &x->cu_seqlens));
        if (x->cu_seqlens.shape[0] < 1)
            return INVALID("cu_seqlens is empty; expected N + 1 values");
        if (x->batches != 1)
            return INVALID("q has B = %lld; expected 1 with cu_seqlens", (long long)x->batches);
        if (x->on_host)
            TRY(kda_check_cumulative(&x->cu_seqlens, x->tokens, "T"));
        x->sequences = x->cu_seqlens.shape[0] - 1;
    }
    return FLASH_KDA_OK;
}

flash_kda_status kda_check_has_initial_state(const DLTensor *t, const struct kda_tokens *x,
                                             const DLDevice *device, struct kda_tensor *out) {
    const int64_t like[1] = {x->sequences};
    const struct kda_tensor_spec spec = {.name = "has_initial_state",
                                         .form = "[N]",
                                         .dtypes = KDA_DTYPES_FLAG,
                                         .rank = 1,
                                         .shape = like,
                                         .device = device};
    return t ? kda_tensor_check(t, &spec, out) : FLASH_KDA_OK;
}

flash_kda_status kda_check_padding_slot(uint32_t flags, int64_t padding_slot, const DLTensor *state_indices) {
    if (!(flags & FLASH_KDA_PADDING_SLOT))
        return padding_slot ? INVALID("padding_slot is %lld without FLASH_KDA_PADDING_SLOT; expected 0",
                                      (long long)padding_slot)
                            : FLASH_KDA_OK;
    if (padding_slot < 0)
        return INVALID("padding_slot is %lld; expected a slot, 0 or more, beside -1, which is always padding",
                       (long long)padding_slot);
    if (!state_indices)
        return INVALID("padding_slot is given without state_indices; expected flags without "
                       "FLASH_KDA_PADDING_SLOT");
    return FLASH_KDA_OK;
}

/* ---- States ------------------------------------------------------------------------------------ */

flash_kda_status kda_check_state(const DLTensor *t, const char *name, const char *form, unsigned dtypes,
                                 int rank, int64_t outer, int64_t rows, const DLDevice *device, bool written,
                                 const struct kda_tokens *x, struct kda_tensor *out) {
    bool v_first = x->state_layout == FLASH_KDA_STATE_V_FIRST;
    int64_t first = v_first ? x->value_dim : x->key_dim, second = v_first ? x->key_dim : x->value_dim;
    const int64_t four[4] = {outer, x->value_heads, first, second};
    const int64_t five[5] = {outer, rows, x->value_heads, first, second};
    const struct kda_tensor_spec spec = {.name = name,
                                         .form = form,
                                         .dtypes = dtypes,
                                         .rank = rank,
                                         .shape = rank == 5 ? five : four,
                                         .last_dim_contiguous = true,
                                         .written = written,
                                         .device = device};
    return kda_tensor_check(t, &spec, out);
}

const char *kda_state_form(const struct kda_tokens *x, const char *v_first, const char *k_first) {
    return x->state_layout == FLASH_KDA_STATE_V_FIRST ? v_first : k_first;
}

/* ---- Checkpoints ------------------------------------------------------------------------------- */

flash_kda_status kda_check_checkpoint_rows(const struct kda_checkpoint_args *a, const DLDevice *device,
                                           struct kda_prefill *p) {
    const struct kda_tokens *x = &p->base;
    if (!x->cu_seqlens.data) {
        TRY(kda_check_state(a->rows, "checkpoints",
                            kda_state_form(x, "[B, rows, HV, V, K]", "[B, rows, HV, K, V]"), KDA_DTYPES_STATE,
                            5, p->batches, -1, device, a->written, x, &p->checkpoints));
    } else {
        if (!a->cu_starts)
            return INVALID(
                "checkpoint_cu_starts is NULL; expected a tensor with cu_seqlens and checkpoint_every");
        TRY(kda_check_state(a->rows, "checkpoints", kda_state_form(x, "[rows, HV, V, K]", "[rows, HV, K, V]"),
                            KDA_DTYPES_STATE, 4, -1, 0, device, a->written, x, &p->checkpoints));
        const int64_t starts[1] = {p->sequences + 1};
        TRY(kda_check_indices(a->cu_starts, "checkpoint_cu_starts", "[N + 1]", 1, starts, device,
                              &p->checkpoint_cu_starts));
        int64_t rows = p->checkpoints.shape[0];
        if (a->indices) {
            const int64_t any[1] = {-1};
            TRY(kda_check_indices(a->indices, "checkpoint_indices", "[rows of all sequences]", 1, any, device,
                                  &p->checkpoint_indices));
            rows = p->checkpoint_indices.shape[0];
        }
        if (p->on_host)
            TRY(kda_check_cumulative(&p->checkpoint_cu_starts, rows,
                                     a->indices ? "the size of checkpoint_indices"
                                                : "the rows of checkpoints"));
    }
    int64_t distinct = p->sequences > 0; /* dense sequences are all alike */
    if (x->cu_seqlens.data)
        distinct = p->on_host ? p->sequences : 0;
    for (int64_t n = 0; n < distinct; n++) {
        int64_t length = kda_sequence(p, n).length;
        int64_t most = length / p->checkpoint_every + (length % p->checkpoint_every != 0);
        int64_t rows = p->checkpoints.rank == 5 ? p->checkpoints.shape[1]
                                                : kda_index(&p->checkpoint_cu_starts, n + 1, 0) -
                                                      kda_index(&p->checkpoint_cu_starts, n, 0);
        int64_t least = a->written || !most ? 0 : most - 1; /* a reader does not miss the last one */
        if (rows < least || rows > most)
            return INVALID(
                "%s gives sequence %lld of %lld tokens %lld rows; expected at %s %lld, one every %lld tokens",
                p->checkpoints.rank == 5 ? "checkpoints" : "checkpoint_cu_starts", (long long)n,
                (long long)length, (long long)rows, rows < least ? "least" : "most",
                (long long)(rows < least ? least : most), (long long)p->checkpoint_every);
    }
    return FLASH_KDA_OK;
}

/* ---- Memory ------------------------------------------------------------------------------------ */

flash_kda_status kda_check_overlap(const struct kda_tensor *written, const struct kda_tensor *other,
                                   const char *but) {
    if (written->data && other->data && kda_tensors_overlap(written, other))
        return INVALID("%s overlaps %s in memory; expected memory of its own%s", written->name, other->name,
                       but);
    return FLASH_KDA_OK;
}

size_t kda_with_alignment(size_t needed) { return needed ? needed + KDA_WORKSPACE_ALIGNMENT - 1 : 0; }

flash_kda_status kda_check_workspace(const struct kda_tensor *const *tensors, size_t count, void *workspace,
                                     size_t bytes, size_t needed, unsigned char **aligned) {
    if (bytes < needed)
        return kda_fail(FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL, "workspace has %zu bytes; expected at least %zu",
                        bytes, needed);
    if (needed && !workspace)
        return kda_fail(FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL, "workspace is NULL; expected at least %zu bytes",
                        needed);
    const struct kda_tensor scratch = {.name = "workspace",
                                       .data = workspace,
                                       .dtype = KDA_I32,
                                       .rank = 1,
                                       .shape = {(int64_t)(needed / 4 + 1)},
                                       .stride = {4}};
    for (size_t i = 0; needed && i < count; i++)
        TRY(kda_check_overlap(&scratch, tensors[i], ""));
    *aligned = workspace;
    if (workspace)
        *aligned += -(uintptr_t)workspace % KDA_WORKSPACE_ALIGNMENT;
    return FLASH_KDA_OK;
}

/* ---- All of it --------------------------------------------------------------------------------- */

flash_kda_status kda_check_tokens(const struct kda_token_args *a, struct kda_tokens *x,
                                  const struct kda_backend **backend) {
    TRY(check_options(a, x));
    TRY(check_required(a));
    TRY(kda_backend_for(a->backend, "q", a->q->device, backend));
    x->on_host = kda_on_host(a->q->device);
    x->device = a->q->device.device_id;
    TRY(check_inputs(a, x));
    return check_sequences(a, x);
}
