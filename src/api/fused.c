/* SPDX-License-Identifier: MIT */
/* Checks of the convolutions before the recurrence and of the norm after it. */
#include "api/fused.h"

#include "api/check.h"

#include <float.h>
#include <string.h>

/* How messages call the convolution of q, k or v. */
static const struct {
    const char *weight, *bias, *state, *weight_form, *bias_form, *state_form;
} names[KDA_CONVOLUTIONS] = {
    {"q_conv_weight", "q_conv_bias", "q_conv_state", "[H K, 4]", "[H K]", "[slots, H K, 3]"},
    {"k_conv_weight", "k_conv_bias", "k_conv_state", "[H K, 4]", "[H K]", "[slots, H K, 3]"},
    {"v_conv_weight", "v_conv_bias", "v_conv_state", "[HV V, 4]", "[HV V]", "[slots, HV V, 3]"},
};

static flash_kda_status check_convolution(const struct kda_fused_args *a, int i, int64_t slots,
                                          int64_t channels, const DLDevice *device,
                                          struct kda_convolution *out) {
    const DLTensor *weight = a->conv[i].weight, *bias = a->conv[i].bias, *state = a->conv[i].state;
    const int64_t weight_shape[2] = {channels, KDA_CONV_WIDTH};
    const int64_t state_shape[3] = {slots, channels, KDA_CONV_PAST};
    if (!weight && (bias || state))
        return INVALID("%s is given without %s; expected NULL", bias ? names[i].bias : names[i].state,
                       names[i].weight);
    if (!weight)
        return FLASH_KDA_OK;
    if (!state && a->needs_states)
        return INVALID("%s is NULL with %s; expected a tensor", names[i].state, names[i].weight);
    const struct kda_tensor_spec of_weight =
        kda_floats(names[i].weight, names[i].weight_form, 2, weight_shape, device);
    const struct kda_tensor_spec of_bias =
        kda_floats(names[i].bias, names[i].bias_form, 1, weight_shape, device);
    struct kda_tensor_spec of_state = kda_floats(names[i].state, names[i].state_form, 3, state_shape, device);
    of_state.last_dim_contiguous = false;
    of_state.written = a->written;
    TRY(kda_tensor_check(weight, &of_weight, &out->weight));
    if (bias)
        TRY(kda_tensor_check(bias, &of_bias, &out->bias));
    return state ? kda_tensor_check(state, &of_state, &out->state) : FLASH_KDA_OK;
}

static flash_kda_status check_convolutions(const struct kda_fused_args *a, const struct kda_tokens *x,
                                           const DLDevice *device, struct kda_fused *out) {
    struct kda_convolution *const convs[KDA_CONVOLUTIONS] = {&out->q_conv, &out->k_conv, &out->v_conv};
    int64_t keys = x->heads * x->key_dim, values = x->value_heads * x->value_dim, slots = a->slots;
    for (int i = 0; i < KDA_CONVOLUTIONS; i++) {
        TRY(check_convolution(a, i, slots, i < 2 ? keys : values, device, convs[i]));
        if (slots < 0 && convs[i]->state.data)
            slots = convs[i]->state.shape[0];
    }
    return FLASH_KDA_OK;
}

static flash_kda_status check_norm(const struct kda_fused_args *a, const struct kda_tokens *x,
                                   const DLDevice *device, struct kda_fused *out) {
    const int64_t like_v[4] = {x->batches, x->tokens, x->value_heads, x->value_dim};
    if ((unsigned)a->norm_activation > FLASH_KDA_NORM_SILU)
        return INVALID("norm_activation is %d; expected a flash_kda_norm_activation", (int)a->norm_activation);
    if (!a->norm_weight && a->norm_gate)
        return INVALID("norm_gate is given without norm_weight; expected NULL");
    if (!a->norm_weight)
        return FLASH_KDA_OK;
    if (x->value_dim > KDA_MAX_NORM_DIM)
        return INVALID("v has V = %lld with norm_weight; expected at most %d", (long long)x->value_dim,
                       KDA_MAX_NORM_DIM);
    if (!(a->norm_eps > 0 && a->norm_eps <= FLT_MAX))
        return INVALID("norm_eps is %g with norm_weight; expected a number above 0", a->norm_eps);
    const struct kda_tensor_spec weight = kda_floats("norm_weight", "[V]", 1, like_v + 3, device);
    const struct kda_tensor_spec gate = kda_floats("norm_gate", "[B, T, HV, V]", 4, like_v, device);
    TRY(kda_tensor_check(a->norm_weight, &weight, &out->norm_weight));
    if (a->norm_gate)
        TRY(kda_tensor_check(a->norm_gate, &gate, &out->norm_gate));
    out->norm_activation = a->norm_activation;
    out->norm_eps = (float)a->norm_eps;
    return FLASH_KDA_OK;
}

flash_kda_status kda_check_fused(const struct kda_fused_args *a, const struct kda_tokens *x,
                                 const DLDevice *device, struct kda_fused *out) {
    TRY(check_convolutions(a, x, device, out));
    return check_norm(a, x, device, out);
}

void kda_list_fused(const struct kda_fused *f, const struct kda_tensor *list[KDA_FUSED_TENSORS]) {
    const struct kda_tensor *const all[KDA_FUSED_TENSORS] = {
        &f->q_conv.state, &f->k_conv.state,  &f->v_conv.state, &f->q_conv.weight,
        &f->q_conv.bias,  &f->k_conv.weight, &f->k_conv.bias,  &f->v_conv.weight,
        &f->v_conv.bias,  &f->norm_weight,   &f->norm_gate};
    memcpy(list, all, sizeof all);
}

const char *kda_fused_words(const struct kda_fused *f) {
    bool before = f && kda_has_convolution(f), after = f && f->norm_weight.data;
    return before && after ? ", between convolutions and a norm"
           : before        ? ", after convolutions"
           : after         ? ", before a norm"
                           : "";
}
