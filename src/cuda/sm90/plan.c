/* SPDX-License-Identifier: MIT */
#include "cuda/sm90/plan.h"

#include "cuda/sm80/plan.h"
#include "cuda/sm90/cost.h"

enum { ALIGNMENT = 16, PANEL = 64, CLUSTER = 2 /* CTAs */ };

static int64_t chains_of(const struct kda_prefill *p) { return p->sequences * p->value_heads; }

/* ---- What the level takes ------------------------------------------------------------------------ */

bool kda_sm90_can_map(const struct kda_tensor *t) {
    const int64_t longest_stride = INT64_C(1) << 40, longest_dimension = INT64_C(1) << 31;
    bool good = (uintptr_t)t->data % ALIGNMENT == 0;
    for (int i = 0; i < 3; i++) {
        bool used = t->shape[i] > 1;
        good = good && t->shape[i] <= longest_dimension &&
               (!used || (t->stride[i] > 0 && t->stride[i] < longest_stride && t->stride[i] % ALIGNMENT == 0));
    }
    return good && t->shape[3] % PANEL == 0;
}

/* Can the operands have the form of three tiles, which all schedules but the general one need? It takes K = V =
 * 64 or 128, q, k, v and g in bf16 with rows that start at multiples of 16 bytes, outputs of 2 bytes likewise,
 * normalised q and k, the sigmoid gate or, for 128, the softplus gate. */
static bool has_tiles(const struct kda_prefill *p) {
    const struct kda_tensor *brought[] = {&p->q, &p->k, &p->v, &p->g};
    bool dims = p->key_dim == 128 || (p->key_dim == 64 && p->gate == FLASH_KDA_GATE_SIGMOID);
    bool good = dims && p->value_dim == p->key_dim && p->qk_norm && p->gate != FLASH_KDA_GATE_NONE &&
                p->tokens > 0 && p->tokens <= INT32_MAX && p->out.dtype != KDA_F32 && kda_sm90_can_map(&p->out);
    for (int i = 0; i < 4; i++)
        good = good && brought[i]->dtype == KDA_BF16 && kda_sm90_can_map(brought[i]);
    return good;
}

/* Has the cluster schedule numbers for all checkpoints, whose places in the workspace are 32-bit? */
static bool may_keep(const struct kda_prefill *p) {
    const int64_t most = INT64_C(1) << 20;
    return !p->checkpoints.data || kda_first_checkpoint(p, 0, p->tokens, p->sequences) <= most / p->value_heads;
}

/* No sequence is split if its bits may not depend on the others, or where checkpoints fall between whole
 * chunks. */
static bool may_split(const struct kda_prefill *p) {
    return !p->batch_invariant && p->tokens && p->sequences && !kda_splits_chunks(p) &&
           !kda_checkpoint_splits(p) && may_keep(p) &&
           p->key_dim % 4 == 0; /* the scan copies 16 bytes at a time */
}

static bool is_half(const struct kda_prefill *p) { return p->border.phase != FLASH_KDA_PHASE_WHOLE; }

/* Segments give a half both its summary and what its outputs owe to the state that it waits for. A given beta may grow a
 * state; chains of which that is so must not be split. */
static bool takes_half(const struct kda_prefill *p) {
    return has_tiles(p) && p->key_dim == KDA_SM90_DIM && may_split(p) && p->beta_mode != FLASH_KDA_BETA_GIVEN &&
           !p->checkpoint_offsets.data;
}

bool kda_sm90_takes(const struct kda_prefill *p) {
    bool aligned = (uintptr_t)p->v.data % ALIGNMENT == 0;
    for (int i = 0; i < 3; i++)
        aligned = aligned && p->v.stride[i] % ALIGNMENT == 0;
    return p->key_dim <= 128 && p->value_dim % KDA_SM90_GENERAL_COLUMNS == 0 && p->v.dtype == KDA_BF16 &&
           aligned && (!is_half(p) || takes_half(p));
}

/* ---- The schedule -------------------------------------------------------------------------------- */

/* 0: no checkpoints in equal steps are asked for. */
static double chunks_per_checkpoint(const struct kda_prefill *p) {
    bool even = p->checkpoints.data && !p->checkpoint_offsets.data;
    return even ? (double)p->checkpoint_every / KDA_CUDA_CHUNK : 0;
}

static int general_ctas(int64_t columns) {
    return (int)((columns + KDA_SM90_GENERAL_COLUMNS - 1) / KDA_SM90_GENERAL_COLUMNS);
}

/* K = V = 64. A rule, not the cost model: persistent where general would not be split, or chains use enough of the device. */
static void choose_for_64(const struct kda_segment_problem *problem, enum kda_schedule asked,
                          struct kda_plan *plan) {
    plan->segments = kda_general_segments(problem);
    bool many = plan->segments == 1 || problem->chains >= problem->processors / 3;
    plan->schedule = asked == KDA_SCHEDULE_PERSISTENT || many ? KDA_SCHEDULE_PERSISTENT : KDA_SCHEDULE_GENERAL;
}

static void choose_for_128(const struct kda_prefill *p, const struct kda_segment_problem *problem,
                           const struct kda_override *override, struct kda_plan *plan) {
    double cluster, persistent = kda_persistent_cost(problem);
    plan->segments = kda_cluster_segments(problem, &cluster);
    /* If bits may not depend on the batch, neither may the schedule. */
    bool fewer = p->batch_invariant || persistent < cluster;
    plan->schedule = fewer ? KDA_SCHEDULE_PERSISTENT : KDA_SCHEDULE_CLUSTER;
    if (override->schedule)
        plan->schedule = override->schedule;
    bool may_stream_k =
        problem->may_split && kda_can_stream_k(p) && (!override->schedule || override->stream_k);
    int ranges = may_stream_k ? kda_stream_k_ranges(problem) : 0;
    double otherwise = plan->schedule == KDA_SCHEDULE_PERSISTENT ? persistent : cluster;
    if (ranges && (override->stream_k || kda_stream_k_pays(problem, ranges, otherwise)))
        plan->stream_k = kda_split_evenly(p, ranges);
}

/* One segment more than the cost model wants: the first is empty where a state comes in. */
static void choose_for_half(const struct kda_segment_problem *problem, const struct kda_override *override,
                            struct kda_plan *plan) {
    double cost;
    int segments = override->segments ? override->segments : kda_cluster_segments(problem, &cost);
    plan->schedule = KDA_SCHEDULE_CLUSTER;
    plan->segments = segments < KDA_MAX_SEGMENTS ? segments + 1 : KDA_MAX_SEGMENTS;
}

static void choose(const struct kda_prefill *p, int multiprocessors, const struct kda_override *override,
                   struct kda_plan *plan) {
    bool packed = p->cu_seqlens.data;
    int64_t tokens = packed && p->sequences ? p->tokens / p->sequences : p->tokens;
    struct kda_segment_problem problem = {.chains = chains_of(p),
                                          .chunks = kda_chunks_of(tokens),
                                          .packed = packed,
                                          .may_split = may_split(p),
                                          .kept_every = chunks_per_checkpoint(p),
                                          .ctas_per_chain = general_ctas(p->value_dim),
                                          .ctas_per_identity = general_ctas(p->key_dim),
                                          .processors = multiprocessors};
    if (is_half(p)) {
        choose_for_half(&problem, override, plan);
        return;
    }
    if (!has_tiles(p) || override->schedule == KDA_SCHEDULE_GENERAL) {
        plan->schedule = KDA_SCHEDULE_GENERAL;
        plan->segments = kda_general_segments(&problem);
    } else if (p->key_dim != KDA_SM90_DIM) {
        choose_for_64(&problem, override->schedule, plan);
    } else {
        choose_for_128(p, &problem, override, plan);
    }
    if (override->segments)
        plan->segments = problem.may_split ? override->segments : 1;
    if (plan->schedule == KDA_SCHEDULE_PERSISTENT)
        plan->segments = 1;
}

/* ---- Its kernels --------------------------------------------------------------------------------- */

static void plan_general(const struct kda_prefill *p, int multiprocessors, struct kda_plan *plan) {
    unsigned chains = (unsigned)chains_of(p), value_ctas = (unsigned)general_ctas(p->value_dim),
             segments = chains * (unsigned)plan->segments;
    kda_sm80_plan_prepare(p, plan);
    if (plan->segments == 1) {
        /* Two consumer warpgroups share what a CTA fetches, if that leaves no multiprocessor without a CTA. */
        bool two = (int64_t)chains * value_ctas > multiprocessors && value_ctas % 2 == 0;
        kda_add_launch(plan, (struct kda_launch){.kernel = KDA_KERNEL_GENERAL,
                                                 .config = two ? 2 : 1,
                                                 .grid = {chains, two ? value_ctas / 2 : value_ctas}});
        return;
    }
    unsigned identity_ctas = (unsigned)general_ctas(p->key_dim);
    kda_add_launch(plan, (struct kda_launch){.kernel = KDA_KERNEL_GENERAL_LOCAL,
                                             .config = 1,
                                             .grid = {segments, value_ctas + identity_ctas}});
    kda_add_launch(
        plan, (struct kda_launch){.kernel = KDA_KERNEL_GENERAL_SCAN,
                                  .grid = {chains, (unsigned)(p->value_dim / KDA_SM90_GENERAL_SCAN_COLUMNS)},
                                  .overlaps = true});
    kda_add_launch(plan, (struct kda_launch){
                             .kernel = KDA_KERNEL_GENERAL_RESUME, .config = 1, .grid = {segments, value_ctas}});
}

static void plan_stream_k(struct kda_plan *plan) {
    unsigned ranges = (unsigned)plan->stream_k.ranges;
    kda_add_launch(plan, (struct kda_launch){.kernel = KDA_KERNEL_PROBE, .grid = {ranges, 1}});
    kda_add_launch(plan,
                   (struct kda_launch){.kernel = KDA_KERNEL_RANGES, .grid = {ranges, 1}, .overlaps = true});
    kda_add_launch(plan,
                   (struct kda_launch){.kernel = KDA_KERNEL_FIXUP, .grid = {ranges, 2}, .overlaps = true});
}

static void plan_persistent(const struct kda_prefill *p, int multiprocessors, struct kda_plan *plan) {
    int64_t chains = chains_of(p);
    /* With K = V = 64 a multiprocessor holds two CTAs. It holds one with twice the producers where every chain
     * has a multiprocessor. The kernel may not depend on the batch if bits may not. */
    bool few = !p->batch_invariant && chains <= multiprocessors;
    int config = p->key_dim == 128 || few ? 1 : 2;
    kda_add_launch(plan, (struct kda_launch){.kernel = KDA_KERNEL_PERSISTENT,
                                             .config = config,
                                             .grid = {(unsigned)kda_min64(chains, multiprocessors * config), 1},
                                             .overlaps = plan->stream_k.ranges > 0});
}

/* Columns of V that a CTA scans, in eights: as few as still let all CTAs of an H200 run at once. */
static int scan_columns(int64_t chains) { return chains <= 8 ? 1 : chains <= 16 ? 2 : 4; }

static void plan_history(const struct kda_prefill *p, int multiprocessors, struct kda_plan *plan) {
    int64_t states = chains_of(p) * (plan->segments - 1);
    int64_t each = plan->chunks / (p->sequences * plan->segments) + 1; /* chunks of a segment, about */
    int64_t strips = each * (KDA_CUDA_CHUNK / KDA_SM90_HISTORY_TOKENS);
    int64_t pieces = kda_clamp(KDA_SM90_HISTORY_CTAS * multiprocessors / states, 1,
                               (strips + KDA_SM90_HISTORY_WARPS - 1) / KDA_SM90_HISTORY_WARPS);
    kda_add_launch(plan, (struct kda_launch){.kernel = KDA_KERNEL_ADD_HISTORY,
                                             .config = (int)pieces,
                                             .grid = {(unsigned)(states * pieces), p->checkpoints.data ? 2 : 1},
                                             .overlaps = true});
}

static void plan_incoming(const struct kda_prefill *p, struct kda_plan *plan) {
    unsigned rows = p->border.states.data ? (unsigned)p->border.states.shape[0] : 0;
    if (rows)
        kda_add_launch(plan, (struct kda_launch){.kernel = KDA_KERNEL_TAKE_INCOMING,
                                                 .grid = {rows, (unsigned)p->value_heads}});
}

static void plan_summaries(const struct kda_prefill *p, struct kda_plan *plan) {
    kda_add_launch(
        plan, (struct kda_launch){.kernel = KDA_KERNEL_CLUSTER_SUMMARIES,
                                  .grid = {(unsigned)chains_of(p), 2 * KDA_SM90_DIM / KDA_SM90_SUMMARY_ROWS},
                                  .overlaps = true});
}

static void plan_cluster(const struct kda_prefill *p, int multiprocessors, struct kda_plan *plan) {
    enum { SHORT = 1024 /* tokens of a segment */ };
    int64_t chains = chains_of(p);
    int64_t tokens = p->tokens / (p->cu_seqlens.data ? p->sequences : 1) / plan->segments;
    /* A cluster that starts while the kernel before it ends takes multiprocessors that happen to be free, often
     * no neighbours. It gains a microsecond at the start, but its steps are 2% slower. */
    const struct kda_launch cluster = {.kernel = KDA_KERNEL_CLUSTER,
                                       .grid = {(unsigned)(chains * plan->segments * CLUSTER), 1},
                                       .overlaps = plan->stream_k.ranges && tokens < SHORT};
    if (plan->segments == 1) {
        kda_add_launch(plan, cluster);
        return;
    }
    struct kda_launch local = cluster, again = cluster;
    local.kernel = KDA_KERNEL_CLUSTER_LOCAL;
    if (p->border.phase == FLASH_KDA_PHASE_FINISH)
        plan_incoming(p, plan);
    else
        kda_add_launch(plan, local);
    if (p->border.phase == FLASH_KDA_PHASE_BEGIN && p->border.summaries.data)
        plan_summaries(p, plan);
    int columns = scan_columns(chains);
    kda_add_launch(
        plan, (struct kda_launch){.kernel = KDA_KERNEL_CLUSTER_SCAN,
                                  .config = columns,
                                  .grid = {(unsigned)chains,
                                           (unsigned)(KDA_SM90_DIM / columns / KDA_SM90_CLUSTER_SCAN_COLUMNS)},
                                  .overlaps = true});
    plan_history(p, multiprocessors, plan);
    if (p->beta_mode != FLASH_KDA_BETA_GIVEN)
        return; /* a computed beta is between 0 and 2 and grows no state */
    again.kernel = KDA_KERNEL_CLUSTER_AGAIN;
    again.grid[0] = (unsigned)(chains * CLUSTER);
    again.overlaps = true;
    kda_add_launch(plan, again);
}

void kda_sm90_plan(const struct kda_prefill *p, int multiprocessors, const struct kda_override *override,
                   struct kda_plan *plan) {
    struct kda_sm90_memory memory;
    choose(p, multiprocessors, override, plan);
    plan->workspace = kda_sm90_lay_out(p, plan, NULL, &memory);
    if (plan->stream_k.ranges)
        plan_stream_k(plan);
    if (plan->schedule == KDA_SCHEDULE_PERSISTENT)
        plan_persistent(p, multiprocessors, plan);
    else if (plan->schedule == KDA_SCHEDULE_CLUSTER)
        plan_cluster(p, multiprocessors, plan);
    else
        plan_general(p, multiprocessors, plan);
}

/* ---- Its memory ---------------------------------------------------------------------------------- */

static void lay_out_general(const struct kda_prefill *p, const struct kda_plan *plan, struct kda_arena *arena,
                            struct kda_sm90_memory *memory) {
    size_t segments = (size_t)(chains_of(p) * plan->segments), K = (size_t)p->key_dim, V = (size_t)p->value_dim;
    memory->operands = kda_take(arena, kda_sm80_operands(p), 1);
    memory->general.count = plan->segments;
    if (plan->segments == 1)
        return;
    memory->general.summaries = kda_take(arena, segments * (V + K) * K, sizeof *memory->general.summaries);
    memory->general.growth = kda_take(arena, segments, sizeof *memory->general.growth);
}

/* The prefix that the schedule's kernels read after stream-K and must preserve. */
static void lay_out_outcome(const struct kda_prefill *p, struct kda_arena *arena,
                            struct kda_sm90_stream_k *stream_k) {
    stream_k->outcome = kda_take(arena, 1, sizeof *stream_k->outcome);
    stream_k->pending = kda_take(arena, (size_t)chains_of(p), sizeof *stream_k->pending);
}

static void lay_out_ranges(const struct kda_prefill *p, struct kda_arena *arena,
                           struct kda_sm90_stream_k *stream_k) {
    size_t ranges = (size_t)stream_k->split.ranges, K = (size_t)p->key_dim, V = (size_t)p->value_dim;
    size_t finals = kda_states_by_chain(p, stream_k->split.ranges) ? (size_t)chains_of(p) : ranges;
    stream_k->probes = kda_take(arena, ranges, sizeof *stream_k->probes);
    stream_k->firsts = kda_take(arena, ranges, sizeof *stream_k->firsts);
    stream_k->proofs = kda_take(arena, ranges, sizeof *stream_k->proofs);
    stream_k->states = kda_take(arena, ranges * V * K, sizeof *stream_k->states);
    stream_k->outputs = kda_take(arena, ranges * KDA_CUDA_CHUNK * K, sizeof *stream_k->outputs);
    stream_k->finals = kda_take(arena, finals * V * K, sizeof *stream_k->finals);
}

/* Tokens of every sequence's first segment, where all have as many; else 0. */
static int64_t tokens_of_first(const struct kda_prefill *p, int segments) {
    if (p->cu_seqlens.data || is_half(p))
        return 0;
    int64_t chunks = kda_begin_of_segment((int)kda_chunks_of(p->tokens), segments, 1);
    return kda_min64(chunks * KDA_CUDA_CHUNK, p->tokens - 1);
}

static void lay_out_cluster(const struct kda_prefill *p, const struct kda_plan *plan, struct kda_arena *arena,
                            struct kda_sm90_cluster_memory *cluster) {
    cluster->segments = plan->segments;
    if (plan->segments == 1)
        return;
    cluster->skipped = tokens_of_first(p, plan->segments);
    size_t chains = (size_t)chains_of(p), segments = chains * (size_t)plan->segments;
    size_t others = segments - chains; /* all but first segments */
    size_t chunks = (size_t)(plan->chunks * p->value_heads), K = (size_t)p->key_dim, V = (size_t)p->value_dim;
    size_t rows = (size_t)(p->batches * (p->tokens - cluster->skipped) * p->value_heads);
    cluster->local_states = kda_take(arena, segments * V * K, sizeof *cluster->local_states);
    cluster->transitions = kda_take(arena, others * K * K, sizeof *cluster->transitions);
    cluster->transition_exponents =
        kda_take(arena, others * K / KDA_SM90_EXPONENT_COLUMNS, sizeof *cluster->transition_exponents);
    cluster->outputs = kda_take(arena, rows * K, sizeof *cluster->outputs);
    cluster->output_exponents =
        kda_take(arena, chunks * (K + V) / KDA_SM90_EXPONENT_COLUMNS, sizeof *cluster->output_exponents);
    cluster->state_exponents = kda_take(arena, segments * V, sizeof *cluster->state_exponents);
    if (p->beta_mode == FLASH_KDA_BETA_GIVEN) /* else it is between 0 and 2 */
        cluster->grown = kda_take(arena, segments, sizeof *cluster->grown);
    if (p->checkpoints.data) {
        int64_t each = kda_first_checkpoint(p, cluster->skipped, p->tokens, p->sequences);
        size_t checkpoints = (size_t)(each * p->value_heads);
        cluster->kept = kda_take(arena, checkpoints * (V * K + K * K), sizeof *cluster->kept);
        cluster->kept_exponents =
            kda_take(arena, checkpoints * (V + K) / KDA_SM90_EXPONENT_COLUMNS, sizeof *cluster->kept_exponents);
    }
}

size_t kda_sm90_lay_out(const struct kda_prefill *p, const struct kda_plan *plan, void *workspace,
                        struct kda_sm90_memory *memory) {
    struct kda_arena arena = {workspace, 0};
    *memory = (struct kda_sm90_memory){.stream_k.split = plan->stream_k, .cluster.segments = 1};
    if (plan->stream_k.ranges)
        lay_out_outcome(p, &arena, &memory->stream_k);
    struct kda_arena ranges = arena; /* used before the schedule's kernels start; these reuse it */
    if (plan->stream_k.ranges)
        lay_out_ranges(p, &ranges, &memory->stream_k);
    if (plan->schedule == KDA_SCHEDULE_GENERAL)
        lay_out_general(p, plan, &arena, memory);
    else if (plan->schedule == KDA_SCHEDULE_CLUSTER)
        lay_out_cluster(p, plan, &arena, &memory->cluster);
    return arena.used > ranges.used ? arena.used : ranges.used;
}
