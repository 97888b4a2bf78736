/* SPDX-License-Identifier: MIT */
#include "block.h"

#include "copies.h"
#include "products.h"

#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ucontext.h>

namespace emulator {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr size_t STACK = 1 << 18, MAX_SHARED = 227 * 1024;
constexpr int NAMED = 16;

struct Thread {
    std::unique_ptr<char[]> stack{new char[STACK]};
    ucontext_t start;
    jmp_buf place; /* where its turn ended */
    bool begun, done;
    std::function<bool()> ready; /* empty: it waits for nothing */
    const char *what;
};

/* Threads that arrive; the generation counts how often all were there. */
struct Arrivals {
    int count = 0;
    uint64_t generation = 0;
    bool arrive(int expected) {
        if (++count < expected)
            return false;
        count = 0, generation++;
        return true;
    }
    void wait(const char *what_for) {
        uint64_t now = generation;
        wait_until(what_for, [this, now] { return generation != now; });
    }
};

struct Warp {
    Arrivals arrivals;
    void *lanes[LANES];
};

Thread threads[MAX_THREADS];
Warp warps[MAX_THREADS / LANES];
Arrivals block, named[NAMED];
int live; /* threads that have not ended */
jmp_buf scheduler;
const std::function<void()> *body;
alignas(1024) char memory[MAX_SHARED];
size_t memory_bytes;

/* A thread's first turn. setjmp and longjmp make the others: unlike swapcontext, they ask nothing of the kernel. */
void begin() {
    Thread &thread = threads[thread_index.x];
    (*body)();
    check_thread_end();
    thread.done = true;
    live--;
    if (live && block.count == live) /* the others wait for this thread no longer */
        block.count = 0, block.generation++;
    _longjmp(scheduler, 1);
}

void take_turn(Thread &thread) {
    if (_setjmp(scheduler))
        return;
    if (thread.begun)
        _longjmp(thread.place, 1);
    thread.begun = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get(), thread.start.uc_stack.ss_size = STACK;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, begin, 0);
    setcontext(&thread.start);
}

/* Gives every thread that can go on a turn; false if there was none. */
bool take_turns(int count, bool reverse) {
    bool any = false;
    for (int i = 0; i < count; i++) {
        int index = reverse ? count - 1 - i : i;
        Thread &thread = threads[index];
        if (thread.done || (thread.ready && !thread.ready()))
            continue;
        thread.ready = nullptr;
        thread_index = {(unsigned)index, 0, 0};
        take_turn(thread);
        any = true;
    }
    return any;
}

[[noreturn]] void report_deadlock(int count) {
    for (int i = 0; i < count; i += LANES)
        fprintf(stderr, "emulator: warp %d: %s\n", i / LANES, threads[i].done ? "ended" : threads[i].what);
    fail("all threads wait");
}

void run_block(int count) {
    static const bool reverse = asked_for("reverse"), early = asked_for("early");
    memset(memory, 0xff, memory_bytes); /* what a kernel does not write is NaN */
    for (int i = 0; i < count; i++)
        threads[i].begun = threads[i].done = false, threads[i].ready = nullptr, threads[i].what = "nothing";
    std::fill(std::begin(warps), std::end(warps), Warp());
    std::fill(std::begin(named), std::end(named), Arrivals());
    block = Arrivals();
    live = count;
    while (live) {
        bool any = take_turns(count, reverse);
        if (early)
            while (engine_copy())
                ;
        if (!any && !engine_copy())
            report_deadlock(count);
    }
    end_copies(count);
}

} // namespace

void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "emulator, CTA %u %u, thread %u: ", block_index.x, block_index.y, thread_index.x);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    abort();
}

bool asked_for(const char *word) {
    const char *value = getenv("FLASH_KDA_EMULATE");
    return value && strstr(value, word);
}

void wait_until(const char *what, std::function<bool()> ready) {
    if (ready())
        return;
    Thread &thread = threads[thread_index.x];
    thread.ready = std::move(ready), thread.what = what;
    if (!_setjmp(thread.place))
        _longjmp(scheduler, 1);
}

char *shared_memory() { return memory; }

uint32_t shared_address(const void *pointer) {
    ptrdiff_t address = static_cast<const char *>(pointer) - memory;
    if (address < 0 || (size_t)address >= memory_bytes)
        fail("a pointer is not to shared memory");
    return (uint32_t)address;
}

char *shared_pointer(uint32_t address, size_t bytes) {
    if (address + bytes > memory_bytes)
        fail("address %u is outside of %zu bytes of shared memory", address, memory_bytes);
    return memory + address;
}

void wait_for_block() {
    if (!block.arrive(live))
        block.wait("__syncthreads");
}

void arrive_at_named(int barrier, int count, bool waits) {
    static const char *const names[NAMED] = {"barrier 0",  "barrier 1",  "barrier 2",  "barrier 3",
                                             "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
                                             "barrier 8",  "barrier 9",  "barrier 10", "barrier 11",
                                             "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
    if (barrier < 1 || barrier >= NAMED || count % LANES)
        fail("named barrier %d of %d threads; expected 1 to 15, of whole warps", barrier, count);
    if (!named[barrier].arrive(count) && waits)
        named[barrier].wait(names[barrier]);
}

void together(void *mine, const std::function<void(void *const *)> &work) {
    Warp &warp = warps[thread_index.x / LANES];
    warp.lanes[thread_index.x % LANES] = mine;
    if (warp.arrivals.arrive(LANES))
        work(warp.lanes);
    else
        warp.arrivals.wait("the other lanes of the warp");
}

void run(unsigned columns, unsigned rows, int count, size_t bytes, const std::function<void()> &kernel) {
    static const bool reverse = asked_for("reverse");
    if (!columns || !rows || count < 1 || count > MAX_THREADS || count % LANES || bytes > MAX_SHARED)
        fail("a grid of %u x %u CTAs of %d threads with %zu bytes of shared memory", columns, rows, count,
             bytes);
    memory_bytes = bytes, body = &kernel;
    block_size = dim3((unsigned)count), grid_size = dim3(columns, rows);
    for (unsigned i = 0; i < columns * rows; i++) {
        unsigned at = reverse ? columns * rows - 1 - i : i;
        block_index = {at % columns, at / columns, 0};
        run_block(count);
    }
}

} // namespace emulator
