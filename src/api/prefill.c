/* SPDX-License-Identifier: MIT */
/* The public entries of prefill: every argument is checked here, before anything is written. */
#include "api/backend.h"
#include "api/status.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define INVALID(...) kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT, __VA_ARGS__)

/* Runs a check and leaves the function with its status if it failed. */
#define TRY(check)                             \
    do {                                       \
        flash_kda_status try_status = (check); \
        if (try_status)                        \
            return try_status;                 \
    } while (0)

enum { MAX_KEY_DIM = 256 };

/* ---- Numbers ----------------------------------------------------------------------------------- */

static flash_kda_status check_options(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    if ((unsigned)a->gate > FLASH_KDA_GATE_SIGMOID)
        return INVALID("gate is %d; expected a flash_kda_gate", (int)a->gate);
    if ((unsigned)a->beta_mode > FLASH_KDA_BETA_TWICE_SIGMOID)
        return INVALID("beta_mode is %d; expected a flash_kda_beta", (int)a->beta_mode);
    if ((unsigned)a->state_layout > FLASH_KDA_STATE_K_FIRST)
        return INVALID("state_layout is %d; expected a flash_kda_state_layout", (int)a->state_layout);
    if (a->flags & ~(uint32_t)(FLASH_KDA_QK_NORM | FLASH_KDA_BATCH_INVARIANT))
        return INVALID("flags is 0x%x; expected only bits of flash_kda_flags", (unsigned)a->flags);
    if (a->gate == FLASH_KDA_GATE_SIGMOID && !(a->lower_bound >= -5 && a->lower_bound < 0))
        return INVALID("lower_bound is %g; expected at least -5 and below 0 with FLASH_KDA_GATE_SIGMOID",
                       a->lower_bound);
    if (!(fabs(a->scale) <= FLT_MAX))
        return INVALID("scale is %g; expected a number that fp32 can hold, or 0 for 1 / sqrt(K)", a->scale);
    if (a->num_threads < 0 || a->num_threads > KDA_MAX_THREADS)
        return INVALID("num_threads is %d; expected 0 to %d", (int)a->num_threads, KDA_MAX_THREADS);
    if (a->checkpoint_every < 0)
        return INVALID("checkpoint_every is %lld; expected 0 or more", (long long)a->checkpoint_every);
    p->gate = a->gate;
    p->lower_bound = (float)a->lower_bound;
    p->beta_mode = a->beta_mode;
    p->state_layout = a->state_layout;
    p->backend = a->backend;
    p->qk_norm = a->flags & FLASH_KDA_QK_NORM;
    p->batch_invariant = a->flags & FLASH_KDA_BATCH_INVARIANT;
    p->num_threads = a->num_threads;
    p->stream = a->stream;
    p->checkpoint_every = a->checkpoint_every;
    return FLASH_KDA_OK;
}

/* ---- Tensors ----------------------------------------------------------------------------------- */

static flash_kda_status check_required(const flash_kda_prefill_args *a) {
    const struct {
        const char *name;
        const DLTensor *tensor;
    } required[] = {{"q", a->q}, {"k", a->k}, {"v", a->v}, {"g", a->g}, {"beta", a->beta}, {"out", a->out}};
    for (size_t i = 0; i < sizeof required / sizeof *required; i++)
        if (!required[i].tensor)
            return INVALID("%s is NULL; expected a tensor", required[i].name);
    return FLASH_KDA_OK;
}

/* An argument of any float dtype that is read or written in rows. */
static struct kda_tensor_spec floats(const char *name, const char *form, int rank, const int64_t *shape,
                                     const DLDevice *device) {
    return (struct kda_tensor_spec){.name = name,
                                    .form = form,
                                    .dtypes = KDA_DTYPES_FLOAT,
                                    .rank = rank,
                                    .shape = shape,
                                    .last_dim_contiguous = true,
                                    .device = device};
}

static flash_kda_status check_gate_inputs(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    const int64_t like_g[4] = {p->batches, p->tokens, p->value_heads, p->key_dim};
    const int64_t *like_A_log = &like_g[2], *like_dt_bias = &like_g[2];
    const struct kda_tensor_spec g = floats("g", "[B, T, HV, K]", 4, like_g, &a->q->device);
    const struct kda_tensor_spec dt_bias = floats("dt_bias", "[HV, K]", 2, like_dt_bias, &a->q->device);
    struct kda_tensor_spec A_log = floats("A_log", "[HV]", 1, like_A_log, &a->q->device);
    A_log.last_dim_contiguous = false;
    TRY(kda_tensor_check(a->g, &g, &p->g));
    if (p->gate == FLASH_KDA_GATE_NONE && (a->A_log || a->dt_bias))
        return INVALID("%s is given with FLASH_KDA_GATE_NONE, where g is the log decay itself; expected NULL",
                       a->A_log ? "A_log" : "dt_bias");
    if (a->A_log)
        TRY(kda_tensor_check(a->A_log, &A_log, &p->A_log));
    if (a->dt_bias)
        TRY(kda_tensor_check(a->dt_bias, &dt_bias, &p->dt_bias));
    return FLASH_KDA_OK;
}

static flash_kda_status check_inputs(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    const DLDevice *device = &a->q->device;
    const int64_t any[4] = {-1, -1, -1, -1};
    const struct kda_tensor_spec q = floats("q", "[B, T, H, K]", 4, any, device);
    TRY(kda_tensor_check(a->q, &q, &p->q));
    int64_t B = p->batches = p->q.shape[0], T = p->tokens = p->q.shape[1];
    int64_t H = p->heads = p->q.shape[2], K = p->key_dim = p->q.shape[3];
    if (K < 1 || K > MAX_KEY_DIM)
        return INVALID("q has K = %lld; expected 1 to %d", (long long)K, MAX_KEY_DIM);
    const int64_t like_q[4] = {B, T, H, K}, values[4] = {B, T, -1, -1};
    const struct kda_tensor_spec k = floats("k", "[B, T, H, K]", 4, like_q, device);
    const struct kda_tensor_spec v = floats("v", "[B, T, HV, V]", 4, values, device);
    TRY(kda_tensor_check(a->k, &k, &p->k));
    TRY(kda_tensor_check(a->v, &v, &p->v));
    int64_t HV = p->value_heads = p->v.shape[2], V = p->value_dim = p->v.shape[3];
    if (V < 1 || V > INT32_MAX)
        return INVALID("v has V = %lld; expected 1 to %d", (long long)V, INT32_MAX);
    if (H < 1 || HV < 1 || HV % H)
        return INVALID("v has HV = %lld value heads; expected a positive multiple of the H = %lld heads of q",
                       (long long)HV, (long long)H);
    const int64_t like_v[4] = {B, T, HV, V};
    struct kda_tensor_spec beta = floats("beta", "[B, T, HV]", 3, like_v, device);
    struct kda_tensor_spec out = floats("out", "[B, T, HV, V]", 4, like_v, device);
    beta.last_dim_contiguous = false;
    out.written = true;
    TRY(check_gate_inputs(a, p));
    TRY(kda_tensor_check(a->beta, &beta, &p->beta));
    TRY(kda_tensor_check(a->out, &out, &p->out));
    p->scale = (float)(a->scale != 0 ? a->scale : 1 / sqrt((double)K));
    return FLASH_KDA_OK;
}

/* An index tensor of int32 and, where dtypes says so, int64. */
static flash_kda_status check_indices(const DLTensor *t, const char *name, const char *form, unsigned dtypes,
                                      int rank, const int64_t *shape, const DLDevice *device,
                                      struct kda_tensor *out) {
    const struct kda_tensor_spec spec = {
        .name = name, .form = form, .dtypes = dtypes, .rank = rank, .shape = shape, .device = device};
    TRY(kda_tensor_check(t, &spec, out));
    if (out->shape[0] > 1 && out->stride[0] == 0)
        return INVALID("%s has stride 0 in dimension 0; expected a value of its own for each element", name);
    return FLASH_KDA_OK;
}

/* cu_seqlens or checkpoint_cu_starts: from 0 to `end`, never falling. */
static flash_kda_status check_cumulative(const struct kda_tensor *t, int64_t end, const char *what) {
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

static flash_kda_status check_sequences(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    const DLDevice *device = &a->q->device;
    p->sequences = p->batches;
    if (a->cu_seqlens) {
        const int64_t any[1] = {-1};
        TRY(check_indices(a->cu_seqlens, "cu_seqlens", "[N + 1]", KDA_DTYPES_INDEX, 1, any, device,
                          &p->cu_seqlens));
        if (p->cu_seqlens.shape[0] < 1)
            return INVALID("cu_seqlens is empty; expected N + 1 values");
        if (p->batches != 1)
            return INVALID("q has B = %lld; expected 1 with cu_seqlens", (long long)p->batches);
        if (p->on_host)
            TRY(check_cumulative(&p->cu_seqlens, p->tokens, "T"));
        p->sequences = p->cu_seqlens.shape[0] - 1;
    }
    if (a->state_indices) {
        const int64_t like[1] = {p->sequences};
        if (!a->initial_state && !a->final_state)
            return INVALID(
                "state_indices is given without initial_state and final_state; expected one of them");
        TRY(check_indices(a->state_indices, "state_indices", "[N]", 1u << KDA_I32, 1, like, device,
                          &p->state_indices));
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_state(const DLTensor *t, const char *name, const char *form, int rank,
                                    int64_t outer, int64_t rows, const DLDevice *device, bool written,
                                    const struct kda_prefill *p, struct kda_tensor *out) {
    bool v_first = p->state_layout == FLASH_KDA_STATE_V_FIRST;
    int64_t first = v_first ? p->value_dim : p->key_dim, second = v_first ? p->key_dim : p->value_dim;
    const int64_t four[4] = {outer, p->value_heads, first, second};
    const int64_t five[5] = {outer, rows, p->value_heads, first, second};
    const struct kda_tensor_spec spec = {.name = name,
                                         .form = form,
                                         .dtypes = KDA_DTYPES_STATE,
                                         .rank = rank,
                                         .shape = rank == 5 ? five : four,
                                         .last_dim_contiguous = true,
                                         .written = written,
                                         .device = device};
    return kda_tensor_check(t, &spec, out);
}

static const char *state_form(const struct kda_prefill *p, const char *v_first, const char *k_first) {
    return p->state_layout == FLASH_KDA_STATE_V_FIRST ? v_first : k_first;
}

static flash_kda_status check_states(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    const DLDevice *device = &a->q->device;
    int64_t slots = p->state_indices.data ? -1 : p->sequences;
    const char *form = slots < 0 ? state_form(p, "[slots, HV, V, K]", "[slots, HV, K, V]")
                                 : state_form(p, "[N, HV, V, K]", "[N, HV, K, V]");
    if (a->initial_state) {
        TRY(check_state(a->initial_state, "initial_state", form, 4, slots, 0, device, false, p,
                        &p->initial_state));
        slots = p->initial_state.shape[0];
    }
    if (a->final_state)
        TRY(check_state(a->final_state, "final_state", form, 4, slots, 0, device, true, p, &p->final_state));
    return FLASH_KDA_OK;
}

static flash_kda_status check_checkpoints_every(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    const DLDevice *device = &a->q->device;
    if (!a->cu_seqlens) {
        TRY(check_state(a->checkpoints, "checkpoints",
                        state_form(p, "[B, rows, HV, V, K]", "[B, rows, HV, K, V]"), 5, p->batches, -1, device,
                        true, p, &p->checkpoints));
    } else {
        if (!a->checkpoint_cu_starts)
            return INVALID(
                "checkpoint_cu_starts is NULL; expected a tensor with cu_seqlens and checkpoint_every");
        TRY(check_state(a->checkpoints, "checkpoints", state_form(p, "[rows, HV, V, K]", "[rows, HV, K, V]"), 4,
                        -1, 0, device, true, p, &p->checkpoints));
        const int64_t starts[1] = {p->sequences + 1};
        TRY(check_indices(a->checkpoint_cu_starts, "checkpoint_cu_starts", "[N + 1]", KDA_DTYPES_INDEX, 1,
                          starts, device, &p->checkpoint_cu_starts));
        int64_t rows = p->checkpoints.shape[0];
        if (a->checkpoint_indices) {
            const int64_t any[1] = {-1};
            TRY(check_indices(a->checkpoint_indices, "checkpoint_indices", "[rows of all sequences]",
                              1u << KDA_I32, 1, any, device, &p->checkpoint_indices));
            rows = p->checkpoint_indices.shape[0];
        }
        if (p->on_host)
            TRY(check_cumulative(&p->checkpoint_cu_starts, rows,
                                 a->checkpoint_indices ? "the size of checkpoint_indices"
                                                       : "the rows of checkpoints"));
    }
    int64_t distinct = p->sequences > 0; /* dense sequences are all alike */
    if (a->cu_seqlens)
        distinct = p->on_host ? p->sequences : 0;
    for (int64_t n = 0; n < distinct; n++) {
        int64_t length = kda_sequence(p, n).length;
        int64_t most = length / p->checkpoint_every + (length % p->checkpoint_every != 0);
        int64_t rows = p->checkpoints.rank == 5 ? p->checkpoints.shape[1]
                                                : kda_index(&p->checkpoint_cu_starts, n + 1, 0) -
                                                      kda_index(&p->checkpoint_cu_starts, n, 0);
        if (rows > most)
            return INVALID(
                "%s gives sequence %lld of %lld tokens %lld rows; expected at most %lld, one every %lld tokens",
                p->checkpoints.rank == 5 ? "checkpoints" : "checkpoint_cu_starts", (long long)n,
                (long long)length, (long long)rows, (long long)most, (long long)p->checkpoint_every);
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_checkpoints_at_offsets(const flash_kda_prefill_args *a, struct kda_prefill *p) {
    const DLDevice *device = &a->q->device;
    int rank = a->checkpoint_offsets->ndim == 2 ? 2 : 1;
    const int64_t like[2] = {p->sequences, -1};
    TRY(check_indices(a->checkpoint_offsets, "checkpoint_offsets", rank == 2 ? "[N, C]" : "[N] or [N, C]",
                      KDA_DTYPES_INDEX, rank, like, device, &p->checkpoint_offsets));
    int64_t columns = rank == 2 ? p->checkpoint_offsets.shape[1] : 1;
    TRY(check_state(a->checkpoints, "checkpoints",
                    rank == 2 ? state_form(p, "[N, C, HV, V, K]", "[N, C, HV, K, V]")
                              : state_form(p, "[N, HV, V, K]", "[N, HV, K, V]"),
                    rank + 3, p->sequences, columns, device, true, p, &p->checkpoints));
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
    return every ? check_checkpoints_every(a, p) : check_checkpoints_at_offsets(a, p);
}

/* ---- Memory ------------------------------------------------------------------------------------ */

static bool shared_pool(const struct kda_prefill *p) {
    return p->state_indices.data && p->checkpoint_indices.data && p->final_state.data &&
           kda_tensors_identical(&p->final_state, &p->checkpoints);
}

/* No written tensor overlaps another argument, but for the two exceptions that the header names. */
static flash_kda_status check_aliasing(const struct kda_prefill *p) {
    const struct kda_tensor *const all[] = {&p->out,
                                            &p->final_state,
                                            &p->checkpoints,
                                            &p->q,
                                            &p->k,
                                            &p->v,
                                            &p->g,
                                            &p->beta,
                                            &p->A_log,
                                            &p->dt_bias,
                                            &p->initial_state,
                                            &p->cu_seqlens,
                                            &p->state_indices,
                                            &p->checkpoint_cu_starts,
                                            &p->checkpoint_indices,
                                            &p->checkpoint_offsets};
    enum { WRITTEN = 3, ALL = sizeof all / sizeof *all };
    bool in_place = p->final_state.data && p->initial_state.data &&
                    kda_tensors_identical(&p->final_state, &p->initial_state);
    bool pool = shared_pool(p);
    for (int i = 0; i < WRITTEN; i++)
        for (int j = i + 1; j < ALL; j++) {
            bool states = all[i] == &p->final_state && all[j] == &p->initial_state && in_place;
            bool slots = pool && all[i] != &p->out &&
                         (all[j] == &p->checkpoints || (all[j] == &p->initial_state && in_place));
            if (all[i]->data && all[j]->data && !states && !slots && kda_tensors_overlap(all[i], all[j]))
                return INVALID(
                    "%s overlaps %s in memory; expected memory of its own%s", all[i]->name, all[j]->name,
                    all[j] == &p->initial_state ? ", or the very same tensor to update it in place" : "");
        }
    return FLASH_KDA_OK;
}

/* Marks the slots that t names in `seen`, one bit a slot. */
static flash_kda_status check_slots(const struct kda_tensor *t, int64_t slots, unsigned char *seen) {
    for (int64_t i = 0; i < t->shape[0]; i++) {
        int64_t slot = kda_index(t, i, 0);
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

static int64_t pool_slots(const struct kda_prefill *p) {
    return p->initial_state.data ? p->initial_state.shape[0] : p->final_state.shape[0];
}

static size_t slot_bytes(const struct kda_prefill *p) {
    int64_t slots = 0;
    if (!p->on_host)
        return 0;
    if (p->state_indices.data)
        slots = pool_slots(p);
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
        TRY(check_slots(&p->state_indices, pool_slots(p), seen));
    if (p->checkpoint_indices.data) {
        if (seen && !shared_pool(p))
            memset(seen, 0, slot_bytes(p));
        TRY(check_slots(&p->checkpoint_indices, p->checkpoints.shape[0], seen));
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_workspace(const struct kda_prefill *p, const void *workspace, size_t bytes,
                                        size_t needed) {
    if (bytes < needed)
        return kda_fail(FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL, "workspace has %zu bytes; expected at least %zu",
                        bytes, needed);
    if (needed && !workspace)
        return kda_fail(FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL, "workspace is NULL; expected at least %zu bytes",
                        needed);
    const struct kda_tensor scratch = {.name = "workspace",
                                       .data = (char *)(uintptr_t)workspace,
                                       .dtype = KDA_I32,
                                       .rank = 1,
                                       .shape = {(int64_t)(needed / 4 + 1)},
                                       .stride = {4}};
    const struct kda_tensor *const all[] = {&p->out,
                                            &p->final_state,
                                            &p->checkpoints,
                                            &p->q,
                                            &p->k,
                                            &p->v,
                                            &p->g,
                                            &p->beta,
                                            &p->A_log,
                                            &p->dt_bias,
                                            &p->initial_state,
                                            &p->cu_seqlens,
                                            &p->state_indices,
                                            &p->checkpoint_cu_starts,
                                            &p->checkpoint_indices,
                                            &p->checkpoint_offsets};
    for (size_t i = 0; needed && i < sizeof all / sizeof *all; i++)
        if (all[i]->data && kda_tensors_overlap(all[i], &scratch))
            return INVALID("workspace overlaps %s in memory; expected memory of its own", all[i]->name);
    return FLASH_KDA_OK;
}

/* ---- Entries ----------------------------------------------------------------------------------- */

/* Checks everything that needs no workspace; describes the problem in *p and its backend in *backend. */
static flash_kda_status check_all(const flash_kda_prefill_args *args, struct kda_prefill *p,
                                  const struct kda_backend **backend) {
    if (!args)
        return INVALID("args is NULL; expected a flash_kda_prefill_args");
    if (args->struct_size != sizeof *args)
        return INVALID("args has struct_size %zu; expected %zu (start it from FLASH_KDA_PREFILL_ARGS_INIT)",
                       args->struct_size, sizeof *args);
    memset(p, 0, sizeof *p);
    TRY(check_options(args, p));
    TRY(check_required(args));
    TRY(kda_backend_for(args->backend, args->q->device, backend));
    p->on_host = kda_on_host(args->q->device);
    p->device = args->q->device.device_id;
    TRY(check_inputs(args, p));
    TRY(check_sequences(args, p));
    TRY(check_states(args, p));
    TRY(check_checkpoints(args, p));
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
    *bytes = needed ? needed + KDA_WORKSPACE_ALIGNMENT - 1 : 0;
    return FLASH_KDA_OK;
}

flash_kda_status flash_kda_prefill_workspace_size(const flash_kda_prefill_args *args, size_t *bytes) {
    struct kda_prefill p;
    const struct kda_backend *backend = NULL;
    if (!bytes)
        return INVALID("bytes is NULL; expected where to write the size");
    TRY(check_all(args, &p, &backend));
    return workspace_size(&p, backend, bytes);
}

flash_kda_status flash_kda_prefill(const flash_kda_prefill_args *args, void *workspace,
                                   size_t workspace_bytes) {
    struct kda_prefill p;
    const struct kda_backend *backend = NULL;
    size_t needed = 0;
    TRY(check_all(args, &p, &backend));
    TRY(workspace_size(&p, backend, &needed));
    TRY(check_workspace(&p, workspace, workspace_bytes, needed));
    unsigned char *aligned = workspace;
    if (aligned)
        aligned += -(uintptr_t)aligned % KDA_WORKSPACE_ALIGNMENT;
    TRY(check_all_slots(&p, aligned));
    bool nothing_to_write = p.tokens == 0 && !p.final_state.data && !p.checkpoints.data;
    if (nothing_to_write || p.sequences == 0)
        return FLASH_KDA_OK;
    return backend->prefill(&p, aligned);
}

flash_kda_status flash_kda_prefill_describe(const flash_kda_prefill_args *args, char *text, size_t size) {
    struct kda_prefill p;
    const struct kda_backend *backend = NULL;
    if (!text || !size)
        return INVALID("text is NULL or of size 0; expected where to write");
    TRY(check_all(args, &p, &backend));
    return backend->prefill_describe(&p, text, size);
}
