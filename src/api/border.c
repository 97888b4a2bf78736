/* SPDX-License-Identifier: MIT */
/* Checks of the arguments by which sequences begin or go on in other calls. */
#include "api/check.h"

#include <string.h>

static flash_kda_status check_phase(const struct kda_border_args *a) {
    const struct {
        const char *name;
        const DLTensor *tensor;
    } all[] = {{a->awaiting_name, a->awaiting_rows},
               {a->giving_name, a->giving_rows},
               {"summaries", a->summaries},
               {"incoming", a->states}};
    if ((unsigned)a->phase > FLASH_KDA_PHASE_FINISH)
        return INVALID("phase is %d; expected a flash_kda_phase", (int)a->phase);
    for (size_t i = 0; i < sizeof all / sizeof *all && a->phase == FLASH_KDA_PHASE_WHOLE; i++)
        if (all[i].tensor)
            return INVALID("%s is given with FLASH_KDA_PHASE_WHOLE; expected NULL, or another phase",
                           all[i].name);
    if (!a->summaries != !a->giving_rows)
        return INVALID("%s is given without %s; expected both or neither",
                       a->summaries ? "summaries" : a->giving_name,
                       a->summaries ? a->giving_name : "summaries");
    if (a->states && !a->awaiting_rows)
        return INVALID("incoming is given without %s; expected both or neither", a->awaiting_name);
    if (a->awaiting_rows && !a->states && a->phase == FLASH_KDA_PHASE_FINISH)
        return INVALID("incoming is NULL; expected a tensor with %s and FLASH_KDA_PHASE_FINISH",
                       a->awaiting_name);
    return FLASH_KDA_OK;
}

static flash_kda_status check_rows(const DLTensor *t, const char *name, const char *form,
                                   const struct kda_tokens *x, const DLDevice *device, struct kda_tensor *out) {
    const int64_t any[1] = {-1};
    TRY(kda_check_indices(t, name, form, 1, any, device, out));
    for (int64_t i = 0; x->on_host && i < out->shape[0]; i++) {
        int64_t row = kda_index(out, i, 0);
        if (row < -1 || row >= x->sequences)
            return INVALID("%s[%lld] is %lld; expected 0 to %lld, or -1", name, (long long)i, (long long)row,
                           (long long)x->sequences - 1);
        if (row >= 0 && kda_place_of(out, row) < i)
            return INVALID("%s[%lld] is %lld, a row that is named twice; expected each row once", name,
                           (long long)i, (long long)row);
    }
    return FLASH_KDA_OK;
}

/* B of each row, with M beside it for prefill. */
static flash_kda_status check_summaries(const struct kda_border_args *a, const struct kda_tokens *x,
                                        const DLDevice *device, struct kda_border *border) {
    bool v_first = x->state_layout == FLASH_KDA_STATE_V_FIRST;
    int64_t K = x->key_dim, columns = x->value_dim + (a->with_transitions ? K : 0);
    const int64_t shape[4] = {border->giving_rows.shape[0], x->value_heads, v_first ? columns : K,
                              v_first ? K : columns};
    const struct kda_tensor_spec spec = {
        .name = "summaries",
        .form = a->with_transitions ? kda_state_form(x, "[S, HV, V + K, K]", "[S, HV, K, V + K]")
                                    : kda_state_form(x, "[C, HV, V, K]", "[C, HV, K, V]"),
        .dtypes = 1u << KDA_F32,
        .rank = 4,
        .shape = shape,
        .last_dim_contiguous = true,
        .written = true,
        .device = device};
    return kda_tensor_check(a->summaries, &spec, &border->summaries);
}

flash_kda_status kda_check_border(const struct kda_border_args *a, const DLDevice *device,
                                  const struct kda_tokens *x, struct kda_border *border) {
    TRY(check_phase(a));
    border->phase = a->phase;
    if (a->awaiting_rows)
        TRY(check_rows(a->awaiting_rows, a->awaiting_name, a->awaiting_form, x, device,
                       &border->awaiting_rows));
    if (a->giving_rows) {
        TRY(check_rows(a->giving_rows, a->giving_name, a->giving_form, x, device, &border->giving_rows));
        TRY(check_summaries(a, x, device, border));
    }
    if (a->states)
        TRY(kda_check_state(a->states, "incoming",
                            a->with_transitions ? kda_state_form(x, "[C, HV, V, K]", "[C, HV, K, V]")
                                                : kda_state_form(x, "[S, HV, V, K]", "[S, HV, K, V]"),
                            1u << KDA_F32, 4, border->awaiting_rows.shape[0], 0, device, false, x,
                            &border->states));
    return FLASH_KDA_OK;
}

static void clear(struct kda_state s, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
        memset(s.data + i * s.stride, 0, (size_t)columns * sizeof(float));
}

void kda_clear_summaries(const struct kda_tokens *x, const struct kda_border *border) {
    const struct kda_tensor *t = &border->summaries;
    for (int64_t place = 0; border->phase == FLASH_KDA_PHASE_BEGIN && t->data && place < t->shape[0]; place++)
        for (int64_t head = 0; head < x->value_heads; head++)
            clear(kda_state_in(x, t, place, head), t->shape[2], t->shape[3]);
}
