/* SPDX-License-Identifier: MIT */
/* How many threads a call takes: affinity, cgroup, environment, and what is worth waking a thread for. */
#include "cpu/threads.h"

#include "api/status.h"
#include "api/tokens.h"

#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The environment variables that bound the default. */
#define OWN_VARIABLE    "FLASH_KDA_NUM_THREADS"
#define OPENMP_VARIABLE "OMP_NUM_THREADS"

/* Microseconds of one thread's work that are worth another thread. Waking one that sleeps costs the caller a system call,
 * about 5 us, and helps it some 10 to 50 us later. */
enum { WORTH = 40 };

static int min(int a, int b) { return a < b ? a : b; }

/* ---- Affinity ----------------------------------------------------------------------------------- */

/* Processors that the calling thread may run on; by the system call, which every libc lets through alike. */
static int affinity(void) {
    unsigned long mask[1024]; /* as many processors as the kernel may number */
    long bytes = syscall(SYS_sched_getaffinity, 0, sizeof mask, mask);
    int count = 0;
    for (size_t i = 0; bytes > 0 && i < (size_t)bytes / sizeof *mask; i++)
        count += __builtin_popcountl(mask[i]);
    return count;
}

/* ---- Quota -------------------------------------------------------------------------------------- */

enum { PATH = 4096 };

/* A small file's text; false if there is none. */
static bool read_text(const char *path, char *text, size_t size) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? -1 : read(file, text, size - 1);
    text[got > 0 ? got : 0] = '\0';
    if (file >= 0)
        close(file);
    return got > 0;
}

/* The numbers, up to two, in root/tree/group/name; 0 for what is none, as "max". */
static void read_numbers(const char *root, const char *tree, const char *group, const char *name,
                         long long numbers[2]) {
    char path[PATH], text[64], *rest = text;
    int length = snprintf(path, sizeof path, "%s/%s%s/%s", root, tree, group, name);
    numbers[0] = numbers[1] = 0;
    if (length >= (int)sizeof path || !read_text(path, text, sizeof text))
        return;
    numbers[0] = strtoll(text, &rest, 10);
    numbers[1] = strtoll(rest, NULL, 10);
}

static int processors_of(long long time, long long period) {
    return time > 0 && period > 0 ? (int)((time + period - 1) / period) : INT_MAX;
}

/* Of one cgroup: version 2 has both numbers in one file, version 1 has a file each. */
static int quota_of(const char *root, const char *tree, const char *group) {
    long long both[2], time[2], period[2];
    read_numbers(root, tree, group, "cpu.max", both);
    read_numbers(root, tree, group, "cpu.cfs_quota_us", time);
    read_numbers(root, tree, group, "cpu.cfs_period_us", period);
    return min(processors_of(both[0], both[1]), processors_of(time[0], period[0]));
}

/* Of a cgroup and those above it. */
static int least_quota(const char *root, const char *tree, char *group) {
    int least = INT_MAX;
    for (char *end = group + strlen(group); end; end = strrchr(group, '/')) {
        *end = '\0';
        least = min(least, quota_of(root, tree, group));
    }
    return least;
}

static bool has_word(const char *list, const char *word) {
    size_t length = strlen(word);
    for (const char *at = list;; at++) {
        if (!strncmp(at, word, length) && (at[length] == ',' || !at[length]))
            return true;
        at = strchr(at, ',');
        if (!at)
            return false;
    }
}

int kda_cgroup_quota(const char *membership, const char *root) {
    char groups[PATH], group[PATH];
    int least = INT_MAX;
    read_text(membership, groups, sizeof groups);
    /* Lines "ID:CONTROLLERS:/GROUP"; version 2 has no controllers. */
    for (char *line = groups, *end; *line; line = end) {
        end = line + strcspn(line, "\n");
        end += *end ? (*end = '\0', 1) : 0;
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path || path[1] != '/')
            continue;
        *path++ = '\0';
        controllers++;
        if (*controllers && !has_word(controllers, "cpu"))
            continue;
        const char *const trees[] = {*controllers ? controllers : ".", *controllers ? "cpu" : "unified"};
        for (int i = 0; i < 2; i++) {
            memcpy(group, path, strlen(path) + 1);
            least = min(least, least_quota(root, trees[i], group));
        }
    }
    return least;
}

/* ---- Environment -------------------------------------------------------------------------------- */

/* A whole number above 0 that begins `text`, and what follows it; 0 if there is none. */
static int parse_count(const char *text, const char **rest) {
    long long count = 0;
    const char *at = text;
    for (; *at >= '0' && *at <= '9'; at++)
        count = count < INT_MAX ? count * 10 + (*at - '0') : count;
    *rest = at;
    return count < INT_MAX ? (int)count : INT_MAX;
}

/* What the environment allows; 0 with an error for nonsense in our own variable. OpenMP's is not ours to judge; it may hold
 * a list, of which the first number counts. */
static int environment(void) {
    const char *own = getenv(OWN_VARIABLE), *openmp = getenv(OPENMP_VARIABLE), *rest;
    if (own && *own) {
        int count = parse_count(own, &rest);
        if (count && !*rest)
            return count;
        kda_explain("the environment variable " OWN_VARIABLE " is %.40s; expected a number of threads above 0",
                    own);
        return 0;
    }
    int count = openmp ? parse_count(openmp, &rest) : 0;
    return count && (!*rest || *rest == ',') ? count : INT_MAX;
}

/* ---- All of it ---------------------------------------------------------------------------------- */

/* Threads that meet here first agree on what one of them finds. */
int kda_default_threads(void) {
    static _Atomic int known;
    int count = atomic_load_explicit(&known, memory_order_relaxed);
    if (count)
        return count;
    int allowed = environment();
    if (!allowed)
        return 0;
    int found = min(affinity(), kda_cgroup_quota("/proc/self/cgroup", "/sys/fs/cgroup"));
    found = min(min(found > 0 ? found : 1, allowed), KDA_MAX_THREADS);
    return atomic_compare_exchange_strong(&known, &count, found) ? found : count;
}

int kda_threads_for(int num_threads, double microseconds) {
    int most = num_threads ? num_threads : kda_default_threads();
    double pay = microseconds / WORTH + 1;
    return pay < most ? (int)pay : most;
}

int flash_kda_cpu_threads(void) { return kda_default_threads(); }
