/* SPDX-License-Identifier: MIT */
/* flashkda bench: one measurement, made only after its result has been found right. */
#include "bench.h"
#include "captured.h"
#include "check.h"
#include "replay.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    MIN_REPEATS = 3,      /* however long one takes */
    MAX_COPIES = 256,     /* of a case's tensors */
    WARM_CALLS = 100,     /* on the same tensors, in a graph */
    HOST_BYTES = 1 << 28, /* beyond any cache of a CPU */
};

/* After this long no further repeat begins, seconds. */
static const double time_budget = 4;

/* The oracle looks at so many heads, then tokens, that its work, tokens x value heads x K x V, stays below this:
 * about a second. A longer case is compared on its first tokens, which depend on no later one. */
static const int64_t oracle_budget = (int64_t)1 << 29;

/* ---- A case ------------------------------------------------------------------------------------ */

/* How many units, of so much work each, the budget allows: 1 to `most`. */
static int64_t affordable(int64_t work, int64_t most) {
    int64_t count = oracle_budget / (work > 0 ? work : 1);
    count = count < most ? count : most;
    return count > 0 ? count : 1;
}

static bool make_prefix(struct kda_case *prefix, const struct kda_case *c) {
    int64_t token = c->batch * (c->value_heads / c->heads) * c->key_dim * c->value_dim; /* of one head */
    int64_t heads = affordable(token * c->tokens, c->heads);
    return case_prefix(prefix, c, c->tokens ? affordable(token * heads, c->tokens) : 0, heads) ||
           failed("out of memory for a case");
}

void bench_case_free(struct bench_case *c) {
    trial_free(&c->oracle);
    case_free(&c->prefix);
    case_free(&c->whole);
}

bool bench_case_make(struct bench_case *c, const struct case_spec *spec) {
    double seconds = 0;
    bool backward = c->operation == BENCH_BACKWARD;
    bool good = captured_generate(&c->whole, spec) && make_prefix(&c->prefix, &c->whole) &&
                (backward ? trial_backward(&c->oracle, &c->prefix, FLASH_KDA_BACKEND_REFERENCE, 1)
                          : trial_prefill(&c->oracle, &c->prefix, TYPE_FP32, FLASH_KDA_BACKEND_REFERENCE, 1)) &&
                trial_run(&c->oracle, &seconds);
    if (!good)
        bench_case_free(c);
    return good;
}

static bool make_trial(struct trial *trial, const struct bench_case *c, const struct kda_case *problem,
                       const struct bench_result *result) {
    if (c->operation == BENCH_BACKWARD)
        return trial_backward(trial, problem, c->backend, result->threads);
    return c->operation == BENCH_DECODE
               ? trial_decode(trial, problem, c->way, c->backend, result->threads)
               : trial_prefill(trial, problem, result->out_dtype, c->backend, result->threads);
}

/* ---- Is it right? ------------------------------------------------------------------------------ */

/* Compares one result where the oracle has its answer; keeps the largest error. */
static void judge_tensor(struct bench_result *result, const struct tensor *value, const struct tensor *exact,
                         int head_dim, double tolerance, double *error) {
    struct tensor heads;
    tensor_view(&heads, &value->dl);
    tensor_narrow(&heads, head_dim, 0, exact->shape[head_dim]);
    struct comparison comparison = compare(&heads, exact, tolerance);
    *error = fmax(*error, comparison.error_ratio);
    result->passed = result->passed && comparison.passed;
}

/* The gradients of A_log and dt_bias of the oracle's heads. */
static void judge_parameters(struct bench_result *result, const struct bench_case *c, const struct trial *trial,
                             const struct tolerance *tolerance) {
    const struct tensor *exact = c->oracle.gradients;
    struct tensor A_log;
    if (tensor_present(&exact[TRIAL_D_DT_BIAS]))
        judge_tensor(result, &trial->gradients[TRIAL_D_DT_BIAS], &exact[TRIAL_D_DT_BIAS], 0, tolerance->dt_bias,
                     &result->output_error);
    if (!tensor_present(&exact[TRIAL_DA_LOG]))
        return;
    tensor_view(&A_log, &trial->gradients[TRIAL_DA_LOG].dl);
    tensor_narrow(&A_log, 0, 0, exact[TRIAL_DA_LOG].shape[0]);
    double error = A_log_error(&A_log, &exact[TRIAL_DA_LOG], c->prefix.gate, &c->prefix.g, &c->prefix.dt_bias,
                               &exact[TRIAL_DG]);
    result->A_log_error = fmax(result->A_log_error, error);
    result->passed = result->passed && error <= tolerance->A_log;
}

static void judge(struct bench_result *result, const struct bench_case *c, const struct trial *trial) {
    struct tolerance tolerance = trial_tolerance(trial, &c->oracle);
    const struct trial *oracle = &c->oracle;
    struct tensor first, states;
    bool whole = trial->c->tokens == c->prefix.tokens;
    if (c->operation == BENCH_BACKWARD && !whole) /* gradients depend on later tokens */
        return;
    tensor_view(&first, &trial->out.dl);
    tensor_narrow(&first, 1, 0, c->prefix.tokens);
    judge_tensor(result, &first, &oracle->out, 2, tolerance.output, &result->output_error);
    for (int i = 0; i < TRIAL_TOKEN_GRADIENTS && c->operation == BENCH_BACKWARD; i++)
        judge_tensor(result, &trial->gradients[i], &oracle->gradients[i], 2, tolerance.output,
                     &result->output_error);
    if (c->operation == BENCH_BACKWARD)
        judge_parameters(result, c, trial, &tolerance);
    if (!whole || (c->operation == BENCH_DECODE && c->way == DECODE_STATE_KEPT))
        return;
    trial_last_states(trial, &states);
    judge_tensor(result, &states, &oracle->state, 1, tolerance.state, &result->state_error);
    if (tensor_present(&oracle->checkpoints))
        judge_tensor(result, &trial->checkpoints, &oracle->checkpoints, 2, tolerance.checkpoints,
                     &result->checkpoint_error);
}

/* Runs the case once, which warms up, and where only its first tokens have an exact answer those too. */
static bool check_trial(const struct bench_case *c, struct trial *trial, struct bench_result *result) {
    double seconds = 0;
    struct tensor states;
    if (!trial_run(trial, &seconds))
        return false;
    trial_last_states(trial, &states);
    result->passed = count_non_finite(&trial->out) == 0 && count_non_finite(&states) == 0;
    for (int i = 0; i < TRIAL_GRADIENTS; i++)
        if (tensor_present(&trial->gradients[i]))
            result->passed = result->passed && count_non_finite(&trial->gradients[i]) == 0;
    judge(result, c, trial);
    if (c->prefix.tokens == c->whole.tokens)
        return true;
    struct trial prefix;
    if (!make_trial(&prefix, c, &c->prefix, result))
        return false;
    bool good = trial_run(&prefix, &seconds);
    if (good)
        judge(result, c, &prefix);
    trial_free(&prefix);
    return good;
}

/* ---- How fast? --------------------------------------------------------------------------------- */

/* Do the copies hold the bits of the result that was found right? Decode's states have gone on since. */
static bool same_result(const struct bench_case *c, struct trial *copies, int count,
                        const struct trial *checked) {
    for (int i = 0; i < count && c->operation != BENCH_DECODE; i++) {
        if (!call_fetch(&copies[i].call))
            return false;
        bool same =
            tensor_same(&copies[i].out, &checked->out) && tensor_same(&copies[i].state, &checked->state);
        for (int n = 0; n < TRIAL_GRADIENTS; n++)
            if (tensor_present(&checked->gradients[n]))
                same = same && tensor_same(&copies[i].gradients[n], &checked->gradients[n]);
        if (!same)
            return failed("a replayed call gave other bits than the one that was compared with the oracle");
    }
    return true;
}

/* On the CPU: seconds of one call, the mean over all in turn. */
static bool time_in_turn(struct trial *trials, int count, double *seconds, int repeats) {
    for (int repeat = -1; repeat < repeats; repeat++) { /* the first warms up */
        double start = timing_now();
        for (int i = 0; i < count; i++)
            if (!call_launch(&trials[i].call, NULL))
                return false;
        seconds[repeat < 0 ? 0 : repeat] = (timing_now() - start) / count;
    }
    return true;
}

static bool time_trials(const struct bench_case *c, struct trial *trials, int count, double *seconds) {
    struct call *calls[MAX_COPIES];
    for (int i = 0; i < count; i++)
        calls[i] = &trials[i].call;
    return trials->call.memory == MEMORY_HOST ? time_in_turn(trials, count, seconds, c->repeats)
                                              : replay_calls(calls, count, seconds, c->repeats);
}

/* Cold: over as many copies as overflow the caches, as between the layers of a model. */
static bool time_cold(const struct bench_case *c, const struct trial *checked, struct bench_result *result) {
    double seconds[BENCH_MAX_REPEATS];
    int64_t cache = checked->call.memory == MEMORY_HOST ? HOST_BYTES : 2 * c->l2_bytes;
    int64_t wanted = 1 + cache / trial_bytes(checked);
    int count = (int)(wanted < MAX_COPIES ? wanted : MAX_COPIES), made = 0;
    struct trial *copies = calloc((size_t)count, sizeof *copies);
    if (!copies)
        return failed("out of memory for %d calls", count);
    while (made < count && make_trial(&copies[made], c, &c->whole, result))
        made++;
    bool good =
        made == count && time_trials(c, copies, count, seconds) && same_result(c, copies, count, checked);
    if (good)
        result->timing = timing_of(seconds, c->repeats);
    for (int i = 0; i < made; i++)
        trial_free(&copies[i]);
    free(copies);
    return good;
}

/* Warm: every call of a GPU on the same tensors, where the states fit in its L2 cache, with room for the rest. */
static bool time_warm(const struct bench_case *c, struct trial *trial, struct timing *timing) {
    double seconds[BENCH_MAX_REPEATS];
    struct call *calls[WARM_CALLS];
    if (c->operation != BENCH_DECODE || trial->call.memory == MEMORY_HOST ||
        4 * (int64_t)tensor_bytes(&trial->state) > 3 * c->l2_bytes)
        return true;
    for (int i = 0; i < WARM_CALLS; i++)
        calls[i] = &trial->call;
    if (!replay_calls(calls, WARM_CALLS, seconds, c->repeats))
        return false;
    *timing = timing_of(seconds, c->repeats);
    return true;
}

/* Prefill on the CPU: again and again. */
static bool time_hot(const struct bench_case *c, struct trial *trial, struct timing *timing) {
    double seconds[BENCH_MAX_REPEATS], sum = 0;
    int count = 0;
    while (count < c->repeats && (count < MIN_REPEATS || sum < time_budget)) {
        if (!trial_run(trial, &seconds[count]))
            return false;
        sum += seconds[count++];
    }
    *timing = timing_of(seconds, count);
    return true;
}

bool bench_measure(const struct bench_case *c, struct bench_result *result) {
    struct trial trial;
    if (!make_trial(&trial, c, &c->whole, result))
        return false;
    bool hot = c->operation != BENCH_DECODE && trial.call.memory == MEMORY_HOST;
    result->decode = c->operation == BENCH_DECODE ? decode_way_names[c->way] : NULL;
    result->backward = c->operation == BENCH_BACKWARD;
    result->tokens = c->whole.tokens;
    result->checked_tokens = c->prefix.tokens;
    result->checked_heads = c->prefix.value_heads;
    result->bytes = trial_bytes(&trial);
    result->workspace_bytes = (int64_t)trial.call.workspace_bytes;
    bool good = trial_describe(&trial, result->ran_on, sizeof result->ran_on) &&
                trial_level(&trial, result->level) && check_trial(c, &trial, result);
    if (good && result->passed)
        good = hot ? time_hot(c, &trial, &result->timing)
                   : time_cold(c, &trial, result) && time_warm(c, &trial, &result->warm);
    trial_free(&trial);
    return good;
}
