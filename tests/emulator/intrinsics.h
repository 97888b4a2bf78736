/* SPDX-License-Identifier: MIT */
/* What nvcc's language has and C++ has not, as the kernels use it. It is included before every kernel's source. */
#ifndef EMULATOR_INTRINSICS_H
#define EMULATOR_INTRINSICS_H

#include "block.h"
#include "numbers.h"

#include <cmath>
#include <cstring>
#include <cuda_runtime.h>

#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#undef __forceinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __shared__      static /* the kernels' own arrays: one CTA runs at a time */

#define threadIdx emulator::thread_index
#define blockIdx  emulator::block_index
#define blockDim  emulator::block_size
#define gridDim   emulator::grid_size

inline size_t __cvta_generic_to_shared(const void *p) { return emulator::shared_address(p); }
inline void __syncthreads() { emulator::wait_for_block(); }
inline void __syncwarp() {
    char nothing;
    emulator::together(nothing, [](char *const *) {});
}

/* ---- Of a warp: all kernels call these with all lanes ---- */

/* The value of the lane that `source` names for each. */
template <class T> T shuffle(T x, int source) {
    struct Lane {
        T given;
        int source;
        T taken;
    } mine = {x, source, x};
    emulator::together(mine, [](Lane *const *lanes) {
        for (int i = 0; i < emulator::LANES; i++)
            lanes[i]->taken = lanes[lanes[i]->source]->given;
    });
    return mine.taken;
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
    return shuffle(x, (int)(threadIdx.x % emulator::LANES) ^ mask);
}
template <class T> T __shfl_sync(unsigned, T x, int from, int width = emulator::LANES) {
    int lane = (int)(threadIdx.x % emulator::LANES);
    return shuffle(x, lane / width * width + from % width);
}
template <class T> T __shfl_up_sync(unsigned, T x, int distance, int width = emulator::LANES) {
    int lane = (int)(threadIdx.x % emulator::LANES);
    return shuffle(x, lane % width >= distance ? lane - distance : lane);
}
template <class T> T __shfl_down_sync(unsigned, T x, int distance, int width = emulator::LANES) {
    int lane = (int)(threadIdx.x % emulator::LANES);
    return shuffle(x, lane % width + distance < width ? lane + distance : lane);
}

inline uint32_t __ballot_sync(unsigned, bool vote) {
    struct Lane {
        bool vote;
        uint32_t votes;
    } mine = {vote, 0};
    emulator::together(mine, [](Lane *const *lanes) {
        uint32_t votes = 0;
        for (int i = 0; i < emulator::LANES; i++)
            votes |= (uint32_t)lanes[i]->vote << i;
        for (int i = 0; i < emulator::LANES; i++)
            lanes[i]->votes = votes;
    });
    return mine.votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, !vote) == 0; }

inline uint32_t __reduce_max_sync(unsigned mask, uint32_t x) {
    for (int bit = 1; bit < emulator::LANES; bit *= 2) {
        uint32_t other = __shfl_xor_sync(mask, x, bit);
        x = other > x ? other : x;
    }
    return x;
}

/* ---- Of a thread ---- */

inline float __uint_as_float(uint32_t x) { return emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulator::bits_as<uint32_t>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) {
    return fabsf(y) < INFINITY ? x / y : fabsf(x) < INFINITY ? 0 : NAN;
}
inline int __clz(int x) { return x ? __builtin_clz((uint32_t)x) : 32; }
inline float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }
inline int __ffs(uint32_t x) { return __builtin_ffs((int)x); }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
    uint32_t high = a >> 16 > b >> 16 ? a >> 16 : b >> 16, low = (a & 0xffff) > (b & 0xffff) ? a : b;
    return high << 16 | (low & 0xffff);
}
inline int atomicMax(int *p, int x) {
    int old = *p;
    *p = x > old ? x : old;
    return old;
}

template <class T> inline T smaller(T a, T b) { return b < a ? b : a; }
template <class T> inline T larger(T a, T b) { return a < b ? b : a; }
inline int min(int a, int b) { return smaller(a, b); }
inline int max(int a, int b) { return larger(a, b); }
inline uint32_t min(uint32_t a, uint32_t b) { return smaller(a, b); }
inline uint32_t max(uint32_t a, uint32_t b) { return larger(a, b); }
inline int64_t min(int64_t a, int64_t b) { return smaller(a, b); }
inline int64_t max(int64_t a, int64_t b) { return larger(a, b); }

/* A load that goes past the L1 cache: here there is none. */
template <class T> T __ldcg(const T *from) { return *from; }

#endif
