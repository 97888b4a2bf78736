/* SPDX-License-Identifier: MIT */
/*
 * How the pool works. A call in progress has a place in `calls`, which is static: a helper that was held up may still
 * look at a place whose call is over, and finds so there. Two words decide everything:
 *
 *   seats   number of the call's first step | helpers that may still join
 *   ticket  number of the step at hand      | its pieces that nobody has claimed
 *
 * Steps are numbered through all calls of a place, so a claim, which is one compare-and-swap of the ticket, succeeds
 * only in the step that it is meant for. Nothing else of a place is read before a claim has succeeded; until the piece
 * is counted as done nothing of it changes.
 *
 * Who waits looks for a short time, then sleeps on a futex: helpers without a call on `posted`, members of a call
 * between two steps on its `opened`. There are no locks, so a fork at any moment leaves nothing held: the child sets
 * everything back and begins without helpers.
 */
#include "cpu/pool.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    CALLS = 64, /* at once; a further one runs on its caller alone */
    HELPERS = 1023,
    WAKES = 4,            /* sleepers that one thread wakes; those wake the others */
    SPIN_NS = 30000,      /* looking before sleeping */
    KEEP_NS = 10000,      /* of these a helper without a call keeps its core */
    STACK = 64 << 10,     /* a helper's, or more where the system insists */
    MAX_STACK = 4 << 20,  /* what is tried last */
    RETRY_NS = 100000000, /* after a helper could not be made */
};

struct call {
    alignas(128) _Atomic uint64_t ticket;
    _Atomic uint64_t seats;
    _Atomic bool taken;                 /* by a caller */
    _Atomic bool stepped;               /* has further steps, perhaps */
    alignas(128) _Atomic uint32_t left; /* pieces of the step at hand that are not done */
    _Atomic uint32_t opened;            /* changes when a step opens or the call ends */
    _Atomic uint32_t sleepers;          /* on `opened` */
    uint32_t pieces;
    kda_pool_work *work;
    kda_pool_next *next;
    void *context;
};

static struct call calls[CALLS];
static _Atomic int highest;                  /* places below this have been used */
static alignas(128) _Atomic uint32_t posted; /* changes when a call is posted */
static _Atomic uint32_t sleepers;            /* on `posted` */
static _Atomic bool closing;
static _Atomic bool growing; /* a thread is making helpers */
static _Atomic int helpers;
static pthread_t made[HELPERS];
static _Atomic int64_t retry_at;
static bool forks_are_seen;

/* ---- Waiting ------------------------------------------------------------------------------------ */

static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void pause_briefly(void) {
    for (int i = 0; i < 8; i++)
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("isb" ::: "memory");
#else
        atomic_signal_fence(memory_order_seq_cst);
#endif
}

/* What a waiting thread has seen: of its call, or without one of `posted`. */
struct watch {
    bool helper;
    struct call *call;
    uint64_t ticket;
    uint32_t first, posted;
};

/* Is the call that began with step `first` still in its place? */
static bool call_is(const struct call *call, uint32_t first) {
    return atomic_load(&call->seats) >> 32 == first;
}

static bool nothing_new(const struct watch *w) {
    if (w->helper && atomic_load(&closing))
        return false;
    return w->call ? atomic_load(&w->call->ticket) == w->ticket && call_is(w->call, w->first)
                   : atomic_load(&posted) == w->posted;
}

/* Returns when there may be news; true if it slept. Those who bring them change what is watched, then the word, then
 * look for sleepers. */
static bool wait_for_news(const struct watch *w, _Atomic uint32_t *word, _Atomic uint32_t *asleep,
                          int64_t spin_ns) {
    int64_t start = spin_ns ? now_ns() : 0, now = start;
    for (; now < start + spin_ns; now = now_ns()) {
        if (!nothing_new(w))
            return false;
        if (w->call || now < start + KEEP_NS)
            pause_briefly();
        else
            sched_yield(); /* the caller that was just helped may be waiting for this very core */
    }
    uint32_t seen = atomic_load(word);
    atomic_fetch_add(asleep, 1);
    if (nothing_new(w))
        futex_wait(word, seen);
    atomic_fetch_sub(asleep, 1);
    return true;
}

static void wake(_Atomic uint32_t *word, _Atomic uint32_t *asleep, int count) {
    if (count > 0 && atomic_load(asleep))
        futex_wake(word, count);
}

static void tell(_Atomic uint32_t *word, _Atomic uint32_t *asleep, int count) {
    atomic_fetch_add(word, 1);
    wake(word, asleep, count);
}

static int fewer(int a, int b) { return a < b ? a : b; }

/* ---- Working on a call -------------------------------------------------------------------------- */

/* By whoever has done the last piece of a step: opens the next, or ends the call. */
static void finish_step(struct call *call, uint32_t step) {
    uint32_t pieces = call->next ? call->next(call->context) : 0;
    uint64_t number = (uint64_t)(step + 1) << 32;
    if (pieces) {
        call->pieces = pieces;
        atomic_store(&call->left, pieces);
        atomic_store(&call->ticket, number | pieces);
    } else {
        atomic_store(&call->seats, number); /* the caller may be gone from here on */
    }
    tell(&call->opened, &call->sleepers, INT_MAX);
}

static void work_on(struct call *call, uint32_t first, int member) {
    for (;;) {
        uint64_t ticket = atomic_load(&call->ticket);
        uint32_t unclaimed = (uint32_t)ticket;
        if (!call_is(call, first) || (member && atomic_load(&closing)))
            return; /* asked after the ticket was read: while the call is in its place, that is the call's */
        if (unclaimed) {
            if (!atomic_compare_exchange_strong(&call->ticket, &ticket, ticket - 1))
                continue;
            call->work(call->context, call->pieces - unclaimed, member);
            if (atomic_fetch_sub(&call->left, 1) == 1)
                finish_step(call, (uint32_t)(ticket >> 32));
        } else if (member && !atomic_load(&call->stepped)) {
            return;
        } else {
            const struct watch w = {.helper = member > 0, .call = call, .ticket = ticket, .first = first};
            wait_for_news(&w, &call->opened, &call->sleepers, SPIN_NS);
        }
    }
}

/* ---- Helpers ------------------------------------------------------------------------------------ */

static bool join_a_call(void) {
    for (int i = 0; i < atomic_load(&highest); i++) {
        struct call *call = &calls[i];
        uint64_t seats = atomic_load(&call->seats);
        if (!(uint32_t)seats || (!(uint32_t)atomic_load(&call->ticket) && !atomic_load(&call->stepped)))
            continue;
        if (atomic_compare_exchange_strong(&call->seats, &seats, seats - 1)) {
            int member = (int)(uint32_t)seats;
            wake(&posted, &sleepers, fewer(member - 1, WAKES));
            work_on(call, (uint32_t)(seats >> 32), member);
            return true;
        }
        i--; /* another helper was faster: look again */
    }
    return false;
}

static void *help(void *unused) {
    (void)unused;
    bool slept = false;
    while (!atomic_load(&closing)) {
        const struct watch w = {.helper = true, .posted = atomic_load(&posted)};
        if (join_a_call())
            slept = false;
        else /* does not look long when it was woken for nothing */
            slept = wait_for_news(&w, &posted, &sleepers, slept ? 0 : SPIN_NS);
    }
    return NULL;
}

/* Signals go to the program's own threads, but for those that a thread's own instructions raise. */
static void block_signals(sigset_t *before) {
    static const int own[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS};
    sigset_t signals;
    sigfillset(&signals);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        sigdelset(&signals, own[i]);
    pthread_sigmask(SIG_SETMASK, &signals, before);
}

static bool make_helper(pthread_t *thread) {
    pthread_attr_t attributes;
    sigset_t before;
    if (pthread_attr_init(&attributes))
        return false;
    block_signals(&before);
    int error = EINVAL; /* also where the stack is too small for the thread-local variables of the program */
    for (size_t stack = STACK; error == EINVAL && stack <= MAX_STACK; stack *= 2) {
        error = pthread_attr_setstacksize(&attributes, stack);
        if (!error)
            error = pthread_create(thread, &attributes, help, NULL);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return !error;
}

/* Makes helpers until there are `wanted`, unless another thread is at it or some time ago it did not work. */
static void grow(int wanted) {
    if (atomic_load(&helpers) >= wanted || now_ns() < atomic_load(&retry_at) || atomic_exchange(&growing, true))
        return;
    for (int count = atomic_load(&helpers); count < wanted && !atomic_load(&closing); count++) {
        if (!make_helper(&made[count])) {
            atomic_store(&retry_at, now_ns() + RETRY_NS);
            break;
        }
        atomic_store(&helpers, count + 1);
    }
    atomic_store(&growing, false);
}

/* ---- Calls -------------------------------------------------------------------------------------- */

static void run_alone(uint32_t pieces, kda_pool_work *work, kda_pool_next *next, void *context) {
    for (; pieces; pieces = next ? next(context) : 0)
        for (uint32_t i = 0; i < pieces; i++)
            work(context, i, 0);
}

static struct call *take_place(void) {
    for (int i = 0; i < CALLS; i++)
        if (!atomic_load(&calls[i].taken) && !atomic_exchange(&calls[i].taken, true)) {
            int high = atomic_load(&highest);
            while (high <= i && !atomic_compare_exchange_weak(&highest, &high, i + 1))
                continue;
            return &calls[i];
        }
    return NULL;
}

void kda_pool_run(int threads, uint32_t pieces, kda_pool_work *work, kda_pool_next *next, void *context) {
    int seats = fewer(threads - 1, HELPERS);
    if (!next && (int64_t)seats >= (int64_t)pieces)
        seats = (int)pieces - 1;
    bool alone = seats <= 0 || !pieces || !forks_are_seen || atomic_load(&closing);
    if (!alone)
        grow(seats);
    struct call *call = alone || !atomic_load(&helpers) ? NULL : take_place();
    if (!call) {
        run_alone(pieces, work, next, context);
        return;
    }
    uint32_t first = (uint32_t)(atomic_load(&call->ticket) >> 32) + 1;
    call->pieces = pieces;
    call->work = work;
    call->next = next;
    call->context = context;
    atomic_store(&call->left, pieces);
    atomic_store(&call->stepped, next != NULL);
    atomic_store(&call->ticket, (uint64_t)first << 32 | pieces);
    atomic_store(&call->seats, (uint64_t)first << 32 | (uint32_t)seats); /* who joins finds the ticket */
    tell(&posted, &sleepers, fewer(seats, WAKES));
    work_on(call, first, 0);
    atomic_store(&call->taken, false);
}

/* ---- Begin, fork, end --------------------------------------------------------------------------- */

/* In the child: there is one thread, and what the others were doing is not our business. */
static void begin_again(void) {
    for (int i = 0; i < CALLS; i++) {
        atomic_store(&calls[i].seats, 0);
        atomic_store(&calls[i].ticket, 0);
        atomic_store(&calls[i].sleepers, 0);
        atomic_store(&calls[i].taken, false);
    }
    atomic_store(&sleepers, 0);
    atomic_store(&helpers, 0);
    atomic_store(&growing, false);
    atomic_store(&retry_at, 0);
}

__attribute__((constructor)) static void begin(void) {
    forks_are_seen = !pthread_atfork(NULL, NULL, begin_again);
}

/* At exit and dlclose. A helper inside a piece ends after it. */
__attribute__((destructor)) static void end(void) {
    atomic_store(&closing, true);
    while (atomic_exchange(&growing, true)) /* another thread still calls at exit */
        sched_yield();
    tell(&posted, &sleepers, INT_MAX);
    for (int i = 0; i < CALLS; i++)
        tell(&calls[i].opened, &calls[i].sleepers, INT_MAX);
    for (int i = 0; i < atomic_load(&helpers); i++)
        pthread_join(made[i], NULL);
    atomic_store(&helpers, 0);
}
