/* SPDX-License-Identifier: MIT */
/* Prefill with all options against each other: every two values of any two options meet in some case. Each
 * case runs twice: with its own dtypes, and with q, k, v and out in bf16, which a level may treat apart. */
#include "pairwise.h"
#include "prefill_compare.h"
#include "prefill_families.h"

#include <stdio.h>
#include <stdlib.h>

static const int64_t key_dims[] = {1, 8, 20, 64, 100, 128, 256};
static const int64_t value_dims[] = {1, 7, 64, 100, 128, 200};
static const int64_t ratios[] = {1, 2, 4};
static const int64_t intervals[] = {1, 16, 50};
static const int thread_counts[] = {1, 2, 5};
static const double scales[] = {0, 0.3};

static const struct {
    flash_kda_gate gate;
    bool A_log, dt_bias;
    const char *name;
} gates[] = {{FLASH_KDA_GATE_NONE, false, false, "none"},
             {FLASH_KDA_GATE_SOFTPLUS, false, false, "softplus"},
             {FLASH_KDA_GATE_SOFTPLUS, true, false, "softplus+A_log"},
             {FLASH_KDA_GATE_SOFTPLUS, false, true, "softplus+dt_bias"},
             {FLASH_KDA_GATE_SOFTPLUS, true, true, "softplus+A_log+dt_bias"},
             {FLASH_KDA_GATE_SIGMOID, false, false, "sigmoid"},
             {FLASH_KDA_GATE_SIGMOID, true, false, "sigmoid+A_log"},
             {FLASH_KDA_GATE_SIGMOID, false, true, "sigmoid+dt_bias"},
             {FLASH_KDA_GATE_SIGMOID, true, true, "sigmoid+A_log+dt_bias"}};

static const struct {
    enum storage initial, final;
    const char *name;
} states[] = {
    {STORAGE_NONE, STORAGE_NONE, "no state"},         {STORAGE_NONE, STORAGE_FP32, "0->fp32"},
    {STORAGE_NONE, STORAGE_BF16, "0->bf16"},          {STORAGE_FP32, STORAGE_NONE, "fp32->0"},
    {STORAGE_BF16, STORAGE_NONE, "bf16->0"},          {STORAGE_FP32, STORAGE_FP32, "fp32->fp32"},
    {STORAGE_FP32, STORAGE_BF16, "fp32->bf16"},       {STORAGE_BF16, STORAGE_FP32, "bf16->fp32"},
    {STORAGE_BF16, STORAGE_BF16, "bf16->bf16"},       {STORAGE_FP32, STORAGE_IN_PLACE, "fp32 in place"},
    {STORAGE_BF16, STORAGE_IN_PLACE, "bf16 in place"}};

static const struct {
    enum packing packing;
    int count;
    int64_t lengths[MAX_SEQUENCES];
    const char *name;
} batches[] = {{PACKING_DENSE, 1, {70}, "1x70"},
               {PACKING_DENSE, 3, {35, 35, 35}, "3x35"},
               {PACKING_INT32, 4, {17, 0, 65, 1}, "17 0 65 1 int32"},
               {PACKING_INT64, 3, {0, 33, 90}, "0 33 90 int64"},
               {PACKING_INT64, 2, {5, 2}, "5 2 int64"}};

static const char *const checkpoint_names[] = {"none", "every", "fewer", "offsets", "offsets x3", "indexed"};
static const char *const spacing_names[] = {"compact", "fused", "heads first", "repeat"};
static const char *const beta_names[] = {"given", "sigmoid", "2 sigmoid"};

enum option {
    GATE,
    NORM,
    BETA,
    SCALE,
    RATIO,
    BATCH,
    STATES,
    LAYOUT,
    POOL,
    CHECKPOINTS,
    INTERVAL,
    CHECKPOINT_TYPE,
    INDEX_TYPE,
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
    INVARIANT,
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
    [STATES] = COUNT(states),
    [LAYOUT] = 2,
    [POOL] = 2,
    [CHECKPOINTS] = COUNT(checkpoint_names),
    [INTERVAL] = COUNT(intervals),
    [CHECKPOINT_TYPE] = 2,
    [INDEX_TYPE] = 2,
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
    [INVARIANT] = 2,
    [HEADS] = 2,
};

/* Slots need a state, checkpoint indices need packed sequences. */
static bool forbidden(int a, int x, int b, int y) {
    if (a == STATES && b == POOL)
        return x == 0 && y == 1;
    if (a == BATCH && b == CHECKPOINTS)
        return batches[x].packing == PACKING_DENSE && y == CHECKPOINTS_INDEXED;
    return false;
}

static DLDataType float_type(int i) { return i == 0 ? TYPE_FP32 : i == 1 ? TYPE_FP16 : TYPE_BF16; }

static struct prefill_case case_of(const int *row) {
    struct prefill_case c = prefill_case_plain();
    c.gate = gates[row[GATE]].gate;
    c.A_log = gates[row[GATE]].A_log;
    c.dt_bias = gates[row[GATE]].dt_bias;
    c.qk_norm = row[NORM];
    c.beta_mode = (flash_kda_beta)row[BETA];
    c.scale = scales[row[SCALE]];
    c.group = ratios[row[RATIO]];
    c.packing = batches[row[BATCH]].packing;
    c.sequences = batches[row[BATCH]].count;
    for (int n = 0; n < c.sequences; n++)
        c.lengths[n] = batches[row[BATCH]].lengths[n];
    c.initial = states[row[STATES]].initial;
    c.final = states[row[STATES]].final;
    c.layout = (flash_kda_state_layout)row[LAYOUT];
    c.pool = row[POOL];
    c.checkpoints = (enum checkpoints)row[CHECKPOINTS];
    c.every = intervals[row[INTERVAL]];
    c.checkpoints_bf16 = row[CHECKPOINT_TYPE];
    c.wide_indices = row[INDEX_TYPE];
    c.q_type = float_type(row[Q_TYPE]);
    c.k_type = float_type(row[K_TYPE]);
    c.v_type = float_type(row[V_TYPE]);
    c.g_type = float_type(row[G_TYPE]);
    c.beta_type = float_type(row[BETA_TYPE]);
    c.out_type = float_type(row[OUT_TYPE]);
    c.parameter_type = float_type(row[PARAMETER_TYPE]);
    c.K = key_dims[row[KEY_DIM]];
    c.V = value_dims[row[VALUE_DIM]];
    c.inputs = (enum spacing)row[INPUTS];
    c.outputs = (enum spacing)row[OUTPUTS];
    c.threads = thread_counts[row[THREADS]];
    c.batch_invariant = row[INVARIANT];
    c.H = 1 + row[HEADS];
    return c;
}

static void name_case(struct prefill_case *c, int number, const int *row, const char *variant) {
    snprintf(c->name, sizeof c->name,
             "pairwise %d%s: gate %s, beta %s, %s, H %lld x%lld, K %lld, V %lld, %s%s, checkpoints %s, %s",
             number, variant, gates[row[GATE]].name, beta_names[row[BETA]], batches[row[BATCH]].name,
             (long long)c->H, (long long)c->group, (long long)c->K, (long long)c->V, states[row[STATES]].name,
             row[POOL] ? " in a pool" : "", checkpoint_names[row[CHECKPOINTS]], spacing_names[row[INPUTS]]);
}

static void compare_row(struct check *check, int number, const int *row) {
    struct prefill_case c = case_of(row);
    name_case(&c, number, row, "");
    prefill_compare(check, &c);
    if (check->quick)
        return;
    c.q_type = c.k_type = c.v_type = c.out_type = TYPE_BF16;
    name_case(&c, number, row, " in bf16");
    prefill_compare(check, &c);
}

void prefill_pairwise(struct check *check) {
    const struct pairwise p = {OPTIONS, sizes, forbidden};
    struct random r = random_named(check->seed, "pairwise");
    int count, pairs;
    int *rows = pairwise_rows(&p, &r, &count);
    int missing = pairwise_missing(&p, rows, count, &pairs);
    if (check_wanted(check, "pairwise cover")) {
        char text[100];
        snprintf(text, sizeof text, "%d cases cover %d pairs, %d wrong", count, pairs, missing);
        check_report(check, missing == 0 && pairs > 0, "-", "pairwise cover", text);
    }
    for (int i = 0; i < count; i += check->quick ? 3 : 1)
        compare_row(check, i, rows + i * OPTIONS);
    free(rows);
}
