/* SPDX-License-Identifier: MIT */
/* The CPU backend's fold: heads of rows, or parts of their columns of V, are shared out among threads. */
#include "api/backend.h"
#include "api/status.h"
#include "api/workspace.h"
#include "cpu/denormals.h"
#include "cpu/level.h"
#include "cpu/pool.h"
#include "cpu/threads.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    RATE = 20000, /* multiply-adds a microsecond, of one thread */
    MAX_PIECES = 1 << 30,
};

struct plan {
    const struct kda_cpu_level *level;
    int threads;
    int64_t tiles, parts; /* of V; parts: so many threads share a head's tiles */
};

/* Of a thread. */
struct memory {
    float *transition; /* tiles of K columns */
    float *X, *next;   /* tiles of a part of V's columns */
};

struct call {
    const struct kda_fold *f;
    struct plan plan;
    char *scratch;
    size_t bytes; /* of each thread */
};

static flash_kda_status make_plan(const struct kda_fold *f, struct plan *plan) {
    int64_t heads = f->rows * f->value_heads, tiles = kda_tiles(f->value_dim);
    double work = (double)heads * (double)(f->links * f->key_dim) * (double)(f->key_dim * f->value_dim);
    *plan = (struct plan){.level = kda_cpu_level(), .tiles = tiles, .parts = 1};
    if (!plan->level)
        return FLASH_KDA_ERROR_UNSUPPORTED;
    plan->threads = kda_threads_for(f->num_threads, work / RATE);
    if (!plan->threads)
        return FLASH_KDA_ERROR_UNSUPPORTED;
    if (heads && heads < plan->threads)
        plan->parts = kda_min64((plan->threads + heads - 1) / heads, tiles);
    return FLASH_KDA_OK;
}

static int64_t tiles_of_part(const struct plan *plan) { return (plan->tiles + plan->parts - 1) / plan->parts; }

static int64_t tile_floats(const struct kda_fold *f) { return kda_pad_key_dim(f->key_dim) * KDA_TILE; }

/* Returns the bytes. */
static size_t lay_out(const struct kda_fold *f, const struct plan *plan, void *scratch, struct memory *m) {
    struct kda_arena arena = {scratch, 0};
    size_t floats = (size_t)tile_floats(f), columns = (size_t)tiles_of_part(plan) * floats;
    m->transition = kda_take(&arena, (size_t)kda_tiles(f->key_dim) * floats, sizeof(float));
    m->X = kda_take(&arena, columns, sizeof(float));
    m->next = kda_take(&arena, columns, sizeof(float));
    return arena.used;
}

/* Columns `first` to first + columns - 1 of a state as tiles [K][KDA_TILE], zeros beyond. */
static void load_columns(const struct kda_fold *f, const struct kda_matrix *m, int64_t first, int64_t columns,
                         float *tiles) {
    int64_t floats = tile_floats(f);
    memset(tiles, 0, (size_t)(kda_tiles(columns) * floats) * sizeof *tiles);
    for (int64_t v = 0; m->data && v < columns; v++)
        for (int64_t c = 0; c < f->key_dim; c++)
            tiles[v / KDA_TILE * floats + c * KDA_TILE + v % KDA_TILE] =
                kda_load((const char *)kda_at(m, first + v, c), m->dtype, 0);
}

static void store_columns(const struct kda_fold *f, const struct kda_matrix *m, int64_t first, int64_t columns,
                          const float *tiles) {
    int64_t floats = tile_floats(f);
    for (int64_t v = 0; m->data && v < columns; v++)
        for (int64_t c = 0; c < f->key_dim; c++)
            kda_store((char *)kda_at(m, first + v, c), m->dtype, 0,
                      tiles[v / KDA_TILE * floats + c * KDA_TILE + v % KDA_TILE]);
}

/* X becomes what the link makes of it. */
static void follow_link(const struct call *call, struct memory *m, int64_t summary, int64_t head, int64_t first,
                        int64_t columns) {
    const struct kda_fold *f = call->f;
    const struct kda_matrix B = kda_fold_matrix(f, &f->bias, summary, 0, head);
    const struct kda_matrix M = kda_fold_transition(f, summary, head);
    struct kda_tile A[KDA_MAX_KEY_DIM / KDA_TILE];
    int64_t floats = tile_floats(f);
    /* A = M^T, as the columns of a state. */
    load_columns(f, &M, 0, f->key_dim, m->transition);
    for (int64_t i = 0; i < kda_tiles(f->key_dim); i++)
        A[i] = (struct kda_tile){.S = m->transition + i * floats};
    load_columns(f, &B, first, columns, m->next);
    for (int64_t i = 0; i < kda_tiles(columns); i++) {
        const struct kda_tile from = {.S = m->X + i * floats};
        struct kda_tile to = {.S = m->next + i * floats};
        call->plan.level->fp32->compose(f->key_dim, A, &from, &to);
    }
    float *X = m->X;
    m->X = m->next;
    m->next = X;
}

static void run_part(const struct call *call, int64_t i, struct memory *m) {
    const struct kda_fold *f = call->f;
    int64_t part = i % call->plan.parts, head = i / call->plan.parts % f->value_heads;
    int64_t n = i / call->plan.parts / f->value_heads, slot = kda_fold_slot(f, n);
    int64_t first = part * tiles_of_part(&call->plan) * KDA_TILE;
    int64_t columns = kda_min64(f->value_dim - first, tiles_of_part(&call->plan) * KDA_TILE);
    if (slot < 0 || columns <= 0)
        return;
    const struct kda_matrix initial = kda_fold_matrix(f, &f->initial_state, slot, 0, head);
    const struct kda_matrix last = kda_fold_matrix(f, &f->states, slot, 0, head);
    load_columns(f, &initial, first, columns, m->X);
    for (int64_t link = 0; link < f->links; link++) {
        const struct kda_matrix prefix = kda_fold_matrix(f, &f->prefixes, n, link, head);
        int64_t summary = kda_fold_link(f, n, link);
        store_columns(f, &prefix, first, columns, m->X);
        if (summary >= 0)
            follow_link(call, m, summary, head, first, columns);
    }
    store_columns(f, &last, first, columns, m->X);
}

static int64_t pieces_of(const struct call *call) {
    return call->f->rows * call->f->value_heads * call->plan.parts;
}

static void work(void *context, uint32_t piece, int member) {
    const struct call *call = context;
    struct memory m;
    uint64_t mode = kda_flush_denormals();
    lay_out(call->f, &call->plan, call->scratch + (size_t)member * call->bytes, &m);
    for (int64_t i = piece; i < pieces_of(call); i += MAX_PIECES)
        run_part(call, i, &m);
    kda_set_float_mode(mode);
}

flash_kda_status kda_cpu_fold(const struct kda_fold *f) {
    struct call call = {.f = f};
    struct memory unused;
    flash_kda_status status = make_plan(f, &call.plan);
    if (status)
        return status;
    call.bytes = lay_out(f, &call.plan, NULL, &unused);
    size_t all = call.bytes * (size_t)call.plan.threads;
    call.scratch = aligned_alloc(KDA_WORKSPACE_ALIGNMENT, all);
    if (!call.scratch)
        return kda_fail(FLASH_KDA_ERROR_OUT_OF_MEMORY,
                        "fold could not allocate %zu bytes of scratch for %d threads", all, call.plan.threads);
    kda_pool_run(call.plan.threads, (uint32_t)kda_min64(pieces_of(&call), MAX_PIECES), work, NULL, &call);
    free(call.scratch);
    return FLASH_KDA_OK;
}

flash_kda_status kda_cpu_fold_describe(const struct kda_fold *f, char *text, size_t size) {
    struct plan plan;
    flash_kda_status status = make_plan(f, &plan);
    if (status)
        return status;
    snprintf(text, size,
             "cpu: level %s, fp32 products, %" PRId64 " states in %" PRId64 " part%s on %d thread%s",
             plan.level->name, f->rows * f->value_heads, plan.parts, plan.parts == 1 ? "" : "s each",
             plan.threads, plan.threads == 1 ? "" : "s");
    return FLASH_KDA_OK;
}
