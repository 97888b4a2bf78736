/* SPDX-License-Identifier: MIT */
/* The oracle's prefill: the token recurrence in fp64, one head after the other. */
#include "api/backend.h"
#include "reference/fused.h"

#include <inttypes.h>
#include <stdio.h>

static void store_checkpoints(const struct kda_prefill *p, int64_t n, int64_t position, int64_t head,
                              const double *S) {
    const struct kda_columns all = {0, p->value_dim};
    int64_t cursor = 0;
    struct kda_state state;
    while ((state = kda_checkpoint_at(p, n, position, head, &cursor)).data)
        kda_store_state(&p->base, state, all, S);
}

/* One token. S [K, V]; u [V] is scratch. */
static void run_token(const struct kda_prefill *p, const struct kda_fused *fused, const struct kda_sequence *s,
                      int64_t t, int64_t head, double *S, double *u) {
    const struct kda_token x = kda_load_fused_token(&p->base, fused, s, t, head);
    char *out = kda_row(&p->out, s->batch, s->first + t, head);
    double mean_square = 0;
    for (int64_t j = 0; j < p->value_dim; j++)
        u[j] = kda_load_input(&p->v, &fused->v_conv, s, t, head, j);
    kda_recur(&p->base, &x, p->value_dim, S, u);
    for (int64_t j = 0; j < p->value_dim; j++)
        mean_square += u[j] * u[j] / (double)p->value_dim;
    for (int64_t j = 0; j < p->value_dim; j++)
        kda_store(out, p->out.dtype, j, (float)kda_normed(fused, s, t, head, j, u[j], mean_square));
}

/* After all heads, for several may read one channel. */
static void finish_convolutions(const struct kda_prefill *p, const struct kda_fused *fused,
                                const struct kda_sequence *s) {
    const struct kda_tensor *const inputs[KDA_CONVOLUTIONS] = {&p->q, &p->k, &p->v};
    for (int i = 0; i < KDA_CONVOLUTIONS && s->slot >= 0; i++)
        for (int64_t head = 0; kda_convolution_of(fused, i)->state.data && head < inputs[i]->shape[2]; head++)
            for (int64_t c = 0; c < inputs[i]->shape[3]; c++)
                kda_conv_finish(inputs[i], kda_convolution_of(fused, i), s, head, c);
}

static flash_kda_status prefill(const struct kda_prefill *p, void *workspace) {
    static const struct kda_fused nothing = {.norm_eps = 0};
    const struct kda_fused *fused = p->fused ? p->fused : &nothing;
    const struct kda_columns all = {0, p->value_dim};
    double *S = workspace, *u = S + p->key_dim * p->value_dim;
    for (int64_t n = 0; n < p->sequences; n++) {
        struct kda_sequence sequence = kda_sequence(p, n);
        for (int64_t head = 0; head < p->value_heads && sequence.slot >= 0; head++) {
            kda_load_state(&p->base, kda_state_before(p, n, sequence.slot, head), all, S);
            store_checkpoints(p, n, 0, head, S);
            for (int64_t t = 0; t < sequence.length; t++) {
                run_token(p, fused, &sequence, t, head, S, u);
                store_checkpoints(p, n, t + 1, head, S);
            }
            struct kda_state final_state = kda_state_at(p, &p->final_state, sequence.slot, head);
            if (final_state.data)
                kda_store_state(&p->base, final_state, all, S);
        }
        finish_convolutions(p, fused, &sequence);
    }
    return FLASH_KDA_OK;
}

static flash_kda_status workspace_size(const struct kda_prefill *p, size_t *bytes) {
    *bytes = (size_t)(p->key_dim + 1) * (size_t)p->value_dim * sizeof(double);
    return FLASH_KDA_OK;
}

static flash_kda_status describe(const struct kda_prefill *p, char *text, size_t size) {
    snprintf(text, size, "reference: token recurrence in fp64, %" PRId64 " chains on 1 thread%s",
             p->sequences * p->value_heads, kda_fused_words(p->fused));
    return FLASH_KDA_OK;
}

static bool available(void) { return true; }

const struct kda_backend kda_reference_backend = {.name = "reference",
                                                  .on_host = true,
                                                  .available = available,
                                                  .prefill_workspace_size = workspace_size,
                                                  .prefill = prefill,
                                                  .prefill_describe = describe,
                                                  .decode = kda_reference_decode,
                                                  .decode_describe = kda_reference_decode_describe,
                                                  .backward_workspace_size =
                                                      kda_reference_backward_workspace_size,
                                                  .backward = kda_reference_backward,
                                                  .backward_describe = kda_reference_backward_describe};
