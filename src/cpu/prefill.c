/* SPDX-License-Identifier: MIT */
/*
 * The CPU backend's prefill: how chains of tokens are shared out among threads.
 *
 * A run is a range of one chain's tokens with a state and a batch of prepared chunks. Two schedules:
 *   apart     a thread takes a run and works it alone; for many chains.
 *   together  all runs advance side by side, step by step: all threads share the tiles and the chunks of all runs; for
 *             few chains. Same bits as apart.
 * With many more threads than tiles, a sequence is also split into segments: a first pass finds what each
 * segment does to a state (A, B), a scan gives every segment its true state, a second pass writes the outputs. Where A
 * may be large, which a bound that the first pass finds tells, the rest of the sequence stays whole.
 */
#include "api/backend.h"
#include "api/status.h"
#include "api/workspace.h"
#include "cpu/denormals.h"
#include "cpu/fused.h"
#include "cpu/level.h"
#include "cpu/pool.h"
#include "cpu/threads.h"

#include <stdalign.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

enum {
    BATCH_APART = 1,     /* chunks prepared at a time: few, so that they stay in a core's own cache */
    BATCH_TOGETHER = 32, /* many, so that threads seldom wait for each other */
    BATCH_SEGMENTS = 64, /* steps are shorter there, for more threads share them */
    PLANNED = 3,         /* batches of a run that are planned, prepared and applied side by side */
    MIN_SEGMENT = 256,   /* tokens */
    MAX_SEGMENTS = 64,
    MAX_PIECES = 1 << 30,
    RATE = 100000, /* multiply-adds a microsecond, of one thread on the fastest level */
};

/* What a segment's A may make of a state's norm, with those of the segments before it, in logs. The scan multiplies A, whose
 * error is that of fp32 times this much, where the chain itself would have met a state that perhaps never grew: 16 units
 * in the last place are less than what a few thousand tokens round, and far from an overflow. */
static const float MAX_GROWTH = 2.7725887F; /* log 16 */

struct plan {
    const struct kda_cpu_level *level;
    const struct kda_cpu_kernels *kernels;
    int64_t chains;
    int64_t tiles;          /* of V, of one chain */
    int64_t identity_tiles; /* of K, for a segment's A or a summary's M; 0 without them */
    int threads, segments, batch;
    bool grows;    /* a segment's A may grow: keys, steps or decays are the caller's */
    int64_t group; /* tiles of a run that one piece takes through a batch */
    bool together;
    const struct kda_cpu_fused *fused; /* NULL: nothing stands around */
};

/* Up to plan.batch chunks that follow each other. */
struct batch {
    int64_t count;
    struct kda_chunk *chunks;
};

struct run {
    struct kda_chain chain;
    int64_t position; /* first token that is not planned */
    int64_t pace;     /* chunks of a batch, such that all runs of a pass end together; at most plan.batch */
    float growth;     /* of the batches that are prepared, see MAX_GROWTH */
    bool
        has_identity; /* also runs the identity, without outputs: the first pass over a segment, or a summary */
    bool resumed;     /* its tiles already hold the state to start from */
    struct batch batches[PLANNED];
    struct kda_chunk *operands; /* memory for the chunks of two batches: one being prepared, one applied */
    struct kda_tile *tiles;
    float *outputs; /* of a batch, where a norm follows: [plan.batch][KDA_CHUNK][kda_cpu_fused.padded[2]] */
    _Atomic int64_t finished; /* tiles of the batch at hand: who finishes the last one norms all rows */
};

/* Pieces of a step: large ones take a group of tiles through a batch, small ones prepare a chunk. */
enum kind { LARGE, SMALL, KINDS };

/* How many pieces of each kind have been taken from a member's share of them. */
struct share {
    alignas(KDA_WORKSPACE_ALIGNMENT) _Atomic uint32_t taken[KINDS];
};

struct group {
    int32_t run, number;
};

enum stage { APART, FIRST_PASS, SCAN, SECOND_PASS };

struct call {
    const struct kda_prefill *p;
    const struct plan *plan;
    struct run *runs;
    struct share *shares; /* [threads], and one for all together */
    char *scratch;        /* [threads] of kda_prepare_scratch() bytes */
    struct kda_cpu_fused fused;
    enum stage stage;
    int64_t n;            /* the step of a pass */
    struct group *groups; /* of the runs that have something to do in this pass */
    int32_t *working;     /* runs that have chunks in this pass */
    int64_t counts[KINDS];
};

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t groups(int64_t count, int64_t size) { return (count + size - 1) / size; }

/* Of tiles of a run. */
static int64_t groups_of_run(const struct plan *plan) {
    return groups(plan->tiles, plan->group) + groups(plan->identity_tiles, plan->group);
}

/* ---- Plan -------------------------------------------------------------------------------------- */

/* Tiles of one group read the same operands, so the fewer groups the less passes between cores; but every thread must
 * find a group, and none much more than another. */
static int64_t choose_group(const struct plan *plan) {
    int64_t size = plan->tiles;
    for (; size > 1; size = (size + 1) / 2) {
        int64_t pieces = plan->chains * plan->segments * groups(plan->tiles, size);
        int64_t rounds = groups(pieces, plan->threads);
        if (pieces >= plan->threads && 4 * rounds * plan->threads <= 5 * pieces)
            break;
    }
    return size;
}

static flash_kda_status make_plan(const struct kda_prefill *p, struct plan *plan) {
    const struct kda_cpu_level *level = kda_cpu_level();
    if (!level)
        return FLASH_KDA_ERROR_UNSUPPORTED;
    bool bf16 =
        p->q.dtype == KDA_BF16 && p->k.dtype == KDA_BF16 && p->v.dtype == KDA_BF16 && p->out.dtype == KDA_BF16;
    *plan = (struct plan){.level = level,
                          .kernels = bf16 && level->bf16 ? level->bf16 : level->fp32,
                          .chains = p->sequences * p->value_heads,
                          .tiles = kda_tiles(p->value_dim),
                          .segments = 1};

    double work =
        (double)p->batches * (double)p->tokens * (double)(p->value_heads * p->key_dim * p->value_dim) * 4;
    plan->threads = kda_threads_for(p->num_threads, work / RATE);
    if (!plan->threads)
        return FLASH_KDA_ERROR_UNSUPPORTED;

    int64_t columns = max64(plan->chains * plan->tiles, 1),
            most = kda_min64(p->tokens / MIN_SEGMENT, MAX_SEGMENTS);
    /* More than one segment a thread: with just as many, those who only prepare chunks wait for the others in
     * every step. Uncut, a call takes at least as long as one tile's way through all chunks (measured: 8 threads on
     * 4 columns are no faster than 4). Three segments shorten that way to 19 of 27 parts and make the work 1.4 times
     * as much, of which preparing a chunk is as much as 1.7 tiles: two threads a column are done with it sooner from
     * 4 tiles on, with no more of them in A; else it takes three. */
    int64_t fill = plan->threads / columns, segments = kda_min64(fill * 3 / 2, most);
    int64_t least = plan->tiles < 4 || kda_tiles(p->key_dim) > plan->tiles ? 3 : 2;
    bool whole = p->border.phase == FLASH_KDA_PHASE_WHOLE;
    if (!whole && p->border.summaries.data)
        plan->identity_tiles = kda_tiles(p->key_dim);
    if (fill >= least && segments >= 3 && !p->batch_invariant && whole) {
        plan->segments = (int)segments;
        plan->identity_tiles = kda_tiles(p->key_dim);
        plan->grows = !p->qk_norm || p->beta_mode == FLASH_KDA_BETA_GIVEN || p->gate == FLASH_KDA_GATE_NONE;
    }
    bool even = !p->cu_seqlens.data && plan->chains % plan->threads == 0;
    plan->together = plan->threads > 1 && (plan->segments > 1 || (plan->chains < 4 * plan->threads && !even));
    plan->batch = plan->segments > 1 ? BATCH_SEGMENTS : plan->together ? BATCH_TOGETHER : BATCH_APART;
    plan->group = plan->together ? choose_group(plan) : plan->tiles;
    return FLASH_KDA_OK;
}

/* Runs that are in memory at the same time. */
static int64_t plan_runs(const struct plan *plan) {
    return plan->together ? plan->chains * plan->segments : plan->threads;
}

/* ---- Workspace: the one place where its layout is written ---------------------------------------- */

static void lay_out_chunk(const struct plan *plan, size_t Kp, struct kda_arena *arena,
                          struct kda_chunk *chunk) {
    struct kda_chunk laid = {
        .carry = kda_take(arena, Kp, sizeof(float)),
        .beta = kda_take(arena, KDA_CHUNK, sizeof(float)),
        .L = kda_take(arena, (size_t)KDA_CHUNK * KDA_CHUNK, sizeof(float)),
        .M = kda_take(arena, (size_t)KDA_CHUNK * KDA_CHUNK, sizeof(float)),
        .queries_keys = kda_take(arena, 2 * KDA_CHUNK * Kp, plan->kernels->operand_size),
        .keys_to_end = kda_take(arena, KDA_CHUNK * Kp, plan->kernels->operand_size),
    };
    if (chunk)
        *chunk = laid;
}

static void lay_out_tile(const struct plan *plan, size_t Kp, struct kda_arena *arena, struct kda_tile *tile) {
    struct kda_tile laid = {.S = kda_take(arena, Kp * KDA_TILE, sizeof(float)), .products = NULL};
    if (plan->kernels->products_size)
        laid.products = kda_take(arena, Kp * KDA_TILE, plan->kernels->products_size);
    if (tile)
        *tile = laid;
}

/* All memory of a call; NULL while counting. */
static void lay_out(const struct kda_prefill *p, const struct plan *plan, struct kda_arena *arena,
                    struct call *call) {
    size_t Kp = (size_t)kda_padded_key_dim(p), tiles = (size_t)(plan->tiles + plan->identity_tiles);
    int64_t count = plan_runs(plan);
    struct run *runs = kda_take(arena, (size_t)count, sizeof *runs);
    call->runs = runs;
    call->shares = kda_take(arena, (size_t)plan->threads + 1, sizeof *call->shares);
    call->groups = kda_take(arena, (size_t)(count * groups_of_run(plan)), sizeof *call->groups);
    call->working = kda_take(arena, (size_t)count, sizeof *call->working);
    call->scratch = kda_take(arena, (size_t)plan->threads, kda_prepare_scratch(p));
    kda_cpu_lay_out_fused(p, arena, &call->fused);
    bool normed = p->fused && p->fused->norm_weight.data;
    size_t outputs = normed ? (size_t)(plan->batch * KDA_CHUNK * call->fused.padded[2]) : 0;
    for (int64_t i = 0; i < count; i++) {
        struct run run = {.operands = kda_take(arena, 2 * (size_t)plan->batch, sizeof(struct kda_chunk)),
                          .tiles = kda_take(arena, tiles, sizeof(struct kda_tile))};
        if (outputs)
            run.outputs = kda_take(arena, outputs, sizeof(float));
        for (int n = 0; n < PLANNED; n++)
            run.batches[n].chunks = kda_take(arena, (size_t)plan->batch, sizeof(struct kda_chunk));
        for (int n = 0; n < 2 * plan->batch; n++)
            lay_out_chunk(plan, Kp, arena, runs ? &run.operands[n] : NULL);
        for (size_t n = 0; n < tiles; n++)
            lay_out_tile(plan, Kp, arena, runs ? &run.tiles[n] : NULL);
        if (runs)
            runs[i] = run;
    }
}

static flash_kda_status workspace_size(const struct kda_prefill *p, size_t *bytes) {
    struct plan plan;
    flash_kda_status status = make_plan(p, &plan);
    if (status)
        return status;
    struct kda_arena counter = {NULL, 0};
    struct call unused;
    lay_out(p, &plan, &counter, &unused);
    *bytes = counter.used;
    return FLASH_KDA_OK;
}

/* ---- One run ----------------------------------------------------------------------------------- */

/* Where segment s of a sequence begins, at a whole chunk; behind its end there are none. The first is longest, for its first
 * pass is not followed by a second, and the last is longer than the others, for it has no first pass. */
static int64_t segment_begin(const struct plan *plan, int64_t length, int s) {
    enum { FIRST = 10, MIDDLE = 8, LAST = 9 };
    int64_t unit = length / (FIRST + MIDDLE * (plan->segments - 2) + LAST) + 1;
    unit = (max64(unit, MIN_SEGMENT / MIDDLE) + 7) / 8 * 8;
    return s == 0 ? 0 : kda_min64(length, unit * (FIRST + MIDDLE * (s - 1)));
}

/* Segment s of a chain. */
static struct kda_chain chain_segment(const struct kda_prefill *p, const struct plan *plan, int64_t index,
                                      int s) {
    struct kda_chain chain = {.sequence = index / p->value_heads,
                              .head = index % p->value_heads,
                              .prepares_next = !plan->together,
                              .fused = plan->fused};
    chain.tokens = kda_sequence(p, chain.sequence);
    if (kda_work_on(&p->border, chain.sequence) == KDA_WORK_NONE)
        chain.tokens.slot = -1;
    int64_t length = chain.tokens.slot < 0 ? 0 : chain.tokens.length;
    chain.begin = segment_begin(plan, length, s);
    chain.end = s + 1 < plan->segments ? segment_begin(plan, length, s + 1) : length;
    return chain;
}

static bool is_padding(const struct run *run) { return run->chain.tokens.slot < 0; }

static bool finds_summary(const struct kda_prefill *p, const struct run *run) {
    return !is_padding(run) && kda_work_on(&p->border, run->chain.sequence) == KDA_WORK_SUMMARY;
}

static void start_run(struct run *run, struct kda_chain chain) {
    run->chain = chain;
    run->position = chain.begin;
    run->pace = 1;
    run->growth = 0;
}

static struct kda_tile_io tile_io(const struct kda_prefill *p, const struct plan *plan, const struct run *run,
                                  int64_t tile) {
    int64_t column = (tile < plan->tiles ? tile : tile - plan->tiles) * KDA_TILE;
    if (tile >= plan->tiles)
        return (struct kda_tile_io){.column = column, .columns = kda_min64(KDA_TILE, p->key_dim - column)};
    return (struct kda_tile_io){.column = column,
                                .columns = kda_min64(KDA_TILE, p->value_dim - column),
                                .has_values = true,
                                .has_outputs = !run->has_identity};
}

static void store_checkpoints(const struct kda_prefill *p, const struct plan *plan, const struct run *run,
                              int64_t position, const struct kda_tile_io *io, const struct kda_tile *tile) {
    int64_t cursor = 0;
    struct kda_state state;
    while ((state = kda_checkpoint_at(p, run->chain.sequence, position, run->chain.head, &cursor)).data)
        plan->kernels->store_state(p, state, io, tile);
}

/* After the run's last token, to final_state and to the summary. */
static void store_final(const struct kda_prefill *p, const struct plan *plan, const struct run *run,
                        const struct kda_tile_io *io, const struct kda_tile *tile) {
    const struct kda_chain *chain = &run->chain;
    int64_t place = kda_summary_of(&p->border, chain->sequence);
    struct kda_state state = kda_state_at(p, &p->final_state, chain->tokens.slot, chain->head);
    if (chain->end != chain->tokens.length)
        return;
    if (state.data && io->has_outputs)
        plan->kernels->store_state(p, state, io, tile);
    if (place >= 0)
        plan->kernels->store_state(p,
                                   (io->has_values ? kda_summary_bias : kda_summary_transition)(
                                       &p->base, &p->border, place, chain->head),
                                   io, tile);
}

static void set_identity(const struct kda_prefill *p, const struct plan *plan, const struct kda_tile_io *io,
                         struct kda_tile *tile) {
    int64_t Kp = kda_padded_key_dim(p);
    for (int64_t c = 0; c < Kp; c++)
        for (int64_t j = 0; j < KDA_TILE; j++)
            tile->S[c * KDA_TILE + j] = c == io->column + j ? 1.0F : 0.0F;
    plan->kernels->refresh(p, tile);
}

/* The state a run starts from. */
static void begin_tile(const struct kda_prefill *p, const struct plan *plan, struct run *run, int64_t index) {
    const struct kda_chain *chain = &run->chain;
    struct kda_tile_io io = tile_io(p, plan, run, index);
    struct kda_tile *tile = &run->tiles[index];
    bool first = chain->begin == 0 && !run->has_identity;
    if (is_padding(run) || run->resumed || (!first && !run->has_identity))
        return;
    struct kda_state none = {.data = NULL};
    if (io.has_values)
        plan->kernels->load_state(
            p, first ? kda_state_before(p, chain->sequence, chain->tokens.slot, chain->head) : none, &io, tile);
    else
        set_identity(p, plan, &io, tile);
    if (first)
        store_checkpoints(p, plan, run, 0, &io, tile);
    if (chain->end == 0) /* an empty sequence is done at once */
        store_final(p, plan, run, &io, tile);
}

/* Decides the chunks of the run's batch number n: none across a checkpoint, none if the run is at its end. */
static void plan_batch(const struct kda_prefill *p, const struct plan *plan, struct run *run, int64_t n) {
    struct batch *batch = &run->batches[n % PLANNED];
    const struct kda_chunk *operands = run->operands + n % 2 * plan->batch;
    for (batch->count = 0; batch->count < run->pace && run->position < run->chain.end; batch->count++) {
        struct kda_chunk *chunk = &batch->chunks[batch->count];
        int64_t end = kda_min64(run->chain.end, run->position + KDA_CHUNK);
        *chunk = operands[batch->count];
        chunk->first = run->position;
        chunk->count =
            kda_min64(end, kda_next_checkpoint(p, run->chain.sequence, run->position)) - run->position;
        run->position += chunk->count;
    }
}

static void prepare_chunk(const struct call *call, int member, struct run *run, int64_t n, int64_t i) {
    const struct batch *batch = &run->batches[n % PLANNED];
    if (i < batch->count)
        call->plan->kernels->prepare(call->p, &run->chain, &batch->chunks[i],
                                     call->scratch + (size_t)member * kda_prepare_scratch(call->p));
}

/* Of batch number n, which is prepared. */
static void add_growth(struct run *run, int64_t n) {
    for (int64_t i = 0; n >= 0 && run->chain.bounds_growth && i < run->batches[n % PLANNED].count; i++)
        run->growth += run->batches[n % PLANNED].chunks[i].growth;
}

/* Where the outputs of the batch's chunk number i wait for the norm. */
static float *outputs_of(const struct plan *plan, const struct run *run, int64_t i) {
    return run->outputs + i * KDA_CHUNK * plan->fused->padded[2];
}

/* Counts tiles that are through a batch. The norm needs whole rows: who finishes the last tile takes them through it. */
static void finish_tiles(const struct kda_prefill *p, const struct plan *plan, struct run *run,
                         const struct batch *batch, int64_t count) {
    int64_t before = atomic_fetch_add_explicit(&run->finished, count, memory_order_acq_rel);
    if (before + count < plan->tiles)
        return;
    atomic_store_explicit(&run->finished, 0, memory_order_relaxed);
    for (int64_t i = 0; i < batch->count; i++)
        plan->kernels->norm(p, &run->chain, &batch->chunks[i], outputs_of(plan, run, i));
}

/* Takes tiles first to end - 1 of the state through batch number n. */
static void advance_tiles(const struct kda_prefill *p, const struct plan *plan, struct run *run, int64_t n,
                          int64_t first, int64_t end) {
    const struct batch *batch = &run->batches[n % PLANNED];
    bool normed = run->outputs && !run->has_identity && first < plan->tiles;
    for (int64_t i = 0; i < batch->count; i++)
        for (int64_t index = first; index < end; index++) {
            const struct kda_chunk *chunk = &batch->chunks[i];
            struct kda_tile_io io = tile_io(p, plan, run, index);
            struct kda_tile *tile = &run->tiles[index];
            int64_t position = chunk->first + chunk->count;
            if (normed)
                io.outputs = outputs_of(plan, run, i);
            plan->kernels->apply(p, &run->chain, chunk, &io, tile);
            if (io.has_outputs)
                store_checkpoints(p, plan, run, position, &io, tile);
            if (position == run->chain.end)
                store_final(p, plan, run, &io, tile);
        }
    if (normed)
        finish_tiles(p, plan, run, batch, end - first);
}

/* ---- Schedule apart ----------------------------------------------------------------------------- */

static void run_chain(const struct call *call, int member, int64_t i) {
    const struct kda_prefill *p = call->p;
    const struct plan *plan = call->plan;
    struct run *run = &call->runs[member];
    start_run(run, chain_segment(p, plan, i, 0));
    run->has_identity = finds_summary(p, run);
    int64_t tiles = plan->tiles + (run->has_identity ? plan->identity_tiles : 0);
    for (int64_t tile = 0; tile < tiles; tile++)
        begin_tile(p, plan, run, tile);
    for (plan_batch(p, plan, run, 0); run->batches[0].count; plan_batch(p, plan, run, 0)) {
        for (int64_t n = 0; n < plan->batch; n++)
            prepare_chunk(call, member, run, 0, n);
        advance_tiles(p, plan, run, 0, 0, tiles);
    }
}

/* ---- Schedule together --------------------------------------------------------------------------- */

/* One piece of a kind: the next of the member's own share, or of another's, the nearest first; -1 if none is left. Shares are
 * the same in every step of a pass, so that tiles stay in their member's cache and with them the operands that it has
 * prepared. */
static int64_t take_one(const struct call *call, int member, enum kind kind) {
    int64_t threads = call->plan->threads, count = call->counts[kind];
    for (int64_t i = 0; i < threads; i++) {
        int64_t owner = (member + i) % threads;
        int64_t first = owner * count / threads, own = (owner + 1) * count / threads - first;
        _Atomic uint32_t *taken = &call->shares[owner].taken[kind];
        if (atomic_load_explicit(taken, memory_order_relaxed) >= own)
            continue;
        int64_t n = atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
        if (n < own)
            return first + n;
    }
    return -1;
}

/* The piece that a claim is worked as: a large one while there are any, be they others', so that small ones fill up the end of
 * a step. Shares only shrink and there are as many claims as pieces, so every claim finds one. */
static int64_t take_piece(const struct call *call, int member, enum kind *kind) {
    _Atomic uint32_t *all = &call->shares[call->plan->threads].taken[LARGE];
    if (atomic_load_explicit(all, memory_order_relaxed) < call->counts[LARGE]) {
        int64_t piece = take_one(call, member, *kind = LARGE);
        if (piece >= 0) {
            atomic_fetch_add_explicit(all, 1, memory_order_relaxed);
            return piece;
        }
    }
    return take_one(call, member, *kind = SMALL);
}

/* Apply, prepare and plan go on side by side in batches n, n + 1 and n + 2; step -1, before the first, begins the tiles
 * instead of applying. */
static void work_tiles(const struct call *call, struct run *run, int64_t group) {
    const struct plan *plan = call->plan;
    int64_t value_groups = groups(plan->tiles, plan->group);
    bool identity = group >= value_groups;
    int64_t first = identity ? plan->tiles + (group - value_groups) * plan->group : group * plan->group;
    int64_t end = kda_min64(first + plan->group, plan->tiles + (identity ? plan->identity_tiles : 0));
    if (call->n >= 0)
        advance_tiles(call->p, plan, run, call->n, first, end);
    for (int64_t tile = first; call->n < 0 && tile < end; tile++)
        begin_tile(call->p, plan, run, tile);
}

static void prepare_one(const struct call *call, int member, struct run *run, int64_t i) {
    prepare_chunk(call, member, run, call->n + 1, i);
    if (i == 0) {
        add_growth(run, call->n);
        plan_batch(call->p, call->plan, run, call->n + 2);
    }
}

static void work_piece(const struct call *call, int member) {
    enum kind kind;
    int64_t piece = take_piece(call, member, &kind), batch = call->plan->batch;
    if (kind == LARGE)
        work_tiles(call, &call->runs[call->groups[piece].run], call->groups[piece].number);
    else
        prepare_one(call, member, &call->runs[call->working[piece / batch]], piece % batch);
}

static bool any_left(const struct run *runs, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; i++)
        if (runs[i].batches[n % PLANNED].count)
            return true;
    return false;
}

/* ---- Segments ------------------------------------------------------------------------------------ */

/* The last segment of a chain that may start from the scan, which multiplies the A of segments 1 up to the one before it.
 * Behind the first A that may be too large nothing is cut: NaN counts as too large. */
static int last_start(const struct plan *plan, const struct run *runs) {
    float growth = 0;
    int s = 1;
    for (; s + 1 < plan->segments; s++) {
        growth += runs[s].growth;
        if (!(growth <= MAX_GROWTH))
            break;
    }
    return s;
}

/* Gives every segment of a chain its true state, in the tiles of the run before it:
 * the state after segment s is B_s + A_s times the state before it. */
static void scan_segments(const struct kda_prefill *p, const struct plan *plan, struct run *runs,
                          int64_t tile) {
    int last = last_start(plan, runs);
    for (int s = 1; s < last; s++)
        plan->kernels->compose(p->key_dim, runs[s].tiles + plan->tiles, &runs[s - 1].tiles[tile],
                               &runs[s].tiles[tile]);
}

/* First pass: every chain's first segment as it is, the others but the last for their (A, B). */
static void start_first_pass(const struct kda_prefill *p, const struct plan *plan, struct run *runs) {
    for (int64_t i = 0; i < plan->chains; i++)
        for (int s = 0; s < plan->segments; s++) {
            struct run *run = &runs[i * plan->segments + s];
            start_run(run, chain_segment(p, plan, i, s));
            run->has_identity = s > 0 || finds_summary(p, run);
            run->chain.bounds_growth = s > 0 && plan->grows;
            if (s > 0 && s == plan->segments - 1)
                run->chain.end = run->chain.begin;
        }
}

/* Second pass: every segment but the first, from the state that the scan left in the run before it. */
static void start_second_pass(const struct kda_prefill *p, const struct plan *plan, struct run *runs) {
    for (int64_t i = 0; i < plan->chains; i++) {
        int last = last_start(plan, runs + i * plan->segments);
        for (int s = plan->segments - 1; s >= 0; s--) {
            struct run *run = &runs[i * plan->segments + s];
            struct kda_chain chain = chain_segment(p, plan, i, s);
            if (s == 0 || s > last)
                chain.begin = chain.end;
            if (s == last)
                chain.end = chain_segment(p, plan, i, plan->segments - 1).end;
            start_run(run, chain);
            run->has_identity = false;
            run->resumed = true;
            if (s > 0)
                run->tiles = runs[i * plan->segments + s - 1].tiles;
        }
    }
}

/* ---- Steps of a call ---------------------------------------------------------------------------- */

static void work(void *context, uint32_t claim, int member) {
    const struct call *call = context;
    const struct plan *plan = call->plan;
    uint64_t mode = kda_flush_denormals();
    if (call->stage == APART)
        for (int64_t i = claim; i < plan->chains; i += MAX_PIECES)
            run_chain(call, member, i);
    else if (call->stage == SCAN)
        scan_segments(call->p, plan, call->runs + claim / plan->tiles * plan->segments, claim % plan->tiles);
    else
        work_piece(call, member);
    kda_set_float_mode(mode);
}

static void work_conv_states(void *context, uint32_t claim, int member) {
    const struct call *call = context;
    (void)member;
    int64_t pieces = kda_cpu_conv_pieces(call->p);
    for (int64_t i = claim; i < pieces; i += MAX_PIECES)
        kda_cpu_conv_piece(call->p, i);
}

static uint32_t begin_step(const struct call *call) {
    for (int i = 0; i <= call->plan->threads; i++)
        for (int kind = 0; kind < KINDS; kind++)
            atomic_store_explicit(&call->shares[i].taken[kind], 0, memory_order_relaxed);
    return (uint32_t)(call->counts[LARGE] + call->counts[SMALL]);
}

static int64_t chunks_of(const struct run *run) {
    return (run->chain.end - run->chain.begin + KDA_CHUNK - 1) / KDA_CHUNK;
}

/* Lists what run r has to do in this pass, whose longest run has `longest` chunks. In the first all tiles that the scan reads must at least be begun. */
static void list_run(struct call *call, int64_t r, int64_t longest) {
    const struct plan *plan = call->plan;
    struct run *run = &call->runs[r];
    int64_t last_segment = plan->segments > 1 && r % plan->segments == plan->segments - 1;
    bool works = run->chain.begin < run->chain.end, begins = call->stage == FIRST_PASS && !last_segment;
    int64_t count = groups(plan->tiles, plan->group);
    if (run->has_identity)
        count += groups(plan->identity_tiles, plan->group);
    for (int64_t number = 0; number < count && (works || begins); number++)
        call->groups[call->counts[LARGE]++] = (struct group){(int32_t)r, (int32_t)number};
    if (works)
        call->working[call->counts[SMALL]++] = (int32_t)r;
    run->pace = longest ? (plan->batch * chunks_of(run) + longest - 1) / longest : 0;
    for (int n = 1; n < PLANNED; n++)
        run->batches[n].count = 0;
    plan_batch(call->p, plan, run, 0);
}

/* Begins a pass over all runs; returns the pieces of its first step. */
static uint32_t begin_pass(struct call *call, enum stage stage) {
    call->stage = stage;
    call->n = -1;
    if (stage == FIRST_PASS)
        start_first_pass(call->p, call->plan, call->runs);
    else
        start_second_pass(call->p, call->plan, call->runs);
    call->counts[LARGE] = call->counts[SMALL] = 0;
    int64_t longest = 0;
    for (int64_t r = 0; r < plan_runs(call->plan); r++)
        longest = max64(longest, chunks_of(&call->runs[r]));
    for (int64_t r = 0; r < plan_runs(call->plan); r++)
        list_run(call, r, longest);
    call->counts[SMALL] *= call->plan->batch;
    return begin_step(call);
}

static uint32_t next_step(void *context) {
    struct call *call = context;
    const struct plan *plan = call->plan;
    if (call->stage == SCAN)
        return begin_pass(call, SECOND_PASS);
    if (any_left(call->runs, plan_runs(plan), ++call->n))
        return begin_step(call);
    if (call->stage == SECOND_PASS || plan->segments == 1)
        return 0;
    call->stage = SCAN;
    return (uint32_t)(plan->chains * plan->tiles);
}

/* ---- Entries ----------------------------------------------------------------------------------- */

static flash_kda_status prefill(const struct kda_prefill *p, void *workspace) {
    struct plan plan;
    flash_kda_status status = make_plan(p, &plan);
    if (status)
        return status;
    struct kda_arena arena = {workspace, 0};
    struct call call = {.p = p, .plan = &plan, .stage = APART};
    lay_out(p, &plan, &arena, &call);
    if (p->fused) {
        kda_cpu_fill_fused(p, &call.fused);
        plan.fused = &call.fused;
    }
    if (plan.together)
        kda_pool_run(plan.threads, begin_pass(&call, FIRST_PASS), work, next_step, &call);
    else
        kda_pool_run(plan.threads, (uint32_t)kda_min64(plan.chains, MAX_PIECES), work, NULL, &call);
    int64_t states = kda_cpu_conv_pieces(p); /* when nobody reads what they were */
    if (states)
        kda_pool_run(plan.threads, (uint32_t)kda_min64(states, MAX_PIECES), work_conv_states, NULL, &call);
    return FLASH_KDA_OK;
}

static flash_kda_status describe(const struct kda_prefill *p, char *text, size_t size) {
    struct plan plan;
    flash_kda_status status = make_plan(p, &plan);
    if (status)
        return status;
    char parts[40] = "";
    if (plan.segments > 1)
        snprintf(parts, sizeof parts, ", its tokens in %d parts", plan.segments);
    snprintf(text, size, "cpu: level %s, %s products, %d thread%s for %lld head%s, %s to each%s%s%s",
             plan.level->name, plan.kernels == plan.level->bf16 ? "bf16" : "fp32", plan.threads,
             plan.threads == 1 ? "" : "s", (long long)plan.chains, plan.chains == 1 ? "" : "s",
             plan.together ? "all" : "one", parts, kda_fused_words(p->fused), kda_phase_text(&p->border));
    return FLASH_KDA_OK;
}

static bool available(void) { return true; }

const struct kda_backend kda_cpu_backend = {.name = "cpu",
                                            .on_host = true,
                                            .available = available,
                                            .prefill_workspace_size = workspace_size,
                                            .prefill = prefill,
                                            .prefill_describe = describe,
                                            .decode = kda_cpu_decode,
                                            .decode_describe = kda_cpu_decode_describe,
                                            .backward_workspace_size = kda_cpu_backward_workspace_size,
                                            .backward = kda_cpu_backward,
                                            .backward_describe = kda_cpu_backward_describe,
                                            .fold = kda_cpu_fold,
                                            .fold_describe = kda_cpu_fold_describe};
