/* SPDX-License-Identifier: MIT */
/* Backward with all options against each other: every two values of any two options meet in some case. */
#include "backward_compare.h"
#include "pairwise.h"
#include "pairwise_values.h"
#include "prefill_compare.h"

#include <stdio.h>
#include <stdlib.h>

/* The oracle is compared with derivatives, one run for each element of each input: small ones. */
static const int64_t key_dims[2][5] = {{8, 20, 64, 100, 128}, {1, 2, 3, 5, 6}};
static const int64_t value_dims[2][4] = {{7, 64, 100, 128}, {1, 2, 3, 5}};
static const int64_t intervals[] = {32, 64, 96};

static const struct {
    bool d_out;
    enum storage initial, d_final, d_initial;
    const char *name;
} states[] = {{true, STORAGE_NONE, STORAGE_NONE, STORAGE_NONE, "no state"},
              {true, STORAGE_FP32, STORAGE_NONE, STORAGE_FP32, "dO, fp32 S, dS0 fp32"},
              {true, STORAGE_BF16, STORAGE_FP32, STORAGE_NONE, "dO, bf16 S, dS fp32"},
              {true, STORAGE_NONE, STORAGE_FP32, STORAGE_IN_PLACE, "dO, no S, dS fp32 in place"},
              {true, STORAGE_FP32, STORAGE_BF16, STORAGE_IN_PLACE, "dO, fp32 S, dS bf16 in place"},
              {false, STORAGE_BF16, STORAGE_BF16, STORAGE_FP32, "no dO, bf16 S, dS bf16, dS0 fp32"},
              {false, STORAGE_FP32, STORAGE_FP32, STORAGE_BF16, "no dO, fp32 S, dS fp32, dS0 bf16"}};

static const struct {
    enum packing packing;
    int count;
    int64_t lengths[MAX_SEQUENCES];
    const char *name;
} batches[] = {{PACKING_DENSE, 1, {70}, "1x70"},
               {PACKING_DENSE, 3, {35, 35, 35}, "3x35"},
               {PACKING_INT32, 4, {17, 0, 65, 1}, "17 0 65 1 int32"},
               {PACKING_INT64, 3, {0, 33, 50}, "0 33 50 int64"},
               {PACKING_INT64, 2, {5, 2}, "5 2 int64"}};

static const enum checkpoints checkpoints[] = {CHECKPOINTS_NONE, CHECKPOINTS_EVERY, CHECKPOINTS_FEWER};

enum option {
    GATE,
    NORM,
    BETA,
    SCALE,
    RATIO,
    BATCH,
    STATES,
    LAYOUT,
    CHECKPOINTS,
    INTERVAL,
    CHECKPOINT_TYPE,
    INDEX_TYPE,
    WITHOUT,
    Q_TYPE,
    K_TYPE,
    V_TYPE,
    G_TYPE,
    BETA_TYPE,
    D_OUT_TYPE,
    PARAMETER_TYPE,
    DQ_TYPE,
    DK_TYPE,
    DV_TYPE,
    DG_TYPE,
    DBETA_TYPE,
    SUM_TYPE,
    KEY_DIM,
    VALUE_DIM,
    INPUT_SPACING,
    OUTPUT_SPACING,
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
    [CHECKPOINTS] = COUNT(checkpoints),
    [INTERVAL] = COUNT(intervals),
    [CHECKPOINT_TYPE] = 2,
    [INDEX_TYPE] = 2,
    [WITHOUT] = GRADIENTS + 1,
    [Q_TYPE] = 3,
    [K_TYPE] = 3,
    [V_TYPE] = 3,
    [G_TYPE] = 3,
    [BETA_TYPE] = 3,
    [D_OUT_TYPE] = 3,
    [PARAMETER_TYPE] = 3,
    [DQ_TYPE] = 3,
    [DK_TYPE] = 3,
    [DV_TYPE] = 3,
    [DG_TYPE] = 3,
    [DBETA_TYPE] = 3,
    [SUM_TYPE] = 3,
    [KEY_DIM] = COUNT(key_dims[0]),
    [VALUE_DIM] = COUNT(value_dims[0]),
    [INPUT_SPACING] = COUNT(spacing_names),
    [OUTPUT_SPACING] = COUNT(spacing_names) - 1,
    [THREADS] = COUNT(thread_counts),
    [INVARIANT] = 2,
    [HEADS] = 2,
};

/* Everything goes with everything. */
static bool forbidden(int a, int x, int b, int y) {
    (void)a, (void)x, (void)b, (void)y;
    return false;
}

static DLDataType float_type(int i) { return i == 0 ? TYPE_FP32 : i == 1 ? TYPE_FP16 : TYPE_BF16; }

static struct backward_case case_of(const int *row, bool oracle_tested) {
    struct backward_case b = backward_case_plain();
    struct prefill_case *c = &b.forward;
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
    b.d_out = states[row[STATES]].d_out;

    c->initial = states[row[STATES]].initial;
    b.d_final = states[row[STATES]].d_final;
    b.d_initial = states[row[STATES]].d_initial;
    c->layout = (flash_kda_state_layout)row[LAYOUT];
    c->checkpoints = checkpoints[row[CHECKPOINTS]];
    c->every = intervals[row[INTERVAL]];
    c->checkpoints_bf16 =
        row[CHECKPOINT_TYPE] && !oracle_tested; /* which moves gradients away from derivatives */
    c->wide_indices = row[INDEX_TYPE];
    b.without = 1u << row[WITHOUT] & ((1u << GRADIENTS) - 1);
    c->q_type = float_type(row[Q_TYPE]);
    c->k_type = float_type(row[K_TYPE]);
    c->v_type = float_type(row[V_TYPE]);
    c->g_type = float_type(row[G_TYPE]);
    c->beta_type = float_type(row[BETA_TYPE]);
    c->out_type = float_type(row[D_OUT_TYPE]);
    c->parameter_type = float_type(row[PARAMETER_TYPE]);
    for (int i = 0; i < D_INITIAL_STATE; i++)
        b.types[i] = float_type(row[DQ_TYPE + (i < DA_LOG ? i : (int)DA_LOG)]);
    c->K = key_dims[oracle_tested][row[KEY_DIM]];
    c->V = value_dims[oracle_tested][row[VALUE_DIM]];
    c->inputs = (enum spacing)row[INPUT_SPACING];
    c->outputs = (enum spacing)row[OUTPUT_SPACING];
    c->threads = thread_counts[row[THREADS]];
    c->batch_invariant = row[INVARIANT];
    c->H = 1 + row[HEADS];
    return b;
}

static void compare_row(struct check *check, int number, const int *row) {
    struct backward_case b = case_of(row, level_backend(check->levels[0]) == FLASH_KDA_BACKEND_REFERENCE);
    struct prefill_case *c = &b.forward;
    snprintf(c->name, sizeof c->name,
             "backward pairwise %d: gate %s, beta %s, %s, H %lld x%lld, K %lld, V %lld, %s, kept %s, %s",
             number, gates[row[GATE]].name, beta_names[row[BETA]], batches[row[BATCH]].name, (long long)c->H,
             (long long)c->group, (long long)c->K, (long long)c->V, states[row[STATES]].name,
             c->checkpoints ? c->checkpoints_bf16 ? "in bf16" : "in fp32" : "none",
             spacing_names[row[INPUT_SPACING]]);
    backward_compare(check, &b);
}

void backward_pairwise(struct check *check) {
    const struct pairwise p = {OPTIONS, sizes, forbidden};
    struct random r = random_named(check->seed, "backward pairwise");
    int count, pairs;
    int *rows = pairwise_rows(&p, &r, &count);
    int missing = pairwise_missing(&p, rows, count, &pairs);
    if (check_wanted(check, "backward pairwise cover")) {
        char text[100];
        snprintf(text, sizeof text, "%d cases cover %d pairs, %d wrong", count, pairs, missing);
        check_report(check, missing == 0 && pairs > 0, "-", "backward pairwise cover", text);
    }
    for (int i = 0; i < count; i += check->quick ? 3 : 1)
        compare_row(check, i, rows + i * OPTIONS);
    free(rows);
}
