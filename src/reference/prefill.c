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

/* One head of sequence n. S [K, V], u [V] are scratch. */
static void run_head(const struct kda_prefill *p, const struct kda_fused *fused, const struct kda_sequence *s,
                     int64_t n, int64_t head, double *S, double *u) {
    const struct kda_columns all = {0, p->value_dim};
    int64_t summary = kda_summary_of(&p->border, n);
    kda_load_state(&p->base, kda_state_before(p, n, s->slot, head), all, S);
    store_checkpoints(p, n, 0, head, S);
    for (int64_t t = 0; t < s->length; t++) {
        run_token(p, fused, s, t, head, S, u);
        store_checkpoints(p, n, t + 1, head, S);
    }
    struct kda_state final_state = kda_state_at(p, &p->final_state, s->slot, head);
    if (final_state.data)
        kda_store_state(&p->base, final_state, all, S);
    if (summary >= 0)
        kda_store_state(&p->base, kda_summary_bias(&p->base, &p->border, summary, head), all, S);
}

/* B and M: the state from zero, and from the identity with v = 0, side by side. S [K, V + K], u [V + K]. */
static void summarise_head(const struct kda_prefill *p, const struct kda_sequence *s, int64_t n, int64_t head,
                           double *S, double *u) {
    int64_t K = p->key_dim, V = p->value_dim, width = V + K, summary = kda_summary_of(&p->border, n);
    for (int64_t i = 0; i < K; i++)
        for (int64_t j = 0; j < width; j++)
            S[i * width + j] = j == V + i;
    for (int64_t t = 0; t < s->length; t++) {
        const struct kda_token x = kda_load_token(&p->base, s->batch, s->first + t, head);
        const char *v = kda_row(&p->v, s->batch, s->first + t, head);
        for (int64_t j = 0; j < width; j++)
            u[j] = j < V ? kda_load(v, p->v.dtype, j) : 0;
        kda_recur(&p->base, &x, width, S, u);
    }
    /* One matrix [K, V + K] is stored as two states. */
    double *B = u + width, *M = B + K * V;
    for (int64_t i = 0; i < K; i++)
        for (int64_t j = 0; j < width; j++)
            *(j < V ? &B[i * V + j] : &M[i * K + j - V]) = S[i * width + j];
    kda_store_state(&p->base, kda_summary_bias(&p->base, &p->border, summary, head), (struct kda_columns){0, V},
                    B);
    kda_store_state(&p->base, kda_summary_transition(&p->base, &p->border, summary, head),
                    (struct kda_columns){0, K}, M);
}

static flash_kda_status prefill(const struct kda_prefill *p, void *workspace) {
    static const struct kda_fused nothing = {.norm_eps = 0};
    const struct kda_fused *fused = p->fused ? p->fused : &nothing;
    int64_t width = p->value_dim + (p->border.summaries.data ? p->key_dim : 0);
    double *S = workspace, *u = S + p->key_dim * width;
    for (int64_t n = 0; n < p->sequences; n++) {
        struct kda_sequence sequence = kda_sequence(p, n);
        enum kda_work work = sequence.slot < 0 ? KDA_WORK_NONE : kda_work_on(&p->border, n);
        for (int64_t head = 0; head < p->value_heads; head++)
            if (work == KDA_WORK_ALL)
                run_head(p, fused, &sequence, n, head, S, u);
            else if (work == KDA_WORK_SUMMARY)
                summarise_head(p, &sequence, n, head, S, u);
        if (work == KDA_WORK_ALL)
            finish_convolutions(p, fused, &sequence);
    }
    return FLASH_KDA_OK;
}

static flash_kda_status workspace_size(const struct kda_prefill *p, size_t *bytes) {
    int64_t K = p->key_dim, V = p->value_dim, doubles = (K + 1) * V;
    if (p->border.summaries.data)
        doubles = (2 * K + 1) * (V + K);
    *bytes = (size_t)doubles * sizeof(double);
    return FLASH_KDA_OK;
}

static flash_kda_status describe(const struct kda_prefill *p, char *text, size_t size) {
    snprintf(text, size, "reference: token recurrence in fp64, %" PRId64 " chains on 1 thread%s%s",
             p->sequences * p->value_heads, kda_fused_words(p->fused), kda_phase_text(&p->border));
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
                                                  .backward_describe = kda_reference_backward_describe,
                                                  .fold = kda_reference_fold,
                                                  .fold_describe = kda_reference_fold_describe};
