/* SPDX-License-Identifier: MIT */
/* A CTA on the CPU: one thread of the process runs its threads by turns. A turn ends where a thread waits, so that nothing
 * is interrupted between two waits. */
#ifndef EMULATOR_BLOCK_H
#define EMULATOR_BLOCK_H

#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector_types.h>

namespace emulator {

constexpr int LANES = 32, MAX_THREADS = 1024;

/* What kernels read as threadIdx, blockIdx, blockDim and gridDim. */
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

/* Runs a kernel: the CTAs of the grid one after another, each with so many bytes of shared memory. */
void run(unsigned columns, unsigned rows, int threads, size_t bytes, const std::function<void()> &kernel);

/* A kernel did what a GPU would not do, or would do wrong: says so and ends the process. */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Ends the thread's turn until `ready`. what: for the report of a deadlock. */
void wait_until(const char *what, std::function<bool()> ready);

char *shared_memory();
uint32_t shared_address(const void *pointer);
/* The bytes at an address of shared memory, all of which lie in it. */
char *shared_pointer(uint32_t address, size_t bytes);

/* Waits for all threads of the CTA that have not ended. */
void wait_for_block();
/* Arrives at a named barrier of so many threads, and waits for the others or does not. */
void arrive_at_named(int barrier, int threads, bool waits);

/* One operation of a warp: the lane that comes last does `work` on all lanes' `mine`. */
void together(void *mine, const std::function<void(void *const *)> &work);
template <class Lane, class Work> void together(Lane &mine, Work work) {
    together(static_cast<void *>(&mine),
             [&](void *const *lanes) { work(reinterpret_cast<Lane *const *>(lanes)); });
}

/* FLASH_KDA_EMULATE: words that change the order of what a GPU does in any order. `reverse`: threads and CTAs from the last
 * on; `early`: the copy engine is done at once, not as late as it can be. */
bool asked_for(const char *word);

} // namespace emulator

#endif
