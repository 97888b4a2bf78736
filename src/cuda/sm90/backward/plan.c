/* SPDX-License-Identifier: MIT */
#include "cuda/sm90/backward/plan.h"

#include "cuda/sm90/plan.h"

enum { DIM = KDA_SM90_BACKWARD_DIM, SEGMENT = KDA_SM90_BACKWARD_SEGMENT, CHUNKS = KDA_SM90_BACKWARD_CHUNKS };
enum { ADJOINT_COLUMNS = 64 }; /* of V, of a CTA */

/* ---- What the level takes ------------------------------------------------------------------------ */

/* Is S kept at every segment's start? Explicit offsets or indices would have to be read. */
static bool keeps_states(const struct kda_prefill *p) {
    bool needed = p->tokens > SEGMENT;
    return !needed || (p->checkpoints.data && p->checkpoint_every > 0 && SEGMENT % p->checkpoint_every == 0);
}

static bool is_moved(const struct kda_tensor *t) {
    return t->data && t->dtype == KDA_BF16 && kda_sm90_can_map(t);
}

bool kda_sm90_backward_takes(const struct kda_backward *b) {
    const struct kda_prefill *p = &b->forward;
    const struct kda_tensor *moved[] = {&p->q, &p->k, &p->v, &p->g, &b->d_out, &b->dq, &b->dk, &b->dv, &b->dg};
    bool good = b->border.phase == FLASH_KDA_PHASE_WHOLE && p->key_dim == DIM && p->value_dim == DIM &&
                p->gate != FLASH_KDA_GATE_NONE && p->beta.dtype == KDA_BF16 && b->dbeta.data && p->scale != 0 &&
                p->tokens > 0 && keeps_states(p);
    for (size_t i = 0; i < sizeof moved / sizeof *moved; i++)
        good = good && is_moved(moved[i]);
    return good;
}

/* ---- The plan ------------------------------------------------------------------------------------ */

static bool shares_heads(const struct kda_backward *b) { return b->forward.value_heads > b->forward.heads; }

void kda_sm90_backward_plan(const struct kda_backward *b, struct kda_backward_plan *plan) {
    struct kda_sm90_backward_memory memory;
    plan->segment = SEGMENT;
    plan->segments = kda_first_segment(&b->forward.base, SEGMENT, b->forward.tokens, b->forward.sequences);
    plan->slab_segments = plan->segments, plan->slabs = 1;
    plan->count = 3 + plan->needs_sums + shares_heads(b);
    plan->workspace = kda_sm90_backward_lay_out(b, plan, NULL, &memory);
}

size_t kda_sm90_backward_lay_out(const struct kda_backward *b, const struct kda_backward_plan *plan,
                                 void *workspace, struct kda_sm90_backward_memory *memory) {
    const struct kda_tokens *x = &b->forward.base;
    struct kda_arena arena = {workspace, 0};
    size_t segments = (size_t)(plan->segments * x->value_heads), chunks = segments * CHUNKS;
    size_t rows = shares_heads(b) ? (size_t)(x->batches * x->tokens * x->value_heads) : 0;
    memory->operands = kda_take(&arena, chunks, KDA_SM90_BACKWARD_OPERANDS);
    memory->adjoints = kda_take(&arena, chunks * DIM * DIM / 2, sizeof *memory->adjoints);
    memory->done = kda_take(&arena, segments, sizeof *memory->done);
    memory->sums = kda_take(&arena, segments * 2 * DIM, sizeof *memory->sums);
    memory->queries = memory->keys = NULL;
    if (rows) {
        memory->queries = kda_take(&arena, rows * DIM, sizeof *memory->queries);
        memory->keys = kda_take(&arena, rows * DIM, sizeof *memory->keys);
    }
    return arena.used;
}

/* CTAs that prepare a segment: more of them where there would be few rounds of CTAs, or not even one. */
static unsigned parts_to_prepare(const struct kda_backward_plan *plan, unsigned segments) {
    enum { AT_A_TIME = 3, ROUNDS = 4 }; /* CTAs of a multiprocessor */
    unsigned parts = 1;
    while (parts < CHUNKS && segments * parts < (unsigned)(ROUNDS * AT_A_TIME * plan->multiprocessors))
        parts *= 2;
    return parts;
}

struct kda_backward_launch kda_sm90_backward_launch_at(const struct kda_backward *b,
                                                       const struct kda_backward_plan *plan, int i) {
    static const char *const names[] = {[KDA_SM90_BACKWARD_PREPARE] = "backward_prepare",
                                        [KDA_SM90_BACKWARD_ADJOINT] = "backward_adjoint",
                                        [KDA_SM90_BACKWARD_GRADIENTS] = "backward_gradients",
                                        [KDA_SM90_BACKWARD_SUMS] = "backward_sums",
                                        [KDA_SM90_BACKWARD_HEADS] = "backward_heads"};
    const struct kda_tokens *x = &b->forward.base;
    unsigned segments = (unsigned)plan->segments, chunks = segments * CHUNKS, heads = (unsigned)x->value_heads;
    const unsigned grids[][2] = {
        [KDA_SM90_BACKWARD_PREPARE] = {segments * parts_to_prepare(plan, segments * heads), heads},
        [KDA_SM90_BACKWARD_ADJOINT] = {(unsigned)x->sequences * heads, DIM / ADJOINT_COLUMNS},
        [KDA_SM90_BACKWARD_GRADIENTS] = {segments * heads, 1},
        [KDA_SM90_BACKWARD_SUMS] = {heads, 1},
        [KDA_SM90_BACKWARD_HEADS] = {chunks, (unsigned)x->heads}};
    bool skips = i == KDA_SM90_BACKWARD_SUMS && !plan->needs_sums;
    int kernel = skips ? KDA_SM90_BACKWARD_HEADS : i;
    return (struct kda_backward_launch){
        .kernel = kernel, .name = names[kernel], .grid = {grids[kernel][0], grids[kernel][1]}};
}
