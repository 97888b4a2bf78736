/* SPDX-License-Identifier: MIT */
/* What must hold between runs of prefill: with batch invariance, a sequence has the same bits alone, in any
 * batch and on any number of threads; and a sequence cut in two, its state carried over, is the whole one. */
#include "call.h"
#include "compare.h"
#include "prefill_compare.h"
#include "prefill_families.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- A part of one sequence as a problem of its own -------------------------------------------- */

/* Tokens first .. first + length - 1 of sequence n. */
struct part {
    const struct prefill_problem *p;
    int64_t n, first, length;
    const DLTensor *initial; /* NULL: the sequence's own */
    bool packed;             /* called with cu_seqlens of one sequence, not as a dense batch of one */
    int threads;
};

/* Runs a part; out [1, length, HV, V] and final [1, HV, ..] are of the problem's dtypes. */
static const char *run_part(const struct part *part, struct tensor *out, struct tensor *final) {
    const struct prefill_problem *p = part->p;
    struct tensor views[TOKEN_ARGUMENTS], initial;
    bool dense = p->c.packing == PACKING_DENSE;
    tensor_view(&initial, &p->initial_state.dl);
    tensor_narrow(&initial, 0, part->n, 1);
    int64_t boundaries[2] = {0, part->length}, two = 2;
    DLTensor cu_seqlens = {
        .data = boundaries, .device = {kDLCPU, 0}, .ndim = 1, .dtype = TYPE_INT64, .shape = &two};

    flash_kda_prefill_args args = p->args;
    prefill_narrow(&args, views, 0, dense ? part->n : 0, 1);
    prefill_narrow(&args, views, 1, (dense ? 0 : p->starts[part->n]) + part->first, part->length);
    args.initial_state = part->initial ? part->initial : &initial.dl;
    args.cu_seqlens = part->packed ? &cu_seqlens : NULL;
    args.out = &out->dl;
    args.final_state = &final->dl;
    args.num_threads = part->threads;
    return prefill_call(&args, FILL_NAN);
}

static void make_part_results(const struct prefill_problem *p, int64_t length, struct tensor *out,
                              struct tensor *final) {
    const struct tensor_layout compact = {SPACING_COMPACT, 0, false};
    int64_t rows[4] = {1, length, p->HV, p->c.V}, states[4];
    memcpy(states, p->final.shape, sizeof states);
    states[0] = 1;
    tensor_make(out, p->out.type, 4, rows, compact);
    tensor_make(final, p->final.type, 4, states, compact);
}

static bool same_elements(const struct tensor *a, int64_t first_a, const struct tensor *b, int64_t first_b,
                          int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        double x = tensor_get(a, first_a + i), y = tensor_get(b, first_b + i);
        if (x != y || signbit(x) != signbit(y))
            return false;
    }
    return true;
}

/* ---- Batch invariance -------------------------------------------------------------------------- */

static const char *alone_differs(const struct part *part, const struct prefill_results *batch) {
    const struct prefill_problem *p = part->p;
    struct tensor out, final;
    int64_t row = p->HV * p->c.V, matrix = p->HV * p->c.K * p->c.V;
    int64_t first = p->c.packing == PACKING_DENSE ? part->n * p->T : p->starts[part->n];
    make_part_results(p, part->length, &out, &final);
    const char *wrong = run_part(part, &out, &final);
    if (!wrong && !same_elements(&out, 0, &batch->out, first * row, part->length * row))
        wrong = "out of a sequence alone has other bits than in the batch";
    if (!wrong && !same_elements(&final, 0, &batch->final, part->n * matrix, matrix))
        wrong = "final_state of a sequence alone has other bits than in the batch";
    tensor_free(&out);
    tensor_free(&final);
    return wrong;
}

static const char *threads_differ(struct prefill_problem *p, const struct prefill_results *batch, int threads) {
    struct prefill_results r;
    prefill_results_make(&r, p);
    p->args.num_threads = threads;
    const char *wrong = prefill_run(p, &r, p->args.backend, FILL_NAN);
    if (!wrong && !prefill_same(&r, batch))
        wrong = "another number of threads gave other bits";
    prefill_results_free(&r);
    return wrong;
}

static const char *invariance_broken(struct prefill_problem *p) {
    static const int threads[] = {1, 3, 16};
    enum { THREADS = sizeof threads / sizeof *threads };
    struct prefill_results batch;
    prefill_results_make(&batch, p);
    const char *wrong = prefill_run(p, &batch, p->args.backend, FILL_NAN);
    for (int i = 0; i < THREADS && !wrong; i++)
        wrong = threads_differ(p, &batch, threads[i]);
    for (int64_t n = 0; n < p->N && !wrong; n++)
        for (int i = 0; i < THREADS && !wrong; i++) {
            const struct part part = {
                .p = p, .n = n, .length = p->c.lengths[n], .packed = (n + i) % 2, .threads = threads[i]};
            wrong = alone_differs(&part, &batch);
        }
    prefill_results_free(&batch);
    return wrong;
}

static void invariance_case(struct check *check, const struct prefill_case *c) {
    if (!check_wanted(check, c->name))
        return;
    struct random r = random_named(check->seed, c->name);
    struct prefill_problem p;
    prefill_problem_make(&p, c, &r);
    for (int i = 0; i < check->level_count; i++) {
        level_select(check->levels[i]);
        p.args.backend = level_backend(check->levels[i]);
        const char *wrong = invariance_broken(&p);
        check_report(check, !wrong, check->levels[i], c->name, wrong ? wrong : "the same bits");
    }
    prefill_problem_free(&p);
}

static struct prefill_case invariant(flash_kda_gate gate, bool dense, bool bf16) {
    static const int64_t packed[] = {300, 1, 900, 0, 64, 1400};
    struct prefill_case c = prefill_case_plain();
    prefill_case_set_gate(&c, gate);
    c.batch_invariant = true;
    c.fill = fill_remembering;
    c.H = 1;
    c.packing = dense ? PACKING_DENSE : PACKING_INT64;
    c.sequences = dense ? 3 : sizeof packed / sizeof *packed;
    for (int n = 0; n < c.sequences; n++)
        c.lengths[n] = dense ? 1000 : packed[n];
    if (bf16)
        c.q_type = c.k_type = c.v_type = c.g_type = c.out_type = TYPE_BF16;
    snprintf(c.name, sizeof c.name, "batch invariance, %s, gate %s, %s", dense ? "dense" : "packed",
             prefill_gate_names[gate], bf16 ? "bf16" : "fp32");
    return c;
}

static void batch_invariance(struct check *check) {
    for (int gate = 0; gate < 3; gate++)
        for (int kind = 0; kind < (check->quick ? 2 : 4); kind++) {
            struct prefill_case c = invariant((flash_kda_gate)gate, kind % 2, kind / 2);
            invariance_case(check, &c);
        }
}

/* ---- Carried state ----------------------------------------------------------------------------- */

/* Rows of the whole that a part covers, as an output of its own. */
static double part_error(const struct tensor *x, const struct tensor *ref, int64_t first_row) {
    struct tensor rows;
    tensor_view(&rows, &ref->dl);
    tensor_narrow(&rows, 1, first_row, x->shape[1]);
    return tensor_error(x, &rows, true);
}

/* Error ratio of a sequence run in two parts, cut after `cut` tokens; *wrong says what failed. */
static double carried_error(const struct prefill_problem *p, const struct prefill_results *expected,
                            int64_t cut, const char **wrong) {
    struct tensor out[2], final[2];
    int64_t first[2] = {0, cut}, length[2] = {cut, p->T - cut};
    double error = 0;
    *wrong = NULL;
    for (int i = 0; i < 2; i++) {
        make_part_results(p, length[i], &out[i], &final[i]);
        const struct part part = {.p = p,
                                  .first = first[i],
                                  .length = length[i],
                                  .initial = i ? &final[0].dl : NULL,
                                  .packed = i,
                                  .threads = p->c.threads};
        if (!*wrong)
            *wrong = run_part(&part, &out[i], &final[i]);
        if (!*wrong)
            error = fmax(error, part_error(&out[i], &expected->out, first[i]));
    }
    if (!*wrong)
        error = fmax(error, prefill_error(&final[1], &expected->final, &p->final, true));
    for (int i = 0; i < 2; i++) {
        tensor_free(&out[i]);
        tensor_free(&final[i]);
    }
    return error;
}

static void carried_level(struct check *check, struct prefill_problem *p,
                          const struct prefill_results *expected, const char *level, const void *context) {
    (void)context;
    p->args.backend = level_backend(level);
    static const int64_t cuts[] = {1, 16, 31, 100, 256};
    const char *wrong = NULL;
    bool bf16_products = p->args.backend == FLASH_KDA_BACKEND_CUDA;
    double worst = 0, at_most = bf16_products ? TOLERANCE_BF16_MARGIN * BF16_ANY.out : p->c.fp32_tolerance;
    char text[100];
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts && !wrong; i++)
        worst = fmax(worst, carried_error(p, expected, cuts[i], &wrong));
    snprintf(text, sizeof text, "out and state %.1e", worst);
    check_report(check, !wrong && worst <= at_most, level, p->c.name, wrong ? wrong : text);
}

static void carried_state(struct check *check) {
    for (int gate = 0; gate < 3; gate++) {
        struct prefill_case c = prefill_case_plain();
        c.gate = (flash_kda_gate)gate;
        c.A_log = c.dt_bias = gate != FLASH_KDA_GATE_NONE;
        c.lengths[0] = 257;
        c.fill = fill_remembering;
        c.layout = gate == 1 ? FLASH_KDA_STATE_K_FIRST : FLASH_KDA_STATE_V_FIRST;
        snprintf(c.name, sizeof c.name, "a sequence in two calls, gate %d", gate);
        prefill_examine(check, &c, carried_level, NULL);
    }
}

void prefill_properties(struct check *check) {
    /* The oracle runs token by token: these properties are its definition. */
    if (level_backend(check->levels[0]) == FLASH_KDA_BACKEND_REFERENCE)
        return;
    batch_invariance(check);
    carried_state(check);
}
