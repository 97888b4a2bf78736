/* SPDX-License-Identifier: MIT */
/* Problems of prefill, decode and backward with everything on, their memory on the heap. */
#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { WIDTH = 4, MAX_NORM = 1024 };

/* Numbers between -1 and 1 that differ from tensor to tensor. */
static void fill(struct problem_tensor *t, int seed) {
    float *x = t->dl.data;
    unsigned value = (unsigned)seed * 7919 + 1;
    for (size_t i = 0; i < t->bytes / sizeof *x; i++) {
        value = value * 1664525 + 1013904223;
        x[i] = (float)(value >> 8) * 0x1p-23F - 1;
    }
}

/* An fp32 tensor of up to four dimensions; those after the first 0 are left out. */
static const DLTensor *add(struct problem *p, int64_t a, int64_t b, int64_t c, int64_t d) {
    struct problem_tensor *t = &p->tensors[p->count++];
    const int64_t shape[4] = {a, b, c, d};
    t->dl = (DLTensor){.device = {kDLCPU, 0}, .dtype = {kDLFloat, 32, 1}, .shape = t->shape};
    t->bytes = sizeof(float);
    for (int i = 0; i < 4 && shape[i]; i++, t->dl.ndim++) {
        t->shape[i] = shape[i];
        t->bytes *= (size_t)shape[i];
    }
    t->dl.data = malloc(t->bytes);
    if (t->dl.data)
        fill(t, p->count);
    return &t->dl;
}

void problem_reset(struct problem *p) {
    for (int i = 0; i < p->count; i++)
        fill(&p->tensors[i], i + 1);
}

static bool all_there(const struct problem *p) {
    for (int i = 0; i < p->count; i++)
        if (!p->tensors[i].dl.data)
            return false;
    return true;
}

/* Backward of the same tensors. */
static void set_backward(struct problem *p, struct problem_size size) {
    int64_t B = size.B, T = size.T, H = size.H, K = size.K, V = size.V;
    const flash_kda_prefill_args *a = &p->prefill;
    flash_kda_backward_args *b = &p->backward;
    *b = (flash_kda_backward_args)FLASH_KDA_BACKWARD_ARGS_INIT;
    b->q = a->q;
    b->k = a->k;
    b->v = a->v;
    b->g = a->g;
    b->beta = a->beta;
    b->A_log = a->A_log;
    b->dt_bias = a->dt_bias;
    b->gate = a->gate;
    b->beta_mode = a->beta_mode;
    b->flags = a->flags;
    b->state_layout = a->state_layout;
    b->backend = a->backend;
    b->num_threads = a->num_threads;
    b->d_out = a->out;
    b->initial_state = b->d_final_state = a->final_state;
    b->dq = add(p, B, T, H, K);
    b->dk = add(p, B, T, H, K);
    b->dv = add(p, B, T, H, V);
    b->dg = add(p, B, T, H, K);
    b->dbeta = add(p, B, T, H, 0);
    b->dA_log = add(p, H, 0, 0, 0);
    b->d_dt_bias = add(p, H, K, 0, 0);
    b->d_initial_state = add(p, B, H, K, V);
}

/* Enough for either. */
static bool find_workspace_size(struct problem *p) {
    size_t backward;
    if (flash_kda_prefill_workspace_size(&p->prefill, &p->workspace_bytes) != FLASH_KDA_OK ||
        flash_kda_backward_workspace_size(&p->backward, &backward) != FLASH_KDA_OK)
        return false;
    if (backward > p->workspace_bytes)
        p->workspace_bytes = backward;
    return true;
}

bool problem_make(struct problem *p, struct problem_size size, flash_kda_backend backend, int threads) {
    int64_t B = size.B, T = size.T, H = size.H, K = size.K, V = size.V;
    *p = (struct problem){.prefill = FLASH_KDA_PREFILL_ARGS_INIT, .decode = FLASH_KDA_DECODE_ARGS_INIT};
    flash_kda_prefill_args *a = &p->prefill;
    flash_kda_decode_args *d = &p->decode;
    a->q = d->q = add(p, B, T, H, K);
    a->k = d->k = add(p, B, T, H, K);
    a->v = d->v = add(p, B, T, H, V);
    a->g = d->g = add(p, B, T, H, K);
    a->beta = d->beta = add(p, B, T, H, 0);
    a->A_log = d->A_log = add(p, H, 0, 0, 0);
    a->dt_bias = d->dt_bias = add(p, H, K, 0, 0);
    a->out = d->out = add(p, B, T, H, V);
    a->initial_state = a->final_state = d->state = add(p, B, H, K, V);
    d->q_conv_weight = add(p, H * K, WIDTH, 0, 0);
    d->k_conv_weight = add(p, H * K, WIDTH, 0, 0);
    d->v_conv_weight = add(p, H * V, WIDTH, 0, 0);
    d->q_conv_state = add(p, B, H * K, WIDTH - 1, 0);
    d->k_conv_state = add(p, B, H * K, WIDTH - 1, 0);
    d->v_conv_state = add(p, B, H * V, WIDTH - 1, 0);
    if (V <= MAX_NORM) {
        d->norm_weight = add(p, V, 0, 0, 0);
        d->norm_gate = add(p, B, T, H, V);
        d->norm_activation = FLASH_KDA_NORM_SILU;
        d->norm_eps = 1e-5;
    }
    a->gate = d->gate = FLASH_KDA_GATE_SOFTPLUS;
    a->beta_mode = d->beta_mode = FLASH_KDA_BETA_SIGMOID;
    a->flags = d->flags = FLASH_KDA_QK_NORM;
    a->state_layout = d->state_layout = FLASH_KDA_STATE_K_FIRST;
    a->backend = d->backend = backend;
    a->num_threads = d->num_threads = threads;
    set_backward(p, size);
    if (!all_there(p) || !find_workspace_size(p))
        return false;
    p->workspace = malloc(p->workspace_bytes + 1);
    return p->workspace;
}

void problem_free(struct problem *p) {
    for (int i = 0; i < p->count; i++)
        free(p->tensors[i].dl.data);
    free(p->workspace);
}

bool problem_same(const struct problem *a, const struct problem *b) {
    for (int i = 0; i < a->count; i++)
        if (memcmp(a->tensors[i].dl.data, b->tensors[i].dl.data, a->tensors[i].bytes) != 0)
            return false;
    return true;
}
