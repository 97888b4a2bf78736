/* SPDX-License-Identifier: MIT */
/* flashkda bench --decode: times one row of its table, after its result has been found right. */
#include "bench.h"

#include "check.h"
#include "replay.h"
#include "spec_options.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    CHECKED_HEADS = 4, /* that the oracle looks at */
    MAX_COPIES = 256,  /* of a call's tensors */
    WARM_CALLS = 100,  /* on the same tensors, in a graph */
    MAX_REPEATS = 1000,
    HOST_BYTES = 1 << 28, /* beyond any cache */
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* ---- Is it right? ------------------------------------------------------------------------------ */

/* The states after the last token, which lie in the last of each sequence's slots. */
static void last_states(struct tensor *states, const struct decode_call *call, const struct kda_case *c) {
    tensor_view(states, &call->state, 0, c->batch);
    int64_t columns = call->state.shape[0] / c->batch;
    states->dl.data = (char *)call->state.dl.data +
                      (size_t)((columns - 1) * call->state.strides[0]) * dtype_size(call->state.dl.dtype);
    states->strides[0] *= columns;
    states->compact = states->compact && columns == 1;
}

static void judge(struct bench_result *result, const struct decode_call *call, const struct kda_case *c,
                  const struct prefill_call *oracle) {
    /* fp32 arithmetic, then the rounding of each result to its dtype */
    const double arithmetic = 1e-5;
    int64_t heads = oracle->out.shape[2];
    struct tensor out, all, states;
    tensor_view(&out, &call->out, 2, heads);
    struct comparison outputs =
        compare(&out, &oracle->out, arithmetic + rounding_error(&oracle->out, call->out.dl.dtype));
    result->output_error = outputs.error_ratio;
    result->passed = outputs.passed && count_non_finite(&call->out) == 0;
    if (call->way == DECODE_STATE_KEPT) {
        return;
    }
    last_states(&all, call, c);
    tensor_view(&states, &all, 1, heads);
    struct comparison last =
        compare(&states, &oracle->state, arithmetic + rounding_error(&oracle->state, call->state.dl.dtype));
    result->state_error = last.error_ratio;
    result->passed = result->passed && last.passed;
}

/* Runs the call once, and the oracle's prefill of the same tokens on the first heads. */
static bool check_call(struct bench_result *result, const struct decode_call *call, const struct kda_case *c,
                       char *error, size_t error_size) {
    struct kda_case prefix;
    struct prefill_call oracle;
    double seconds = 0;
    int64_t heads = c->heads < CHECKED_HEADS ? c->heads : CHECKED_HEADS;
    if (!decode_launch(call, NULL, error, error_size) || !decode_fetch(call, error, error_size)) {
        return false;
    }
    if (!case_prefix(&prefix, c, c->tokens, heads)) {
        snprintf(error, error_size, "out of memory for a case");
        return false;
    }
    bool prepared =
        call_prepare(&oracle, &prefix, dtype_fp32, FLASH_KDA_BACKEND_REFERENCE, 1, error, error_size);
    bool good = prepared && call_run(&oracle, &seconds, error, error_size);
    if (good) {
        judge(result, call, c, &oracle);
    }
    if (prepared) {
        call_free(&oracle);
    }
    case_free(&prefix);
    result->checked_tokens = c->tokens;
    result->checked_heads = heads;
    return good;
}

/* ---- How fast? --------------------------------------------------------------------------------- */

static bool launch(const void *calls, int i, void *stream, char *error, size_t error_size) {
    return decode_launch((const struct decode_call *)calls + i, stream, error, error_size);
}

static bool launch_again(const void *call, int i, void *stream, char *error, size_t error_size) {
    (void)i;
    return decode_launch(call, stream, error, error_size);
}

/* On the CPU: seconds of one call, the mean over all in turn. */
static bool time_on_host(const struct decode_call *calls, int count, double *seconds, int repeats, char *error,
                         size_t error_size) {
    for (int repeat = -1; repeat < repeats; repeat++) { /* the first warms up */
        double start = now();
        for (int i = 0; i < count; i++) {
            if (!decode_launch(&calls[i], NULL, error, error_size)) {
                return false;
            }
        }
        seconds[repeat < 0 ? 0 : repeat] = (now() - start) / count;
    }
    return true;
}

/* Cold: over as many copies as overflow the caches, as between the layers of a model. */
static bool time_copies(const struct bench_decode *how, const struct decode_call *call,
                        const struct kda_case *c, struct decode_call *copies, int count, struct timing *timing,
                        char *error, size_t error_size) {
    double seconds[MAX_REPEATS];
    int made = 0;
    const flash_kda_decode_args *a = &call->args;
    while (made < count &&
           decode_prepare(&copies[made], c, call->way, a->backend, a->num_threads, error, error_size)) {
        made++;
    }
    bool good = made == count &&
                (call->copies ? replay_calls(launch, copies, count, seconds, how->repeats, error, error_size)
                              : time_on_host(copies, count, seconds, how->repeats, error, error_size));
    if (good) {
        *timing = timing_of(seconds, how->repeats);
    }
    for (int i = 0; i < made; i++) {
        decode_free(&copies[i]);
    }
    return good;
}

static bool time_cold(const struct bench_decode *how, const struct decode_call *call, const struct kda_case *c,
                      struct timing *timing, char *error, size_t error_size) {
    int64_t cache = call->copies ? 2 * how->machine->device.l2_bytes : HOST_BYTES;
    int64_t wanted = 1 + cache / decode_bytes(call);
    int count = (int)(wanted < MAX_COPIES ? wanted : MAX_COPIES);
    struct decode_call *copies = calloc((size_t)count, sizeof *copies);
    if (!copies) {
        snprintf(error, error_size, "out of memory for %d calls", count);
        return false;
    }
    bool good = time_copies(how, call, c, copies, count, timing, error, error_size);
    free(copies);
    return good;
}

/* Do the states fit in a GPU's L2 cache, with room for the rest? */
static bool fits_cache(const struct bench_decode *how, const struct decode_call *call) {
    return call->copies && 4 * (int64_t)tensor_bytes(&call->state) <= 3 * how->machine->device.l2_bytes;
}

/* Warm: every call on the same tensors, which the one before has left in the cache. */
static bool time_warm(const struct bench_decode *how, const struct decode_call *call, struct timing *timing,
                      char *error, size_t error_size) {
    double seconds[MAX_REPEATS];
    if (!replay_calls(launch_again, call, WARM_CALLS, seconds, how->repeats, error, error_size)) {
        return false;
    }
    *timing = timing_of(seconds, how->repeats);
    return true;
}

static bool time_call(const struct bench_decode *how, const struct decode_call *call, const struct kda_case *c,
                      struct bench_result *result, char *error, size_t error_size) {
    return time_cold(how, call, c, &result->timing, error, error_size) &&
           (!fits_cache(how, call) || time_warm(how, call, &result->warm, error, error_size));
}

static bool describe(struct bench_result *result, const struct decode_call *call, char *error,
                     size_t error_size) {
    if (flash_kda_decode_describe(&call->args, result->ran_on, sizeof result->ran_on) != FLASH_KDA_OK) {
        snprintf(error, error_size, "%s", flash_kda_last_error());
        return false;
    }
    sscanf(result->ran_on, "%*[^:]: level %15[^,]", result->level);
    return true;
}

/* ---- A row ------------------------------------------------------------------------------------- */

static struct bench_result result_of(const struct bench_decode *how, const struct bench_decode_row *row) {
    struct bench_result result = {.spec = default_spec,
                                  .tokens = row->tokens,
                                  .out_dtype = default_spec.dtype,
                                  .threads = how->threads,
                                  .decode = decode_way_names[row->way]};
    result.spec.batch = row->batch;
    result.spec.tokens = row->tokens;
    result.spec.heads = row->heads;
    result.spec.gate = FLASH_KDA_GATE_SIGMOID;
    result.spec.regime = REGIME_SLOW;
    result.spec.initial_state = true;
    result.spec.bf16_state = row->bf16_state;
    snprintf(result.name, sizeof result.name, "H%lld-B%lld-T%lld-%s%s%s", (long long)row->heads,
             (long long)row->batch, (long long)row->tokens, row->bf16_state ? "bf16" : "fp32",
             row->way == DECODE_IN_PLACE ? "" : ", ", row->way == DECODE_IN_PLACE ? "" : result.decode);
    return result;
}

bool bench_decode_row(const struct bench_decode *how, const struct bench_decode_row *row,
                      struct bench_result *result, char *error, size_t error_size) {
    struct kda_case c;
    struct decode_call call;
    *result = result_of(how, row);
    if (!case_generate(&c, &result->spec, error, error_size)) {
        return false;
    }
    bool prepared = decode_prepare(&call, &c, row->way, how->backend, how->threads, error, error_size);
    bool good = prepared && describe(result, &call, error, error_size) &&
                check_call(result, &call, &c, error, error_size);
    if (good) {
        result->bytes = decode_bytes(&call);
        good = !result->passed || time_call(how, &call, &c, result, error, error_size);
    }
    if (prepared) {
        decode_free(&call);
    }
    case_free(&c);
    return good;
}
