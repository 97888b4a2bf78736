/* SPDX-License-Identifier: MIT */
/* The machine this runs on. */
#include "machine.h"

#include "parallel.h"
#include "timing.h"

#include <flash_kda.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

/* The value of a line "key   : value" of /proc/cpuinfo, or NULL. */
static const char *value_of(const char *line, const char *key) {
    size_t length = strlen(key);
    if (strncmp(line, key, length) != 0 || (line[length] != '\t' && line[length] != ' ' && line[length] != ':'))
        return NULL;
    const char *colon = strchr(line, ':');
    return colon ? colon + 1 + strspn(colon + 1, " ") : NULL;
}

static void append(char *list, size_t size, const char *word) {
    size_t used = strlen(list);
    snprintf(list + used, size - used, "%s%s", used ? " " : "", word);
}

/* Keeps those of the kernel's flags that the CPU backend's levels ask for. */
static void read_features(struct machine *machine, char *flags) {
    static const char *const interesting[] = {"avx2",     "fma",      "f16c",        "avx512f", "avx512bw",
                                              "avx512dq", "avx512vl", "avx512_bf16", "asimd",   "bf16"};
    machine->features[0] = '\0';
    for (char *rest = NULL, *flag = strtok_r(flags, " \n", &rest); flag; flag = strtok_r(NULL, " \n", &rest)) {
        for (size_t i = 0; i < sizeof interesting / sizeof interesting[0]; i++)
            if (strcmp(flag, interesting[i]) == 0)
                append(machine->features, sizeof machine->features, flag);
    }
}

static void read_cpuinfo(struct machine *machine) {
    FILE *file = fopen("/proc/cpuinfo", "r");
    char *line = NULL;
    size_t size = 0;
    while (file && getline(&line, &size, file) > 1) { /* the first processor ends with an empty line */
        const char *model = value_of(line, "model name");
        const char *flags = value_of(line, "flags");
        flags = flags ? flags : value_of(line, "Features");
        if (model)
            snprintf(machine->cpu, sizeof machine->cpu, "%.*s", (int)strcspn(model, "\n"), model);
        if (flags)
            read_features(machine, line + (flags - line));
    }
    free(line);
    if (file)
        fclose(file);
}

void machine_describe(struct machine *machine) {
    *machine =
        (struct machine){.processors = (int)sysconf(_SC_NPROCESSORS_ONLN), .threads = flash_kda_cpu_threads()};
    struct utsname name;
    if (uname(&name) == 0)
        snprintf(machine->architecture, sizeof machine->architecture, "%s", name.machine);
    snprintf(machine->cpu, sizeof machine->cpu, "%s", machine->architecture);
    read_cpuinfo(machine);
}

enum { COPY_BYTES = 1 << 28, COPY_REPEATS = 7 };

struct copy {
    char *to;
    const char *from;
    size_t share;
};

static void copy_share(void *context, int i) {
    const struct copy *copy = context;
    memcpy(copy->to + (size_t)i * copy->share, copy->from + (size_t)i * copy->share, copy->share);
}

static double copy_seconds(struct copy *copy, int threads) {
    double begin = timing_now();
    parallel_run(threads, copy_share, copy);
    return timing_now() - begin;
}

double machine_copy_rate(int threads) {
    char *from = malloc(COPY_BYTES), *to = malloc(COPY_BYTES);
    struct copy copy = {to, from, COPY_BYTES / (size_t)threads};
    double best = HUGE_VAL;
    if (from && to) {
        memset(from, 1, COPY_BYTES);
        for (int i = 0; i < COPY_REPEATS; i++)
            best = fmin(best, copy_seconds(&copy, threads));
    }
    free(from);
    free(to);
    return 2.0 * COPY_BYTES / best;
}
