/* SPDX-License-Identifier: MIT */
#include "cuda/override.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char SM80[] = "sm80", SM90[] = "sm90", STREAM_K[] = "stream_k";

static const struct name {
    const char *name;
    enum kda_schedule schedule;
    bool splits; /* NAME/N is N segments */
} names[] = {{"general", KDA_SCHEDULE_GENERAL, true},
             {"persistent", KDA_SCHEDULE_PERSISTENT, false},
             {"cluster", KDA_SCHEDULE_CLUSTER, true},
             /* Names of version 0.1, in which sm90/N was general/N and spread was stream_k. */
             {"fused", KDA_SCHEDULE_PERSISTENT, false},
             {"pairs", KDA_SCHEDULE_CLUSTER, true}};
enum { NAMES = sizeof names / sizeof *names };
static const char OLD_STREAM_K[] = "spread";

/* Digits alone: strtol would skip spaces and take a sign. */
static bool read_segments(const char *text, int *segments) {
    char *end = NULL;
    long count = isdigit((unsigned char)*text) ? strtol(text, &end, 10) : 0;
    if (count < 1 || count > KDA_MAX_SEGMENTS || *end)
        return false;
    *segments = (int)count;
    return true;
}

static const char *after(const char *text, const char *prefix) {
    size_t length = strlen(prefix);
    return strncmp(text, prefix, length) == 0 ? text + length : NULL;
}

static bool read_schedule(const char *text, struct kda_override *override) {
    for (int i = 0; i < NAMES; i++) {
        const char *rest = after(text, names[i].name);
        if (!rest ||
            (*rest && !(names[i].splits && *rest == '/' && read_segments(rest + 1, &override->segments))))
            continue;
        override->schedule = names[i].schedule;
        return true;
    }
    override->schedule = KDA_SCHEDULE_GENERAL;
    return read_segments(text, &override->segments);
}

static bool read_all(const char *value, struct kda_override *override) {
    const char *rest = after(value, SM80);
    override->level = SM80;
    if (rest && !*rest)
        return true;
    rest = after(value, SM90);
    override->level = SM90;
    if (!rest || !*rest)
        return rest;
    if (*rest++ != '/')
        return false;
    override->stream_k = true;
    if (!strcmp(rest, STREAM_K) || !strcmp(rest, OLD_STREAM_K))
        return true;
    const char *plus = after(rest, STREAM_K);
    override->stream_k = plus && *plus == '+';
    return read_schedule(override->stream_k ? plus + 1 : rest, override) &&
           !(override->stream_k && override->schedule == KDA_SCHEDULE_GENERAL);
}

flash_kda_status kda_read_override(struct kda_override *override, const char *value) {
    *override = (struct kda_override){.level = NULL};
    if (!value || !*value || read_all(value, override))
        return FLASH_KDA_OK;
    return kda_fail(
        FLASH_KDA_ERROR_UNSUPPORTED,
        "the environment variable " KDA_CUDA_VARIABLE
        " is %.40s; expected sm80, sm90, sm90/general, sm90/persistent, sm90/cluster, sm90/stream_k, "
        "sm90/stream_k+persistent or sm90/stream_k+cluster; /N after general or cluster asks for N "
        "segments, N from 1 to %d",
        value, KDA_MAX_SEGMENTS);
}

void kda_plan_name(const struct kda_plan *plan, char *text, size_t size) {
    if (plan->schedule == KDA_SCHEDULE_ANY) { /* the level has only one */
        snprintf(text, size, "%s", plan->level);
        return;
    }
    const struct name *name = names;
    while (name->schedule != plan->schedule)
        name++;
    int used =
        snprintf(text, size, "%s/%s%s", plan->level, plan->stream_k.ranges ? "stream_k+" : "", name->name);
    if (name->splits && used > 0 && (size_t)used < size)
        snprintf(text + used, size - (size_t)used, "/%d", plan->segments);
}
