/* SPDX-License-Identifier: MIT */
/* How an engine marks its sequences: those that start from zero while their slots hold NaN, padding that names a slot,
 * int64 indices. In shapes that Hopper's schedules take, with gates that let the first state be seen to the end. */
#include "prefill_compare.h"
#include "prefill_families.h"

#include <stdio.h>

static const struct {
    enum packing packing;
    int count;
    int64_t lengths[MAX_SEQUENCES], H, group;
    bool pool;
    const char *name;
} batches[] = {{PACKING_INT64, 6, {300, 1, 900, 0, 64, 33}, 2, 2, true, "packed, in a pool"},
               {PACKING_INT32, 4, {700, 650, 0, 800}, 4, 1, true, "few packed, in a pool"},
               {PACKING_DENSE, 3, {2100, 2100, 2100}, 1, 1, false, "long dense"},
               {PACKING_DENSE, 5, {40, 40, 40, 40, 40}, 1, 1, true, "short dense, in a pool"}};

static void fill_strong(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    if (p->c.gate != FLASH_KDA_GATE_NONE)
        tensor_fill(&p->g, 100);
}

static struct prefill_case marked(int batch, int gate, int variant) {
    struct prefill_case c = prefill_case_plain();
    prefill_case_set_gate(&c, (flash_kda_gate)gate);
    c.packing = batches[batch].packing;
    c.sequences = batches[batch].count;
    for (int n = 0; n < c.sequences; n++)
        c.lengths[n] = batches[batch].lengths[n];
    c.H = batches[batch].H;
    c.group = batches[batch].group;
    c.K = c.V = variant % 2 ? 64 : 128;
    c.pool = batches[batch].pool;
    c.padding_slot = c.wide_indices = variant % 2 == 0;
    c.flags = (enum flags)(1 + variant % 3);
    c.q_type = c.k_type = c.v_type = c.g_type = c.beta_type = c.out_type = TYPE_BF16;
    c.initial = variant % 2 ? STORAGE_BF16 : STORAGE_FP32;
    c.final = variant % 3 == 1 ? STORAGE_FP32 : STORAGE_IN_PLACE;
    c.layout = (flash_kda_state_layout)(variant / 2 % 2);
    c.fill = variant == 2 ? fill_strong : fill_remembering;
    snprintf(c.name, sizeof c.name, "sequences from zero, %s, K = V = %lld, gate %s, %s%s", batches[batch].name,
             (long long)c.K, prefill_gate_names[gate],
             c.final == STORAGE_IN_PLACE ? "in place" : "to new states", variant == 2 ? ", strong" : "");
    return c;
}

void prefill_marks(struct check *check) {
    for (size_t batch = 0; batch < sizeof batches / sizeof *batches; batch++)
        for (int gate = 0; gate < 3; gate++)
            for (int variant = 0; variant < (check->quick ? 1 : 3); variant++) {
                const struct prefill_case c = marked((int)batch, gate, variant);
                prefill_compare(check, &c);
            }
}
