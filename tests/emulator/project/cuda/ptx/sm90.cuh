/* SPDX-License-Identifier: MIT */
/* In place of src/cuda/ptx/sm90.cuh: what its instructions do. Those that no emulated kernel uses are declared alone, for the
 * headers that name them. */
#ifndef KDA_CUDA_PTX_SM90_CUH
#define KDA_CUDA_PTX_SM90_CUH

#include "cuda/ptx/sm80.cuh"
#include "products.h"
#include "tensor_map.h"

namespace kda {

/* ---- Threads and registers ---- */

inline uint32_t thread() { return threadIdx.x; }
template <int count> void give_registers() {}
template <int count> void take_registers() {}
inline float some_one() { return 1; }
template <int TILES> void pin(float (&)[TILES][4]) {}
inline bool elected() {
    __syncwarp();
    return threadIdx.x % emulator::LANES == 0;
}
inline void barrier_wait(int barrier, int threads) { emulator::arrive_at_named(barrier, threads, true); }
inline void barrier_arrive(int barrier, int threads) { emulator::arrive_at_named(barrier, threads, false); }
void arrive_at(uint64_t &barrier, int rank);

inline void count_up(uint32_t *count) { ++*count; }
/* Kernels run one after another: a count that is not there yet never comes. Offsets that make no sense may count twice. */
inline bool wait_for_count(const uint32_t *count, uint32_t wanted, int) {
    if (*count < wanted)
        emulator::fail("%u are waited for, and %u are counted", (unsigned)wanted, (unsigned)*count);
    return true;
}

/* ---- Shared memory ---- */

inline uint32_t shared_address(const void *x) { return emulator::shared_address(x); }
inline uint32_t load_shared(uint32_t address) {
    return emulator::load_word(emulator::shared_pointer(address, 4));
}
inline void store_shared(uint32_t address, uint32_t x) { memcpy(emulator::shared_pointer(address, 4), &x, 4); }
inline void fence_shared() {}

struct StoredMatrixLane {
    const uint32_t *x;
    uint32_t row;
};
inline void store_matrices(uint32_t row, const uint32_t (&x)[4], bool transposed) {
    StoredMatrixLane mine = {x, row};
    emulator::together(mine, [=](StoredMatrixLane *const *lanes) {
        for (int m = 0; m < 4; m++)
            for (int i = 0; i < emulator::LANES; i++)
                for (int half = 0; half < 2; half++) {
                    int row = i / 4, column = i % 4 * 2 + half;
                    uint32_t start = lanes[m * 8 + (transposed ? column : row)]->row;
                    uint16_t element = (uint16_t)(lanes[i]->x[m] >> 16 * half);
                    if (start % 16)
                        emulator::fail("stmatrix of a row at %u, no multiple of 16", start);
                    memcpy(emulator::shared_pointer(start, 16) + (transposed ? row : column) * 2, &element, 2);
                }
    });
}
inline void stmatrix(uint32_t row, const uint32_t (&x)[4]) { store_matrices(row, x, false); }
inline void stmatrix_transposed(uint32_t row, const uint32_t (&x)[4]) { store_matrices(row, x, true); }
inline void stmatrix_transposed(void *row, const uint32_t (&a)[2], const uint32_t (&b)[2]) {
    const uint32_t x[4] = {a[0], a[1], b[0], b[1]};
    stmatrix_transposed(shared_address(row), x);
}

/* ---- The copy engine and the caches ---- */

inline void prefetch_map(const CUtensorMap &) {}
inline uint64_t read_once() { return 0; }
inline uint64_t read_again() { return 0; }
inline void bring_to_cache(const void *, uint32_t) {}
inline void bring_box(void *to, const CUtensorMap &map, const int32_t (&at)[4], uint64_t &barrier, uint64_t) {
    emulator::bring_box(to, map, at, &barrier);
}

/* ---- Products ---- */

enum Swizzle : uint64_t { SWIZZLE_128 = 1, SWIZZLE_64 = 2 };

inline uint64_t wgmma_operand(const void *tile, uint32_t leading, uint32_t stride, Swizzle swizzle) {
    uint64_t address = emulator::shared_address(tile);
    if (address % (swizzle == SWIZZLE_128 ? 1024 : 512))
        emulator::fail("an operand of wgmma at %u, which its swizzle does not allow", (unsigned)address);
    return address >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
           (uint64_t)swizzle << 62;
}
inline uint64_t advanced(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::commit_products(); }
template <int pending> void wgmma_wait() { emulator::wait_for_products(pending); }

template <bool b_rows, bool accumulate, bool negative = false, int TILES>
void wgmma(float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b) {
    emulator::add_product({.a_in_registers = true,
                           .a_across = false,
                           .b_across = b_rows,
                           .accumulate = accumulate,
                           .negative = negative,
                           .tiles = TILES,
                           .a_registers = {a[0], a[1], a[2], a[3]},
                           .a = 0,
                           .b = b,
                           .d = &d[0][0]});
}
template <bool a_columns, bool b_rows, bool accumulate, bool negative = false, int TILES>
void wgmma_both(float (&d)[TILES][4], uint64_t a, uint64_t b) {
    emulator::add_product({.a_in_registers = false,
                           .a_across = a_columns,
                           .b_across = b_rows,
                           .accumulate = accumulate,
                           .negative = negative,
                           .tiles = TILES,
                           .a_registers = {},
                           .a = a,
                           .b = b,
                           .d = &d[0][0]});
}
template <bool accumulate> void wgmma_half(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b);
template <bool accumulate> void wgmma_tf32(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b);
template <bool accumulate, int TILES> void wgmma_shared(float (&d)[TILES][4], uint64_t a, uint64_t b);

/* ---- Numbers ---- */

inline uint32_t multiply_pair(uint32_t pair, uint32_t factors) {
    float2 x = unpack_bf16(pair), y = unpack_bf16(factors);
    return pack_bf16(x.x * y.x, x.y * y.y);
}

} // namespace kda

#endif
