/* SPDX-License-Identifier: MIT */
/* A serving loop: sequences join by a prefill into the pool, are decoded in changing batches, verified and committed, leave,
 * are preempted and resume from a checkpoint. Whatever happens, every sequence must have the outputs and the state that the
 * recurrence gives it alone; slots that nobody owns hold NaN. */
#include "call.h"
#include "compare.h"
#include "decode_case.h"
#include "decode_families.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
    KEYS = 8,
    VALUES = 6,
    HEADS = 2, /* value heads; they share one head of q and k */
    MATRIX = HEADS * KEYS * VALUES,
    SEQUENCES = 10, /* known to the server, in the pool or waiting */
    BATCH = 6,
    COLUMNS = 4, /* slots of a sequence */
    SLOTS = 30,  /* too few for all at once */
    PROMPT = 20, /* tokens of a prompt, at most */
    EVERY = 4,   /* tokens between checkpoints */
    LEAVES = 90, /* tokens after which a sequence is at its end */
};

enum phase { UNUSED, RUNNING, WAITING };

struct sequence {
    enum phase phase;
    uint64_t seed;                 /* its tokens are a function of this and their position */
    int64_t position;              /* tokens that are part of it */
    int64_t slot[COLUMNS], column; /* where it runs; column: of its state now */
    double S[MATRIX];              /* [HEADS][KEYS][VALUES] at `position` */
    int64_t checkpoint_position;   /* of the state below, from a prefill */
    double checkpoint[MATRIX];     /* as the pool orders it */
};

struct server {
    flash_kda_backend backend;
    flash_kda_state_layout layout;
    double tolerance;
    struct random random;
    struct sequence sequences[SEQUENCES];
    bool taken[SLOTS];
    struct tensor pool, A_log, dt_bias;
    double worst;
    int64_t prefills, decodes, verifies, commits, resumes;
    char wrong[400]; /* empty: all is well */
};

static void fail(struct server *s, const char *what) { snprintf(s->wrong, sizeof s->wrong, "%s", what); }

/* ---- Tokens and their recurrence ----------------------------------------------------------------- */

struct token {
    double q[KEYS], k[KEYS], v[HEADS][VALUES], g[HEADS][KEYS], beta[HEADS];
};

static double rounded(double x) { return (double)(float)x; }

static struct token token_at(uint64_t seed, int64_t position) {
    struct random r = {seed * 0x9e3779b97f4a7c15u + (uint64_t)position};
    struct token x;
    random_next(&r);
    for (int c = 0; c < KEYS; c++) {
        x.q[c] = rounded(random_uniform(&r, -1, 1));
        x.k[c] = rounded(random_uniform(&r, -1, 1));
    }
    for (int h = 0; h < HEADS; h++) {
        for (int j = 0; j < VALUES; j++)
            x.v[h][j] = rounded(random_uniform(&r, -1, 1));
        for (int c = 0; c < KEYS; c++)
            x.g[h][c] = rounded(random_uniform(&r, -8, -1));
        x.beta[h] = rounded(random_uniform(&r, -2, 2));
    }
    return x;
}

static double A_log_of(int h) { return 0.5 * h; }
static double dt_bias_of(int h, int c) { return 0.125 * (h + c % 3); }

static double normalised(const double *x, int c) {
    double squares = 1e-6;
    for (int i = 0; i < KEYS; i++)
        squares += x[i] * x[i];
    return x[c] / sqrt(squares);
}

/* docs/maths.md, the softplus gate and sigmoid of beta. S [KEYS][VALUES] of one head. */
static void recur(const struct token *x, int h, double *S, double *o) {
    double beta = 1 / (1 + exp(-x->beta[h]));
    for (int j = 0; j < VALUES; j++) {
        double seen = 0;
        for (int c = 0; c < KEYS; c++) {
            S[c * VALUES + j] *= exp(-exp(A_log_of(h)) * log1p(exp(x->g[h][c] + dt_bias_of(h, c))));
            seen += S[c * VALUES + j] * normalised(x->k, c);
        }
        o[j] = 0;
        for (int c = 0; c < KEYS; c++) {
            S[c * VALUES + j] += normalised(x->k, c) * beta * (x->v[h][j] - seen);
            o[j] += S[c * VALUES + j] * normalised(x->q, c) / sqrt(KEYS);
        }
    }
}

/* Element i of a state in the pool's order, as an element of S. */
static int64_t in_S(const struct server *s, int64_t i) {
    int64_t h = i / (KEYS * VALUES), row, column;
    if (s->layout == FLASH_KDA_STATE_K_FIRST)
        return i;
    row = i / KEYS % VALUES;
    column = i % KEYS;
    return (h * KEYS + column) * VALUES + row;
}

/* ---- Comparing ----------------------------------------------------------------------------------- */

/* What is expected counts as at least as large as it usually is: a few outputs may be small together by chance. */
static const double usual = 0.05;

static void judge(struct server *s, const struct error *e, const char *what) {
    double ratio = e->spread ? (double)INFINITY : error_ratio(e, usual);
    s->worst = fmax(s->worst, ratio);
    if (!(ratio <= s->tolerance))
        snprintf(s->wrong, sizeof s->wrong, "%s off by %.1e, at most %.1e", what, ratio, s->tolerance);
}

static void compare_state(struct server *s, int64_t slot, const double *S, const char *what) {
    struct error e = {0};
    for (int64_t i = 0; i < MATRIX; i++)
        error_add(&e, tensor_get(&s->pool, slot * MATRIX + i), S[in_S(s, i)], 0);
    judge(s, &e, what);
}

/* ---- Slots --------------------------------------------------------------------------------------- */

static void poison(struct server *s, int64_t slot) {
    for (int64_t i = 0; i < MATRIX; i++)
        tensor_set(&s->pool, slot * MATRIX + i, (double)NAN);
}

static void release(struct server *s, struct sequence *x) {
    for (int t = 0; t < COLUMNS; t++) {
        poison(s, x->slot[t]);
        s->taken[x->slot[t]] = false;
    }
}

static bool take_slots(struct server *s, struct sequence *x) {
    int64_t spare = 0;
    for (int i = 0; i < SLOTS; i++)
        spare += !s->taken[i];
    if (spare < COLUMNS)
        return false;
    for (int t = 0; t < COLUMNS; t++) {
        do
            x->slot[t] = random_below(&s->random, SLOTS);
        while (s->taken[x->slot[t]]);
        s->taken[x->slot[t]] = true;
    }
    x->column = 0;
    return true;
}

/* ---- Calls --------------------------------------------------------------------------------------- */

/* The tensors of one call, packed: rows of several sequences, one after another. */
struct batch {
    int64_t N, total, length[BATCH];
    struct tensor q, k, v, g, beta, out, cu_seqlens;
};

static void batch_make(struct batch *b) {
    const struct tensor_layout layout = {SPACING_FUSED, 0, false};
    int64_t keys[4] = {1, b->total, 1, KEYS}, gates[4] = {1, b->total, HEADS, KEYS};
    int64_t values[4] = {1, b->total, HEADS, VALUES}, boundaries = b->N + 1, end = 0;
    tensor_make(&b->q, TYPE_FP32, 4, keys, layout);
    tensor_make(&b->k, TYPE_FP32, 4, keys, layout);
    tensor_make(&b->v, TYPE_FP32, 4, values, layout);
    tensor_make(&b->g, TYPE_FP32, 4, gates, layout);
    tensor_make(&b->beta, TYPE_FP32, 3, gates, layout);
    tensor_make(&b->out, TYPE_FP32, 4, values, layout);
    tensor_make(&b->cu_seqlens, TYPE_INT32, 1, &boundaries, layout);
    tensor_set(&b->cu_seqlens, 0, 0);
    for (int64_t n = 0; n < b->N; n++)
        tensor_set(&b->cu_seqlens, n + 1, (double)(end += b->length[n]));
}

static void batch_free(struct batch *b) {
    struct tensor *const all[] = {&b->q, &b->k, &b->v, &b->g, &b->beta, &b->out, &b->cu_seqlens};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        tensor_free(all[i]);
}

static void set_token(struct batch *b, int64_t row, const struct token *x) {
    for (int c = 0; c < KEYS; c++) {
        tensor_set(&b->q, row * KEYS + c, x->q[c]);
        tensor_set(&b->k, row * KEYS + c, x->k[c]);
    }
    for (int h = 0; h < HEADS; h++) {
        for (int j = 0; j < VALUES; j++)
            tensor_set(&b->v, (row * HEADS + h) * VALUES + j, x->v[h][j]);
        for (int c = 0; c < KEYS; c++)
            tensor_set(&b->g, (row * HEADS + h) * KEYS + c, x->g[h][c]);
        tensor_set(&b->beta, row * HEADS + h, x->beta[h]);
    }
}

/* Takes S through a token and adds what out holds for it to e. */
static void expect_token(const struct batch *b, int64_t row, const struct token *x, double *S,
                         struct error *e) {
    for (int h = 0; h < HEADS; h++) {
        double o[VALUES];
        recur(x, h, S + h * KEYS * VALUES, o);
        for (int j = 0; j < VALUES; j++)
            error_add(e, tensor_get(&b->out, (row * HEADS + h) * VALUES + j), o[j], 0);
    }
}

static void indices_make(struct tensor *t, int64_t N, int64_t columns) {
    const int64_t shape[2] = {N, columns};
    tensor_make(t, TYPE_INT32, columns ? 2 : 1, shape, (struct tensor_layout){SPACING_FUSED, 0, true});
}

/* ---- Prefill: joining and resuming ---------------------------------------------------------------- */

/* Runs tokens x->position .. end - 1 of x by prefill, from zero or from the state in its slot; keeps the last checkpoint. */
static void prefill(struct server *s, struct sequence *x, int64_t end, bool from_slot) {
    struct batch b = {.N = 1, .total = end - x->position, .length = {end - x->position}};
    int64_t rows = b.total / EVERY, checkpoints_shape[5], slot = x->slot[0];
    struct tensor checkpoints, starts, index;
    struct error e = {0};
    memcpy(checkpoints_shape, s->pool.shape, sizeof checkpoints_shape);
    checkpoints_shape[0] = rows;
    batch_make(&b);
    tensor_make(&checkpoints, TYPE_FP32, 4, checkpoints_shape, (struct tensor_layout){SPACING_FUSED, 0, false});
    indices_make(&starts, 2, 0);
    indices_make(&index, 1, 0);
    tensor_set(&starts, 0, 0);
    tensor_set(&starts, 1, (double)rows);
    tensor_set(&index, 0, (double)slot);
    for (int64_t t = 0; t < b.total; t++) {
        const struct token token = token_at(x->seed, x->position + t);
        set_token(&b, t, &token);
    }
    const flash_kda_prefill_args args = {.struct_size = sizeof args,
                                         .q = &b.q.dl,
                                         .k = &b.k.dl,
                                         .v = &b.v.dl,
                                         .g = &b.g.dl,
                                         .beta = &b.beta.dl,
                                         .A_log = &s->A_log.dl,
                                         .dt_bias = &s->dt_bias.dl,
                                         .out = &b.out.dl,
                                         .gate = FLASH_KDA_GATE_SOFTPLUS,
                                         .beta_mode = FLASH_KDA_BETA_SIGMOID,
                                         .flags = FLASH_KDA_QK_NORM,
                                         .cu_seqlens = &b.cu_seqlens.dl,
                                         .state_layout = s->layout,
                                         .initial_state = from_slot ? &s->pool.dl : NULL,
                                         .final_state = &s->pool.dl,
                                         .state_indices = &index.dl,
                                         .checkpoints = rows ? &checkpoints.dl : NULL,
                                         .checkpoint_every = rows ? EVERY : 0,
                                         .checkpoint_cu_starts = rows ? &starts.dl : NULL,
                                         .backend = s->backend};
    const char *wrong = prefill_call(&args, FILL_NAN);
    if (wrong)
        fail(s, wrong);
    for (int64_t t = 0; t < b.total; t++) {
        const struct token token = token_at(x->seed, x->position + t);
        expect_token(&b, t, &token, x->S, &e);
    }
    for (int64_t i = 0; i < MATRIX && rows; i++)
        x->checkpoint[i] = tensor_get(&checkpoints, (rows - 1) * MATRIX + i);
    if (rows)
        x->checkpoint_position = x->position + rows * EVERY;
    x->position = end;
    if (!wrong && b.total)
        judge(s, &e, "prefill's output");
    if (!wrong)
        compare_state(s, slot, x->S, "prefill's state");
    s->prefills++;
    tensor_free(&checkpoints);
    tensor_free(&starts);
    tensor_free(&index);
    batch_free(&b);
}

static void join(struct server *s, struct sequence *x) {
    *x = (struct sequence){.phase = UNUSED, .seed = random_next(&s->random)};
    if (!take_slots(s, x))
        return;
    x->phase = RUNNING;
    prefill(s, x, random_below(&s->random, PROMPT + 1), false);
}

static void preempt(struct server *s, struct sequence *x) {
    release(s, x);
    x->phase = WAITING;
}

/* From its checkpoint, through the tokens that were decoded since, to where it was. */
static void resume(struct server *s, struct sequence *x) {
    int64_t end = x->position;
    if (!take_slots(s, x))
        return;
    x->phase = RUNNING;
    s->resumes++;
    x->position = x->checkpoint_position;
    memset(x->S, 0, sizeof x->S);
    for (int64_t i = 0; i < MATRIX; i++) {
        x->S[in_S(s, i)] = x->checkpoint[i];
        tensor_set(&s->pool, x->slot[0] * MATRIX + i, x->checkpoint[i]);
    }
    prefill(s, x, end, true);
}

/* ---- Decode ------------------------------------------------------------------------------------- */

enum kind { DECODE, VERIFY, COMMIT, KINDS };

/* A batch of decode. Row n is sequence row[n], or padding. */
struct step {
    enum kind kind;
    struct batch batch;
    struct sequence *row[BATCH];
    int64_t accepted[BATCH];
    struct tensor slots, num_accepted, accepted_tensor;
};

/* Sequences that run, in random order, with padding between them. */
static void choose_rows(struct server *s, struct step *step) {
    struct sequence *order[SEQUENCES] = {NULL};
    int64_t running = 0;
    for (int i = 0; i < SEQUENCES; i++)
        if (s->sequences[i].phase == RUNNING) {
            int64_t j = random_below(&s->random, running + 1);
            order[running] = order[j];
            order[j] = &s->sequences[i];
            running++;
        }
    struct batch *b = &step->batch;
    b->N = 1 + random_below(&s->random, BATCH);
    for (int64_t n = 0; n < b->N; n++) {
        bool padding = running == 0 || random_below(&s->random, 4) == 0;
        step->row[n] = padding ? NULL : order[--running];
        b->length[n] = random_below(&s->random, 3) ? 1 : random_below(&s->random, COLUMNS + 1);
        step->accepted[n] = b->length[n] ? 1 + random_below(&s->random, b->length[n]) : 0;
        if (step->kind == DECODE)
            step->accepted[n] = b->length[n];
        b->total += b->length[n];
    }
}

/* Tokens after those that will be accepted are drafts that are wrong. */
static struct token drafted(const struct step *step, int64_t n, int64_t t) {
    const struct sequence *x = step->row[n];
    return token_at(t < step->accepted[n] ? x->seed : ~x->seed, x->position + t);
}

static void fill_step(struct step *step) {
    struct batch *b = &step->batch;
    int64_t columns = step->kind == VERIFY ? COLUMNS : 0, row = 0;
    batch_make(b);
    indices_make(&step->slots, b->N, columns);
    indices_make(&step->num_accepted, b->N, 0);
    indices_make(&step->accepted_tensor, b->N, 0);
    for (int64_t n = 0; n < b->N; n++) {
        const struct sequence *x = step->row[n];
        for (int64_t t = 0; t < b->length[n]; t++, row++)
            if (x) {
                const struct token token = drafted(step, n, t);
                set_token(b, row, &token);
            }
        tensor_set(&step->num_accepted, n, x ? (double)(x->column + 1) : 0);
        tensor_set(&step->accepted_tensor, n, (double)step->accepted[n]);
        for (int64_t t = 0; t < (columns ? columns : 1); t++)
            tensor_set(&step->slots, n * (columns ? columns : 1) + t,
                       !x ? -1 : (double)x->slot[columns ? t : x->column]);
    }
}

static const char *call(struct server *s, struct step *step, uint32_t flags, bool commit) {
    struct batch *b = &step->batch;
    flash_kda_decode_args args = {.struct_size = sizeof args,
                                  .q = &b->q.dl,
                                  .k = &b->k.dl,
                                  .v = &b->v.dl,
                                  .g = &b->g.dl,
                                  .beta = &b->beta.dl,
                                  .A_log = &s->A_log.dl,
                                  .dt_bias = &s->dt_bias.dl,
                                  .out = commit ? NULL : &b->out.dl,
                                  .gate = FLASH_KDA_GATE_SOFTPLUS,
                                  .beta_mode = FLASH_KDA_BETA_SIGMOID,
                                  .flags = FLASH_KDA_QK_NORM | flags,
                                  .cu_seqlens = &b->cu_seqlens.dl,
                                  .max_tokens = COLUMNS,
                                  .accepted = commit ? &step->accepted_tensor.dl : NULL,
                                  .state_layout = s->layout,
                                  .state = &s->pool.dl,
                                  .state_indices = &step->slots.dl,
                                  .num_accepted_tokens = step->kind == VERIFY ? &step->num_accepted.dl : NULL,
                                  .backend = s->backend};
    return decode_call(&args);
}

static const char *run_calls(struct server *s, struct step *step) {
    const char *wrong = call(s, step, step->kind == COMMIT ? FLASH_KDA_KEEP_STATE : 0, false);
    if (!wrong && step->kind == COMMIT)
        wrong = call(s, step, 0, true);
    return wrong;
}

/* Outputs of every row; then each sequence goes on by what was accepted. */
static void compare_rows(struct server *s, struct step *step) {
    struct batch *b = &step->batch;
    struct error e = {0};
    int64_t row = 0;
    for (int64_t n = 0; n < b->N; n++) {
        struct sequence *x = step->row[n];
        double S[MATRIX];
        if (x)
            memcpy(S, x->S, sizeof S);
        for (int64_t t = 0; t < b->length[n]; t++, row++) {
            if (!x)
                continue;
            const struct token token = drafted(step, n, t);
            expect_token(b, row, &token, S, &e);
            if (t + 1 == step->accepted[n])
                memcpy(x->S, S, sizeof S);
        }
        if (!x || !b->length[n])
            continue;
        x->position += step->accepted[n];
        if (step->kind == VERIFY)
            x->column = step->accepted[n] - 1;
        compare_state(s, x->slot[x->column], x->S, "a state");
    }
    if (e.count || e.spread)
        judge(s, &e, "an output");
}

/* Slots of sequences that were not in the batch, and those that nobody owns, hold the bytes they held. */
static void compare_rest(struct server *s, const struct step *step, const struct tensor *before) {
    bool named[SLOTS] = {false};
    for (int64_t n = 0; n < step->batch.N; n++)
        for (int64_t t = 0; step->row[n] && t < COLUMNS; t++)
            named[step->row[n]->slot[t]] = true;
    if (!tensor_unchanged(&s->pool, before, 1, named, NULL))
        fail(s, "wrote to a slot that is not in the batch");
}

static void decode(struct server *s) {
    struct step step = {.kind = (enum kind)random_below(&s->random, KINDS)};
    struct tensor before, out_before;
    bool written[BATCH * FLASH_KDA_MAX_DECODE_TOKENS] = {false};
    choose_rows(s, &step);
    fill_step(&step);
    tensor_clone(&before, &s->pool);
    tensor_clone(&out_before, &step.batch.out);
    const char *wrong = run_calls(s, &step);
    for (int64_t n = 0, row = 0; n < step.batch.N; n++)
        for (int64_t t = 0; t < step.batch.length[n]; t++, row++)
            written[row] = step.row[n];
    if (!wrong && !tensor_unchanged(&step.batch.out, &out_before, 2, written, NULL))
        wrong = "wrote to rows of out that are padding";
    if (wrong)
        fail(s, wrong);
    else
        compare_rest(s, &step, &before);
    if (!*s->wrong)
        compare_rows(s, &step);
    int64_t *const counts[KINDS] = {&s->decodes, &s->verifies, &s->commits};
    ++*counts[step.kind];
    tensor_free(&before);
    tensor_free(&out_before);
    tensor_free(&step.slots);
    tensor_free(&step.num_accepted);
    tensor_free(&step.accepted_tensor);
    batch_free(&step.batch);
}

/* ---- The loop ------------------------------------------------------------------------------------ */

static void schedule(struct server *s) {
    struct sequence *x = &s->sequences[random_below(&s->random, SEQUENCES)];
    if (x->phase == UNUSED)
        join(s, x);
    else if (x->phase == WAITING)
        resume(s, x);
    else if (x->position > LEAVES || random_below(&s->random, 40) == 0)
        release(s, x), x->phase = UNUSED;
    else if (random_below(&s->random, 12) == 0)
        preempt(s, x);
}

static void server_make(struct server *s, DLDataType type) {
    const struct tensor_layout layout = {SPACING_FUSED, 0, false};
    bool v_first = s->layout == FLASH_KDA_STATE_V_FIRST;
    int64_t heads[2] = {HEADS, KEYS},
            pool[4] = {SLOTS, HEADS, v_first ? VALUES : KEYS, v_first ? KEYS : VALUES};
    tensor_make(&s->pool, type, 4, pool, layout);
    tensor_make(&s->A_log, TYPE_FP32, 1, heads, layout);
    tensor_make(&s->dt_bias, TYPE_FP32, 2, heads, layout);
    for (int h = 0; h < HEADS; h++) {
        tensor_set(&s->A_log, h, A_log_of(h));
        for (int c = 0; c < KEYS; c++)
            tensor_set(&s->dt_bias, h * KEYS + c, dt_bias_of(h, c));
    }
}

static void soak(struct check *check, const char *level, const char *name, flash_kda_state_layout layout,
                 DLDataType type, double tolerance, int64_t steps) {
    struct server s = {.backend = level_backend(level),
                       .layout = layout,
                       .tolerance = tolerance,
                       .random = random_named(check->seed, name)};
    char text[600];
    level_select(level);
    server_make(&s, type);
    int64_t step = 0;
    for (; step < steps && !*s.wrong; step++) {
        if (random_below(&s.random, 3) == 0)
            schedule(&s);
        if (!*s.wrong)
            decode(&s);
    }
    snprintf(text, sizeof text,
             "%s%sworst error %.1e after %lld steps: %lld prefills, %lld of them resumed, %lld decodes, %lld "
             "verified, %lld committed",
             s.wrong, *s.wrong ? "; " : "", s.worst, (long long)step, (long long)s.prefills,
             (long long)s.resumes, (long long)s.decodes, (long long)s.verifies, (long long)s.commits);
    check_report(check, !*s.wrong, level, name, text);
    tensor_free(&s.pool);
    tensor_free(&s.A_log);
    tensor_free(&s.dt_bias);
}

void decode_soak(struct check *check) {
    int64_t steps = check->long_cases ? 100000 : 2000;
    if (check->quick)
        steps /= 5;
    char wide[80], half[80];
    snprintf(wide, sizeof wide, "a serving loop of %lld steps, fp32 state, V first", (long long)steps);
    snprintf(half, sizeof half, "a serving loop of %lld steps, bf16 state, K first", (long long)steps);
    bool wants_wide = check_wanted(check, wide), wants_half = check_wanted(check, half);
    for (int i = 0; i < check->level_count; i++) {
        const char *level = check->levels[i];
        bool products = level_backend(level) == FLASH_KDA_BACKEND_CUDA; /* its prefill takes bf16 operands */
        if (wants_wide)
            soak(check, level, wide, FLASH_KDA_STATE_V_FIRST, TYPE_FP32,
                 products ? TOLERANCE_SOAK_BF16 : TOLERANCE_FP32, steps);
        if (wants_half)
            soak(check, level, half, FLASH_KDA_STATE_K_FIRST, TYPE_BF16, TOLERANCE_SOAK_BF16, steps);
    }
}
