/* SPDX-License-Identifier: MIT */
/* Backward of what models are trained with: K = V = 128, bf16, a gate, states kept. A GPU's level may have
 * kernels of its own for it; the other options meet each other in pairs. */
#include "backward_compare.h"
#include "pairwise.h"
#include "pairwise_values.h"

#include <stdio.h>
#include <stdlib.h>

static const struct {
    enum packing packing;
    int count;
    int64_t lengths[MAX_SEQUENCES];
    const char *name;
} batches[] = {{PACKING_DENSE, 1, {300}, "1x300"},
               {PACKING_DENSE, 2, {127, 127}, "2x127"},
               {PACKING_DENSE, 3, {1, 1, 1}, "3x1"},
               {PACKING_INT32, 5, {129, 0, 31, 33, 1}, "129 0 31 33 1 int32"},
               {PACKING_INT64, 3, {0, 128, 97}, "0 128 97 int64"},
               {PACKING_INT64, 2, {2, 260}, "2 260 int64"}};

static const struct {
    enum storage initial, d_final, d_initial;
    const char *name;
} states[] = {{STORAGE_NONE, STORAGE_NONE, STORAGE_NONE, "no state"},
              {STORAGE_FP32, STORAGE_NONE, STORAGE_FP32, "fp32 S, dS0 fp32"},
              {STORAGE_BF16, STORAGE_FP32, STORAGE_BF16, "bf16 S, dS fp32, dS0 bf16"},
              {STORAGE_NONE, STORAGE_BF16, STORAGE_IN_PLACE, "no S, dS bf16 in place"}};

static const int64_t intervals[] = {128, 64, 32};
static const double sizes_of_d_out[] = {1, 0x1p-30};

enum option {
    BATCH,
    STATES,
    LAYOUT,
    BETA,
    NORM,
    RATIO,
    GATE,
    INTERVAL,
    CHECKPOINT_TYPE,
    WITHOUT,
    SIZE,
    OPTIONS
};

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static const int sizes[OPTIONS] = {
    [BATCH] = COUNT(batches),
    [STATES] = COUNT(states),
    [LAYOUT] = 2,
    [BETA] = COUNT(beta_names),
    [NORM] = 2,
    [RATIO] = COUNT(ratios),
    [GATE] = 6,
    [INTERVAL] = COUNT(intervals),
    [CHECKPOINT_TYPE] = 2,
    [WITHOUT] = 3,
    [SIZE] = COUNT(sizes_of_d_out),
};

static bool forbidden(int a, int x, int b, int y) {
    (void)a, (void)x, (void)b, (void)y;
    return false;
}

static struct backward_case case_of(const int *row) {
    struct backward_case b = backward_case_plain();
    struct prefill_case *c = &b.forward;
    c->K = c->V = 128;
    c->packing = batches[row[BATCH]].packing;
    c->sequences = batches[row[BATCH]].count;
    for (int n = 0; n < c->sequences; n++)
        c->lengths[n] = batches[row[BATCH]].lengths[n];
    c->initial = states[row[STATES]].initial;
    b.d_final = states[row[STATES]].d_final;
    b.d_initial = states[row[STATES]].d_initial;
    c->layout = (flash_kda_state_layout)row[LAYOUT];
    c->beta_mode = (flash_kda_beta)row[BETA];
    c->qk_norm = row[NORM];
    c->group = ratios[row[RATIO]];
    c->gate = row[GATE] < 3 ? FLASH_KDA_GATE_SIGMOID : FLASH_KDA_GATE_SOFTPLUS;
    c->A_log = row[GATE] % 3 != 1;
    c->dt_bias = row[GATE] % 3 != 2;
    c->checkpoints = CHECKPOINTS_EVERY;
    c->every = intervals[row[INTERVAL]];
    c->checkpoints_bf16 = row[CHECKPOINT_TYPE];
    b.without = row[WITHOUT] == 1 ? 1u << DA_LOG | 1u << D_DT_BIAS : row[WITHOUT] == 2 ? 1u << DA_LOG : 0;
    b.size = sizes_of_d_out[row[SIZE]];
    c->q_type = c->k_type = c->v_type = c->g_type = c->beta_type = c->out_type = TYPE_BF16;
    for (int i = 0; i < DA_LOG; i++)
        b.types[i] = TYPE_BF16;
    return b;
}

void backward_tiles(struct check *check) {
    const struct pairwise p = {OPTIONS, sizes, forbidden};
    struct random r = random_named(check->seed, "backward tiles");
    int count;
    int *rows = pairwise_rows(&p, &r, &count);
    for (int i = 0; i < count; i += check->quick ? 3 : 1) {
        const int *row = rows + i * OPTIONS;
        struct backward_case b = case_of(row);
        snprintf(b.forward.name, sizeof b.forward.name,
                 "backward of 128 channels in bf16 %d: gate %s%s, beta %s, %s, HV / H %lld, %s, kept every "
                 "%lld in %s, "
                 "dO %.0e",
                 i, row[GATE] < 3 ? "sigmoid" : "softplus", row[NORM] ? ", norm" : "", beta_names[row[BETA]],
                 batches[row[BATCH]].name, (long long)b.forward.group, states[row[STATES]].name,
                 (long long)b.forward.every, b.forward.checkpoints_bf16 ? "bf16" : "fp32", b.size);
        backward_compare(check, &b);
    }
    free(rows);
}
