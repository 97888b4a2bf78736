/* SPDX-License-Identifier: MIT */
/* What decode promises on CUDA alone: graphs that are replayed with other contents, indices in device memory that are out
 * of range, managed memory; and what its kernels for many states and few make of a batch. */
#include "calls.h"
#include "decode_case.h"
#include "decode_families.h"
#include "replay.h"

#include <stdio.h>

/* Calls with every index tensor. */
static const struct {
    enum packing packing;
    int64_t columns;
    bool accepted, keep_state;
    const char *name;
} kinds[] = {
    {PACKING_DENSE, 0, false, false, "dense"},
    {PACKING_INT32, 16, false, false, "verify, int32"},
    {PACKING_INT64, 16, true, false, "verify, accepted, int64"},
    {PACKING_INT32, 0, true, true, "state kept, int32"},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

static struct decode_case case_of_kind(int i) {
    static const int64_t lengths[] = {4, 0, 16, 1, 2};
    struct decode_case c = decode_case_plain();
    c.tokens.packing = kinds[i].packing;
    c.tokens.sequences = sizeof lengths / sizeof *lengths;
    for (int n = 0; n < c.tokens.sequences; n++)
        c.tokens.lengths[n] = kinds[i].packing == PACKING_DENSE ? 1 : lengths[n];
    c.tokens.inputs = SPACING_FUSED;
    c.tokens.q_type = c.tokens.k_type = c.tokens.v_type = c.tokens.g_type = c.tokens.out_type = TYPE_BF16;
    c.columns = kinds[i].columns;
    c.num_accepted = kinds[i].columns;
    c.accepted = kinds[i].accepted;
    c.keep_state = kinds[i].keep_state;
    c.tokens.flags = (enum flags)(i % 4);
    c.tokens.padding_slot = i % 2;
    c.tokens.wide_indices = i / 2;
    return c;
}

static bool wanted(const struct check *check, struct decode_case *c, const char *what, int kind) {
    snprintf(c->tokens.name, sizeof c->tokens.name, "decode, %s, %s", what, kinds[kind].name);
    return check_wanted(check, c->tokens.name);
}

static void report(struct check *check, const struct decode_case *c, const char *wrong, const char *right) {
    check_report(check, !wrong, "cuda", c->tokens.name, wrong ? wrong : right);
}

static const char *differ(const struct decode_results *a, const struct decode_results *b) {
    bool same = tensor_same(&a->out, &b->out) && tensor_same(&a->state, &b->state);
    return same ? NULL : "other bits than an ordinary call";
}

/* ---- Graphs ------------------------------------------------------------------------------------ */

static const char *replay_differs(const struct decode_problem *captured, const struct decode_problem *changed) {
    struct decode_results first, replayed, called;
    decode_results_make(&first, captured);
    decode_results_make(&replayed, changed);
    decode_results_make(&called, changed);
    const flash_kda_decode_args before = decode_bind(captured, &first, FLASH_KDA_BACKEND_CUDA);
    const flash_kda_decode_args after = decode_bind(changed, &replayed, FLASH_KDA_BACKEND_CUDA);
    const flash_kda_decode_args ordinary = decode_bind(changed, &called, FLASH_KDA_BACKEND_CUDA);
    const char *wrong = decode_call(&ordinary);
    const struct arguments captured_args = arguments_of_decode(&before),
                           changed_args = arguments_of_decode(&after);
    if (!wrong)
        wrong = replay_changed(&captured_args, &changed_args, FILL_NONE);
    if (!wrong)
        wrong = differ(&replayed, &called);
    decode_results_free(&first);
    decode_results_free(&replayed);
    decode_results_free(&called);
    return wrong;
}

static void graphs(struct check *check) {
    for (int i = 0; i < KINDS; i++) {
        struct decode_case c = case_of_kind(i);
        if (!wanted(check, &c, "a graph replayed with other contents", i))
            continue;
        struct random r = random_named(check->seed, c.tokens.name);
        struct decode_problem captured, changed = {.slots = 0};
        const char *wrong = decode_problem_make(&captured, &c, false, &r);
        for (int n = 0; n < c.tokens.sequences / 2; n++) {
            int64_t length = c.tokens.lengths[n], other = c.tokens.sequences - 1 - n;
            c.tokens.lengths[n] = c.tokens.lengths[other];
            c.tokens.lengths[other] = length;
        }
        if (!wrong)
            wrong = decode_problem_make(&changed, &c, false, &r);
        report(check, &c, wrong ? wrong : replay_differs(&captured, &changed), "the same bits as a call");
        decode_problem_free(&captured);
        decode_problem_free(&changed);
    }
}

/* ---- Wild indices ------------------------------------------------------------------------------ */

static void mark_all(bool *rows, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        rows[i] = true;
}

/* What rows hold afterwards means nothing, but padding between them, and after the tensors, is as it was. */
static const char *wild_indices_break(struct decode_problem *d, struct random *r) {
    struct decode_results results, before;
    struct tensor *const indices[] = {&d->p.cu_seqlens, &d->state_indices, &d->num_accepted_tokens,
                                      &d->accepted};
    decode_results_make(&results, d);
    decode_results_make(&before, d);
    for (size_t i = 0; i < sizeof indices / sizeof *indices; i++)
        spoil_indices(indices[i], r);
    const flash_kda_decode_args args = decode_bind(d, &results, FLASH_KDA_BACKEND_CUDA);
    const char *wrong = decode_call(&args);
    mark_all(d->out_written, d->p.B * d->p.T);
    mark_all(d->state_written, d->c.keep_state ? 0 : d->slots);
    if (!wrong && !tensor_unchanged(&results.out, &before.out, 2, d->out_written, NULL))
        wrong = "wrote to padding of out";
    if (!wrong && !tensor_unchanged(&results.state, &before.state, 1, d->state_written, NULL))
        wrong = "wrote to padding of state";
    decode_results_free(&results);
    decode_results_free(&before);
    return wrong;
}

static void wild_indices(struct check *check) {
    for (int i = 0; i < KINDS; i++) {
        struct decode_case c = case_of_kind(i);
        if (!wanted(check, &c, "indices out of range", i))
            continue;
        struct random r = random_named(check->seed, c.tokens.name);
        const char *wrong = NULL;
        for (int round = 0; round < 8 && !wrong; round++) {
            struct decode_problem d;
            wrong = decode_problem_make(&d, &c, false, &r);
            if (!wrong)
                wrong = wild_indices_break(&d, &r);
            decode_problem_free(&d);
        }
        report(check, &c, wrong, "nothing else was written");
    }
}

/* ---- Memory ------------------------------------------------------------------------------------ */

static void managed_memory(struct check *check) {
    struct decode_case c = case_of_kind(1);
    if (!wanted(check, &c, "managed memory", 1))
        return;
    struct random r = random_named(check->seed, c.tokens.name);
    struct decode_problem d;
    struct decode_results managed, plain;
    const char *wrong = decode_problem_make(&d, &c, false, &r);
    decode_results_make(&managed, &d);
    decode_results_make(&plain, &d);
    const flash_kda_decode_args in_managed = decode_bind(&d, &managed, FLASH_KDA_BACKEND_CUDA);
    const struct arguments args = arguments_of_decode(&in_managed);
    const flash_kda_decode_args in_plain = decode_bind(&d, &plain, FLASH_KDA_BACKEND_CUDA);
    if (!wrong)
        wrong = call_run(&args, MEMORY_MANAGED, FILL_NONE);
    if (!wrong)
        wrong = decode_call(&in_plain);
    if (!wrong)
        wrong = differ(&managed, &plain);
    report(check, &c, wrong, "the same bits as in device memory");
    decode_results_free(&managed);
    decode_results_free(&plain);
    decode_problem_free(&d);
}

/* ---- Many states and few ----------------------------------------------------------------------- */

static const struct {
    int64_t H, group, V;
} batches[] = {{16, 2, 128}, {20, 2, 128}, {8, 2, 256}, {300, 1, 128}};

static struct decode_case case_of_batch(int i, DLDataType state_type) {
    struct decode_case c = decode_case_plain();
    c.state_type = state_type;
    c.tokens.H = batches[i].H, c.tokens.group = batches[i].group;
    c.tokens.K = 128, c.tokens.V = batches[i].V;
    c.tokens.sequences = 3;
    for (int n = 0; n < c.tokens.sequences; n++)
        c.tokens.lengths[n] = 1;
    c.tokens.q_type = c.tokens.k_type = c.tokens.v_type = c.tokens.out_type = TYPE_BF16;
    c.tokens.g_type = c.tokens.beta_type = TYPE_BF16;
    c.tokens.inputs = SPACING_FUSED;
    return c;
}

static void compare_batches(struct check *check) {
    const DLDataType types[] = {TYPE_FP32, TYPE_BF16, TYPE_FP16};
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++)
        for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
            struct decode_case c = case_of_batch((int)i, types[t]);
            c.tokens.gate = t ? FLASH_KDA_GATE_SIGMOID : FLASH_KDA_GATE_SOFTPLUS;
            c.keep_state = t == 2 && i % 2;
            c.tokens.flags = (enum flags)((i + t) % 4);
            c.tokens.padding_slot = c.tokens.wide_indices = t == 1;
            snprintf(c.tokens.name, sizeof c.tokens.name, "decode, %lld states, V %lld, %s",
                     c.tokens.sequences * (long long)(c.tokens.H * c.tokens.group), (long long)c.tokens.V,
                     type_name(types[t]));
            decode_compare(check, &c);
        }
}

/* Sequence n of a call alone. */
static const char *decode_alone(const struct decode_problem *d, struct decode_results *results, int64_t n) {
    flash_kda_decode_args args = decode_bind(d, results, FLASH_KDA_BACKEND_CUDA);
    struct tensor views[TOKEN_ARGUMENTS], index;
    decode_narrow(&args, views, 0, n, 1);
    tensor_view(&index, args.state_indices);
    tensor_narrow(&index, 0, n, 1);
    args.state_indices = &index.dl;
    return decode_call(&args);
}

/* Each sequence alone, and all at once: so many states that another kernel would be faster. */
static void batch_invariant(struct check *check) {
    for (int half = 0; half < 2; half++) {
        struct decode_case c = case_of_batch(0, half ? TYPE_BF16 : TYPE_FP32);
        c.tokens.H = 64, c.tokens.batch_invariant = true;
        snprintf(c.tokens.name, sizeof c.tokens.name, "decode, each sequence alone, %s",
                 type_name(c.state_type));
        if (!check_wanted(check, c.tokens.name))
            continue;
        struct random r = random_named(check->seed, c.tokens.name);
        struct decode_problem d;
        struct decode_results alone, together;
        const char *wrong = decode_problem_make(&d, &c, false, &r);
        decode_results_make(&alone, &d);
        decode_results_make(&together, &d);
        const flash_kda_decode_args args = decode_bind(&d, &together, FLASH_KDA_BACKEND_CUDA);
        if (!wrong)
            wrong = decode_call(&args);
        for (int64_t n = 0; n < c.tokens.sequences && !wrong; n++)
            wrong = decode_alone(&d, &alone, n);
        if (!wrong)
            wrong = differ(&alone, &together);
        report(check, &c, wrong, "the same bits as in a batch");
        decode_results_free(&alone);
        decode_results_free(&together);
        decode_problem_free(&d);
    }
}

void decode_cuda(struct check *check) {
    if (!check_tests_cuda(check))
        return;
    graphs(check);
    wild_indices(check);
    managed_memory(check);
    compare_batches(check);
    batch_invariant(check);
#ifdef CHECK_CUDA
    decode_after(check);
#endif
}
