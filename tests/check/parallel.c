/* SPDX-License-Identifier: MIT */
/* One process plays all ranks of a context-parallel prefill and backward: the tokens are cut into slots, every slot runs
 * its two halves in calls of its own, and fold makes the states between them. What comes out must be what one call of all
 * tokens gives. */
#include "backward_case.h"
#include "check.h"
#include "compare.h"
#include "parallel_halves.h"
#include "prefill_compare.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SLOTS = 64, BACKWARD_VIEWS = 11 };

/* A range of the tokens. Its rows are the sequences that have tokens in it, or begin in it without any. */
struct slot {
    int64_t first, length;
    int rows, sequences[MAX_SEQUENCES];
    int before[MAX_SLOTS], before_count; /* slots with earlier tokens of its first row, in order */
    int after[MAX_SLOTS], after_count;   /* with later tokens of its last row */
    struct tensor cu_seqlens, incoming_rows, outgoing_rows, summary, incoming, initial, final;
    struct tensor views[TOKEN_ARGUMENTS];
    flash_kda_prefill_args args;
    struct call call;

    struct tensor adjoint_summary, R, backward_initial, d_final, d_initial, dA_log, d_dt_bias;
    struct tensor backward_views[BACKWARD_VIEWS];
    flash_kda_backward_args backward;
};

struct ranks {
    const struct prefill_problem *p;
    int count;
    struct slot *slots;
    struct tensor summaries, adjoint_summaries; /* of all slots, as an all-gather leaves them */
};

/* ---- Partition ----------------------------------------------------------------------------------- */

enum partition { IN_TWO, IN_SEVEN, ODD, AT_BORDERS, MANY, PARTITIONS };
static const char *const partition_names[PARTITIONS] = {"two slots", "seven slots", "odd slots",
                                                        "slots between all borders", "64 slots"};

static int cut(const struct prefill_problem *p, enum partition kind, struct random *r,
               int64_t sizes[MAX_SLOTS]) {
    static const int64_t odd[] = {31, 1, 0, 33, 32, 0, 0, 2};
    const int counts[PARTITIONS] = {
        [IN_TWO] = 2, [IN_SEVEN] = 7, [ODD] = 9, [AT_BORDERS] = (int)p->N, [MANY] = MAX_SLOTS};
    int64_t left = p->T;
    int count = counts[kind];
    for (int i = 0; i < count; i++) {
        int64_t most = 2 * p->T / MAX_SLOTS + 1, size = kind == AT_BORDERS ? p->c.lengths[i] : p->T / count;
        if (kind == ODD)
            size = i < 8 ? odd[i] : left;
        if (kind == MANY)
            size = random_below(r, 3) ? random_below(r, most) : 0;
        if (i + 1 == count || size > left)
            size = left;
        sizes[i] = size;
        left -= size;
    }
    return count;
}

static int64_t begin_of(const struct prefill_problem *p, int n) {
    return p->c.packing == PACKING_DENSE ? 0 : p->starts[n];
}

/* The slot that an empty sequence beginning at token t belongs to: where that token is, or the last one with tokens. */
static int home_of(const struct ranks *x, int64_t t) {
    int home = 0;
    for (int i = 0; i < x->count; i++)
        if (x->slots[i].length && x->slots[i].first <= t)
            home = i;
    return home;
}

static void place_rows(struct ranks *x) {
    for (int n = 0; n < x->p->N; n++) {
        int64_t begin = begin_of(x->p, n), end = begin + x->p->c.lengths[n];
        int on[MAX_SLOTS], count = 0;
        for (int i = 0; i < x->count; i++)
            if (begin == end ? i == home_of(x, begin)
                             : x->slots[i].length && x->slots[i].first < end &&
                                   begin < x->slots[i].first + x->slots[i].length)
                on[count++] = i;
        for (int i = 0; i < count; i++) {
            struct slot *s = &x->slots[on[i]];
            s->sequences[s->rows++] = n;
            if (i) {
                s->before_count = i;
                memcpy(s->before, on, (size_t)i * sizeof *on);
            }
            if (i + 1 < count) {
                s->after_count = count - i - 1;
                memcpy(s->after, on + i + 1, (size_t)s->after_count * sizeof *on);
            }
        }
    }
}

/* ---- Tensors of a slot --------------------------------------------------------------------------- */

static void make(struct tensor *t, DLDataType type, int ndim, const int64_t *shape) {
    tensor_make(t, type, ndim, shape, (struct tensor_layout){SPACING_COMPACT, 0, false});
}

static void state_shape(const struct prefill_problem *p, int64_t outer, int64_t extra, int64_t shape[4]) {
    bool v_first = p->c.layout == FLASH_KDA_STATE_V_FIRST;
    shape[0] = outer;
    shape[1] = p->HV;
    shape[2] = v_first ? p->c.V + extra : p->c.K;
    shape[3] = v_first ? p->c.K : p->c.V + extra;
}

static void make_state(struct tensor *t, const struct prefill_problem *p, int64_t outer) {
    int64_t shape[4];
    state_shape(p, outer, 0, shape);
    make(t, TYPE_FP32, 4, shape);
}

/* Row `to` of a tensor of states becomes row `from` of another. */
static void copy_row(struct tensor *t, int64_t to, const struct tensor *source, int64_t from) {
    int64_t size = tensor_count(source) / source->shape[0];
    for (int64_t i = 0; i < size; i++)
        tensor_set(t, to * size + i, tensor_get(source, from * size + i));
}

static void make_slot(struct ranks *x, struct slot *s, struct prefill_results *r, flash_kda_backend backend) {
    const struct prefill_problem *p = x->p;
    int64_t one = 1, boundaries = s->rows + 1;
    make(&s->cu_seqlens, TYPE_INT32, 1, &boundaries);
    make(&s->incoming_rows, TYPE_INT32, 1, &one);
    make(&s->outgoing_rows, TYPE_INT32, 1, &one);
    tensor_set(&s->incoming_rows, 0, s->before_count ? 0 : -1);
    tensor_set(&s->outgoing_rows, 0, s->after_count ? s->rows - 1 : -1);
    make_state(&s->incoming, p, 1);
    make_state(&s->initial, p, s->rows);
    tensor_set(&s->cu_seqlens, 0, 0);
    for (int i = 0; i < s->rows; i++) {
        int64_t end = begin_of(p, s->sequences[i]) + p->c.lengths[s->sequences[i]] - s->first;
        tensor_set(&s->cu_seqlens, i + 1, (double)(end < s->length ? end : s->length));
        if (i || !s->before_count) /* a row that comes in stays poison */
            copy_row(&s->initial, i, &p->initial_state, s->sequences[i]);
    }
    tensor_view(&s->summary, &x->summaries.dl);
    tensor_narrow(&s->summary, 0, s - x->slots, 1);
    s->args = prefill_bind(p, r, backend);
    prefill_narrow(&s->args, s->views, 1, s->first, s->length);
    s->args.cu_seqlens = &s->cu_seqlens.dl;
    s->args.initial_state = &s->initial.dl;
    s->args.final_state = NULL;
    if (p->final.ndim) {
        make_state(&s->final, p, s->rows);
        s->args.final_state = &s->final.dl;
    }
    s->args.incoming_rows = &s->incoming_rows.dl;
    s->args.outgoing_rows = &s->outgoing_rows.dl;
    s->args.summaries = &s->summary.dl;
    s->args.incoming = &s->incoming.dl;
}

static void make_ranks(struct ranks *x, const struct prefill_problem *p, enum partition kind,
                       struct prefill_results *r, flash_kda_backend backend, struct random *random) {
    int64_t sizes[MAX_SLOTS] = {0}, first = 0, shape[4];
    *x = (struct ranks){.p = p, .count = cut(p, kind, random, sizes)};
    x->slots = must_allocate(x->count, sizeof *x->slots);
    state_shape(p, x->count, p->c.K, shape);
    make(&x->summaries, TYPE_FP32, 4, shape);
    make_state(&x->adjoint_summaries, p, x->count);
    for (int i = 0; i < x->count; first += sizes[i++]) {
        x->slots[i].first = first;
        x->slots[i].length = sizes[i];
    }
    place_rows(x);
    for (int i = 0; i < x->count; i++)
        make_slot(x, &x->slots[i], r, backend);
}

static void free_ranks(struct ranks *x) {
    for (int i = 0; i < x->count; i++) {
        struct slot *s = &x->slots[i];
        struct tensor *const all[] = {&s->cu_seqlens,
                                      &s->incoming_rows,
                                      &s->outgoing_rows,
                                      &s->incoming,
                                      &s->initial,
                                      &s->final,
                                      &s->R,
                                      &s->d_final,
                                      &s->d_initial,
                                      &s->backward_initial,
                                      &s->dA_log,
                                      &s->d_dt_bias};
        for (size_t n = 0; n < sizeof all / sizeof *all; n++)
            tensor_free(all[n]);
    }
    tensor_free(&x->summaries);
    tensor_free(&x->adjoint_summaries);
    free(x->slots);
}

/* ---- Exchange -------------------------------------------------------------------------------------- */

/* X before a slot's first row, or R after its last: through the summaries of `count` others, in the order of `through`. */
static const char *fold_to(struct ranks *x, const int *through, int count, bool adjoint,
                           flash_kda_backend backend, struct tensor *state) {
    struct tensor chains, bias, transitions;
    int64_t links[2] = {1, count};
    int wide = x->p->c.layout == FLASH_KDA_STATE_V_FIRST ? 2 : 3;
    flash_kda_fold_args args = FLASH_KDA_FOLD_ARGS_INIT;
    make(&chains, TYPE_INT32, 2, links);
    for (int i = 0; i < count; i++)
        tensor_set(&chains, i, through[adjoint ? count - 1 - i : i]);
    tensor_view(&bias, adjoint ? &x->adjoint_summaries.dl : &x->summaries.dl);
    tensor_view(&transitions, &x->summaries.dl);
    if (!adjoint)
        tensor_narrow(&bias, wide, 0, x->p->c.V);
    tensor_narrow(&transitions, wide, x->p->c.V, x->p->c.K);
    args.bias = &bias.dl;
    args.transitions = &transitions.dl;
    args.chains = &chains.dl;
    args.states = &state->dl;
    args.flags = adjoint ? FLASH_KDA_FOLD_ADJOINT : 0;
    args.state_layout = x->p->c.layout;
    args.backend = backend;
    const struct arguments all = arguments_of_fold(&args);
    const char *wrong = call_run(&all, memory_of(backend), FILL_NONE);
    tensor_free(&chains);
    return wrong;
}

/* ---- Forward --------------------------------------------------------------------------------------- */

/* Outputs in the results, final states where their sequences end. */
static const char *play_prefill(struct ranks *x, struct prefill_results *r, flash_kda_backend backend) {
    const char *wrong = NULL;
    int begun = 0;
    for (; begun < x->count && !wrong; begun++) {
        const struct arguments all = arguments_of_prefill(&x->slots[begun].args);
        wrong = halves_begin(&x->slots[begun].call, &all);
    }
    for (int i = 0; i < x->count && !wrong; i++)
        if (x->slots[i].before_count)
            wrong =
                fold_to(x, x->slots[i].before, x->slots[i].before_count, false, backend, &x->slots[i].incoming);
    for (int i = 0; i < begun; i++) {
        struct slot *s = &x->slots[i];
        const struct arguments all = arguments_of_prefill(&s->args);
        const char *said = halves_finish(&s->call, &all, !wrong);
        wrong = wrong ? wrong : said;
        for (int row = 0; row < s->rows && !wrong && r->final.block; row++)
            if (row + 1 < s->rows || !s->after_count)
                copy_row(&r->final, s->sequences[row], &s->final, row);
    }
    return wrong;
}

struct parallel {
    enum partition partition;
};

/* What a level may be off by, from what it is off by uncut. Slots shorter than its chunks make it round products more often. */
static double allowed_of(double uncut, double least, enum partition partition) {
    return fmax(least, (partition == MANY ? 1.5 : 1.15) * uncut);
}

static void forward_level(struct check *check, struct prefill_problem *p, const struct prefill_results *exact,
                          const char *level, const void *context) {
    const struct parallel *c = context;
    struct random random = random_named(check->seed, p->c.name);
    struct prefill_results uncut, r;
    struct ranks x;
    flash_kda_backend backend = level_backend(level);
    char text[200];
    prefill_results_make(&uncut, p);
    prefill_results_make(&r, p);
    const char *wrong = prefill_run(p, &uncut, backend, FILL_NAN);
    make_ranks(&x, p, c->partition, &r, backend, &random);
    if (!wrong)
        wrong = play_prefill(&x, &r, backend);
    double out = prefill_error(&r.out, &exact->out, &p->out, true);
    double state = prefill_error(&r.final, &exact->final, &p->final, true);
    double out_allowed =
        allowed_of(prefill_error(&uncut.out, &exact->out, &p->out, true), p->c.fp32_tolerance, c->partition);
    double state_allowed = allowed_of(prefill_error(&uncut.final, &exact->final, &p->final, true),
                                      p->c.fp32_tolerance, c->partition);
    snprintf(text, sizeof text, "%d slots, out %.1e (at most %.1e), state %.1e (at most %.1e)", x.count, out,
             out_allowed, state, state_allowed);
    check_report(check, !wrong && out <= out_allowed && state <= state_allowed, level, p->c.name,
                 wrong ? wrong : text);
    free_ranks(&x);
    prefill_results_free(&uncut);
    prefill_results_free(&r);
}

/* ---- Backward -------------------------------------------------------------------------------------- */

static void narrow_backward(struct slot *s) {
    flash_kda_backward_args *a = &s->backward;
    const DLTensor **const tokens[BACKWARD_VIEWS] = {&a->q,  &a->k,  &a->v,  &a->g,  &a->beta, &a->d_out,
                                                     &a->dq, &a->dk, &a->dv, &a->dg, &a->dbeta};
    for (int i = 0; i < BACKWARD_VIEWS; i++) {
        tensor_view(&s->backward_views[i], *tokens[i]);
        tensor_narrow(&s->backward_views[i], 1, s->first, s->length);
        *tokens[i] = &s->backward_views[i].dl;
    }
}

static void make_backward_slot(struct ranks *x, struct slot *s, const struct backward_problem *b,
                               struct backward_results *r, flash_kda_backend backend) {
    const struct prefill_problem *p = x->p;
    const int64_t parameters[2] = {p->HV, p->c.K};
    s->backward = backward_bind(b, r, backend);
    narrow_backward(s);
    make_state(&s->backward_initial, p, s->rows);
    make_state(&s->d_final, p, s->rows);
    make_state(&s->d_initial, p, s->rows);
    make_state(&s->R, p, 1);
    make(&s->dA_log, TYPE_FP32, 1, parameters);
    make(&s->d_dt_bias, TYPE_FP32, 2, parameters);
    for (int i = 0; i < s->rows; i++) {
        if (i == 0 && s->before_count)
            copy_row(&s->backward_initial, i, &s->incoming, 0);
        else
            copy_row(&s->backward_initial, i, &p->initial_state, s->sequences[i]);
        if (i + 1 < s->rows || !s->after_count) /* a row that goes on stays poison */
            copy_row(&s->d_final, i, &b->d_final_state, s->sequences[i]);
    }
    tensor_view(&s->adjoint_summary, &x->adjoint_summaries.dl);
    tensor_narrow(&s->adjoint_summary, 0, s - x->slots, 1);
    s->backward.cu_seqlens = &s->cu_seqlens.dl;
    s->backward.initial_state = &s->backward_initial.dl;
    s->backward.d_final_state = &s->d_final.dl;
    s->backward.d_initial_state = &s->d_initial.dl;
    if (s->backward.dA_log)
        s->backward.dA_log = &s->dA_log.dl;
    if (s->backward.d_dt_bias)
        s->backward.d_dt_bias = &s->d_dt_bias.dl;
    s->backward.incoming_rows = &s->incoming_rows.dl;
    s->backward.outgoing_rows = &s->outgoing_rows.dl;
    s->backward.summaries = &s->adjoint_summary.dl;
    s->backward.incoming = &s->R.dl;
}

static void add_sums(struct tensor *to, const struct tensor *from) {
    for (int64_t i = 0; to->block && i < tensor_count(to); i++)
        tensor_set(to, i, tensor_get(to, i) + tensor_get(from, i));
}

static const char *play_backward(struct ranks *x, const struct backward_problem *b, struct backward_results *r,
                                 flash_kda_backend backend) {
    const char *wrong = NULL;
    int begun = 0;
    for (int g = DA_LOG; g <= D_DT_BIAS; g++)
        if (r->tensors[g].block)
            tensor_fill(&r->tensors[g], 0);
    for (; begun < x->count && !wrong; begun++) {
        make_backward_slot(x, &x->slots[begun], b, r, backend);
        const struct arguments all = arguments_of_backward(&x->slots[begun].backward);
        wrong = halves_begin(&x->slots[begun].call, &all);
    }
    for (int i = 0; i < x->count && !wrong; i++)
        if (x->slots[i].after_count)
            wrong = fold_to(x, x->slots[i].after, x->slots[i].after_count, true, backend, &x->slots[i].R);
    for (int i = 0; i < begun; i++) {
        struct slot *s = &x->slots[i];
        const struct arguments all = arguments_of_backward(&s->backward);
        const char *said = halves_finish(&s->call, &all, !wrong);
        wrong = wrong ? wrong : said;
        add_sums(&r->tensors[DA_LOG], &s->dA_log);
        add_sums(&r->tensors[D_DT_BIAS], &s->d_dt_bias);
        for (int row = 0; row < s->rows && !wrong; row++)
            if (row || !s->before_count)
                copy_row(&r->tensors[D_INITIAL_STATE], s->sequences[row], &s->d_initial, row);
    }
    return wrong;
}

static double gradient_error(const struct backward_problem *b, const struct backward_results *exact,
                             const struct backward_results *r, int gradient) {
    const struct tensor *x = &r->tensors[gradient], *expected = &exact->tensors[gradient];
    return gradient == DA_LOG
               ? A_log_error(x, expected, b->p.c.gate, &b->p.g, &b->p.dt_bias, &exact->tensors[DG])
               : tensor_error(x, expected, true);
}

/* A head's dA_log is one number, whose error when cut has nothing to do with what it is off by uncut. */
static double A_log_tolerance(const struct backward_problem *b, const char *level) {
    return level_rounds_gradients(level) ? TOLERANCE_BF16_MARGIN * b->c.bf16.of[DA_LOG] : TOLERANCE_DA_LOG;
}

static void backward_level(struct check *check, struct backward_problem *b,
                           const struct backward_results *exact, enum partition partition, const char *level) {
    const char *name = b->p.c.name;
    struct random random = random_named(check->seed, name);
    struct backward_results uncut, r;
    struct prefill_results out;
    struct ranks x;
    flash_kda_backend backend = level_backend(level);
    char text[400] = "";
    backward_results_make(&uncut, b);
    backward_results_make(&r, b);
    prefill_results_make(&out, &b->p);
    const char *wrong = backward_run(b, &uncut, backend, FILL_NAN);
    make_ranks(&x, &b->p, partition, &out, backend, &random);
    if (!wrong)
        wrong = play_prefill(&x, &out, backend);
    if (!wrong)
        wrong = play_backward(&x, b, &r, backend);
    bool good = !wrong;
    for (int g = 0; g < GRADIENTS && !wrong; g++) {
        if (!r.tensors[g].block)
            continue;
        double error = gradient_error(b, exact, &r, g), whole = gradient_error(b, exact, &uncut, g);
        double allowed =
            allowed_of(whole, g == DA_LOG ? A_log_tolerance(b, level) : b->p.c.fp32_tolerance, partition);
        good = good && error <= allowed;
        append_text(text, sizeof text, "%s%s %.1e", text[0] ? ", " : "", gradient_names[g], error);
        if (!(error <= allowed))
            append_text(text, sizeof text, " (at most %.1e)", allowed);
    }
    check_report(check, good, level, name, wrong ? wrong : text);
    free_ranks(&x);
    backward_results_free(&uncut);
    backward_results_free(&r);
    prefill_results_free(&out);
}

static void run_backward(struct check *check, const struct backward_case *c, enum partition partition) {
    if (!check_wanted(check, c->forward.name))
        return;
    struct random r = random_named(check->seed, c->forward.name);
    struct backward_problem b;
    struct backward_results exact;
    const char *wrong = backward_problem_make(&b, c, &r);
    backward_results_make_exact(&exact, &b);
    if (!wrong)
        wrong = backward_run(&b, &exact, FLASH_KDA_BACKEND_REFERENCE, FILL_NAN);
    if (wrong)
        check_report(check, false, "reference", c->forward.name, wrong);
    for (int i = 0; i < check->level_count && !wrong; i++) {
        level_select(check->levels[i]);
        backward_level(check, &b, &exact, partition, check->levels[i]);
    }
    backward_results_free(&exact);
    backward_problem_free(&b);
}

/* ---- Cases ----------------------------------------------------------------------------------------- */

static const int64_t lengths[] = {0, 70, 0, 33, 163, 0};

static struct prefill_case case_of(enum partition partition, int i) {
    struct prefill_case c = prefill_case_plain();
    prefill_case_set_gate(&c, (flash_kda_gate)(i % 3));
    c.packing = PACKING_INT64;
    if (partition == AT_BORDERS || i % 2) {
        c.sequences = sizeof lengths / sizeof *lengths;
        memcpy(c.lengths, lengths, sizeof lengths);
    } else {
        c.lengths[0] = 266;
    }
    static const int64_t dims[][2] = {{64, 48}, {128, 128}, {33, 70}, {256, 20}};
    c.K = dims[i % 4][0];
    c.V = dims[i % 4][1];
    c.H = 1 + i % 2;
    c.group = 1 + i / 2 % 2;
    c.layout = i / 3 % 2 ? FLASH_KDA_STATE_K_FIRST : FLASH_KDA_STATE_V_FIRST;
    c.threads = i % 4 == 1 ? 16 : 2;
    c.fill = i % 5 == 4 ? NULL : fill_remembering;
    return c;
}

static void forward_cases(struct check *check) {
    for (int i = 0; i < 20; i++) {
        const struct parallel parallel = {(enum partition)(i % PARTITIONS)};
        struct prefill_case c = case_of(parallel.partition, i);
        c.q_type = c.k_type = c.v_type = c.out_type = i % 3 == 1 ? TYPE_BF16 : TYPE_FP32;
        c.bf16_tolerance = BF16_ANY;
        snprintf(c.name, sizeof c.name, "parallel %d: %s, %d sequences, gate %s, K %d, V %d", i,
                 partition_names[parallel.partition], c.sequences, prefill_gate_names[c.gate], (int)c.K,
                 (int)c.V);
        prefill_examine(check, &c, forward_level, &parallel);
    }
}

/* All in bf16, K = V = 128: what Hopper's level splits into segments. */
static void bf16_cases(struct check *check) {
    for (int i = 0; i < 8; i++) {
        const struct parallel parallel = {i % 4 == 3 ? AT_BORDERS : (enum partition)(i % 4)};
        struct prefill_case c = case_of(parallel.partition, 2 * i + (parallel.partition == AT_BORDERS));
        prefill_case_set_gate(&c, i % 2 ? FLASH_KDA_GATE_SOFTPLUS : FLASH_KDA_GATE_SIGMOID);
        for (int n = 0; n < c.sequences && check_tests_cuda(check) && !check->quick; n++)
            c.lengths[n] *= 8;
        c.K = c.V = 128;
        c.beta_mode = i % 3 ? FLASH_KDA_BETA_SIGMOID : FLASH_KDA_BETA_TWICE_SIGMOID;
        c.q_type = c.k_type = c.v_type = c.g_type = c.beta_type = c.out_type = TYPE_BF16;
        c.fill = i % 4 == 2 ? NULL : fill_remembering;
        snprintf(c.name, sizeof c.name, "parallel bf16 %d: %s, %d sequences, gate %s", i,
                 partition_names[parallel.partition], c.sequences, prefill_gate_names[c.gate]);
        prefill_examine(check, &c, forward_level, &parallel);
    }
}

/* |A| near 1 over 64 slots; a hard reset; keys all equal; v that grows by 1e8; saturated logits; the strongest decay. */
static void fill_growing(struct prefill_problem *p, struct random *r) {
    fill_remembering(p, r);
    int64_t count = tensor_count(&p->v);
    for (int64_t i = 0; i < count; i++)
        tensor_set(&p->v, i, tensor_get(&p->v, i) * pow(10, 8 * (double)i / (double)count));
}

static void fill_resets(struct prefill_problem *p, struct random *r) {
    fill_remembering(p, r);
    int64_t row = p->HV * p->c.K;
    for (int64_t i = 100 * row; i < 101 * row; i++)
        tensor_set(&p->g, i, 500);
}

static void fill_saturated(struct prefill_problem *p, struct random *r) {
    fill_remembering(p, r);
    for (int64_t i = 0; i < tensor_count(&p->beta); i++)
        tensor_set(&p->beta, i, random_below(r, 2) ? 120 : -120);
}

static void fill_strongest(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    tensor_fill(&p->g, 500);
}

static void trap_cases(struct check *check) {
    static const struct {
        const char *name;
        void (*fill)(struct prefill_problem *p, struct random *r);
        double tolerance;
    } traps[] = {{"keys all equal", fill_collinear, TOLERANCE_FP32_COLLINEAR},
                 {"nothing forgotten", fill_remembering, TOLERANCE_FP32},
                 {"a hard reset", fill_resets, TOLERANCE_FP32},
                 {"values that grow", fill_growing, TOLERANCE_FP32},
                 {"saturated steps", fill_saturated, TOLERANCE_FP32},
                 {"-5 nats everywhere", fill_strongest, TOLERANCE_FP32},
                 {"channels that move", fill_moving, TOLERANCE_FP32}};
    for (size_t i = 0; i < sizeof traps / sizeof *traps; i++) {
        const struct parallel parallel = {MANY};
        struct prefill_case c = prefill_case_plain();
        prefill_case_set_gate(&c, i % 2 ? FLASH_KDA_GATE_SOFTPLUS : FLASH_KDA_GATE_SIGMOID);
        if (traps[i].fill == fill_collinear || traps[i].fill == fill_strongest || traps[i].fill == fill_moving)
            prefill_case_set_gate(&c, FLASH_KDA_GATE_SIGMOID);
        c.packing = PACKING_INT32;
        c.lengths[0] = check->quick ? 300 : 1000;
        c.K = c.V = 128;
        c.fill = traps[i].fill;
        c.fp32_tolerance = traps[i].tolerance;
        snprintf(c.name, sizeof c.name, "parallel, %s", traps[i].name);
        prefill_examine(check, &c, forward_level, &parallel);
    }
}

static void backward_cases(struct check *check) {
    for (int i = 0; i < 12; i++) {
        enum partition partition = (enum partition)(i % PARTITIONS);
        struct backward_case c = backward_case_plain();
        c.forward = case_of(partition, i);
        c.forward.final = STORAGE_NONE;
        snprintf(c.forward.name, sizeof c.forward.name,
                 "parallel backward %d: %s, %d sequences, gate %s, K %d, V %d", i, partition_names[partition],
                 c.forward.sequences, prefill_gate_names[c.forward.gate], (int)c.forward.K, (int)c.forward.V);
        run_backward(check, &c, partition);
    }
}

static void run(struct check *check) {
    forward_cases(check);
    bf16_cases(check);
    trap_cases(check);
    backward_cases(check);
    parallel_halves(check);
}

const struct operation parallel_operation = {"parallel", run};
