/* SPDX-License-Identifier: MIT */
/* Calls of the library on several threads beside what a program may do meanwhile: fork, limit itself, unload, exit. */
#include "child.h"
#include "problem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h wants the four above first. */
#include <cmocka.h>

#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 3 };

static const struct problem_size size = {2, 256, 5, 64, 64}, small = {8, 4, 5, 64, 64};

/* The library's functions, of the one linked in or of one loaded. */
struct library {
    flash_kda_status (*prefill)(const flash_kda_prefill_args *args, void *workspace, size_t bytes);
    flash_kda_status (*decode)(const flash_kda_decode_args *args);
};

static const struct library linked = {flash_kda_prefill, flash_kda_decode};

/* A prefill and a decode, their right results beside them. */
struct both {
    struct problem prefill, decode, right_prefill, right_decode;
};

static bool make_problems(struct both *b) {
    return problem_make(&b->prefill, size, FLASH_KDA_BACKEND_CPU, THREADS) &&
           problem_make(&b->decode, small, FLASH_KDA_BACKEND_CPU, THREADS) &&
           problem_make(&b->right_prefill, size, FLASH_KDA_BACKEND_CPU, 1) &&
           problem_make(&b->right_decode, small, FLASH_KDA_BACKEND_CPU, 1);
}

static void free_problems(struct both *b) {
    problem_free(&b->prefill);
    problem_free(&b->decode);
    problem_free(&b->right_prefill);
    problem_free(&b->right_decode);
}

static bool run(const struct library *library, struct problem *prefill, struct problem *decode) {
    problem_reset(prefill);
    problem_reset(decode);
    return library->prefill(&prefill->prefill, prefill->workspace, prefill->workspace_bytes) == FLASH_KDA_OK &&
           library->decode(&decode->decode) == FLASH_KDA_OK;
}

/* The right results come from one thread. */
static struct both *new_problems(void) {
    struct both *b = calloc(1, sizeof *b);
    assert_non_null(b);
    assert_true(make_problems(b));
    assert_true(run(&linked, &b->right_prefill, &b->right_decode));
    return b;
}

static void delete_problems(struct both *b) {
    free_problems(b);
    free(b);
}

static bool gives_the_same(void *context) {
    struct both *b = context;
    return run(&linked, &b->prefill, &b->decode) && problem_same(&b->prefill, &b->right_prefill) &&
           problem_same(&b->decode, &b->right_decode);
}

static void assert_child(bool (*works)(void *context), void *context) {
    const char *wrong = child_run(works, context);
    assert_string_equal(wrong ? wrong : "", "");
}

/* ---- Fork -------------------------------------------------------------------------------------------- */

static void test_child_after_fork(void **state) {
    (void)state;
    struct both *b = new_problems();
    assert_true(gives_the_same(b));
    for (int i = 0; i < 3; i++)
        assert_child(gives_the_same, b);
    assert_true(gives_the_same(b));
    delete_problems(b);
}

static _Atomic bool stop, wrong;

static void *call_until_stopped(void *context) {
    while (!stop)
        if (!gives_the_same(context))
            wrong = true;
    return NULL;
}

#ifndef SANITIZED /* whose allocator and threads have locks that a fork leaves held */
static void test_fork_during_calls(void **state) {
    (void)state;
    struct both *b = new_problems(), *others[2] = {new_problems(), new_problems()};
    pthread_t callers[2];
    stop = wrong = false;
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&callers[i], NULL, call_until_stopped, others[i]), 0);
    for (int i = 0; i < 20; i++) {
        usleep(137 * (unsigned)i);
        assert_child(gives_the_same, b);
    }
    stop = true;
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pthread_join(callers[i], NULL), 0);
        delete_problems(others[i]);
    }
    assert_false(wrong);
    delete_problems(b);
}
#endif

/* ---- Limits ------------------------------------------------------------------------------------------- */

static bool same_without_processes(void *context) {
    enum { NOBODY = 54321 };
    const struct rlimit one = {1, 1};
    if (geteuid() == 0 && setresuid(NOBODY, NOBODY, NOBODY)) /* who is root may have more */
        return false;
    return !setrlimit(RLIMIT_NPROC, &one) && gives_the_same(context);
}

static void test_no_more_processes(void **state) {
    (void)state;
    struct both *b = new_problems();
    assert_child(same_without_processes, b);
    delete_problems(b);
}

#ifndef SANITIZED /* whose memory counts, too */
/* Decode of many tokens allocates; where it cannot it says so and has written nothing. */
static bool decode_without_memory(void *context) {
    struct problem *p = context;
    const struct rlimit little = {1 << 20, 1 << 20};
    return !setrlimit(RLIMIT_AS, &little) && flash_kda_decode(&p[0].decode) == FLASH_KDA_ERROR_OUT_OF_MEMORY &&
           strstr(flash_kda_last_error(), "decode could not allocate") && problem_same(&p[0], &p[1]);
}

static void test_no_more_memory(void **state) {
    (void)state;
    struct problem p[2];
    for (int i = 0; i < 2; i++)
        assert_true(problem_make(&p[i], (struct problem_size){2, 16, 4, 256, 1024}, FLASH_KDA_BACKEND_CPU, 64));
    assert_child(decode_without_memory, p);
    assert_int_equal(flash_kda_decode(&p[0].decode), FLASH_KDA_OK);
    for (int i = 0; i < 2; i++)
        problem_free(&p[i]);
}
#endif

/* ---- Unloading, exit ------------------------------------------------------------------------------------ */

static int count_threads(void) {
    int count = 0;
    DIR *tasks = opendir("/proc/self/task");
    assert_non_null(tasks);
    while (readdir(tasks))
        count++;
    closedir(tasks);
    return count - 2; /* . and .. */
}

static void *no_call(void *unused) { return unused; }

static void test_unloading(void **state) {
    (void)state;
    struct both *b = new_problems();
    pthread_t first; /* ThreadSanitizer makes one of its own beside it */
    assert_int_equal(pthread_create(&first, NULL, no_call, NULL), 0);
    assert_int_equal(pthread_join(first, NULL), 0);
    int before = count_threads();
    for (int i = 0; i < 3; i++) {
        void *handle = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
        assert_non_null(handle);
        struct library loaded;
        *(void **)&loaded.prefill = dlsym(handle, "flash_kda_prefill");
        *(void **)&loaded.decode = dlsym(handle, "flash_kda_decode");
        assert_true(run(&loaded, &b->prefill, &b->decode));
        assert_true(problem_same(&b->prefill, &b->right_prefill));
        assert_in_range(count_threads(), before + 1, before + THREADS - 1);
        assert_int_equal(dlclose(handle), 0);
        assert_int_equal(count_threads(), before);
        assert_null(dlopen(LIBRARY, RTLD_NOW | RTLD_NOLOAD));
    }
    delete_problems(b);
}

/* A child that exits, its handlers and destructors run, while others call. */
static bool exits_during_calls(void *context) {
    pthread_t caller;
    stop = false;
    for (int i = 0; i < 2; i++)
        if (pthread_create(&caller, NULL, call_until_stopped, ((struct both **)context)[i]))
            return false;
    usleep(3000);
    exit(0);
}

static void test_exit_during_calls(void **state) {
    (void)state;
    struct both *b[2] = {new_problems(), new_problems()};
    for (int i = 0; i < 10; i++)
        assert_child(exits_during_calls, b);
    delete_problems(b[0]);
    delete_problems(b[1]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
#ifndef SANITIZED
        cmocka_unit_test(test_no_more_memory), /* before others leave memory behind that is free */
        cmocka_unit_test(test_fork_during_calls),
#endif
        cmocka_unit_test(test_unloading),         cmocka_unit_test(test_child_after_fork),
        cmocka_unit_test(test_no_more_processes), cmocka_unit_test(test_exit_during_calls),
    };
    return cmocka_run_group_tests_name("calls", tests, NULL, NULL);
}
