/* SPDX-License-Identifier: MIT */
/* The thread pool by itself. What pieces write are plain numbers, so that ThreadSanitizer sees an order that
 * is missing. */
#include "cpu/pool.h"

#include "child.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h wants the four above first. */
#include <cmocka.h>

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PIECES = 300, STEPS = 40, MEMBERS = 64 };

static double seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void spin(double duration) {
    for (double end = seconds(CLOCK_MONOTONIC) + duration; seconds(CLOCK_MONOTONIC) < end;)
        continue;
}

/* ---- Pieces, steps, members ----------------------------------------------------------------------- */

/* A piece of another process's call was worked. */
static _Atomic bool foreign;

struct job {
    pid_t process;
    int threads, step, pieces;
    int seen[PIECES];
    int scratch[MEMBERS];
    _Atomic int busy[MEMBERS];
    _Atomic bool wrong;
};

static void work_once(void *context, uint32_t piece, int member) {
    struct job *job = context;
    if (member < 0 || member >= job->threads || atomic_fetch_add(&job->busy[member], 1))
        job->wrong = true;
    if (job->process != getpid())
        foreign = true;
    job->scratch[member]++;
    job->seen[piece] += job->step + 1;
    atomic_fetch_sub(&job->busy[member], 1);
}

static uint32_t next_step(void *context) {
    struct job *job = context;
    for (int i = 0; i < job->pieces; i++) {
        if (job->seen[i] != job->step + 1)
            job->wrong = true;
        job->seen[i] = 0;
    }
    job->step++;
    job->pieces = 1 + (job->pieces * 7 + job->step) % 9;
    return job->step < STEPS ? (uint32_t)job->pieces : 0;
}

static bool all_is_done_once(int threads) {
    struct job job = {.process = getpid(), .threads = threads > 1 ? threads : 1};
    struct job steps = {.process = job.process, .threads = job.threads, .pieces = 5};
    kda_pool_run(threads, PIECES, work_once, NULL, &job);
    for (int i = 0; i < PIECES; i++)
        if (job.seen[i] != 1)
            return false;
    kda_pool_run(threads, 5, work_once, next_step, &steps);
    kda_pool_run(threads, 0, work_once, NULL, &job);
    kda_pool_run(threads, 1, work_once, NULL, &job);
    return steps.step == STEPS && job.seen[0] == 2 && !job.wrong && !steps.wrong;
}

static void test_every_piece_once(void **state) {
    (void)state;
    for (int threads = 0; threads < 10; threads++)
        for (int i = 0; i < 50; i++)
            assert_true(all_is_done_once(threads));
}

static void *call_often(void *threads) {
    for (int i = 0; i < 50; i++)
        if (!all_is_done_once((int)(intptr_t)threads + i % 3))
            return "wrong";
    return NULL;
}

/* More callers than the pool has places, too. */
static void test_many_callers(void **state) {
    (void)state;
    enum { CALLERS = 100 };
    pthread_t callers[CALLERS];
    for (int i = 0; i < CALLERS; i++)
        assert_int_equal(pthread_create(&callers[i], NULL, call_often, (void *)(intptr_t)(1 + i % 4)), 0);
    for (int i = 0; i < CALLERS; i++) {
        void *wrong;
        assert_int_equal(pthread_join(callers[i], &wrong), 0);
        assert_null(wrong);
    }
}

static void call_inside(void *context, uint32_t piece, int member) {
    (void)piece, (void)member;
    if (!all_is_done_once(3))
        *(_Atomic bool *)context = true;
}

static void test_a_call_inside_a_piece(void **state) {
    (void)state;
    _Atomic bool wrong = false;
    kda_pool_run(3, 20, call_inside, NULL, &wrong);
    assert_false(wrong);
}

/* ---- Who works, who waits -------------------------------------------------------------------------- */

struct workers {
    pthread_t caller;
    _Atomic int by_caller, by_helpers;
};

static void note_worker(void *context, uint32_t piece, int member) {
    struct workers *w = context;
    (void)piece, (void)member;
    spin(100e-6);
    atomic_fetch_add(pthread_equal(pthread_self(), w->caller) ? &w->by_caller : &w->by_helpers, 1);
}

static bool caller_and_helpers_work(void) {
    struct workers w = {.caller = pthread_self()};
    for (int i = 0; i < 1000 && !(w.by_caller && w.by_helpers); i++)
        kda_pool_run(2, 20, note_worker, NULL, &w);
    return w.by_caller && w.by_helpers;
}

static void test_caller_and_helpers_work(void **state) {
    (void)state;
    assert_true(caller_and_helpers_work());
}

/* Gives a helper the least claim to the second processor. */
static void push_away(void *context, uint32_t piece, int member) {
    const struct workers *w = context;
    const struct sched_param idle = {0};
    cpu_set_t second;
    (void)piece, (void)member;
    spin(300e-6);
    if (pthread_equal(pthread_self(), w->caller))
        return;
    CPU_ZERO(&second);
    CPU_SET(1, &second);
    sched_setaffinity(0, sizeof second, &second);
    sched_setscheduler(0, SCHED_IDLE, &idle);
}

static void no_work(void *context, uint32_t piece, int member) { (void)context, (void)piece, (void)member; }

/* In a child: a helper whose processor another process keeps does not delay a call. */
static bool starved_helper_costs_nothing(void *unused) {
    (void)unused;
    struct workers w = {.caller = pthread_self()};
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(1, &set);
    pid_t hog = fork();
    if (hog == 0) {
        sched_setaffinity(0, sizeof set, &set);
        alarm(20);
        for (;;)
            continue;
    }
    CPU_ZERO(&set);
    CPU_SET(0, &set);
    for (int i = 0; i < 10; i++)
        kda_pool_run(2, 20, push_away, NULL, &w);
    sched_setaffinity(0, sizeof set, &set);
    double best = 1;
    for (int i = 0; i < 50; i++) {
        usleep(1000);
        double start = seconds(CLOCK_MONOTONIC);
        kda_pool_run(2, 10, no_work, NULL, NULL);
        double took = seconds(CLOCK_MONOTONIC) - start;
        best = took < best ? took : best;
    }
    kill(hog, SIGKILL);
    waitpid(hog, NULL, 0);
    return best < 1e-3;
}

static void test_nobody_waits_for_a_late_helper(void **state) {
    (void)state;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) || !CPU_ISSET(0, &set) || !CPU_ISSET(1, &set))
        skip(); /* wants the first two processors */
    const char *wrong = child_run(starved_helper_costs_nothing, NULL);
    assert_string_equal(wrong ? wrong : "", "");
}

/* Calls 10 ms apart, long enough for helpers to join: what these look for work costs a tenth of a
 * millisecond or less. */
static void test_idle_helpers_sleep(void **state) {
    (void)state;
    enum { CALLS = 20 };
    struct workers w = {.caller = pthread_self()};
    double looked = 0;
    int calls = 0;
    for (; calls < 1000 && (calls < CALLS || !w.by_helpers); calls++) {
        kda_pool_run(3, 20, note_worker, NULL, &w);
        double start = seconds(CLOCK_PROCESS_CPUTIME_ID);
        usleep(10000);
        looked += seconds(CLOCK_PROCESS_CPUTIME_ID) - start;
    }
    assert_true(w.by_helpers > 0);
    assert_true(looked / calls < 1e-3);
}

/* A helper that waits for its call's next step sleeps as well. */
static void one_is_slow(void *context, uint32_t piece, int member) {
    (void)context, (void)member;
    if (piece == 0)
        usleep(20000);
}

static uint32_t three_steps(void *context) { return ++*(int *)context < 3; }

static void test_members_between_steps_sleep(void **state) {
    (void)state;
    int step = 0;
    double start = seconds(CLOCK_PROCESS_CPUTIME_ID);
    kda_pool_run(3, 3, one_is_slow, three_steps, &step);
    assert_true(seconds(CLOCK_PROCESS_CPUTIME_ID) - start < 10e-3);
}

/* ---- Signals, stacks -------------------------------------------------------------------------------- */

struct seen {
    pthread_t caller;
    _Atomic bool term_blocked, segv_blocked;
    _Atomic size_t stack;
};

static void look_at_helper(void *context, uint32_t piece, int member) {
    struct seen *seen = context;
    sigset_t mask;
    pthread_attr_t attributes;
    size_t stack;
    (void)piece, (void)member;
    spin(100e-6);
    if (pthread_equal(pthread_self(), seen->caller) || pthread_sigmask(SIG_SETMASK, NULL, &mask) ||
        pthread_getattr_np(pthread_self(), &attributes))
        return;
    pthread_attr_getstacksize(&attributes, &stack);
    pthread_attr_destroy(&attributes);
    seen->term_blocked = sigismember(&mask, SIGTERM);
    seen->segv_blocked = sigismember(&mask, SIGSEGV);
    seen->stack = stack;
}

static void test_helpers_take_no_signals(void **state) {
    (void)state;
    struct seen seen = {.caller = pthread_self()};
    for (int i = 0; i < 1000 && !seen.stack; i++)
        kda_pool_run(2, 20, look_at_helper, NULL, &seen);
    assert_true(seen.stack > 0);
    assert_true(seen.term_blocked);
    assert_false(seen.segv_blocked);
#ifndef SANITIZED /* which want more */
    assert_in_range(seen.stack, 1, 64 << 10);
#endif
}

/* ---- Fork -------------------------------------------------------------------------------------------- */

static bool grandchild_works(void *unused) {
    (void)unused;
    return all_is_done_once(2);
}

static bool child_works(void *unused) {
    (void)unused;
    return all_is_done_once(3) && !child_run(grandchild_works, NULL) && all_is_done_once(2) &&
           caller_and_helpers_work() && !foreign;
}

static _Atomic bool stop;

static void *call_until_stopped(void *unused) {
    (void)unused;
    while (!stop)
        if (!all_is_done_once(3))
            return "wrong";
    return NULL;
}

/* At any moment of other threads' calls, which are the parent's alone; the child makes helpers anew. */
static void test_fork(void **state) {
    (void)state;
    enum { CALLERS = 2, FORKS = 40 };
    pthread_t callers[CALLERS];
    stop = false;
    for (int i = 0; i < CALLERS; i++)
        assert_int_equal(pthread_create(&callers[i], NULL, call_until_stopped, NULL), 0);
    for (int i = 0; i < FORKS; i++) {
        usleep(37 * (unsigned)i);
        const char *wrong = child_run(child_works, NULL);
        assert_string_equal(wrong ? wrong : "", "");
        assert_true(all_is_done_once(2));
    }
    stop = true;
    for (int i = 0; i < CALLERS; i++) {
        void *wrong;
        assert_int_equal(pthread_join(callers[i], &wrong), 0);
        assert_null(wrong);
    }
}

/* ---- Limits ------------------------------------------------------------------------------------------- */

static bool works_without_processes(void *unused) {
    enum { NOBODY = 54321 };
    const struct rlimit one = {1, 1};
    (void)unused;
    if (geteuid() == 0 && setresuid(NOBODY, NOBODY, NOBODY)) /* who is root may have more */
        return false;
    return !setrlimit(RLIMIT_NPROC, &one) && all_is_done_once(8) && all_is_done_once(64);
}

static void test_no_more_processes(void **state) {
    (void)state;
    const char *wrong = child_run(works_without_processes, NULL);
    assert_string_equal(wrong ? wrong : "", "");
}

#ifndef SANITIZED
static bool works_without_memory(void *unused) {
    const struct rlimit little = {1 << 20, 1 << 20};
    (void)unused;
    return !setrlimit(RLIMIT_AS, &little) && all_is_done_once(8) && all_is_done_once(64);
}

static void test_no_more_memory(void **state) {
    (void)state;
    const char *wrong = child_run(works_without_memory, NULL);
    assert_string_equal(wrong ? wrong : "", "");
}
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_piece_once),
        cmocka_unit_test(test_many_callers),
        cmocka_unit_test(test_a_call_inside_a_piece),
        cmocka_unit_test(test_caller_and_helpers_work),
        cmocka_unit_test(test_nobody_waits_for_a_late_helper),
        cmocka_unit_test(test_idle_helpers_sleep),
        cmocka_unit_test(test_members_between_steps_sleep),
        cmocka_unit_test(test_helpers_take_no_signals),
        cmocka_unit_test(test_fork),
        cmocka_unit_test(test_no_more_processes),
#ifndef SANITIZED
        cmocka_unit_test(test_no_more_memory),
#endif
    };
    return cmocka_run_group_tests_name("pool", tests, NULL, NULL);
}
