/* SPDX-License-Identifier: MIT */
/*
 * The CPU backend's prefill: how chains of tokens are shared out among threads.
 *
 * A run is a range of one chain's tokens with a state and a batch of prepared chunks. Two schedules:
 *   apart     a thread takes a run and works it alone; for many chains.
 *   together  all runs advance side by side: all threads share the tiles and the chunks of all runs; for few
 *             chains. Same bits as apart.
 * With many more threads than tiles, a sequence is also split into segments: a first pass finds what each
 * segment does to a state (A, B), a scan gives every segment its true state, a second pass writes the outputs.
 */
#include "api/backend.h"
#include "api/status.h"
#include "cpu/denormals.h"
#include "cpu/level.h"
#include "cpu/team.h"

#include <omp.h>
#include <stdio.h>
#include <string.h>

enum {
    BATCH_APART = 1,     /* chunks prepared at a time: few, so that they stay in a core's own cache */
    BATCH_TOGETHER = 16, /* many, so that threads seldom wait for each other */
    PLANNED = 3,         /* batches of a run that are planned, prepared and applied side by side */
    MIN_SEGMENT = 256,   /* tokens */
    MAX_SEGMENTS = 64,
    MIN_WORK = 4 << 20, /* multiply-adds that are worth another thread */
};

struct plan {
    const struct kda_cpu_level *level;
    const struct kda_cpu_kernels *kernels;
    int64_t chains;
    int64_t tiles;          /* of V, of one chain */
    int64_t identity_tiles; /* of K, for a segment's A; 0 without segments */
    int threads, segments, batch;
    bool together;
};

/* Up to plan.batch chunks that follow each other. */
struct batch {
    int64_t count;
    struct kda_chunk *chunks;
};

struct run {
    struct kda_chain chain;
    int64_t position;  /* first token that is not planned */
    bool has_identity; /* also runs the identity, without outputs: the first pass over a segment */
    bool resumed;      /* its tiles already hold the state to start from */
    struct batch batches[PLANNED];
    struct kda_chunk *operands; /* memory for the chunks of two batches: one being prepared, one applied */
    struct kda_tile *tiles;
};

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- Plan -------------------------------------------------------------------------------------- */

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
    int wanted = p->num_threads ? p->num_threads : (int)kda_min64(omp_get_max_threads(), KDA_MAX_THREADS);
    plan->threads = work / MIN_WORK + 1 < wanted ? (int)(work / MIN_WORK) + 1 : wanted;

    int64_t columns = max64(plan->chains * plan->tiles, 1),
            most = kda_min64(p->tokens / MIN_SEGMENT, MAX_SEGMENTS);
    int64_t segments = kda_min64(plan->threads / columns + 1, most);
    if (segments >= 3 && !p->batch_invariant) {
        plan->segments = (int)segments;
        plan->identity_tiles = kda_tiles(p->key_dim);
    }
    bool even = !p->cu_seqlens.data && plan->chains % plan->threads == 0;
    plan->together = plan->threads > 1 && (plan->segments > 1 || (plan->chains < 4 * plan->threads && !even));
    plan->batch = plan->together ? BATCH_TOGETHER : BATCH_APART;
    return FLASH_KDA_OK;
}

/* Runs that are in memory at the same time. */
static int64_t plan_runs(const struct plan *plan) {
    return plan->together ? plan->chains * plan->segments : plan->threads;
}

/* ---- Workspace: the one place where its layout is written ---------------------------------------- */

/* Hands out memory from `next`, or only counts if that is NULL. */
struct arena {
    char *next;
    size_t used;
};

static void *take(struct arena *arena, size_t count, size_t size) {
    size_t bytes =
        (count * size + KDA_WORKSPACE_ALIGNMENT - 1) / KDA_WORKSPACE_ALIGNMENT * KDA_WORKSPACE_ALIGNMENT;
    void *memory = arena->next ? arena->next + arena->used : NULL;
    arena->used += bytes;
    return memory;
}

static void lay_out_chunk(const struct plan *plan, size_t Kp, struct arena *arena, struct kda_chunk *chunk) {
    struct kda_chunk laid = {
        .carry = take(arena, Kp, sizeof(float)),
        .beta = take(arena, KDA_CHUNK, sizeof(float)),
        .L = take(arena, (size_t)KDA_CHUNK * KDA_CHUNK, sizeof(float)),
        .M = take(arena, (size_t)KDA_CHUNK * KDA_CHUNK, sizeof(float)),
        .queries_keys = take(arena, 2 * KDA_CHUNK * Kp, plan->kernels->operand_size),
        .keys_to_end = take(arena, KDA_CHUNK * Kp, plan->kernels->operand_size),
    };
    if (chunk)
        *chunk = laid;
}

static void lay_out_tile(const struct plan *plan, size_t Kp, struct arena *arena, struct kda_tile *tile) {
    struct kda_tile laid = {.S = take(arena, Kp * KDA_TILE, sizeof(float)), .products = NULL};
    if (plan->kernels->products_size)
        laid.products = take(arena, Kp * KDA_TILE, plan->kernels->products_size);
    if (tile)
        *tile = laid;
}

/* All runs of a plan; NULL while counting. */
static struct run *lay_out(const struct kda_prefill *p, const struct plan *plan, struct arena *arena) {
    size_t Kp = (size_t)kda_padded_key_dim(p), tiles = (size_t)(plan->tiles + plan->identity_tiles);
    int64_t count = plan_runs(plan);
    struct run *runs = take(arena, (size_t)count, sizeof *runs);
    for (int64_t i = 0; i < count; i++) {
        struct run run = {.operands = take(arena, 2 * (size_t)plan->batch, sizeof(struct kda_chunk)),
                          .tiles = take(arena, tiles, sizeof(struct kda_tile))};
        for (int n = 0; n < PLANNED; n++)
            run.batches[n].chunks = take(arena, (size_t)plan->batch, sizeof(struct kda_chunk));
        for (int n = 0; n < 2 * plan->batch; n++)
            lay_out_chunk(plan, Kp, arena, runs ? &run.operands[n] : NULL);
        for (size_t n = 0; n < tiles; n++)
            lay_out_tile(plan, Kp, arena, runs ? &run.tiles[n] : NULL);
        if (runs)
            runs[i] = run;
    }
    return runs;
}

static flash_kda_status workspace_size(const struct kda_prefill *p, size_t *bytes) {
    struct plan plan;
    flash_kda_status status = make_plan(p, &plan);
    if (status)
        return status;
    struct arena counter = {NULL, 0};
    lay_out(p, &plan, &counter);
    *bytes = counter.used;
    return FLASH_KDA_OK;
}

/* ---- One run ----------------------------------------------------------------------------------- */

/* Segment s of a chain; beyond the last it is empty. Segments start at whole chunks. */
static struct kda_chain chain_segment(const struct kda_prefill *p, const struct plan *plan, int64_t index,
                                      int s) {
    struct kda_chain chain = {
        .sequence = index / p->value_heads, .head = index % p->value_heads, .prepares_next = !plan->together};
    chain.tokens = kda_sequence(p, chain.sequence);
    int64_t length = chain.tokens.slot < 0 ? 0 : chain.tokens.length;
    int64_t share = max64((length + plan->segments - 1) / plan->segments, MIN_SEGMENT);
    if (plan->segments == 1)
        share = length;
    share = (share + KDA_CHUNK - 1) / KDA_CHUNK * KDA_CHUNK;
    chain.begin = kda_min64(length, s * share);
    chain.end = kda_min64(length, chain.begin + share);
    return chain;
}

static bool is_padding(const struct run *run) { return run->chain.tokens.slot < 0; }

static void start_run(struct run *run, struct kda_chain chain) {
    run->chain = chain;
    run->position = chain.begin;
}

static struct kda_tile_io tile_io(const struct kda_prefill *p, const struct plan *plan, const struct run *run,
                                  int64_t tile) {
    if (tile >= plan->tiles)
        return (struct kda_tile_io){.column = (tile - plan->tiles) * KDA_TILE, .columns = KDA_TILE};
    int64_t column = tile * KDA_TILE;
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

static void store_final(const struct kda_prefill *p, const struct plan *plan, const struct run *run,
                        const struct kda_tile_io *io, const struct kda_tile *tile) {
    const struct kda_chain *chain = &run->chain;
    struct kda_state state = kda_state_at(p, &p->final_state, chain->tokens.slot, chain->head);
    if (state.data && chain->end == chain->tokens.length)
        plan->kernels->store_state(p, state, io, tile);
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
    if (!io.has_values) {
        set_identity(p, plan, &io, tile);
        return;
    }
    struct kda_state none = {.data = NULL};
    plan->kernels->load_state(
        p, first ? kda_state_at(p, &p->initial_state, chain->tokens.slot, chain->head) : none, &io, tile);
    if (first)
        store_checkpoints(p, plan, run, 0, &io, tile);
    if (first && chain->end == 0) /* an empty sequence is done at once */
        store_final(p, plan, run, &io, tile);
}

/* Decides the chunks of the run's batch number n: none across a checkpoint, none if the run is at its end. */
static void plan_batch(const struct kda_prefill *p, const struct plan *plan, struct run *run, int64_t n) {
    struct batch *batch = &run->batches[n % PLANNED];
    const struct kda_chunk *operands = run->operands + n % 2 * plan->batch;
    for (batch->count = 0; batch->count < plan->batch && run->position < run->chain.end; batch->count++) {
        struct kda_chunk *chunk = &batch->chunks[batch->count];
        int64_t end = kda_min64(run->chain.end, run->position + KDA_CHUNK);
        *chunk = operands[batch->count];
        chunk->first = run->position;
        chunk->count =
            kda_min64(end, kda_next_checkpoint(p, run->chain.sequence, run->position)) - run->position;
        run->position += chunk->count;
    }
}

static void prepare_chunk(const struct kda_prefill *p, const struct plan *plan, struct run *run, int64_t n,
                          int64_t i) {
    const struct batch *batch = &run->batches[n % PLANNED];
    if (i < batch->count)
        plan->kernels->prepare(p, &run->chain, &batch->chunks[i]);
}

/* Takes a tile of the state through batch number n. */
static void advance_tile(const struct kda_prefill *p, const struct plan *plan, const struct run *run, int64_t n,
                         int64_t index) {
    const struct batch *batch = &run->batches[n % PLANNED];
    struct kda_tile_io io = tile_io(p, plan, run, index);
    struct kda_tile *tile = &run->tiles[index];
    for (int64_t i = 0; i < batch->count; i++) {
        const struct kda_chunk *chunk = &batch->chunks[i];
        int64_t end = chunk->first + chunk->count;
        plan->kernels->apply(p, &run->chain, chunk, &io, tile);
        if (io.has_outputs)
            store_checkpoints(p, plan, run, end, &io, tile);
        if (io.has_outputs && end == run->chain.end)
            store_final(p, plan, run, &io, tile);
    }
}

/* ---- Schedules; called by every thread of a team -------------------------------------------------- */

static void run_apart(const struct kda_prefill *p, const struct plan *plan, struct run *runs) {
    struct run *run = &runs[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < plan->chains; i++) {
        start_run(run, chain_segment(p, plan, i, 0));
        for (int64_t tile = 0; tile < plan->tiles; tile++)
            begin_tile(p, plan, run, tile);
        for (plan_batch(p, plan, run, 0); run->batches[0].count; plan_batch(p, plan, run, 0)) {
            for (int64_t n = 0; n < plan->batch; n++)
                prepare_chunk(p, plan, run, 0, n);
            for (int64_t tile = 0; tile < plan->tiles; tile++)
                advance_tile(p, plan, run, 0, tile);
        }
    }
}

static bool any_left(const struct run *runs, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; i++)
        if (runs[i].batches[n % PLANNED].count)
            return true;
    return false;
}

/* One task of step n: apply, prepare and plan go on side by side in batches n, n + 1 and n + 2; step -1, before the
 * first, begins the tiles instead of applying. */
static void work_task(const struct kda_prefill *p, const struct plan *plan, struct run *run, int64_t n,
                      int64_t task) {
    int64_t tiles = plan->tiles + plan->identity_tiles;
    if (task >= tiles + plan->batch)
        plan_batch(p, plan, run, n + 2);
    else if (task >= tiles)
        prepare_chunk(p, plan, run, n + 1, task - tiles);
    else if (task >= plan->tiles && !run->has_identity)
        return;
    else if (n < 0)
        begin_tile(p, plan, run, task);
    else
        advance_tile(p, plan, run, n, task);
}

/* Works all runs to their ends; the threads wait for each other once a step. A thread that comes late to a step
 * finds it done and goes on to the next. */
static void run_together(const struct kda_prefill *p, const struct plan *plan, struct run *runs,
                         struct team *team) {
    int64_t count = plan_runs(plan), i;
#pragma omp single
    {
        for (int64_t r = 0; r < count; r++)
            plan_batch(p, plan, &runs[r], 0);
        team_start(team, count * (plan->tiles + plan->identity_tiles + plan->batch + 1));
    }
    for (int64_t n = -1; !atomic_load(&team->ended); n++) {
        uint64_t step = (uint64_t)(n + 1);
        while (team_take(team, step, &i)) {
            work_task(p, plan, &runs[i % count], n, i / count);
            if (team_done(team))
                team_open(team, step, !any_left(runs, count, n + 1));
        }
        team_wait(team, step);
    }
#pragma omp barrier
}

/* Gives every segment of a chain its true state, in the tiles of the run before it:
 * the state after segment s is B_s + A_s times the state before it. */
static void scan_segments(const struct kda_prefill *p, const struct plan *plan, struct run *runs,
                          int64_t tile) {
    for (int s = 1; s + 1 < plan->segments; s++)
        plan->kernels->compose(p, runs[s].tiles + plan->tiles, &runs[s - 1].tiles[tile], &runs[s].tiles[tile]);
}

/* First pass: every chain's first segment as it is, the others but the last for their (A, B). */
static void start_first_pass(const struct kda_prefill *p, const struct plan *plan, struct run *runs) {
    for (int64_t i = 0; i < plan->chains; i++)
        for (int s = 0; s < plan->segments; s++) {
            struct run *run = &runs[i * plan->segments + s];
            start_run(run, chain_segment(p, plan, i, s));
            run->has_identity = s > 0;
            if (s > 0 && s == plan->segments - 1)
                run->chain.end = run->chain.begin;
        }
}

/* Second pass: every segment but the first, from the state that the scan left in the run before it. */
static void start_second_pass(const struct kda_prefill *p, const struct plan *plan, struct run *runs) {
    for (int64_t i = 0; i < plan->chains; i++)
        for (int s = plan->segments - 1; s >= 0; s--) {
            struct run *run = &runs[i * plan->segments + s];
            struct kda_chain chain = chain_segment(p, plan, i, s);
            if (s == 0)
                chain.begin = chain.end;
            start_run(run, chain);
            run->has_identity = false;
            run->resumed = true;
            if (s > 0)
                run->tiles = runs[i * plan->segments + s - 1].tiles;
        }
}

static void run_segments(const struct kda_prefill *p, const struct plan *plan, struct run *runs,
                         struct team *team) {
#pragma omp single
    start_first_pass(p, plan, runs);
    run_together(p, plan, runs, team);
    if (plan->segments == 1)
        return;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < plan->chains * plan->tiles; i++)
        scan_segments(p, plan, runs + i / plan->tiles * plan->segments, i % plan->tiles);
#pragma omp single
    start_second_pass(p, plan, runs);
    run_together(p, plan, runs, team);
}

/* ---- Entries ----------------------------------------------------------------------------------- */

static flash_kda_status prefill(const struct kda_prefill *p, void *workspace) {
    struct plan plan;
    flash_kda_status status = make_plan(p, &plan);
    if (status)
        return status;
    struct arena arena = {workspace, 0};
    struct run *runs = lay_out(p, &plan, &arena);
    struct team team;
#pragma omp parallel num_threads(plan.threads)
    {
        uint64_t mode = kda_flush_denormals();
        if (plan.together)
            run_segments(p, &plan, runs, &team);
        else
            run_apart(p, &plan, runs);
        kda_set_float_mode(mode);
    }
    return FLASH_KDA_OK;
}

static flash_kda_status describe(const struct kda_prefill *p, char *text, size_t size) {
    struct plan plan;
    flash_kda_status status = make_plan(p, &plan);
    if (status)
        return status;
    snprintf(text, size, "cpu: level %s, %s products, %lld chains on %d thread%s, %s, %d segment%s",
             plan.level->name, plan.kernels == plan.level->bf16 ? "bf16" : "fp32", (long long)plan.chains,
             plan.threads, plan.threads == 1 ? "" : "s", plan.together ? "together" : "apart", plan.segments,
             plan.segments == 1 ? "" : "s");
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
                                            .decode_describe = kda_cpu_decode_describe};
