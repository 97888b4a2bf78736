/* SPDX-License-Identifier: MIT */
/* What backward promises on CUDA alone: graphs that are replayed with other contents, indices in device memory that are out
 * of range; and a sequence's bits in a batch and alone. */
#include "backward_compare.h"
#include "replay.h"

#include <stdio.h>
#include <string.h>

static const struct {
    enum packing packing;
    enum checkpoints checkpoints;
    flash_kda_gate gate;
    bool trained; /* as models are: a level may have kernels for it */
    const char *name;
} kinds[] = {
    {PACKING_INT32, CHECKPOINTS_NONE, FLASH_KDA_GATE_SIGMOID, false, "int32"},
    {PACKING_INT64, CHECKPOINTS_EVERY, FLASH_KDA_GATE_SOFTPLUS, false, "int64, states kept"},
    {PACKING_INT32, CHECKPOINTS_EVERY, FLASH_KDA_GATE_SIGMOID, true, "int32, 128 channels"},
    {PACKING_DENSE, CHECKPOINTS_NONE, FLASH_KDA_GATE_SIGMOID, false, "dense"},
    {PACKING_DENSE, CHECKPOINTS_EVERY, FLASH_KDA_GATE_SOFTPLUS, true, "dense, 128 channels"},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

static struct backward_case case_of_kind(int i) {
    static const int64_t lengths[] = {200, 0, 33, 130, 1};
    struct backward_case b = backward_case_plain();
    struct prefill_case *c = &b.forward;
    prefill_case_set_gate(c, kinds[i].gate);
    c->packing = kinds[i].packing;
    c->sequences = sizeof lengths / sizeof *lengths;
    for (int n = 0; n < c->sequences; n++)
        c->lengths[n] = c->packing == PACKING_DENSE ? 140 : lengths[n];
    c->checkpoints = kinds[i].checkpoints;
    c->every = 64;
    c->group = 2;
    c->batch_invariant = true;
    c->q_type = c->k_type = c->v_type = c->g_type = c->out_type = TYPE_BF16;
    if (kinds[i].trained) {
        c->K = c->V = 128;
        c->beta_type = TYPE_BF16;
        for (int g = 0; g < DA_LOG; g++)
            b.types[g] = TYPE_BF16;
    }
    return b;
}

static bool wanted(const struct check *check, struct backward_case *b, const char *what, int kind) {
    snprintf(b->forward.name, sizeof b->forward.name, "backward, %s, %s", what, kinds[kind].name);
    return check_wanted(check, b->forward.name);
}

static void report(struct check *check, const struct backward_case *b, const char *wrong, const char *right) {
    check_report(check, !wrong, "cuda", b->forward.name, wrong ? wrong : right);
}

/* ---- Graphs ------------------------------------------------------------------------------------ */

static const char *replay_differs(const struct backward_problem *captured,
                                  const struct backward_problem *changed) {
    struct backward_results first, replayed, called;
    backward_results_make(&first, captured);
    backward_results_make(&replayed, changed);
    backward_results_make(&called, changed);
    const flash_kda_backward_args before = backward_bind(captured, &first, FLASH_KDA_BACKEND_CUDA);
    const flash_kda_backward_args after = backward_bind(changed, &replayed, FLASH_KDA_BACKEND_CUDA);
    const char *wrong = backward_run(changed, &called, FLASH_KDA_BACKEND_CUDA, FILL_NAN);
    const struct arguments captured_args = arguments_of_backward(&before),
                           changed_args = arguments_of_backward(&after);
    if (!wrong)
        wrong = replay_changed(&captured_args, &changed_args, FILL_NAN);
    for (int i = 0; i < GRADIENTS && !wrong; i++)
        if (called.tensors[i].block && !tensor_same(&replayed.tensors[i], &called.tensors[i]))
            wrong = "other bits than a call that was not captured";
    backward_results_free(&first);
    backward_results_free(&replayed);
    backward_results_free(&called);
    return wrong;
}

/* As many tokens and sequences, all else different. */
static void graphs(struct check *check) {
    for (int i = 0; i < KINDS; i++) {
        struct backward_case b = case_of_kind(i);
        struct prefill_case *c = &b.forward;
        struct backward_problem captured, changed;
        if (!wanted(check, &b, "a graph replayed with other contents", i))
            continue;
        if (!replay_is_possible()) {
            check_leave_out(check, "cuda", c->name, "for it needs graphs");
            continue;
        }
        struct random r = random_named(check->seed, c->name);
        const char *wrong = backward_problem_make(&captured, &b, &r);
        for (int n = 0; n < c->sequences / 2; n++) {
            int64_t length = c->lengths[n];
            c->lengths[n] = c->lengths[c->sequences - 1 - n];
            c->lengths[c->sequences - 1 - n] = length;
        }
        const char *also_wrong = backward_problem_make(&changed, &b, &r);
        wrong = wrong ? wrong : also_wrong;
        report(check, &b, wrong ? wrong : replay_differs(&captured, &changed), "the same bits as a call");
        backward_problem_free(&captured);
        backward_problem_free(&changed);
    }
}

/* ---- Wild indices ------------------------------------------------------------------------------ */

static void spoil(struct tensor *t, struct random *r) {
    static const double wild[] = {-2, -1000, 150, 1000, 2147483647, -2147483648.};
    for (int64_t i = 0; t->block && i < tensor_count(t); i++)
        if (random_below(r, 2))
            tensor_set(t, i, wild[random_below(r, sizeof wild / sizeof *wild)]);
}

/* What gradients hold then means nothing, but nothing outside is written. */
static void wild_indices(struct check *check) {
    enum { TRIES = 4 };
    for (int i = 0; i < KINDS; i++) {
        struct backward_case b = case_of_kind(i);
        struct backward_problem p;
        struct backward_results results;
        if (kinds[i].packing == PACKING_DENSE || !wanted(check, &b, "indices out of range", i))
            continue;
        struct random r = random_named(check->seed, b.forward.name);
        const char *wrong = NULL;
        for (int n = 0; n < TRIES && !wrong; n++) {
            wrong = backward_problem_make(&p, &b, &r);
            spoil(&p.p.cu_seqlens, &r);
            spoil(&p.p.checkpoint_cu_starts, &r);
            backward_results_make(&results, &p);
            if (!wrong)
                wrong = backward_run(&p, &results, FLASH_KDA_BACKEND_CUDA, FILL_ALWAYS);
            backward_results_free(&results);
            backward_problem_free(&p);
        }
        report(check, &b, wrong, "nothing outside is written");
    }
}

/* ---- A sequence in a batch and alone ----------------------------------------------------------- */

/* Entry n of dimension `dim`. */
static const DLTensor *view(struct tensor *to, const DLTensor *t, int dim, int64_t n) {
    if (!t)
        return NULL;
    tensor_view(to, t);
    tensor_narrow(to, dim, n, 1);
    return &to->dl;
}

static const char *alone_differs(const struct backward_problem *b, const struct backward_results *all,
                                 int64_t n) {
    struct backward_results results;
    struct tensor views[MAX_ARGUMENTS];
    struct argument list[MAX_ARGUMENTS];
    backward_results_make(&results, b);
    flash_kda_backward_args args = backward_bind(b, &results, FLASH_KDA_BACKEND_CUDA);
    int count = backward_list(&args, list);
    for (int i = 0; i < count; i++)
        if (*list[i].tensor && strcmp(list[i].name, "A_log") != 0 && strcmp(list[i].name, "dt_bias") != 0 &&
            strcmp(list[i].name, "dA_log") != 0 && strcmp(list[i].name, "d_dt_bias") != 0)
            *list[i].tensor = view(&views[i], *list[i].tensor, 0, n);
    const struct arguments one = arguments_of_backward(&args);
    const char *wrong = call_run(&one, MEMORY_DEVICE, FILL_NAN);
    for (int i = 0; i < GRADIENTS && !wrong; i++) {
        struct tensor here, there;
        if (i == DA_LOG || i == D_DT_BIAS)
            continue;
        view(&here, &results.tensors[i].dl, 0, n);
        view(&there, &all->tensors[i].dl, 0, n);
        if (!tensor_same(&here, &there))
            wrong = "a sequence has other bits alone than in its batch";
    }
    backward_results_free(&results);
    return wrong;
}

static void batches(struct check *check) {
    for (int i = 0; i < KINDS; i++) {
        struct backward_case b = case_of_kind(i);
        struct backward_problem p;
        struct backward_results all;
        if (kinds[i].packing != PACKING_DENSE || !wanted(check, &b, "sequences alone", i))
            continue;
        struct random r = random_named(check->seed, b.forward.name);
        const char *wrong = backward_problem_make(&p, &b, &r);
        backward_results_make(&all, &p);
        if (!wrong)
            wrong = backward_run(&p, &all, FLASH_KDA_BACKEND_CUDA, FILL_NAN);
        for (int64_t n = 0; n < b.forward.sequences && !wrong; n += 2)
            wrong = alone_differs(&p, &all, n);
        report(check, &b, wrong, "the same bits as in the batch");
        backward_results_free(&all);
        backward_problem_free(&p);
    }
}

void backward_cuda(struct check *check) {
    if (!check_tests_cuda(check))
        return;
    graphs(check);
    wild_indices(check);
    batches(check);
}
