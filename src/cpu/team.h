/* SPDX-License-Identifier: MIT */
/*
 * Steps of equal tasks that the threads of a parallel region share out among themselves, one step after the other.
 *
 * This is `omp for schedule(dynamic)` but for how it waits: OpenMP's barriers spin for milliseconds, and on a machine
 * with other work, where a thread may have lost its core, every step then costs a time slice (a 10 times longer
 * call was measured). Here a thread that waits gives its core away after some microseconds.
 */
#ifndef KDA_CPU_TEAM_H
#define KDA_CPU_TEAM_H

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { SPINS = 4000 }; /* looks at the ticket before a waiting thread offers its core */

struct team {
    int64_t tasks;           /* of a step */
    _Atomic uint64_t ticket; /* the step at hand in the high half, its next task in the low half */
    _Atomic int64_t left;    /* tasks of the step at hand that are not done */
    _Atomic bool ended;      /* there is no further step */
};

/* Before the first step of a pass, by one thread while the others are held by a barrier. */
static inline void team_start(struct team *team, int64_t tasks) {
    team->tasks = tasks;
    atomic_store(&team->ticket, 0);
    atomic_store(&team->left, tasks);
    atomic_store(&team->ended, false);
}

/* Takes a task of this step; false if none is left to take. */
static inline bool team_take(struct team *team, uint64_t step, int64_t *task) {
    uint64_t ticket = atomic_load(&team->ticket);
    while (ticket >> 32 == step && (int64_t)(uint32_t)ticket < team->tasks)
        if (atomic_compare_exchange_weak(&team->ticket, &ticket, ticket + 1)) {
            *task = (int64_t)(uint32_t)ticket;
            return true;
        }
    return false;
}

/* A taken task is done. True for the last of its step: that thread alone is at work now, and must call team_open. */
static inline bool team_done(struct team *team) { return atomic_fetch_sub(&team->left, 1) == 1; }

/* Opens the step after this one, or ends the pass. */
static inline void team_open(struct team *team, uint64_t step, bool ended) {
    atomic_store(&team->ended, ended);
    atomic_store(&team->left, team->tasks);
    atomic_store(&team->ticket, (step + 1) << 32);
}

/* Waits until all tasks of this step are done. */
static inline void team_wait(struct team *team, uint64_t step) {
    for (int spins = 0; atomic_load(&team->ticket) >> 32 == step; spins++)
        if (spins >= SPINS)
            sched_yield();
}

#endif
