/* SPDX-License-Identifier: MIT */
/* What only the CUDA backend promises: graphs that are replayed with other contents, indices in device memory that
 * are out of range, managed memory, and errors that name a device; and what it takes Hopper to do. */
#include "calls.h"
#include "cluster_copy.h"
#include "device.h"
#include "prefill_compare.h"
#include "prefill_families.h"
#include "replay.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A case whose calls have every index tensor that goes with its kind of checkpoints. */
static struct prefill_case indexed_case(enum packing packing, enum checkpoints checkpoints, bool wide) {
    static const int64_t lengths[] = {65, 0, 33, 130, 1};
    struct prefill_case c = prefill_case_plain();
    c.packing = packing;
    c.sequences = sizeof lengths / sizeof *lengths;
    for (int n = 0; n < c.sequences; n++)
        c.lengths[n] = packing == PACKING_DENSE ? 97 : lengths[n];
    c.pool = true;
    c.checkpoints = checkpoints;
    c.wide_indices = wide;
    c.gate = wide ? FLASH_KDA_GATE_SOFTPLUS : FLASH_KDA_GATE_SIGMOID;
    c.q_type = c.k_type = c.v_type = c.g_type = c.out_type = TYPE_BF16;
    return c;
}

static const struct {
    enum packing packing;
    enum checkpoints checkpoints;
    enum storage final;
    bool wide;
    const char *name;
} kinds[] = {
    {PACKING_INT32, CHECKPOINTS_NONE, STORAGE_FP32, false, "int32"},
    {PACKING_INT64, CHECKPOINTS_EVERY, STORAGE_BF16, false, "int64, checkpoints every 16"},
    {PACKING_INT32, CHECKPOINTS_INDEXED, STORAGE_IN_PLACE, true, "int32, checkpoints by index, in place"},
    {PACKING_INT64, CHECKPOINTS_SHARED_POOL, STORAGE_IN_PLACE, false, "int64, checkpoints in the state pool"},
    {PACKING_INT64, CHECKPOINTS_OFFSETS_3, STORAGE_IN_PLACE, true, "int64, checkpoints at offsets"},
    {PACKING_DENSE, CHECKPOINTS_OFFSETS, STORAGE_FP32, false, "dense, checkpoints at an offset"},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

static struct prefill_case case_of_kind(int i) {
    struct prefill_case c = indexed_case(kinds[i].packing, kinds[i].checkpoints, kinds[i].wide);
    c.final = kinds[i].final;
    c.flags = (enum flags)(i % 4);
    c.padding_slot = i % 2;
    if (i % 2 == 0) {
        c.fused = fused_kinds[0];
        c.fused.conv_type = TYPE_BF16;
        c.conv_states = true;
    }
    return c;
}

static bool wanted(const struct check *check, struct prefill_case *c, const char *what, int kind) {
    snprintf(c->name, sizeof c->name, "%s, %s", what, kinds[kind].name);
    return check_wanted(check, c->name);
}

static void report(struct check *check, const struct prefill_case *c, const char *wrong, const char *right) {
    check_report(check, !wrong, "cuda", c->name, wrong ? wrong : right);
}

static const char *differ(const struct prefill_results *a, const struct prefill_results *b) {
    return prefill_same(a, b) ? NULL : "other bits than a call that was not captured";
}

/* ---- Graphs ------------------------------------------------------------------------------------ */

/* Captured on one problem, replayed with the contents of another: as many tokens, sequences and rows, all else
 * different. */
static const char *replay_differs(const struct prefill_problem *captured,
                                  const struct prefill_problem *changed) {
    struct prefill_results first, replayed, called;
    prefill_results_make(&first, captured);
    prefill_results_make(&replayed, changed);
    prefill_results_make(&called, changed);
    const flash_kda_prefill_args before = prefill_bind(captured, &first, FLASH_KDA_BACKEND_CUDA);
    const flash_kda_prefill_args after = prefill_bind(changed, &replayed, FLASH_KDA_BACKEND_CUDA);
    const char *wrong = prefill_run(changed, &called, FLASH_KDA_BACKEND_CUDA, FILL_NAN);
    const struct arguments captured_args = arguments_of_prefill(&before),
                           changed_args = arguments_of_prefill(&after);
    if (!wrong)
        wrong = replay_changed(&captured_args, &changed_args, FILL_NAN);
    if (!wrong)
        wrong = differ(&replayed, &called);
    prefill_results_free(&first);
    prefill_results_free(&replayed);
    prefill_results_free(&called);
    return wrong;
}

static void graphs(struct check *check) {
    for (int i = 0; i < KINDS; i++) {
        struct prefill_case c = case_of_kind(i);
        if (!wanted(check, &c, "a graph replayed with other contents", i))
            continue;
        struct random r = random_named(check->seed, c.name);
        struct prefill_problem captured, changed;
        prefill_problem_make(&captured, &c, &r);
        prefill_fuse_outputs(&captured, NULL, &r);
        for (int n = 0; n < c.sequences / 2; n++) {
            int64_t length = c.lengths[n];
            c.lengths[n] = c.lengths[c.sequences - 1 - n];
            c.lengths[c.sequences - 1 - n] = length;
        }
        prefill_problem_make(&changed, &c, &r);
        prefill_fuse_outputs(&changed, NULL, &r);
        report(check, &c, replay_differs(&captured, &changed), "the same bits as a call");
        prefill_problem_free(&captured);
        prefill_problem_free(&changed);
    }
}

/* ---- Wild indices ------------------------------------------------------------------------------ */

static const char *wild_indices_break(struct prefill_problem *p, struct random *r) {
    struct prefill_results results, before;
    struct tensor *const indices[] = {&p->cu_seqlens, &p->state_indices, &p->checkpoint_cu_starts,
                                      &p->checkpoint_indices, &p->checkpoint_offsets};
    prefill_results_make(&results, p);
    prefill_results_make(&before, p);
    for (size_t i = 0; i < sizeof indices / sizeof *indices; i++)
        spoil_indices(indices[i], r);
    const char *wrong = prefill_run(p, &results, FLASH_KDA_BACKEND_CUDA, FILL_ALWAYS);
    /* What rows hold now means nothing, but slots and padding that no index names are as they were. */
    bool *any = p->out.written;
    for (int64_t row = 0; row < p->out.rows; row++)
        any[row] = true;
    if (!wrong && !tensor_unchanged(&results.out, &before.out, p->out.lead, any, NULL))
        wrong = "wrote to padding of out";
    if (!wrong && !results.shared_pool &&
        !tensor_unchanged(&results.final, &before.final, p->final.lead, p->final.written, NULL))
        wrong = "wrote to a slot that was not named, or to padding of final_state";
    prefill_results_free(&results);
    prefill_results_free(&before);
    return wrong;
}

static void wild_indices(struct check *check) {
    enum { ROUNDS = 8 };
    for (int i = 0; i < KINDS; i++) {
        struct prefill_case c = case_of_kind(i);
        if (!wanted(check, &c, "indices out of range", i))
            continue;
        struct random r = random_named(check->seed, c.name);
        const char *wrong = NULL;
        for (int round = 0; round < ROUNDS && !wrong; round++) {
            struct prefill_problem p;
            prefill_problem_make(&p, &c, &r);
            prefill_fuse_outputs(&p, NULL, &r);
            wrong = wild_indices_break(&p, &r);
            prefill_problem_free(&p);
        }
        report(check, &c, wrong, "nothing else was written");
    }
}

/* ---- Stream-K ---------------------------------------------------------------------------------- */

static void fill_strong(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    tensor_fill(&p->g, 100);
}

/* The first word of stream-K's workspace, Hopper's enum Outcome, says which chains are pending: those it leaves to the
 * schedule's kernels. Results are right in any case: only this tells who made them. */
static const struct {
    void (*fill)(struct prefill_problem *, struct random *);
    int32_t outcome;
    const char *name;
} gates[] = {{fill_strong, 0, "strong gates leave nothing"},
             {fill_moving, 1, "what is not forgotten after all leaves split chains"},
             {fill_remembering, 2, "slow gates leave all"}};

/* Runs prefill, describes it, and copies the first word of its workspace from where the library begins to use it; 0xff bytes
 * where it has none. */
static const char *run_described(const flash_kda_prefill_args *args, char *text, size_t size, int32_t *word) {
    enum { ALIGNMENT = 64 /* of what the library uses */ };
    const struct arguments all = arguments_of_prefill(args);
    struct call c;
    bool ran = call_make(&c, &all, MEMORY_DEVICE, FILL_NAN) && call_launch(&c, NULL) && call_wait(&c);
    if (ran && flash_kda_prefill_describe(&c.args.prefill, text, size))
        ran = failed("%s", flash_kda_last_error());
    *word = -1;
    if (ran && c.workspace_bytes > ALIGNMENT)
        ran = device_copy(word, c.workspace.data + -(uintptr_t)c.workspace.data % ALIGNMENT, sizeof *word);
    return call_finish(&c, ran);
}

/* NULL if stream-K's outcome is the expected one. hopper: did level sm90 take the call? */
static const char *stream_k_leaves(const flash_kda_prefill_args *args, int32_t expected, bool *hopper) {
    static char other[80];
    char text[200] = "";
    int32_t outcome = 0;
    const char *wrong = run_described(args, text, sizeof text, &outcome);
    *hopper = strstr(text, "level sm90");
    if (wrong || !*hopper)
        return wrong;
    setenv("FLASH_KDA_CUDA", "sm90/stream_k", 1);
    wrong = run_described(args, text, sizeof text, &outcome);
    snprintf(other, sizeof other, "outcome %d, expected %d", outcome, expected);
    return wrong                       ? wrong
           : !strstr(text, "stream_k") ? "was not run by stream-K"
           : outcome != expected       ? other
                                       : NULL;
}

static void stream_k(struct check *check) {
    const char *forced = getenv("FLASH_KDA_CUDA");
    if (forced && strcmp(forced, "sm90/stream_k") != 0)
        return;
    for (size_t i = 0; i < sizeof gates / sizeof *gates; i++) {
        struct prefill_case c = prefill_case_plain();
        c.K = c.V = 128;
        c.lengths[0] = 257;
        c.q_type = c.k_type = c.v_type = c.g_type = c.beta_type = c.out_type = TYPE_BF16;
        c.fill = gates[i].fill;
        snprintf(c.name, sizeof c.name, "stream-K: %s", gates[i].name);
        if (!check_wanted(check, c.name))
            continue;
        struct random r = random_named(check->seed, c.name);
        struct prefill_problem p;
        struct prefill_results results;
        prefill_problem_make(&p, &c, &r);
        prefill_results_make(&results, &p);
        const flash_kda_prefill_args args = prefill_bind(&p, &results, FLASH_KDA_BACKEND_CUDA);
        bool hopper = false;
        const char *wrong = stream_k_leaves(&args, gates[i].outcome, &hopper);
        if (!forced)
            unsetenv("FLASH_KDA_CUDA");
        if (wrong || hopper)
            report(check, &c, wrong, "so they did");
        prefill_results_free(&results);
        prefill_problem_free(&p);
    }
}

/* ---- Memory ------------------------------------------------------------------------------------ */

static void managed_memory(struct check *check) {
    struct prefill_case c = case_of_kind(1);
    if (!wanted(check, &c, "managed memory", 1))
        return;
    struct random r = random_named(check->seed, c.name);
    struct prefill_problem p;
    struct prefill_results managed, plain;
    prefill_problem_make(&p, &c, &r);
    prefill_results_make(&managed, &p);
    prefill_results_make(&plain, &p);
    const flash_kda_prefill_args args = prefill_bind(&p, &managed, FLASH_KDA_BACKEND_CUDA);
    const struct arguments all = arguments_of_prefill(&args);
    const char *wrong = call_run(&all, MEMORY_MANAGED, FILL_NAN);
    if (!wrong)
        wrong = prefill_run(&p, &plain, FLASH_KDA_BACKEND_CUDA, FILL_NAN);
    if (!wrong)
        wrong = differ(&managed, &plain);
    report(check, &c, wrong, "the same bits as in device memory");
    prefill_results_free(&managed);
    prefill_results_free(&plain);
    prefill_problem_free(&p);
}

/* ---- Devices ----------------------------------------------------------------------------------- */

enum { NO_SUCH_DEVICE = 99 };

/* A call whose tensors say that they are on devices; it must fail before it touches their memory, which is the
 * host's. */
struct placed_call {
    flash_kda_prefill_args args;
    DLTensor tensors[PREFILL_ARGUMENTS];
};

static void place_call(struct placed_call *call, const flash_kda_prefill_args *args, DLDevice device) {
    struct argument list[MAX_ARGUMENTS];
    call->args = *args;
    for (int i = 0, count = prefill_list(&call->args, list); i < count; i++)
        if (*list[i].tensor) {
            call->tensors[i] = **list[i].tensor;
            call->tensors[i].device = device;
            *list[i].tensor = &call->tensors[i];
        }
}

/* NULL if the call fails with this status and a sentence that has this word. */
static const char *not_refused(const struct placed_call *call, flash_kda_status expected, const char *word) {
    static char workspace[1 << 24], text[900];
    flash_kda_status status = flash_kda_prefill(&call->args, workspace, sizeof workspace);
    if (status == expected && strstr(flash_kda_last_error(), word))
        return NULL;
    snprintf(text, sizeof text, "%s: '%s'; expected %s and a sentence with '%s'", flash_kda_status_name(status),
             status ? flash_kda_last_error() : "", flash_kda_status_name(expected), word);
    return text;
}

/* Each tensor in turn on the host, and on another device, while the others are where q is. */
static const char *mixed_devices_pass(const flash_kda_prefill_args *args) {
    static const DLDevice elsewhere[] = {{kDLCPU, 0}, {kDLCUDA, 1}, {kDLCUDAManaged, 0}};
    const char *wrong = NULL;
    for (int i = 0; i < PREFILL_ARGUMENTS && !wrong; i++)
        for (int n = 0; n < 3 && !wrong; n++) {
            struct placed_call call;
            struct argument list[MAX_ARGUMENTS];
            place_call(&call, args, (DLDevice){kDLCUDA, 0});
            prefill_list(&call.args, list);
            call.tensors[i].device = elsewhere[n];
            if (*list[i].tensor && list[i].tensor != &call.args.q)
                wrong = not_refused(&call, FLASH_KDA_ERROR_INVALID_ARGUMENT, list[i].name);
        }
    return wrong;
}

static const char *wrong_devices_pass(const flash_kda_prefill_args *args) {
    static const struct {
        flash_kda_backend backend;
        DLDevice device;
        flash_kda_status status;
        const char *word;
    } calls[] = {
        {FLASH_KDA_BACKEND_CPU, {kDLCUDA, 0}, FLASH_KDA_ERROR_UNSUPPORTED, "cpu"},
        {FLASH_KDA_BACKEND_REFERENCE, {kDLCUDA, 0}, FLASH_KDA_ERROR_UNSUPPORTED, "reference"},
        {FLASH_KDA_BACKEND_CUDA, {kDLCPU, 0}, FLASH_KDA_ERROR_UNSUPPORTED, "CUDA memory"},
        {FLASH_KDA_BACKEND_CUDA, {kDLCUDA, NO_SUCH_DEVICE}, FLASH_KDA_ERROR_CUDA, "cudaErrorInvalidDevice"},
        {FLASH_KDA_BACKEND_AUTO, {kDLCUDA, NO_SUCH_DEVICE}, FLASH_KDA_ERROR_CUDA, "cudaErrorInvalidDevice"},
    };
    const char *wrong = NULL;
    for (size_t i = 0; i < sizeof calls / sizeof *calls && !wrong; i++) {
        struct placed_call call;
        place_call(&call, args, calls[i].device);
        call.args.backend = calls[i].backend;
        wrong = not_refused(&call, calls[i].status, calls[i].word);
    }
    return wrong;
}

/* The tensors of the call are in host memory, whatever they say. */
static void devices(struct check *check) {
    struct prefill_case c = case_of_kind(0);
    snprintf(c.name, sizeof c.name, "tensors on several devices, and on wrong ones");
    if (!check_wanted(check, c.name))
        return;
    struct random r = random_named(check->seed, c.name);
    struct prefill_problem p;
    struct prefill_results results, before;
    prefill_problem_make(&p, &c, &r);
    prefill_results_make(&results, &p);
    prefill_results_make(&before, &p);
    const flash_kda_prefill_args args = prefill_bind(&p, &results, FLASH_KDA_BACKEND_CUDA);
    const char *wrong = mixed_devices_pass(&args);
    if (!wrong)
        wrong = wrong_devices_pass(&args);
    if (!wrong && differ(&results, &before))
        wrong = "wrote to a result of a call that failed";
    if (!wrong) /* an error that was reported is over */
        wrong = prefill_run(&p, &results, FLASH_KDA_BACKEND_CUDA, FILL_NAN);
    report(check, &c, wrong, "refused, with the tensor or CUDA's error named");
    prefill_results_free(&results);
    prefill_results_free(&before);
    prefill_problem_free(&p);
}

/* ---- Hopper -------------------------------------------------------------------------------------- */

#ifdef CHECK_SM90
/* Without the wait words must be lost, or this check sees nothing. Not one of the quick cases, for it keeps a GPU busy for
 * minutes where a sanitizer watches every word. */
static void cluster_copies(struct check *check) {
    static const char name[] = "copies between shared memories of a cluster are waited for";
    if (check->quick || !cluster_copy_can_run() || !check_wanted(check, name))
        return;
    double waited = cluster_copy_overwritten(true), at_once = cluster_copy_overwritten(false);
    char text[160];
    if (waited < 0 || at_once < 0)
        snprintf(text, sizeof text, "CUDA could not run it");
    else
        snprintf(text, sizeof text,
                 "%.2g of the words overwritten before they were read; without the wait %.2g", waited, at_once);
    check_report(check, waited == 0 && at_once > 0, "cuda", name, text);
}
#endif

void prefill_cuda(struct check *check) {
    if (!check_tests_cuda(check))
        return;
    graphs(check);
    wild_indices(check);
    stream_k(check);
    managed_memory(check);
    devices(check);
#ifdef CHECK_SM90
    cluster_copies(check);
#endif
}
