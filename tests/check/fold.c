/* SPDX-License-Identifier: MIT */
/* Fold: against fp64 in the plainest form, in all layouts; a state's bits depend on its chain alone. */
#include "calls.h"
#include "check.h"
#include "compare.h"
#include "tolerance.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LINKS = 5, MAX_ROWS_OF_FOLD = 3 };

struct fold_case {
    char name[100];
    int64_t J, R, L, HV, K, V;
    flash_kda_state_layout layout;
    bool adjoint, initial, in_place, pool, prefixes, gathered;
    DLDataType state_type;
    int threads;
};

struct fold_problem {
    struct fold_case c;
    struct tensor buffer, bias, transitions, chains, initial, indices, states, prefixes;
    flash_kda_fold_args args;
};

/* ---- Making -------------------------------------------------------------------------------------- */

static void state_shape(const struct fold_case *c, int64_t outer, int64_t shape[4]) {
    bool v_first = c->layout == FLASH_KDA_STATE_V_FIRST;
    shape[0] = outer;
    shape[1] = c->HV;
    shape[2] = v_first ? c->V : c->K;
    shape[3] = v_first ? c->K : c->V;
}

static void make(struct tensor *t, DLDataType type, int ndim, const int64_t *shape, enum spacing spacing) {
    tensor_make(t, type, ndim, shape, (struct tensor_layout){spacing, 0, false});
}

static void random_fill(struct tensor *t, struct random *r, double size) {
    for (int64_t i = 0; i < tensor_count(t); i++)
        tensor_set(t, i, size * random_normal(r));
}

/* Summaries: views of one buffer, as an all-gather of prefill's leaves them, or tensors of their own. */
static void make_summaries(struct fold_problem *p, struct random *r) {
    const struct fold_case *c = &p->c;
    int64_t shape[4], square[4] = {c->J, c->HV, c->K, c->K};
    int wide = c->layout == FLASH_KDA_STATE_V_FIRST ? 2 : 3;
    state_shape(c, c->J, shape);
    if (c->gathered) {
        shape[wide] = c->V + c->K;
        make(&p->buffer, TYPE_FP32, 4, shape, SPACING_COMPACT);
        tensor_view(&p->bias, &p->buffer.dl);
        tensor_view(&p->transitions, &p->buffer.dl);
        tensor_narrow(&p->bias, wide, 0, c->V);
        tensor_narrow(&p->transitions, wide, c->V, c->K);
    } else {
        make(&p->bias, TYPE_FP32, 4, shape, SPACING_FUSED);
        make(&p->transitions, TYPE_FP32, 4, square, SPACING_FUSED);
    }
    random_fill(&p->bias, r, 1);
    random_fill(&p->transitions, r, 1 / sqrt((double)c->K));
}

static void fold_make(struct fold_problem *p, const struct fold_case *c, struct random *r) {
    *p = (struct fold_problem){.c = *c, .args = FLASH_KDA_FOLD_ARGS_INIT};
    int64_t links[2] = {c->R, c->L}, slots = c->pool ? c->R + 3 : c->R, shape[4];
    make_summaries(p, r);
    make(&p->chains, TYPE_INT32, 2, links, SPACING_FUSED);
    for (int64_t i = 0; i < c->R * c->L; i++)
        tensor_set(&p->chains, i, (double)random_below(r, c->J + 1) - 1);
    state_shape(c, slots, shape);
    make(&p->states, c->state_type, 4, shape, SPACING_FUSED);
    if (c->in_place)
        random_fill(&p->states, r, 1);
    if (c->initial && !c->in_place) {
        make(&p->initial, TYPE_FP32, 4, shape, SPACING_FUSED);
        random_fill(&p->initial, r, 1);
    }
    if (c->pool) {
        make(&p->indices, TYPE_INT32, 1, &c->R, SPACING_FUSED);
        for (int64_t n = 0; n < c->R; n++) /* backwards, and the second is padding */
            tensor_set(&p->indices, n, n == 1 ? -1 : (double)(slots - 1 - n));
    }
    if (c->prefixes) {
        int64_t inner[5] = {c->R, c->L};
        memcpy(inner + 2, shape + 1, 3 * sizeof *shape);
        make(&p->prefixes, TYPE_FP32, 5, inner, SPACING_FUSED);
    }
    p->args.bias = &p->bias.dl;
    p->args.transitions = &p->transitions.dl;
    p->args.chains = &p->chains.dl;
    p->args.initial_state = c->in_place ? &p->states.dl : c->initial ? &p->initial.dl : NULL;
    p->args.state_indices = c->pool ? &p->indices.dl : NULL;
    p->args.states = &p->states.dl;
    p->args.prefixes = c->prefixes ? &p->prefixes.dl : NULL;
    p->args.flags = c->adjoint ? FLASH_KDA_FOLD_ADJOINT : 0;
    p->args.state_layout = c->layout;
    p->args.num_threads = c->threads;
}

static void fold_free(struct fold_problem *p) {
    struct tensor *const all[] = {&p->bias,    &p->transitions, &p->chains,   &p->initial,
                                  &p->indices, &p->states,      &p->prefixes, &p->buffer};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        tensor_free(all[i]);
}

/* ---- Expected ------------------------------------------------------------------------------------ */

/* Element (v, k) of a state, (from, to) of M. */
static double element(const struct fold_problem *p, const struct tensor *t, int64_t outer, int64_t head,
                      int64_t i, int64_t j) {
    int64_t rows = t->shape[2], columns = t->shape[3];
    bool v_first = p->c.layout == FLASH_KDA_STATE_V_FIRST;
    int64_t at = (outer * p->c.HV + head) * rows * columns;
    return tensor_get(t, at + (v_first ? i * columns + j : j * columns + i));
}

static int64_t slot_of(const struct fold_problem *p, int64_t n) {
    return p->c.pool ? (int64_t)tensor_get(&p->indices, n) : n;
}

/* Differences of a state in memory from X [V, K]. */
static void compare_state(const struct fold_problem *p, const struct tensor *t, int64_t outer, int64_t head,
                          const double *X, struct error *e) {
    for (int64_t i = 0; i < p->c.V * p->c.K; i++) {
        double forgiven = type_equal(t->dl.dtype, TYPE_BF16) ? type_half_ulp(TYPE_BF16, X[i]) : 0;
        error_add(e, element(p, t, outer, head, i / p->c.K, i % p->c.K), X[i], forgiven);
    }
}

static void compare_prefix(const struct fold_problem *p, int64_t n, int64_t link, int64_t head, const double *X,
                           struct error *e) {
    struct tensor row;
    tensor_view(&row, &p->prefixes.dl);
    tensor_narrow(&row, 0, n, 1);
    tensor_narrow(&row, 1, link, 1);
    for (int d = 1; d < 4; d++) { /* [1, 1, HV, ..] as [1, HV, ..] */
        row.shape[d] = row.shape[d + 1];
        row.strides[d] = row.strides[d + 1];
    }
    row.dl.ndim = 4;
    compare_state(p, &row, 0, head, X, e);
}

/* next = X M + B of summary j. */
static void follow_link(const struct fold_problem *p, int64_t j, int64_t head, const double *X, double *next) {
    int64_t K = p->c.K;
    for (int64_t v = 0; v < p->c.V; v++)
        for (int64_t to = 0; to < K; to++) {
            double sum = element(p, &p->bias, j, head, v, to);
            for (int64_t from = 0; from < K; from++)
                sum += X[v * K + from] *
                       element(p, &p->transitions, j, head, p->c.adjoint ? to : from, p->c.adjoint ? from : to);
            next[v * K + to] = sum;
        }
}

/* One head of a row; results are in p's tensors, what they started from in `before`. */
static void compare_head(const struct fold_problem *p, const struct fold_problem *before, int64_t n,
                         int64_t head, struct error *e) {
    int64_t K = p->c.K, V = p->c.V, slot = slot_of(p, n);
    double *X = must_allocate(V * K, sizeof *X), *next = must_allocate(V * K, sizeof *next);
    const struct tensor *first = p->c.in_place ? &before->states : &p->initial;
    for (int64_t i = 0; i < V * K && (p->c.in_place || p->c.initial); i++)
        X[i] = element(p, first, slot, head, i / K, i % K);
    for (int64_t l = 0; l < p->c.L; l++) {
        int64_t j = (int64_t)tensor_get(&p->chains, n * p->c.L + l);
        if (p->c.prefixes)
            compare_prefix(p, n, l, head, X, e);
        if (j < 0)
            continue;
        follow_link(p, j, head, X, next);
        memcpy(X, next, (size_t)(V * K) * sizeof *X);
    }
    compare_state(p, &p->states, slot, head, X, e);
    free(X);
    free(next);
}

static bool *slots_written(const struct fold_problem *p) {
    bool *written = must_allocate(p->states.shape[0], sizeof *written);
    for (int64_t n = 0; n < p->c.R; n++)
        if (slot_of(p, n) >= 0)
            written[slot_of(p, n)] = true;
    return written;
}

/* The second half of the heads of row n alone, into `states`. */
static const char *run_part(const struct fold_problem *p, int64_t n, const struct tensor *states) {
    enum { OF_HEADS = 4, VIEWS = 6 };
    struct tensor views[VIEWS];
    flash_kda_fold_args args = p->args;
    const DLTensor **const narrowed[VIEWS] = {&args.bias,   &args.transitions, &args.initial_state,
                                              &args.states, &args.chains,      &args.state_indices};
    int64_t head = p->c.HV / 2;
    args.states = &states->dl;
    args.initial_state = p->c.in_place ? NULL : args.initial_state;
    args.prefixes = NULL;
    args.num_threads = 1;
    for (int i = 0; i < VIEWS; i++) {
        if (!*narrowed[i])
            continue;
        tensor_view(&views[i], *narrowed[i]);
        if (i < OF_HEADS)
            tensor_narrow(&views[i], 1, head, p->c.HV - head);
        if (i >= OF_HEADS || (i > 1 && !p->c.pool))
            tensor_narrow(&views[i], 0, n, 1);
        *narrowed[i] = &views[i].dl;
    }
    if (p->c.in_place)
        args.initial_state = args.states;
    const struct arguments all = arguments_of_fold(&args);
    return call_run(&all, memory_of(args.backend), FILL_NONE);
}

/* Whether the parts of a call give the bits of the whole: the second half of the heads, one row. */
static const char *parts_differ(const struct fold_problem *p, const struct fold_problem *before) {
    const char *wrong = NULL;
    int64_t size = p->c.V * p->c.K, heads = p->c.HV, from = heads / 2;
    for (int64_t n = 0; n < p->c.R && !wrong; n++) {
        struct tensor states;
        int64_t slot = slot_of(p, n);
        tensor_clone(&states, &before->states);
        wrong = run_part(p, n, &states);
        for (int64_t i = (slot * heads + from) * size; !wrong && slot >= 0 && i < (slot + 1) * heads * size;
             i++)
            if (tensor_get(&states, i) != tensor_get(&p->states, i))
                wrong = "a row's heads alone gave other bits";
        tensor_free(&states);
    }
    return wrong;
}

/* ---- A case -------------------------------------------------------------------------------------- */

static void run_level(struct check *check, const struct fold_case *c, const char *level) {
    struct fold_problem p, before;
    struct random r = random_named(check->seed, c->name), same = random_named(check->seed, c->name);
    char text[200];
    level_select(level);
    fold_make(&p, c, &r);
    fold_make(&before, c, &same);
    p.args.backend = level_backend(level);
    if (check->threads >= 0)
        p.args.num_threads = check->threads;
    const struct arguments all = arguments_of_fold(&p.args);
    struct arguments only_read = all;
    struct snapshot inputs;
    only_read.fold.states = only_read.fold.prefixes = NULL;
    if (c->in_place)
        only_read.fold.initial_state = NULL;
    snapshot_take(&inputs, &only_read);
    const char *wrong = call_run(&all, memory_of(p.args.backend), FILL_NONE);
    bool *written = slots_written(&p);
    struct error e = {0};
    for (int64_t n = 0; n < c->R && !wrong; n++)
        for (int64_t head = 0; head < c->HV && slot_of(&p, n) >= 0; head++)
            compare_head(&p, &before, n, head, &e);
    if (!wrong)
        wrong = parts_differ(&p, &before);
    if (!wrong && !tensor_unchanged(&p.states, &before.states, 1, written, NULL))
        wrong = "wrote to padding of states, or to a slot that was not named";
    if (!wrong)
        wrong = snapshot_changed(&inputs);
    double ratio = error_of_all(&e);
    snprintf(text, sizeof text, "states %.1e", ratio);
    if (!wrong && check->bench)
        append_text(text, sizeof text, "; %.3f ms", seconds_of(&all) * 1e3);
    check_report(check, !wrong && ratio <= TOLERANCE_FP32, level, c->name, wrong ? wrong : text);
    snapshot_free(&inputs);
    free(written);
    fold_free(&p);
    fold_free(&before);
}

static void run(struct check *check) {
    static const int64_t dims[][2] = {{1, 1}, {64, 20}, {128, 36}, {33, 70}, {256, 5}, {96, 40}};
    for (int i = 0; i < 24; i++) {
        struct fold_case c = {.J = 5, .R = 1 + i % MAX_ROWS_OF_FOLD, .L = i % (MAX_LINKS + 1), .HV = 1 + i % 2};
        c.K = dims[i % 6][0];
        c.V = dims[i % 6][1];
        c.layout = i / 2 % 2 ? FLASH_KDA_STATE_K_FIRST : FLASH_KDA_STATE_V_FIRST;
        c.adjoint = i / 3 % 2;
        c.initial = i % 4 != 1;
        c.in_place = i % 5 == 2;
        c.pool = i % 3 == 2;
        c.prefixes = i / 4 % 2 && c.L > 0;
        c.gathered = i % 2;
        c.state_type = i % 7 == 3 ? TYPE_BF16 : TYPE_FP32;
        c.threads = 1 + i % 2 * 15;
        snprintf(c.name, sizeof c.name, "fold %d: %d rows of %d links, K %d, V %d%s%s%s%s%s", i, (int)c.R,
                 (int)c.L, (int)c.K, (int)c.V, c.layout ? ", K first" : "", c.adjoint ? ", adjoint" : "",
                 c.pool ? ", pool" : "", c.in_place ? ", in place" : "", c.gathered ? ", gathered" : "");
        for (int l = 0; check_wanted(check, c.name) && l < check->level_count; l++)
            run_level(check, &c, check->levels[l]);
    }
}

const struct operation fold_operation = {"fold", run};
