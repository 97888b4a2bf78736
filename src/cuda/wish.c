/* SPDX-License-Identifier: MIT */
/* Reads what the environment asks of the CUDA backend. */
#include "cuda/wish.h"

#include "cuda/segments.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What may be asked for. */
static const struct form {
    const char *name;
    bool counts; /* NAME/N is N segments */
    struct kda_cuda_wish wish;
} forms[] = {
    {"sm80", false, {.sm80 = true}},
    {"sm90", true, {.sm90 = true}},
    {"sm90/fused", false, {.sm90 = true, .fused = true}},
    {"sm90/pairs", true, {.sm90 = true, .pairs = true}},
    {"sm90/spread", false, {.sm90 = true, .spread = true}},
};

enum { FORMS = sizeof forms / sizeof *forms };

/* Is it a number of segments? Digits alone: strtol would skip spaces and take a sign. */
static bool read_segments(const char *text, int *segments) {
    char *end = NULL;
    long count = isdigit((unsigned char)*text) ? strtol(text, &end, 10) : 0;
    if (count < 1 || count > KDA_CUDA_MAX_SEGMENTS || *end)
        return false;
    *segments = (int)count;
    return true;
}

static bool matches(const struct form *form, const char *value, struct kda_cuda_wish *wish) {
    size_t length = strlen(form->name);
    if (strncmp(value, form->name, length) != 0)
        return false;
    *wish = form->wish;
    return !value[length] ||
           (form->counts && value[length] == '/' && read_segments(value + length + 1, &wish->segments));
}

/* Lists the names, "a, b", or those that take a number, "a/N or b/N". */
static void list_forms(char *text, size_t size, bool counts) {
    const char *between = counts ? " or " : ", ", *number = counts ? "/N" : "";
    size_t used = 0;
    for (int i = 0; i < FORMS && used < size; i++)
        if (!counts || forms[i].counts)
            used += (size_t)snprintf(text + used, size - used, "%s%s%s", used ? between : "", forms[i].name,
                                     number);
}

flash_kda_status kda_cuda_read_wish(struct kda_cuda_wish *wish, const char *value) {
    char names[128], counting[128];
    *wish = (struct kda_cuda_wish){.sm80 = false};
    if (!value || !*value)
        return FLASH_KDA_OK;
    for (int i = 0; i < FORMS; i++)
        if (matches(&forms[i], value, wish))
            return FLASH_KDA_OK;
    list_forms(names, sizeof names, false);
    list_forms(counting, sizeof counting, true);
    return kda_fail(FLASH_KDA_ERROR_UNSUPPORTED,
                    "the environment variable " KDA_CUDA_VARIABLE
                    " is %.40s; expected %s or, for N segments, %s with N from 1 to %d",
                    value, names, counting, KDA_CUDA_MAX_SEGMENTS);
}
