/* SPDX-License-Identifier: MIT */
/* The oracle's fold: X <- X M + B in fp64, one head after the other. */
#include "api/backend.h"
#include "api/status.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static float load(const struct kda_matrix *m, int64_t i, int64_t j) {
    return kda_load((const char *)kda_at(m, i, j), m->dtype, 0);
}

static void load_state(const struct kda_fold *f, const struct kda_matrix *m, double *X) {
    for (int64_t i = 0; i < f->value_dim * f->key_dim; i++)
        X[i] = m->data ? load(m, i / f->key_dim, i % f->key_dim) : 0;
}

static void store_state(const struct kda_fold *f, const struct kda_matrix *m, const double *X) {
    for (int64_t i = 0; m->data && i < f->value_dim * f->key_dim; i++)
        kda_store((char *)kda_at(m, i / f->key_dim, i % f->key_dim), m->dtype, 0, (float)X[i]);
}

/* X and next [V, K]. */
static void follow_link(const struct kda_fold *f, int64_t summary, int64_t head, double *X, double *next) {
    const struct kda_matrix B = kda_fold_matrix(f, &f->bias, summary, 0, head);
    const struct kda_matrix M = kda_fold_transition(f, summary, head);
    int64_t K = f->key_dim, V = f->value_dim;
    load_state(f, &B, next);
    for (int64_t v = 0; v < V; v++)
        for (int64_t from = 0; from < K; from++)
            for (int64_t to = 0; to < K; to++)
                next[v * K + to] += X[v * K + from] * load(&M, from, to);
    memcpy(X, next, (size_t)(V * K) * sizeof *X);
}

static void run_head(const struct kda_fold *f, int64_t n, int64_t slot, int64_t head, double *X, double *next) {
    const struct kda_matrix first = kda_fold_matrix(f, &f->initial_state, slot, 0, head);
    const struct kda_matrix last = kda_fold_matrix(f, &f->states, slot, 0, head);
    load_state(f, &first, X);
    for (int64_t i = 0; i < f->links; i++) {
        const struct kda_matrix prefix = kda_fold_matrix(f, &f->prefixes, n, i, head);
        int64_t summary = kda_fold_link(f, n, i);
        store_state(f, &prefix, X);
        if (summary >= 0)
            follow_link(f, summary, head, X, next);
    }
    store_state(f, &last, X);
}

flash_kda_status kda_reference_fold(const struct kda_fold *f) {
    size_t matrix = (size_t)(f->value_dim * f->key_dim), bytes = 2 * matrix * sizeof(double);
    double *X = calloc(1, bytes);
    if (!X)
        return kda_fail(FLASH_KDA_ERROR_OUT_OF_MEMORY, "fold could not allocate %zu bytes of scratch", bytes);
    for (int64_t n = 0; n < f->rows; n++)
        for (int64_t head = 0; head < f->value_heads; head++)
            if (kda_fold_slot(f, n) >= 0)
                run_head(f, n, kda_fold_slot(f, n), head, X, X + matrix);
    free(X);
    return FLASH_KDA_OK;
}

flash_kda_status kda_reference_fold_describe(const struct kda_fold *f, char *text, size_t size) {
    snprintf(text, size, "reference: fp64, %" PRId64 " states on 1 thread", f->rows * f->value_heads);
    return FLASH_KDA_OK;
}
