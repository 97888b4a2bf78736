/* SPDX-License-Identifier: MIT */
/* The halves of one call: together they are the whole; each leaves alone what is the other's; what comes in is not read
 * where it must not be. */
#include "parallel_halves.h"

#include "backward_case.h"
#include "calls.h"
#include "compare.h"
#include "prefill_compare.h"
#ifdef CHECK_CUDA
#include "replay.h"
#endif

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Two halves ------------------------------------------------------------------------------------ */

static void set_phase(struct arguments *a, flash_kda_phase phase) {
    a->prefill.phase = a->backward.phase = phase;
}

const char *halves_begin(struct call *c, const struct arguments *args) {
    struct arguments begin = *args;
    set_phase(&begin, FLASH_KDA_PHASE_BEGIN);
    bool ran = call_make(c, &begin, memory_of(arguments_backend(args)), FILL_NAN) && call_launch(c, NULL) &&
               call_wait(c) && call_fetch(c);
    return ran ? NULL : failure();
}

const char *halves_finish(struct call *c, const struct arguments *args, bool ran) {
    set_phase(&c->args, FLASH_KDA_PHASE_FINISH);
    return call_finish(c, ran && (c->memory == MEMORY_HOST || call_change(c, args)) && call_launch(c, NULL));
}

/* ---- Prefill --------------------------------------------------------------------------------------- */

struct rows {
    struct tensor incoming_rows, outgoing_rows, summaries, incoming;
    bool comes_in[MAX_SEQUENCES];
};

static void make(struct tensor *t, DLDataType type, int ndim, const int64_t *shape) {
    tensor_make(t, type, ndim, shape, (struct tensor_layout){SPACING_COMPACT, 0, false});
}

/* `count` of the sequences in any order, here and there a -1. */
static void choose_rows(struct tensor *t, int64_t sequences, int64_t count, struct random *r) {
    bool taken[MAX_SEQUENCES] = {false};
    make(t, TYPE_INT32, 1, &count);
    for (int64_t i = 0; i < count; i++) {
        int64_t n = random_below(r, sequences + 1) - 1;
        while (n >= 0 && taken[n])
            n = random_below(r, sequences + 1) - 1;
        if (n >= 0)
            taken[n] = true;
        tensor_set(t, i, (double)n);
    }
}

static int64_t matrix_of(const struct prefill_problem *p) { return p->HV * p->c.K * p->c.V; }

/* What comes in is what stood in initial_state, which becomes poison there. */
static void take_incoming(struct prefill_problem *p, struct rows *x) {
    int64_t matrix = matrix_of(p);
    for (int64_t i = 0; i < x->incoming_rows.shape[0]; i++) {
        int64_t n = (int64_t)tensor_get(&x->incoming_rows, i);
        if (n < 0 || p->slot[n] < 0)
            continue;
        x->comes_in[n] = true;
        for (int64_t e = 0; e < matrix; e++) {
            tensor_set(&x->incoming, i * matrix + e, tensor_get(&p->initial_state, p->slot[n] * matrix + e));
            tensor_set(&p->initial_state, p->slot[n] * matrix + e, (double)NAN);
        }
    }
}

static void make_rows(struct prefill_problem *p, struct rows *x, int64_t C, int64_t S, struct random *r) {
    bool v_first = p->c.layout == FLASH_KDA_STATE_V_FIRST;
    int64_t V = p->c.V, K = p->c.K, shape[4] = {S, p->HV, v_first ? V + K : K, v_first ? K : V + K};
    *x = (struct rows){0};
    choose_rows(&x->incoming_rows, p->N, C, r);
    choose_rows(&x->outgoing_rows, p->N, S, r);
    make(&x->summaries, TYPE_FP32, 4, shape);
    shape[0] = C;
    shape[2] = v_first ? V : K;
    shape[3] = v_first ? K : V;
    make(&x->incoming, TYPE_FP32, 4, shape);
    take_incoming(p, x);
}

static void free_rows(struct rows *x) {
    tensor_free(&x->incoming_rows);
    tensor_free(&x->outgoing_rows);
    tensor_free(&x->summaries);
    tensor_free(&x->incoming);
}

static void bind_rows(flash_kda_prefill_args *args, struct rows *x) {
    args->incoming_rows = &x->incoming_rows.dl;
    args->outgoing_rows = &x->outgoing_rows.dl;
    args->summaries = &x->summaries.dl;
    args->incoming = &x->incoming.dl;
}

/* The rows of an output that a half may write: those of sequences that come in, or of the others. */
static void rows_of_half(const struct prefill_problem *p, const struct rows *x, bool finish, bool *out,
                         bool *final, bool *checkpoints) {
    for (int64_t n = 0; n < p->N; n++) {
        if (p->slot[n] < 0)
            continue;
        int64_t first = p->c.packing == PACKING_DENSE ? n * p->T : p->starts[n];
        for (int64_t t = 0; t < p->c.lengths[n]; t++)
            out[first + t] = !finish || x->comes_in[n]; /* BEGIN may leave there what FINISH needs */
        if (final && x->comes_in[n] == finish)
            final[p->slot[n]] = true;
    }
    for (int64_t i = 0; checkpoints && i < p->checkpoints.rows; i++)
        if (p->checkpoints.written[i] && x->comes_in[p->checkpoint_sequence[i]] == finish)
            checkpoints[i] = true;
}

/* Has the half written what is its own alone? */
static const char *strayed(const struct prefill_problem *p, const struct rows *x, bool finish,
                           const struct prefill_results *now, const struct prefill_results *before) {
    bool *out = must_allocate(p->out.rows, sizeof *out), *final = must_allocate(p->slots, sizeof *final);
    bool *checkpoints = must_allocate(p->checkpoints.rows + 1, sizeof *checkpoints);
    const char *wrong = NULL;
    rows_of_half(p, x, finish, out, final, checkpoints);
    if (!tensor_unchanged(&now->out, &before->out, p->out.lead, out, NULL))
        wrong =
            finish ? "FINISH wrote to out of rows that do not come in" : "BEGIN wrote to out beyond its rows";
    else if (now->final.block && !tensor_unchanged(&now->final, &before->final, p->final.lead, final, NULL))
        wrong = finish ? "FINISH wrote to final_state of rows that do not come in"
                       : "BEGIN wrote to final_state of rows that come in";
    else if (now->checkpoints.block &&
             !tensor_unchanged(&now->checkpoints, &before->checkpoints, p->checkpoints.lead, checkpoints, NULL))
        wrong = "a half wrote to checkpoints of the other's rows";
    free(out);
    free(final);
    free(checkpoints);
    return wrong;
}

static void clone_results(struct prefill_results *copy, const struct prefill_results *r) {
    *copy = *r;
    tensor_clone(&copy->out, &r->out);
    if (r->final.block)
        tensor_clone(&copy->final, &r->final);
    if (r->checkpoints.block)
        tensor_clone(&copy->checkpoints, &r->checkpoints);
}

/* Summaries against the oracle's, and zeros where nothing goes on. */
static const char *summaries_wrong(const struct prefill_problem *p, struct rows *x, const struct tensor *exact,
                                   double allowed, double *error) {
    int64_t size = matrix_of(p) + p->HV * p->c.K * p->c.K;
    *error = tensor_error(&x->summaries, exact, true);
    for (int64_t i = 0; i < x->outgoing_rows.shape[0]; i++) {
        int64_t n = (int64_t)tensor_get(&x->outgoing_rows, i);
        for (int64_t e = 0; e < size && (n < 0 || p->slot[n] < 0); e++)
            if (tensor_get(&x->summaries, i * size + e) != 0)
                return "a summary of nothing is not 0";
    }
    return *error <= allowed ? NULL : "summaries are off";
}

struct halves {
    int64_t C, S;
};

static void prefill_level(struct check *check, struct prefill_problem *p, const struct prefill_results *exact,
                          const char *level, const void *context) {
    const struct halves *halves = context;
    struct random random = random_named(check->seed, p->c.name);
    struct prefill_problem copy = *p;
    struct prefill_results r, oracle, begun, uncut;
    struct rows x, y;
    struct tensor kept;
    struct call call, other;
    flash_kda_backend backend = level_backend(level);
    double error = 0;
    char text[300] = "";
    prefill_results_make(&uncut, p);
    const char *wrong = prefill_run(p, &uncut, backend, FILL_NAN);
    tensor_clone(&kept, &p->initial_state);
    struct random same = random;
    make_rows(&copy, &x, halves->C, halves->S, &random);
    prefill_results_make(&r, &copy); /* in place: from the poisoned states */
    prefill_results_make(&oracle, &copy);
    flash_kda_prefill_args args = prefill_bind(&copy, &r, backend);
    flash_kda_prefill_args exact_args = prefill_bind(&copy, &oracle, FLASH_KDA_BACKEND_REFERENCE);
    bind_rows(&args, &x);
    const struct arguments all = arguments_of_prefill(&args);
    clone_results(&begun, &r);
    if (!wrong)
        wrong = halves_begin(&call, &all);
    if (!wrong)
        wrong = strayed(&copy, &x, false, &r, &begun);
    prefill_results_free(&begun);
    clone_results(&begun, &r);
    const char *said = halves_finish(&call, &all, !wrong);
    wrong = wrong ? wrong : said;
    if (!wrong)
        wrong = strayed(&copy, &x, true, &r, &begun);
    /* The oracle's halves. */
    for (int64_t i = 0; i < tensor_count(&kept); i++)
        tensor_set(&copy.initial_state, i, tensor_get(&kept, i));
    make_rows(&copy, &y, halves->C, halves->S, &same);
    bind_rows(&exact_args, &y);
    const struct arguments exact_all = arguments_of_prefill(&exact_args);
    said = halves_begin(&other, &exact_all);
    wrong = wrong ? wrong : said;
    said = halves_finish(&other, &exact_all, !said);
    wrong = wrong ? wrong : said;
    bool rounds = level_rounds(level, &args);
    const struct bf16_tolerance any = BF16_ANY;
    double bf16 = TOLERANCE_BF16_MARGIN * (1 + any.few / sqrt((double)p->T)) * any.state;
    if (!wrong)
        wrong = summaries_wrong(&copy, &x, &y.summaries, rounds ? bf16 : p->c.fp32_tolerance, &error);
    const struct tensor *results[] = {&r.out, &r.final, prefill_checkpoints(&r)};
    const struct tensor *whole[] = {&uncut.out, &uncut.final, prefill_checkpoints(&uncut)};
    const struct tensor *expected[] = {&exact->out, &exact->final, &exact->checkpoints};
    const struct prefill_output *outputs[] = {&p->out, &p->final, &p->checkpoints};
    append_text(text, sizeof text, "summaries %.1e", error);
    bool good = !wrong;
    for (int i = 0; i < 3; i++)
        if (outputs[i]->ndim) {
            double e = prefill_error(results[i], expected[i], outputs[i], true);
            double allowed =
                fmax(p->c.fp32_tolerance, 1.15 * prefill_error(whole[i], expected[i], outputs[i], true));
            append_text(text, sizeof text, ", %.1e", e);
            good = good && e <= allowed;
        }
    check_report(check, good, level, p->c.name, wrong ? wrong : text);
    for (int64_t i = 0; i < tensor_count(&kept); i++)
        tensor_set(&p->initial_state, i, tensor_get(&kept, i));
    tensor_free(&kept);
    free_rows(&x);
    free_rows(&y);
    prefill_results_free(&begun);
    prefill_results_free(&r);
    prefill_results_free(&oracle);
    prefill_results_free(&uncut);
}

static const int64_t lengths[] = {70, 0, 33, 1, 64};
enum { SEQUENCES = sizeof lengths / sizeof *lengths };

static struct prefill_case case_of(int i) {
    static const int64_t dims[][2] = {{64, 64}, {128, 48}, {96, 130}, {256, 16}};
    static const enum checkpoints kept[] = {CHECKPOINTS_NONE, CHECKPOINTS_EVERY, CHECKPOINTS_OFFSETS_3,
                                            CHECKPOINTS_INDEXED};
    struct prefill_case c = prefill_case_plain();
    prefill_case_set_gate(&c, (flash_kda_gate)(i % 3));
    c.beta_mode = (flash_kda_beta)(i / 2 % 3);
    c.sequences = SEQUENCES;
    memcpy(c.lengths, lengths, sizeof lengths);
    c.packing = i % 4 == 3 ? PACKING_DENSE : PACKING_INT32;
    for (int n = 0; n < SEQUENCES && c.packing == PACKING_DENSE; n++)
        c.lengths[n] = 45;
    c.K = dims[i % 4][0];
    c.V = dims[i % 4][1];
    c.group = 1 + i / 3 % 2;
    c.qk_norm = i % 5 != 4;
    c.fill = c.qk_norm && c.beta_mode == FLASH_KDA_BETA_SIGMOID ? fill_remembering : NULL;
    c.layout = i / 2 % 2 ? FLASH_KDA_STATE_K_FIRST : FLASH_KDA_STATE_V_FIRST;
    c.pool = i % 3 == 1;
    c.initial = STORAGE_FP32;
    c.final = i % 4 == 1 ? STORAGE_IN_PLACE : STORAGE_FP32;
    c.checkpoints = kept[i / 2 % 4];
    if (c.checkpoints == CHECKPOINTS_INDEXED && c.packing == PACKING_DENSE)
        c.checkpoints = CHECKPOINTS_EVERY;
    c.threads = i % 3 ? 2 : 16;
    return c;
}

static void prefill_cases(struct check *check) {
    static const struct halves counts[] = {{0, 0}, {1, 1}, {2, 2},        {SEQUENCES, SEQUENCES},
                                           {2, 0}, {0, 1}, {SEQUENCES, 1}};
    for (int i = 0; i < 21; i++) {
        const struct halves *halves = &counts[i % 7];
        struct prefill_case c = case_of(i);
        snprintf(c.name, sizeof c.name, "halves %d: %d rows come in, %d go on, gate %s, K %d, V %d", i,
                 (int)halves->C, (int)halves->S, prefill_gate_names[c.gate], (int)c.K, (int)c.V);
        prefill_examine(check, &c, prefill_level, halves);
    }
}

/* All in bf16, K = V = 128, as above. */
static void bf16_cases(struct check *check) {
    static const struct halves counts[] = {{1, 1}, {SEQUENCES, SEQUENCES}, {2, 1}, {0, 2}};
    for (int i = 0; i < 8; i++) {
        const struct halves *halves = &counts[i % 4];
        struct prefill_case c = case_of(i);
        prefill_case_set_gate(&c, i % 2 ? FLASH_KDA_GATE_SOFTPLUS : FLASH_KDA_GATE_SIGMOID);
        for (int n = 0; n < SEQUENCES && check_tests_cuda(check) && !check->quick; n++)
            c.lengths[n] *= 6;
        c.K = c.V = 128;
        c.qk_norm = true;
        c.beta_mode = FLASH_KDA_BETA_SIGMOID;
        c.fill = fill_remembering;
        c.checkpoints = i % 3 == 2 ? CHECKPOINTS_EVERY : CHECKPOINTS_NONE;
        c.every = 64;
        c.q_type = c.k_type = c.v_type = c.g_type = c.beta_type = c.out_type = TYPE_BF16;
        snprintf(c.name, sizeof c.name, "halves bf16 %d: %d rows come in, %d go on, gate %s", i, (int)halves->C,
                 (int)halves->S, prefill_gate_names[c.gate]);
        prefill_examine(check, &c, prefill_level, halves);
    }
}

#ifdef CHECK_CUDA
/* BEGIN captured with some rows and replayed with others, of as many. */
static const char *replay_differs(struct prefill_problem *p, struct random *r) {
    struct prefill_results results[3]; /* captured, replayed, called */
    struct rows rows[3];
    flash_kda_prefill_args args[3];
    struct arguments all[3];
    struct tensor kept;
    const char *wrong = NULL;
    tensor_clone(&kept, &p->initial_state);
    for (int i = 0; i < 3; i++) {
        struct random same = *r; /* the last two have the same rows */
        prefill_results_make(&results[i], p);
        args[i] = prefill_bind(p, &results[i], FLASH_KDA_BACKEND_CUDA);
        make_rows(p, &rows[i], 2, 2, i ? &same : r);
        bind_rows(&args[i], &rows[i]);
        args[i].phase = FLASH_KDA_PHASE_BEGIN;
        all[i] = arguments_of_prefill(&args[i]);
        for (int64_t e = 0; e < tensor_count(&kept); e++) /* none is poison here */
            tensor_set(&p->initial_state, e, tensor_get(&kept, e));
    }
    tensor_free(&kept);
    wrong = replay_changed(&all[0], &all[1], FILL_NAN);
    if (!wrong)
        wrong = call_run(&all[2], MEMORY_DEVICE, FILL_NAN);
    if (!wrong && (!tensor_same(&results[1].final, &results[2].final) ||
                   !tensor_same(&rows[1].summaries, &rows[2].summaries)))
        wrong = "other bits than a call that was not captured";
    for (int i = 0; i < 3; i++) {
        prefill_results_free(&results[i]);
        free_rows(&rows[i]);
    }
    return wrong;
}

static void graphs(struct check *check) {
    for (int i = 0; i < 2 && check_tests_cuda(check); i++) {
        struct prefill_case c = case_of(4 * i + 1);
        c.K = c.V = 128;
        c.qk_norm = true;
        c.beta_mode = FLASH_KDA_BETA_SIGMOID;
        c.final = STORAGE_FP32;
        c.checkpoints = CHECKPOINTS_NONE;
        if (i)
            c.q_type = c.k_type = c.v_type = c.g_type = c.beta_type = c.out_type = TYPE_BF16;
        prefill_case_set_gate(&c, FLASH_KDA_GATE_SIGMOID);
        snprintf(c.name, sizeof c.name, "halves, a graph replayed with other rows, %s", i ? "bf16" : "fp32");
        if (!check_wanted(check, c.name))
            continue;
        if (!replay_is_possible()) {
            check_leave_out(check, "cuda", c.name, "graphs are not emulated");
            continue;
        }
        struct random r = random_named(check->seed, c.name);
        struct prefill_problem p;
        prefill_problem_make(&p, &c, &r);
        const char *wrong = replay_differs(&p, &r);
        check_report(check, !wrong, "cuda", c.name, wrong ? wrong : "the same bits");
        prefill_problem_free(&p);
    }
}

#endif

/* What the halves of one long sequence take beside the whole, with --bench. */
static void time_halves(struct check *check, const struct prefill_case *c, const char *level) {
    struct random r = random_named(check->seed, c->name);
    struct prefill_problem p;
    struct prefill_results results;
    struct rows x;
    char text[200];
    level_select(level);
    prefill_problem_make(&p, c, &r);
    prefill_results_make(&results, &p);
    flash_kda_prefill_args args = prefill_bind(&p, &results, level_backend(level));
    struct arguments all = arguments_of_prefill(&args);
    double whole = seconds_of(&all);
    make_rows(&p, &x, 1, 1, &r);
    tensor_set(&x.incoming_rows, 0, 0);
    tensor_set(&x.outgoing_rows, 0, 0);
    bind_rows(&args, &x);
    args.phase = FLASH_KDA_PHASE_BEGIN;
    all = arguments_of_prefill(&args);
    double begin = seconds_of(&all);
    args.phase = FLASH_KDA_PHASE_FINISH;
    all = arguments_of_prefill(&args);
    double finish = seconds_of(&all);
    snprintf(text, sizeof text, "whole %.4f ms, begin %.4f, finish %.4f: %.3f times", whole * 1e3, begin * 1e3,
             finish * 1e3, (begin + finish) / whole);
    check_report(check, begin > 0 && finish > 0 && whole > 0, level, c->name, text);
    free_rows(&x);
    prefill_results_free(&results);
    prefill_problem_free(&p);
}

static void timed_cases(struct check *check) {
    static const int64_t shapes[][2] = {{8, 8192}, {16, 8192}, {32, 8192}, {64, 8192}, {8, 65536}};
    for (size_t i = 0; check->bench && i < sizeof shapes / sizeof *shapes; i++) {
        struct prefill_case c = prefill_case_plain();
        c.H = shapes[i][0];
        c.lengths[0] = check->quick ? shapes[i][1] / 8 : shapes[i][1];
        c.K = c.V = 128;
        c.threads = 0;
        c.q_type = c.k_type = c.v_type = c.g_type = c.beta_type = c.out_type = TYPE_BF16;
        c.fill = fill_remembering;
        snprintf(c.name, sizeof c.name, "halves timed: %d heads, %lld tokens", (int)c.H,
                 (long long)c.lengths[0]);
        for (int l = 0; check_wanted(check, c.name) && l < check->level_count; l++)
            time_halves(check, &c, check->levels[l]);
    }
}

void parallel_halves(struct check *check) {
    prefill_cases(check);
    bf16_cases(check);
#ifdef CHECK_CUDA
    graphs(check);
#endif
    timed_cases(check);
}
