/* SPDX-License-Identifier: MIT */
#include "cuda/sm80/plan.h"

size_t kda_sm80_operands(const struct kda_prefill *p) {
    size_t each = p->key_dim <= 64    ? KDA_SM80_OPERANDS(64)
                  : p->key_dim <= 128 ? KDA_SM80_OPERANDS(128)
                                      : KDA_SM80_OPERANDS(256);
    return (size_t)(kda_first_chunk(p, p->tokens, p->sequences) * p->value_heads) * each;
}

void kda_sm80_plan_prepare(const struct kda_prefill *p, struct kda_plan *plan) {
    /* What BEGIN has prepared is still there when FINISH runs. */
    if (p->tokens && p->border.phase != FLASH_KDA_PHASE_FINISH)
        kda_add_launch(plan, (struct kda_launch){.kernel = KDA_KERNEL_PREPARE,
                                                 .grid = {(unsigned)plan->chunks, (unsigned)p->value_heads}});
}

bool kda_sm80_takes(const struct kda_prefill *p) {
    (void)p;
    return true;
}

void kda_sm80_plan(const struct kda_prefill *p, int multiprocessors, const struct kda_override *override,
                   struct kda_plan *plan) {
    (void)multiprocessors;
    (void) override;
    plan->workspace = kda_sm80_operands(p);
    kda_sm80_plan_prepare(p, plan);
    int64_t columns = (p->value_dim + KDA_SM80_COLUMNS - 1) / KDA_SM80_COLUMNS;
    if (p->border.phase == FLASH_KDA_PHASE_BEGIN && p->border.summaries.data)
        columns += (p->key_dim + KDA_SM80_COLUMNS - 1) / KDA_SM80_COLUMNS;
    kda_add_launch(plan,
                   (struct kda_launch){.kernel = KDA_KERNEL_GENERAL,
                                       .grid = {(unsigned)(p->sequences * p->value_heads), (unsigned)columns}});
}
