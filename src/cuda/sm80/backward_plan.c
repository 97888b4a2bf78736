/* SPDX-License-Identifier: MIT */
#include "cuda/sm80/backward_plan.h"

#include "api/workspace.h"

/* Chunks, times value heads, of a slab: so many for each multiprocessor. Memory is 116 KB for each of them at
 * K = V = 128, or 270 KB where launches overlap, and does not grow with the tokens. */
enum { CHUNKS_OF_PROCESSOR = 8 };

/* Channels that a warp of kernel sums adds. */
enum { SUMS = 32 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int kda_sm80_padded_key_dim(const struct kda_backward *b) {
    return b->forward.key_dim <= 64 ? 64 : b->forward.key_dim <= 128 ? 128 : 256;
}

int64_t kda_sm80_tiles(const struct kda_backward *b) {
    return (b->forward.value_dim + KDA_SM80_COLUMNS - 1) / KDA_SM80_COLUMNS;
}

static int64_t chunks_of_segment(const struct kda_backward_plan *plan) {
    return plan->segment / KDA_CUDA_CHUNK;
}

int64_t kda_sm80_slabs_of_operands(const struct kda_backward_plan *plan) {
    return plan->overlaps ? smaller(plan->slabs, 3) : 1;
}

int64_t kda_sm80_slabs_of_states(const struct kda_backward_plan *plan) {
    return plan->overlaps ? smaller(plan->slabs, 2) : 1;
}

int64_t kda_sm80_chunks_of_slab(const struct kda_backward *b, const struct kda_backward_plan *plan) {
    return b->forward.value_heads * plan->slab_segments * chunks_of_segment(plan);
}

size_t kda_sm80_backward_lay_out(const struct kda_backward *b, const struct kda_backward_plan *plan,
                                 void *workspace, struct kda_sm80_backward_memory *memory) {
    struct kda_arena arena = {workspace, 0};
    int KP = kda_sm80_padded_key_dim(b);
    size_t heads = (size_t)b->forward.value_heads, tiles = (size_t)kda_sm80_tiles(b);
    size_t chunks = (size_t)kda_sm80_chunks_of_slab(b, plan);
    size_t rows = (size_t)KDA_CUDA_CHUNK * KDA_SM80_COLUMNS * 2, state = (size_t)KP * KDA_SM80_COLUMNS * 2;
    size_t operands = KP == 64    ? KDA_SM80_BACKWARD_OPERANDS(64)
                      : KP == 128 ? KDA_SM80_BACKWARD_OPERANDS(128)
                                  : KDA_SM80_BACKWARD_OPERANDS(256);
    size_t in_gradients = plan->needs_gradients ? (size_t)kda_sm80_slabs_of_states(plan) * chunks * tiles : 0;
    size_t finds = plan->finds_states;
    size_t carried = plan->slabs > 1 ? 2 * heads * tiles : 0;
    memory->operands = kda_take(&arena, (size_t)kda_sm80_slabs_of_operands(plan) * chunks, operands);
    memory->e = kda_take(&arena, in_gradients, rows);
    memory->Z = kda_take(&arena, in_gradients, rows);
    memory->S = kda_take(&arena, in_gradients, state);
    memory->R = kda_take(&arena, in_gradients, state);
    memory->kept = kda_take(&arena, finds * heads * (size_t)plan->segments * tiles, state);
    memory->carried_S = kda_take(&arena, finds * carried, 2 * state);
    memory->carried_R = kda_take(&arena, carried, 2 * state);
    memory->sums =
        kda_take(&arena, plan->needs_sums * heads * (size_t)(plan->segments * chunks_of_segment(plan)),
                 (size_t)(KP + 1) * sizeof(float));
    return arena.used;
}

bool kda_sm80_backward_takes(const struct kda_backward *b) {
    (void)b;
    return true;
}

/* FINISH adds the sums of both halves. */
static bool adds_sums(const struct kda_backward *b, const struct kda_backward_plan *plan) {
    return plan->needs_sums && b->border.phase != FLASH_KDA_PHASE_BEGIN;
}

void kda_sm80_backward_plan(const struct kda_backward *b, struct kda_backward_plan *plan) {
    struct kda_sm80_backward_memory memory;
    int64_t segment = b->forward.value_heads * chunks_of_segment(plan);
    bool chains = plan->needs_gradients || b->dv.data || b->d_initial_state.data || b->border.summaries.data;
    int64_t segments = chains ? plan->segments : 0;
    if (segments) {
        int64_t room = ((int64_t)plan->multiprocessors * CHUNKS_OF_PROCESSOR + segment / 2) / segment;
        plan->slab_segments = smaller(segments, room > 1 ? room : 1);
        plan->slabs = (segments + plan->slab_segments - 1) / plan->slab_segments;
    }
    plan->count = (int)plan->slabs * (2 + plan->needs_gradients) + adds_sums(b, plan);
    if (plan->finds_states && plan->slabs)
        plan->count += 2 * (int)plan->slabs - 1;
    plan->workspace = kda_sm80_backward_lay_out(b, plan, NULL, &memory);
}

/* Segments of a slab: the last one may have fewer. */
static int64_t segments_in(const struct kda_backward_plan *plan, int64_t slab) {
    return smaller(plan->slab_segments, plan->segments - slab * plan->slab_segments);
}

int64_t kda_sm80_chains_in_slab(const struct kda_backward *b, const struct kda_backward_plan *plan,
                                int64_t slab) {
    return smaller(b->forward.sequences, segments_in(plan, slab)) * b->forward.value_heads;
}

/* Kernel and slab of launch number i. */
static void find_step(const struct kda_backward *b, const struct kda_backward_plan *plan, int i,
                      struct kda_backward_launch *launch) {
    static const int back[] = {KDA_SM80_BACKWARD_PREPARE, KDA_SM80_BACKWARD_CHAINS,
                               KDA_SM80_BACKWARD_GRADIENTS};
    int slabs = (int)plan->slabs, each = 2 + plan->needs_gradients;
    if (i == plan->count - 1 && adds_sums(b, plan)) {
        launch->kernel = KDA_SM80_BACKWARD_SUMS;
        return;
    }
    if (plan->finds_states && i < 2 * slabs) {
        launch->kernel = i % 2 ? KDA_SM80_BACKWARD_STATES : KDA_SM80_BACKWARD_PREPARE;
        launch->slab = i / 2;
        return;
    }
    if (plan->finds_states) /* the operands of the last slab are still there */
        i += 1 - 2 * slabs;
    int turn = i / each, kernel = i % each;
    if (plan->overlaps && plan->needs_gradients && i >= 2) { /* gradients are a turn behind */
        turn = 1 + (i - 2) / each, kernel = turn == slabs ? 2 : (i - 2) % each;
        turn -= kernel == 2;
    }
    launch->kernel = back[kernel];
    launch->slab = slabs - 1 - turn;
}

struct kda_backward_launch kda_sm80_backward_launch_at(const struct kda_backward *b,
                                                       const struct kda_backward_plan *plan, int i) {
    static const char *const names[] = {"backward_prepare", "backward_states", "backward_chains",
                                        "backward_gradients", "backward_sums"};
    struct kda_backward_launch launch = {.slab = 0};
    const struct kda_prefill *p = &b->forward;
    find_step(b, plan, i, &launch);
    launch.overlaps = plan->overlaps && i > 0 && launch.kernel != KDA_SM80_BACKWARD_SUMS;
    int64_t chains = kda_sm80_chains_in_slab(b, plan, launch.slab), tiles = kda_sm80_tiles(b);
    int64_t segments = segments_in(plan, launch.slab), chunks = segments * chunks_of_segment(plan);
    int64_t grid[][2] = {[KDA_SM80_BACKWARD_PREPARE] = {chunks, p->value_heads},
                         [KDA_SM80_BACKWARD_STATES] = {chains * tiles, 1},
                         [KDA_SM80_BACKWARD_CHAINS] =
                             {(chains + (plan->needs_gradients ? segments * p->value_heads : 0)) * tiles, 1},
                         [KDA_SM80_BACKWARD_GRADIENTS] = {chunks, p->heads},
                         [KDA_SM80_BACKWARD_SUMS] = {p->value_heads, (p->key_dim + SUMS) / SUMS}};
    launch.name = names[launch.kernel];
    launch.grid[0] = (unsigned)grid[launch.kernel][0];
    launch.grid[1] = (unsigned)grid[launch.kernel][1];
    return launch;
}
