/* SPDX-License-Identifier: MIT */
/* Copies in the background, and the barriers in shared memory that count their bytes. A copy is done as late as a wait
 * allows: what is read or overwritten too early is wrong. */
#ifndef EMULATOR_COPIES_H
#define EMULATOR_COPIES_H

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

/* ---- cp.async: 16 bytes to shared memory, by the thread ---- */
void copy_piece(void *to, const void *from, bool real);
void commit_pieces();
void wait_for_pieces(int pending);

/* ---- mbarrier ---- */
void barrier_init(uint64_t *barrier, uint32_t arrivals);
/* Arrives, and has the phase wait for so many bytes more. */
void barrier_arrive(uint64_t *barrier, uint32_t bytes);
bool barrier_passed(const uint64_t *barrier, uint32_t parity);

/* ---- The copy engine ---- */
/* To shared memory: `copy` is done some time, and the barrier then told of so many bytes. */
void bring(std::function<void()> copy, uint64_t *barrier, uint32_t bytes);
/* To global memory: `copy` is done some time before the thread's wait for its group ends. */
void take_away(std::function<void()> copy);
void commit_taken();
void wait_for_taken(int pending);
/* Does the oldest copy to shared memory; false if there is none. */
bool engine_copy();

/* A thread ends, or all of a CTA do: what they left is done or is an error. */
void end_copies(int threads);

} // namespace emulator

#endif
