/* SPDX-License-Identifier: MIT */
#include "calls.h"

#include "replay.h"
#include "timing.h"

#include <math.h>

static int tensors_of(const struct arguments *args, struct tensor *tensors[MAX_ARGUMENTS]) {
    struct arguments a = *args;
    struct argument list[MAX_ARGUMENTS];
    int count = 0;
    for (int i = 0, n = arguments_list(&a, list); i < n; i++)
        if (*list[i].tensor)
            tensors[count++] = (struct tensor *)*list[i].tensor;
    return count;
}

void snapshot_take(struct snapshot *s, const struct arguments *args) {
    struct tensor *tensors[MAX_ARGUMENTS];
    *s = (struct snapshot){.count = tensors_of(args, tensors)};
    for (int i = 0; i < s->count; i++) {
        s->tensors[i] = tensors[i];
        tensor_clone(&s->before[i], tensors[i]);
    }
}

const char *snapshot_changed(const struct snapshot *s) {
    for (int i = 0; i < s->count; i++)
        if (!tensor_same(s->tensors[i], &s->before[i]))
            return "changed an input";
    return NULL;
}

void snapshot_free(struct snapshot *s) {
    for (int i = 0; i < s->count; i++)
        tensor_free(&s->before[i]);
}

void arguments_free(const struct arguments *args) {
    struct tensor *tensors[MAX_ARGUMENTS];
    for (int i = tensors_of(args, tensors) - 1; i >= 0; i--)
        tensor_free(tensors[i]);
}

void spoil_indices(struct tensor *t, struct random *r) {
    const bool wide = t->block && t->dl.dtype.bits == 64;
    const double wild[] = {-2, -1000, 1000, 2147483647, -2147483648., wide ? 9e18 : 1e6, wide ? -9e18 : -1e6};
    for (int64_t i = 0; t->block && i < tensor_count(t); i++)
        if (random_below(r, 2))
            tensor_set(t, i, wild[random_below(r, sizeof wild / sizeof *wild)]);
}

static double host_seconds(struct call *c) {
    enum { MIN_RUNS = 5 };
    double begin = timing_now(), best = HUGE_VAL;
    for (int i = 0; i < MIN_RUNS || timing_now() - begin < 0.2; i++) {
        double start = timing_now();
        if (!call_launch(c, NULL))
            return (double)NAN;
        best = fmin(best, timing_now() - start);
    }
    return best;
}

static double device_seconds(struct call *c) {
    enum { RUNS = 10 };
    struct call *const calls[] = {c};
    double seconds[RUNS];
    return replay_calls(calls, 1, seconds, RUNS) ? timing_of(seconds, RUNS).min : (double)NAN;
}

double seconds_of(const struct arguments *args) {
    struct call c;
    enum memory memory = memory_of(arguments_backend(args));
    double seconds = (double)NAN;
    if (call_make(&c, args, memory, FILL_ALWAYS))
        seconds = memory == MEMORY_HOST ? host_seconds(&c) : device_seconds(&c);
    call_free(&c);
    return seconds;
}
