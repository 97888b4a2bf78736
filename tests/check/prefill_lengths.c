/* SPDX-License-Identifier: MIT */
/* Prefill on odd sizes: lengths around every block size, empty sequences, odd head dims, and one long
 * sequence for more threads than it has heads. */
#include "prefill_compare.h"
#include "prefill_families.h"

#include <stdio.h>

static void all_bf16(struct prefill_case *c) {
    c->q_type = c->k_type = c->v_type = c->g_type = c->beta_type = c->out_type = TYPE_BF16;
}

static const char *float_name(bool bf16) { return bf16 ? "bf16" : "fp32"; }

/* ---- Lengths ----------------------------------------------------------------------------------- */

static void dense_lengths(struct check *check, int64_t dim) {
    static const int64_t lengths[] = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 257};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (int gate = 0; gate < 3; gate++)
            for (int bf16 = 0; bf16 < 2; bf16++) {
                struct prefill_case c = prefill_case_plain();
                prefill_case_set_gate(&c, (flash_kda_gate)gate);
                if (bf16)
                    all_bf16(&c);
                c.H = 1;
                c.K = c.V = dim;
                c.sequences = 2;
                c.lengths[0] = c.lengths[1] = lengths[i];
                c.checkpoints = CHECKPOINTS_EVERY;
                snprintf(c.name, sizeof c.name, "length %lld, two dense sequences, K = V = %lld, gate %s, %s",
                         (long long)lengths[i], (long long)dim, prefill_gate_names[gate], float_name(bf16));
                prefill_compare(check, &c);
            }
}

static void packed_lengths(struct check *check, int64_t dim, bool bf16) {
    static const struct {
        const char *name;
        int count;
        int64_t lengths[MAX_SEQUENCES];
    } packs[] = {{"0 1 15 16 17", 5, {0, 1, 15, 16, 17}},
                 {"31 32 33 0 63", 5, {31, 32, 33, 0, 63}},
                 {"64 65 257 0", 4, {64, 65, 257, 0}},
                 {"0 0 0", 3, {0, 0, 0}},
                 {"0", 1, {0}},
                 {"none at all", 0, {0}}};
    for (size_t i = 0; i < sizeof packs / sizeof *packs; i++)
        for (int gate = 0; gate < 3; gate++) {
            struct prefill_case c = prefill_case_plain();
            prefill_case_set_gate(&c, (flash_kda_gate)gate);
            if (bf16)
                all_bf16(&c);
            c.H = 1;
            c.group = 2;
            c.K = c.V = dim;
            c.packing = gate == 1 ? PACKING_INT32 : PACKING_INT64;
            c.sequences = packs[i].count;
            for (int n = 0; n < c.sequences; n++)
                c.lengths[n] = packs[i].lengths[n];
            c.checkpoints = CHECKPOINTS_EVERY;
            snprintf(c.name, sizeof c.name, "packed lengths %s, K = V = %lld, gate %s, %s", packs[i].name,
                     (long long)dim, prefill_gate_names[gate], float_name(bf16));
            prefill_compare(check, &c);
        }
}

/* More chains than a GPU works at a time: one takes up another's place. No sequence has two full chunks, because
 * compute-sanitizer does not see what the copy engine writes to a workspace. */
static void many_chains(struct check *check, int64_t dim) {
    static const int64_t lengths[] = {33, 1, 63, 0, 50, 17, 32, 40};
    struct prefill_case c = prefill_case_plain();
    all_bf16(&c);
    c.H = 20;
    c.group = 2;
    c.K = c.V = dim;
    c.packing = PACKING_INT64;
    c.sequences = sizeof lengths / sizeof *lengths;
    for (int n = 0; n < c.sequences; n++)
        c.lengths[n] = lengths[n];
    for (int kept = 0; kept < 2; kept++) { /* GPUs have kernels of their own for each */
        c.checkpoints = kept ? CHECKPOINTS_EVERY : CHECKPOINTS_NONE;
        c.every = 32;
        snprintf(c.name, sizeof c.name, "320 chains, K = V = %lld%s", (long long)dim,
                 kept ? ", checkpoints" : "");
        prefill_compare(check, &c);
    }
}

/* ---- Head dims --------------------------------------------------------------------------------- */

/* Fused spacing surrounds every row with NaN: a read past K or V shows. */
static void head_dims(struct check *check) {
    static const int64_t dims[] = {1,  2,  3,  7,  8,  15,  16,  17,  20,  31,  32,  33,
                                   47, 63, 64, 65, 96, 100, 127, 128, 129, 192, 255, 256};
    enum { DIMS = sizeof dims / sizeof *dims };
    for (int i = 0; i < DIMS; i++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            struct prefill_case c = prefill_case_plain();
            if (bf16)
                all_bf16(&c);
            c.K = dims[i];
            c.V = dims[(i * 7 + 5) % DIMS];
            c.group = 1 + i % 2;
            c.inputs = c.outputs = SPACING_FUSED;
            prefill_case_set_gate(&c, (flash_kda_gate)(i % 3));
            snprintf(c.name, sizeof c.name, "head dims K = %lld, V = %lld, gate %s, %s, NaN between rows",
                     (long long)c.K, (long long)c.V, prefill_gate_names[c.gate], float_name(bf16));
            prefill_compare(check, &c);
        }
}

/* ---- Segments ---------------------------------------------------------------------------------- */

static struct prefill_case one_long_head(int threads, flash_kda_gate gate, bool bf16) {
    struct prefill_case c = prefill_case_plain();
    prefill_case_set_gate(&c, gate);
    if (bf16)
        all_bf16(&c);
    c.H = 1;
    c.K = threads == 4 ? 100 : 128;
    c.V = threads == 4 ? 20 : 128;
    c.fill = fill_remembering;
    c.lengths[0] = 2003;
    c.threads = threads;
    c.checkpoints = threads == 8 ? CHECKPOINTS_EVERY : CHECKPOINTS_NONE;
    c.every = 300;
    snprintf(c.name, sizeof c.name, "one head of 2003 tokens on %d threads, gate %s, %s", threads,
             prefill_gate_names[gate], float_name(bf16));
    return c;
}

/* More threads than heads: the CPU backend may split the sequence and compose the parts. */
static void segments(struct check *check) {
    static const int threads[] = {16, 8, 4, 2};
    int count = check->quick ? 1 : (int)(sizeof threads / sizeof *threads);
    for (int gate = 0; gate < 3; gate++)
        for (int bf16 = 0; bf16 < (check->quick ? 1 : 2); bf16++)
            for (int i = 0; i < count; i++) {
                struct prefill_case c = one_long_head(threads[i], (flash_kda_gate)gate, bf16);
                prefill_compare(check, &c);
            }
}

/* A long sequence among short ones, and a state pool updated in place, while the long one is split. */
static void uneven_segments(struct check *check) {
    struct prefill_case c = prefill_case_plain();
    c.H = 1;
    c.K = 128;
    c.V = 32;
    c.threads = 16;
    c.fill = fill_remembering;
    c.packing = PACKING_INT32;
    c.sequences = 5;
    const int64_t lengths[] = {3, 2500, 0, 257, 2500};
    for (int n = 0; n < c.sequences; n++)
        c.lengths[n] = lengths[n];
    c.pool = true;
    c.final = STORAGE_IN_PLACE;
    c.checkpoints = CHECKPOINTS_OFFSETS_3;
    snprintf(c.name, sizeof c.name, "packed lengths 3 2500 0 257 2500 on 16 threads, pool in place");
    prefill_compare(check, &c);
}

struct kept_kind {
    enum packing packing;
    enum checkpoints checkpoints;
    int64_t every, lengths[3];
    bool bf16, k_first, given;
};

static void kept_kind(struct check *check, const struct kept_kind *kind, bool odd, bool remembers) {
    struct prefill_case c = prefill_case_plain();
    prefill_case_set_gate(&c, odd ? FLASH_KDA_GATE_SOFTPLUS : FLASH_KDA_GATE_SIGMOID);
    all_bf16(&c);
    c.H = 1;
    c.group = 1 + odd;
    c.K = c.V = 128;
    c.fill = remembers ? fill_remembering : fill_ordinary;
    c.packing = kind->packing;
    c.sequences = 3;
    for (int n = 0; n < 3; n++)
        c.lengths[n] = kind->lengths[n];
    c.checkpoints = kind->checkpoints;
    c.every = kind->every;
    c.checkpoints_bf16 = kind->bf16;
    c.layout = kind->k_first ? FLASH_KDA_STATE_K_FIRST : FLASH_KDA_STATE_V_FIRST;
    c.beta_mode = kind->given ? FLASH_KDA_BETA_GIVEN : FLASH_KDA_BETA_SIGMOID;
    c.pool = kind->checkpoints == CHECKPOINTS_SHARED_POOL;
    if (c.pool)
        c.initial = STORAGE_BF16, c.final = STORAGE_IN_PLACE;
    snprintf(c.name, sizeof c.name, "checkpoints every %lld tokens of up to %lld, %s, %s", (long long)c.every,
             (long long)(c.lengths[0] > c.lengths[1] ? c.lengths[0] : c.lengths[1]),
             float_name(c.checkpoints_bf16), remembers ? "remembered" : "forgotten");
    prefill_compare(check, &c);
}

/* Checkpoints between whole chunks, in long sequences: those within segments are put together from what lies before. */
static void kept_segments(struct check *check) {
    static const struct kept_kind kinds[] = {
        {PACKING_DENSE, CHECKPOINTS_EVERY, 64, {1000, 1000, 1000}, true, false, false},
        {PACKING_DENSE, CHECKPOINTS_FEWER, 128, {777, 777, 777}, false, false, true},
        {PACKING_INT64, CHECKPOINTS_EVERY, 32, {40, 901, 250}, false, true, false},
        {PACKING_INT32, CHECKPOINTS_INDEXED, 96, {513, 0, 640}, true, false, true},
        {PACKING_INT64, CHECKPOINTS_SHARED_POOL, 128, {1000, 129, 128}, true, true, false}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        for (int remembers = 0; remembers < 2; remembers++)
            kept_kind(check, &kinds[i], i % 2, remembers);
}

/* The pool holds initial states, final states and checkpoints at once. */
static void shared_pool(struct check *check) {
    for (int layout = 0; layout < 2; layout++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            struct prefill_case c = prefill_case_plain();
            c.packing = PACKING_INT64;
            c.sequences = 4;
            c.lengths[1] = 0;
            c.lengths[2] = 33;
            c.lengths[3] = 129;
            c.pool = true;
            c.initial = bf16 ? STORAGE_BF16 : STORAGE_FP32;
            c.final = STORAGE_IN_PLACE;
            c.checkpoints = CHECKPOINTS_SHARED_POOL;
            c.layout = (flash_kda_state_layout)layout;
            snprintf(c.name, sizeof c.name, "checkpoints in the state pool itself, %s, %s", float_name(bf16),
                     layout ? "K-first" : "V-first");
            prefill_compare(check, &c);
        }
}

void prefill_lengths(struct check *check) {
    for (int64_t dim = 64; dim <= 128; dim *= 2) {
        dense_lengths(check, dim);
        for (int bf16 = 0; bf16 < 2; bf16++)
            packed_lengths(check, dim, bf16);
        many_chains(check, dim);
    }
    head_dims(check);
    segments(check);
    uneven_segments(check);
    kept_segments(check);
    shared_pool(check);
}
