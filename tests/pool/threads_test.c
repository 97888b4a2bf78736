/* SPDX-License-Identifier: MIT */
/* How many threads a call takes: affinity, cgroups, the environment, and what pays. */
#include "cpu/threads.h"
#include "flash_kda.h"

#include "child.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h wants the four above first. */
#include <cmocka.h>

#include <ftw.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- Cgroups -------------------------------------------------------------------------------------- */

/* A tree of files under a fresh folder. */
struct tree {
    char root[64];
};

static void make_tree(struct tree *tree) {
    snprintf(tree->root, sizeof tree->root, "/tmp/flashkda-cgroup-XXXXXX");
    assert_non_null(mkdtemp(tree->root));
}

static void put(const struct tree *tree, const char *path, const char *text) {
    char whole[300];
    snprintf(whole, sizeof whole, "%s/%s", tree->root, path);
    for (char *slash = whole + strlen(tree->root) + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
        *slash = '\0';
        mkdir(whole, 0700);
    }
    FILE *file = fopen(whole, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static int remove_one(const char *path, const struct stat *status, int kind, struct FTW *place) {
    (void)status, (void)kind, (void)place;
    return remove(path);
}

static void remove_tree(const struct tree *tree) {
    assert_int_equal(nftw(tree->root, remove_one, 4, FTW_DEPTH | FTW_PHYS), 0);
}

static int quota(const struct tree *tree) {
    char membership[100];
    snprintf(membership, sizeof membership, "%s/self", tree->root);
    return kda_cgroup_quota(membership, tree->root);
}

static void test_version_2(void **state) {
    (void)state;
    struct tree tree;
    make_tree(&tree);
    assert_int_equal(quota(&tree), INT_MAX); /* no files at all */
    put(&tree, "self", "0::/a/b\n");
    assert_int_equal(quota(&tree), INT_MAX);
    put(&tree, "a/b/cpu.max", "max 100000\n");
    assert_int_equal(quota(&tree), INT_MAX);
    put(&tree, "a/b/cpu.max", "400000 100000\n");
    assert_int_equal(quota(&tree), 4);
    put(&tree, "a/cpu.max", "150000 100000\n"); /* one above bounds it; a part of a processor is one */
    assert_int_equal(quota(&tree), 2);
    put(&tree, "cpu.max", "20000 100000\n"); /* as a container sees its own */
    assert_int_equal(quota(&tree), 1);
    remove_tree(&tree);
}

static void test_version_1(void **state) {
    (void)state;
    struct tree tree;
    make_tree(&tree);
    put(&tree, "self", "12:memory:/x\n5:cpu,cpuacct:/docker/1\n1:cpuset:/y\n0::/z\n");
    put(&tree, "cpu,cpuacct/docker/1/cpu.cfs_quota_us", "-1\n");
    put(&tree, "cpu,cpuacct/docker/1/cpu.cfs_period_us", "100000\n");
    put(&tree, "memory/x/cpu.cfs_quota_us", "100000\n"); /* not a cpu controller's */
    put(&tree, "memory/x/cpu.cfs_period_us", "100000\n");
    put(&tree, "cpuset/y/cpu.cfs_quota_us", "100000\n"); /* nor is cpuset */
    put(&tree, "cpuset/y/cpu.cfs_period_us", "100000\n");
    assert_int_equal(quota(&tree), INT_MAX);
    put(&tree, "cpu,cpuacct/docker/1/cpu.cfs_quota_us", "250000\n");
    assert_int_equal(quota(&tree), 3);
    remove_tree(&tree);
    make_tree(&tree);
    put(&tree, "self", "5:cpuacct,cpu:/docker/1\n");
    put(&tree, "cpu/cpu.cfs_quota_us", "50000\n"); /* mounted under another name, and inside a container */
    put(&tree, "cpu/cpu.cfs_period_us", "50000\n");
    assert_int_equal(quota(&tree), 1);
    remove_tree(&tree);
}

/* ---- The default ------------------------------------------------------------------------------------ */

static int processors(void) {
    cpu_set_t set;
    assert_int_equal(sched_getaffinity(0, sizeof set, &set), 0);
    return CPU_COUNT(&set);
}

/* What a process with this environment takes by default; NULL: without a variable. */
struct setting {
    const char *own, *openmp;
    int expected; /* -1: an error that names the variable */
};

static bool takes_as_expected(void *context) {
    const struct setting *setting = context;
    if (setting->own)
        setenv("FLASH_KDA_NUM_THREADS", setting->own, 1);
    if (setting->openmp)
        setenv("OMP_NUM_THREADS", setting->openmp, 1);
    int found = flash_kda_cpu_threads();
    unsetenv("FLASH_KDA_NUM_THREADS");
    unsetenv("OMP_NUM_THREADS");
    if (setting->expected < 0)
        return found == 0 && strstr(flash_kda_last_error(), "FLASH_KDA_NUM_THREADS") &&
               flash_kda_cpu_threads() > 0; /* nothing is kept of nonsense */
    return found == setting->expected && flash_kda_cpu_threads() == found;
}

static void test_environment(void **state) {
    (void)state;
    int all = kda_cgroup_quota("/proc/self/cgroup", "/sys/fs/cgroup");
    all = processors() < all ? processors() : all;
    const struct setting settings[] = {
        {NULL, NULL, all},    {"1", NULL, 1},   {NULL, "1", 1},    {"", "1", 1},
        {"100000", "1", all}, {"1", "64", 1},   {NULL, "1,4", 1},  {NULL, "many", all},
        {NULL, "-1", all},    {NULL, "0", all}, {NULL, "1x", all}, {NULL, "99999999999999999999", all},
        {"0", NULL, -1},      {"-2", NULL, -1}, {"two", "1", -1},  {"2 ", NULL, -1},
        {"1,2", NULL, -1},    {" 1", NULL, -1},
    };
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        struct setting setting = settings[i];
        const char *wrong = child_run(takes_as_expected, &setting);
        if (wrong)
            fail_msg("FLASH_KDA_NUM_THREADS=%s OMP_NUM_THREADS=%s: %s", setting.own, setting.openmp, wrong);
    }
}

static bool follows_affinity(void *unused) {
    cpu_set_t set, one;
    (void)unused;
    if (sched_getaffinity(0, sizeof set, &set))
        return false;
    CPU_ZERO(&one);
    for (int i = 0; i < CPU_SETSIZE && !CPU_COUNT(&one); i++)
        if (CPU_ISSET(i, &set))
            CPU_SET(i, &one);
    return !sched_setaffinity(0, sizeof one, &one) && flash_kda_cpu_threads() == 1;
}

static void test_affinity(void **state) {
    (void)state;
    const char *wrong = child_run(follows_affinity, NULL);
    assert_string_equal(wrong ? wrong : "", "");
}

/* ---- What pays --------------------------------------------------------------------------------------- */

static void test_small_calls_take_one(void **state) {
    (void)state;
    assert_int_equal(kda_threads_for(8, 0), 1);
    assert_int_equal(kda_threads_for(8, 20), 1);
    assert_int_equal(kda_threads_for(8, 1e9), 8);
    for (int i = 1; i < 1000; i++) {
        int threads = kda_threads_for(64, i);
        assert_in_range(threads, 1, 64);
        assert_true(threads >= kda_threads_for(64, i - 1));
    }
}

int main(void) {
    unsetenv("FLASH_KDA_NUM_THREADS");
    unsetenv("OMP_NUM_THREADS");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_version_2),
        cmocka_unit_test(test_version_1),
        cmocka_unit_test(test_environment),
        cmocka_unit_test(test_affinity),
        cmocka_unit_test(test_small_calls_take_one),
    };
    return cmocka_run_group_tests_name("threads", tests, NULL, NULL);
}
