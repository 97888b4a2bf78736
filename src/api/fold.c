/* SPDX-License-Identifier: MIT */
/* The public entries of fold: every argument is checked here, before anything is written. */
#include "api/args.h"
#include "api/check.h"

#include <string.h>

/* ---- Tensors ----------------------------------------------------------------------------------- */

static flash_kda_status check_options(const flash_kda_fold_args *a, struct kda_fold *f) {
    if (!a->bias || !a->transitions || !a->chains)
        return INVALID("%s is NULL; expected a tensor", !a->bias          ? "bias"
                                                        : !a->transitions ? "transitions"
                                                                          : "chains");
    if (!a->states && !a->prefixes)
        return INVALID("states is NULL without prefixes; expected one of them");
    if ((unsigned)a->state_layout > FLASH_KDA_STATE_K_FIRST)
        return INVALID("state_layout is %d; expected a flash_kda_state_layout", (int)a->state_layout);
    if (a->flags & ~(uint32_t)FLASH_KDA_FOLD_ADJOINT)
        return INVALID("flags is 0x%x; expected only bits of flash_kda_fold_flags, 0x%x", (unsigned)a->flags,
                       (unsigned)FLASH_KDA_FOLD_ADJOINT);
    if (a->num_threads < 0 || a->num_threads > KDA_MAX_THREADS)
        return INVALID("num_threads is %d; expected 0 to %d", (int)a->num_threads, KDA_MAX_THREADS);
    f->state_layout = a->state_layout;
    f->adjoint = a->flags & FLASH_KDA_FOLD_ADJOINT;
    f->on_host = kda_on_host(a->bias->device);
    f->device = a->bias->device.device_id;
    f->num_threads = a->num_threads;
    f->stream = a->stream;
    return FLASH_KDA_OK;
}

static const char *form(const struct kda_fold *f, const char *v_first, const char *k_first) {
    return f->state_layout == FLASH_KDA_STATE_V_FIRST ? v_first : k_first;
}

static flash_kda_status check_summaries(const flash_kda_fold_args *a, struct kda_fold *f) {
    const DLDevice *device = &a->bias->device;
    bool v_first = f->state_layout == FLASH_KDA_STATE_V_FIRST;
    const int64_t any[4] = {-1, -1, -1, -1};
    struct kda_tensor_spec spec = {.name = "bias",
                                   .form = form(f, "[J, HV, V, K]", "[J, HV, K, V]"),
                                   .dtypes = 1u << KDA_F32,
                                   .rank = 4,
                                   .shape = any,
                                   .device = device};
    TRY(kda_tensor_check(a->bias, &spec, &f->bias));
    f->summaries = f->bias.shape[0];
    f->value_heads = f->bias.shape[1];
    f->value_dim = f->bias.shape[v_first ? 2 : 3];
    f->key_dim = f->bias.shape[v_first ? 3 : 2];
    if (f->key_dim < 1 || f->key_dim > KDA_MAX_KEY_DIM)
        return INVALID("bias has K = %lld; expected 1 to %d", (long long)f->key_dim, KDA_MAX_KEY_DIM);
    if (f->value_dim < 1 || f->value_dim > INT32_MAX)
        return INVALID("bias has V = %lld; expected 1 to %d", (long long)f->value_dim, INT32_MAX);
    const int64_t square[4] = {f->summaries, f->value_heads, f->key_dim, f->key_dim};
    spec.name = "transitions";
    spec.form = "[J, HV, K, K]";
    spec.shape = square;
    return kda_tensor_check(a->transitions, &spec, &f->transitions);
}

static flash_kda_status check_chains(const flash_kda_fold_args *a, struct kda_fold *f) {
    const int64_t any[2] = {-1, -1};
    TRY(kda_check_indices(a->chains, "chains", "[R, L]", 2, any, &a->bias->device, &f->chains));
    f->rows = f->chains.shape[0];
    f->links = f->chains.shape[1];
    for (int64_t n = 0; f->on_host && n < f->rows; n++)
        for (int64_t i = 0; i < f->links; i++) {
            int64_t j = kda_index(&f->chains, n, i);
            if (j < -1 || j >= f->summaries)
                return INVALID("chains[%lld, %lld] is %lld; expected 0 to %lld, or -1", (long long)n,
                               (long long)i, (long long)j, (long long)f->summaries - 1);
        }
    return FLASH_KDA_OK;
}

static flash_kda_status check_state(const flash_kda_fold_args *a, const struct kda_fold *f, const DLTensor *t,
                                    const char *name, const char *shape_form, unsigned dtypes, int rank,
                                    int64_t outer, bool written, struct kda_tensor *out) {
    const struct kda_tokens x = {.value_heads = f->value_heads,
                                 .key_dim = f->key_dim,
                                 .value_dim = f->value_dim,
                                 .state_layout = f->state_layout};
    return kda_check_state(t, name, shape_form, dtypes, rank, outer, f->links, &a->bias->device, written, &x,
                           out);
}

static flash_kda_status check_slots(const struct kda_fold *f, int64_t slots) {
    for (int64_t n = 0; f->on_host && n < f->rows; n++) {
        int64_t slot = kda_index(&f->state_indices, n, 0);
        if (slot < -1 || slot >= slots)
            return INVALID("state_indices[%lld] is %lld; expected 0 to %lld, or -1", (long long)n,
                           (long long)slot, (long long)slots - 1);
        if (slot >= 0 && kda_place_of(&f->state_indices, slot) < n)
            return INVALID("state_indices[%lld] is %lld, a slot that is used twice; expected each slot once",
                           (long long)n, (long long)slot);
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_states(const flash_kda_fold_args *a, struct kda_fold *f) {
    int64_t outer = a->state_indices ? -1 : f->rows;
    const char *of_states = a->state_indices ? form(f, "[slots, HV, V, K]", "[slots, HV, K, V]")
                                             : form(f, "[R, HV, V, K]", "[R, HV, K, V]");
    if (a->state_indices && !a->initial_state && !a->states)
        return INVALID("state_indices is given without initial_state and states; expected one of them");
    if (a->initial_state) {
        TRY(check_state(a, f, a->initial_state, "initial_state", of_states, KDA_DTYPES_STATE, 4, outer, false,
                        &f->initial_state));
        outer = f->initial_state.shape[0];
    }
    if (a->states) {
        TRY(check_state(a, f, a->states, "states", of_states, KDA_DTYPES_STATE, 4, outer, true, &f->states));
        outer = f->states.shape[0];
    }
    if (a->prefixes)
        TRY(check_state(a, f, a->prefixes, "prefixes", form(f, "[R, L, HV, V, K]", "[R, L, HV, K, V]"),
                        1u << KDA_F32, 5, f->rows, true, &f->prefixes));
    if (a->state_indices) {
        const int64_t like[1] = {f->rows};
        TRY(kda_check_indices(a->state_indices, "state_indices", "[R]", 1, like, &a->bias->device,
                              &f->state_indices));
        TRY(check_slots(f, outer));
    }
    return FLASH_KDA_OK;
}

/* ---- Memory ------------------------------------------------------------------------------------ */

/* No written tensor overlaps another argument, but for the exception that the header names. */
static flash_kda_status check_aliasing(const struct kda_fold *f) {
    const struct kda_tensor *const all[] = {&f->states,      &f->prefixes, &f->initial_state, &f->bias,
                                            &f->transitions, &f->chains,   &f->state_indices};
    enum { WRITTEN = 2, ALL = sizeof all / sizeof *all };
    for (int i = 0; i < WRITTEN; i++)
        for (int j = i + 1; j < ALL; j++) {
            bool states = all[i] == &f->states && all[j] == &f->initial_state;
            if (!states || !kda_tensors_identical(all[i], all[j]))
                TRY(kda_check_overlap(all[i], all[j],
                                      states ? ", or the very same tensor to update it in place" : ""));
        }
    return FLASH_KDA_OK;
}

/* ---- Entries ----------------------------------------------------------------------------------- */

static flash_kda_status check_all(const flash_kda_fold_args *given, struct kda_fold *f,
                                  const struct kda_backend **backend) {
    static const struct kda_args_type type = {.name = "flash_kda_fold_args",
                                              .init = "FLASH_KDA_FOLD_ARGS_INIT",
                                              .least = sizeof(flash_kda_fold_args),
                                              .size = sizeof(flash_kda_fold_args)};
    flash_kda_fold_args args;
    TRY(kda_args_read(given, &type, &args));
    memset(f, 0, sizeof *f);
    TRY(check_options(&args, f));
    TRY(kda_backend_for(args.backend, "bias", args.bias->device, backend));
    TRY(check_summaries(&args, f));
    TRY(check_chains(&args, f));
    TRY(check_states(&args, f));
    return check_aliasing(f);
}

flash_kda_status flash_kda_fold(const flash_kda_fold_args *args) {
    struct kda_fold f;
    const struct kda_backend *backend = NULL;
    TRY(check_all(args, &f, &backend));
    if (f.rows == 0 || f.value_heads == 0)
        return FLASH_KDA_OK;
    return backend->fold(&f);
}

flash_kda_status flash_kda_fold_describe(const flash_kda_fold_args *args, char *text, size_t size) {
    struct kda_fold f;
    const struct kda_backend *backend = NULL;
    if (!text || !size)
        return INVALID("text is NULL or of size 0; expected where to write");
    TRY(check_all(args, &f, &backend));
    return backend->fold_describe(&f, text, size);
}
