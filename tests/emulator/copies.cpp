/* SPDX-License-Identifier: MIT */
#include "copies.h"

#include "block.h"

#include <cstring>
#include <deque>
#include <utility>
#include <vector>

namespace emulator {

namespace {

using Copy = std::function<void()>;

/* Copies of one thread, in groups. */
struct Groups {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> committed;
    void commit() { committed.push_back(std::exchange(open, {})); }
    void wait(int pending) {
        while ((int)committed.size() > pending) {
            for (const Copy &copy : committed.front())
                copy();
            committed.pop_front();
        }
    }
};

struct Bringing {
    Copy copy;
    uint64_t *barrier;
    uint32_t bytes;
};

Groups pieces[MAX_THREADS], taken[MAX_THREADS];
std::deque<Bringing> brought;

/* The 64 bits of an mbarrier, as this emulator lays them out. */
struct Barrier {
    int32_t bytes; /* still to come */
    uint16_t pending;
    uint16_t expected : 15, phase : 1;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

Barrier load(const uint64_t *from) {
    Barrier barrier;
    memcpy(&barrier, from, sizeof barrier);
    return barrier;
}

void store(uint64_t *to, Barrier barrier) {
    if (!barrier.pending && !barrier.bytes)
        barrier.phase ^= 1, barrier.pending = barrier.expected;
    memcpy(to, &barrier, sizeof barrier);
}

} // namespace

void copy_piece(void *to, const void *from, bool real) {
    char *there = shared_pointer(shared_address(to), 16);
    if (((uintptr_t)to | (uintptr_t)from) % 16)
        fail("cp.async of an address that is no multiple of 16");
    pieces[thread_index.x].open.push_back([=] {
        if (real)
            memcpy(there, from, 16);
        else
            memset(there, 0, 16);
    });
}

void commit_pieces() { pieces[thread_index.x].commit(); }
void wait_for_pieces(int pending) { pieces[thread_index.x].wait(pending); }

void barrier_init(uint64_t *barrier, uint32_t arrivals) {
    Barrier fresh = {};
    fresh.pending = (uint16_t)arrivals, fresh.expected = (uint16_t)arrivals & 0x7fff;
    store(barrier, fresh);
}

void barrier_arrive(uint64_t *barrier, uint32_t bytes) {
    Barrier b = load(barrier);
    if (!b.pending)
        fail("more arrivals at an mbarrier than it expects");
    b.bytes += (int32_t)bytes, b.pending--;
    store(barrier, b);
}

bool barrier_passed(const uint64_t *barrier, uint32_t parity) { return load(barrier).phase != parity; }

void bring(Copy copy, uint64_t *barrier, uint32_t bytes) {
    brought.push_back({std::move(copy), barrier, bytes});
}

bool engine_copy() {
    if (brought.empty())
        return false;
    brought.front().copy();
    Barrier b = load(brought.front().barrier);
    b.bytes -= (int32_t)brought.front().bytes;
    store(brought.front().barrier, b);
    brought.pop_front();
    return true;
}

void take_away(Copy copy) { taken[thread_index.x].open.push_back(std::move(copy)); }
void commit_taken() { taken[thread_index.x].commit(); }
void wait_for_taken(int pending) { taken[thread_index.x].wait(pending); }

void end_copies(int threads) {
    if (!brought.empty())
        fail("a CTA ended while the copy engine wrote to its shared memory");
    for (int i = 0; i < threads; i++) {
        pieces[i] = Groups(); /* nobody waited for them */
        if (!taken[i].open.empty())
            fail("a CTA ended with copies that belong to no group");
        taken[i].wait(0);
    }
}

} // namespace emulator
