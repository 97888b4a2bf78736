/* SPDX-License-Identifier: MIT */
/* Decode with all options against each other: every two values of any two options meet in some case. */
#include "decode_case.h"
#include "decode_families.h"
#include "pairwise.h"

#include <stdio.h>
#include <stdlib.h>

static const int64_t key_dims[] = {1, 8, 20, 64, 100, 128, 256};
static const int64_t value_dims[] = {1, 7, 64, 100, 128, 200};
static const int64_t ratios[] = {1, 2, 4};
static const int thread_counts[] = {1, 2, 5};
static const double scales[] = {0, 0.3};

static const struct {
    flash_kda_gate gate;
    bool A_log, dt_bias;
    const char *name;
} gates[] = {{FLASH_KDA_GATE_NONE, false, false, "none"},
             {FLASH_KDA_GATE_SOFTPLUS, false, false, "softplus"},
             {FLASH_KDA_GATE_SOFTPLUS, true, false, "softplus+A_log"},
             {FLASH_KDA_GATE_SOFTPLUS, true, true, "softplus+A_log+dt_bias"},
             {FLASH_KDA_GATE_SIGMOID, false, true, "sigmoid+dt_bias"},
             {FLASH_KDA_GATE_SIGMOID, true, true, "sigmoid+A_log+dt_bias"}};

static const struct {
    enum packing packing;
    int count;
    int64_t lengths[MAX_SEQUENCES];
    const char *name;
} batches[] = {{PACKING_DENSE, 1, {1}, "1x1"},
               {PACKING_DENSE, 5, {1, 1, 1, 1, 1}, "5x1"},
               {PACKING_DENSE, 3, {4, 4, 4}, "3x4"},
               {PACKING_INT32, 4, {2, 0, 5, 1}, "2 0 5 1 int32"},
               {PACKING_INT64, 3, {0, 16, 9}, "0 16 9 int64"}};

/* How the states are addressed and what is written. */
static const struct {
    bool pool;
    int64_t columns;
    bool num_accepted, accepted, keep_state, no_out;
    const char *name;
} ways[] = {{false, 0, false, false, false, false, "slot n"},
            {true, 0, false, false, false, false, "pool"},
            {true, 16, false, false, false, false, "a slot a token"},
            {true, 16, true, false, false, false, "verify"},
            {true, 16, true, true, false, false, "verify, accepted"},
            {true, 0, false, false, true, false, "state kept"},
            {true, 16, true, false, true, false, "verify, state kept"},
            {true, 0, false, true, false, true, "commit"},
            {false, 0, false, true, false, false, "accepted"}};

static const char *const spacing_names[] = {"compact", "fused", "heads first", "repeat"};
static const char *const beta_names[] = {"given", "sigmoid", "2 sigmoid"};

enum option {
    GATE,
    NORM,
    BETA,
    SCALE,
    RATIO,
    BATCH,
    WAY,
    LAYOUT,
    STATE_TYPE,
    Q_TYPE,
    K_TYPE,
    V_TYPE,
    G_TYPE,
    BETA_TYPE,
    OUT_TYPE,
    PARAMETER_TYPE,
    KEY_DIM,
    VALUE_DIM,
    INPUTS,
    OUTPUTS,
    THREADS,
    HEADS,
    OPTIONS
};

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static const int sizes[OPTIONS] = {
    [GATE] = COUNT(gates),
    [NORM] = 2,
    [BETA] = 3,
    [SCALE] = COUNT(scales),
    [RATIO] = COUNT(ratios),
    [BATCH] = COUNT(batches),
    [WAY] = COUNT(ways),
    [LAYOUT] = 2,
    [STATE_TYPE] = 3,
    [Q_TYPE] = 3,
    [K_TYPE] = 3,
    [V_TYPE] = 3,
    [G_TYPE] = 3,
    [BETA_TYPE] = 3,
    [OUT_TYPE] = 3,
    [PARAMETER_TYPE] = 3,
    [KEY_DIM] = COUNT(key_dims),
    [VALUE_DIM] = COUNT(value_dims),
    [INPUTS] = COUNT(spacing_names),
    [OUTPUTS] = COUNT(spacing_names) - 1,
    [THREADS] = COUNT(thread_counts),
    [HEADS] = 2,
};

static bool nothing_forbidden(int a, int x, int b, int y) {
    (void)a, (void)x, (void)b, (void)y;
    return false;
}

static DLDataType float_type(int i) { return i == 0 ? TYPE_FP32 : i == 1 ? TYPE_FP16 : TYPE_BF16; }

static struct decode_case case_of(const int *row) {
    struct decode_case d = decode_case_plain();
    struct prefill_case *c = &d.tokens;
    c->gate = gates[row[GATE]].gate;
    c->A_log = gates[row[GATE]].A_log;
    c->dt_bias = gates[row[GATE]].dt_bias;
    c->qk_norm = row[NORM];
    c->beta_mode = (flash_kda_beta)row[BETA];
    c->scale = scales[row[SCALE]];
    c->group = ratios[row[RATIO]];
    c->packing = batches[row[BATCH]].packing;
    c->sequences = batches[row[BATCH]].count;
    for (int n = 0; n < c->sequences; n++)
        c->lengths[n] = batches[row[BATCH]].lengths[n];
    c->layout = (flash_kda_state_layout)row[LAYOUT];
    c->q_type = float_type(row[Q_TYPE]);
    c->k_type = float_type(row[K_TYPE]);
    c->v_type = float_type(row[V_TYPE]);
    c->g_type = float_type(row[G_TYPE]);
    c->beta_type = float_type(row[BETA_TYPE]);
    c->out_type = float_type(row[OUT_TYPE]);
    c->parameter_type = float_type(row[PARAMETER_TYPE]);
    c->K = key_dims[row[KEY_DIM]];
    c->V = value_dims[row[VALUE_DIM]];
    c->inputs = (enum spacing)row[INPUTS];
    c->outputs = (enum spacing)row[OUTPUTS];
    c->threads = thread_counts[row[THREADS]];
    c->H = 1 + row[HEADS];
    c->pool = ways[row[WAY]].pool;
    d.columns = ways[row[WAY]].columns;
    d.num_accepted = ways[row[WAY]].num_accepted;
    d.accepted = ways[row[WAY]].accepted;
    d.keep_state = ways[row[WAY]].keep_state;
    d.no_out = ways[row[WAY]].no_out;
    d.state_type = float_type(row[STATE_TYPE]);
    snprintf(c->name, sizeof c->name,
             "gate %s, beta %s, %s, H %lld x%lld, K %lld, V %lld, %s, %s, %s state, %s", gates[row[GATE]].name,
             beta_names[row[BETA]], batches[row[BATCH]].name, (long long)c->H, (long long)c->group,
             (long long)c->K, (long long)c->V, ways[row[WAY]].name, spacing_names[row[INPUTS]],
             type_name(d.state_type), row[LAYOUT] ? "K first" : "V first");
    return d;
}

void decode_pairwise(struct check *check) {
    const struct pairwise p = {OPTIONS, sizes, nothing_forbidden};
    struct random r = random_named(check->seed, "decode pairwise");
    int count, pairs;
    int *rows = pairwise_rows(&p, &r, &count);
    int missing = pairwise_missing(&p, rows, count, &pairs);
    if (check_wanted(check, "decode pairwise cover")) {
        char text[100];
        snprintf(text, sizeof text, "%d cases cover %d pairs, %d wrong", count, pairs, missing);
        check_report(check, missing == 0 && pairs > 0, "-", "decode pairwise cover", text);
    }
    for (int i = 0; i < count; i += check->quick ? 3 : 1) {
        const struct decode_case c = case_of(rows + i * OPTIONS);
        decode_compare(check, &c);
    }
    free(rows);
}
