/* SPDX-License-Identifier: MIT */
/* Loads and stores for a kernel that reads and writes everything once. Those of a state pass through the caches
 * and have a condition instead of a branch, so that none of many waits for another. Small loads stay where they
 * are written. */
#ifndef KDA_CUDA_PTX_STREAM_CUH
#define KDA_CUDA_PTX_STREAM_CUH

#include <stdint.h>

namespace kda {

/* Leaves x as it is if !real. */
__device__ __forceinline__ void load_streaming(float &x0, float &x1, float &x2, float &x3, const void *from,
                                               bool real) {
    asm volatile("{\n"
                 ".reg .pred real;\n"
                 "setp.ne.b32 real, %5, 0;\n"
                 "@real ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                 "}"
                 : "+f"(x0), "+f"(x1), "+f"(x2), "+f"(x3)
                 : "l"(from), "r"((int)real)
                 : "memory");
}

__device__ __forceinline__ void store_streaming(void *to, float x0, float x1, float x2, float x3, bool real) {
    asm volatile("{\n"
                 ".reg .pred real;\n"
                 "setp.ne.b32 real, %5, 0;\n"
                 "@real st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};\n"
                 "}" ::"l"(to),
                 "f"(x0), "f"(x1), "f"(x2), "f"(x3), "r"((int)real)
                 : "memory");
}

/* Four bytes or two. */
__device__ __forceinline__ uint32_t load_here(const void *from, bool four) {
    uint32_t x;
    asm volatile("{\n"
                 ".reg .pred four;\n"
                 "setp.ne.b32 four, %2, 0;\n"
                 "@four ld.global.u32 %0, [%1];\n"
                 "@!four ld.global.u16 %0, [%1];\n"
                 "}"
                 : "=r"(x)
                 : "l"(from), "r"((int)four)
                 : "memory");
    return x;
}

/* Reads the L2 cache, not the L1 cache: what is read twice may have changed between. */
__device__ __forceinline__ int load_index(const int32_t *from) {
    int x;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

/* The same for four bytes or one. */
__device__ __forceinline__ int load_flag(const void *from, bool four) {
    int x;
    asm volatile("{\n"
                 ".reg .pred four;\n"
                 "setp.ne.b32 four, %2, 0;\n"
                 "@four ld.global.cg.s32 %0, [%1];\n"
                 "@!four ld.global.cg.s8 %0, [%1];\n"
                 "}"
                 : "=r"(x)
                 : "l"(from), "r"((int)four)
                 : "memory");
    return x;
}

/* Prefetches a line into the L2 cache. */
__device__ __forceinline__ void prefetch_line(const void *at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

/* A 0 that the compiler does not know. */
__device__ __forceinline__ uint32_t some_zero() {
    uint32_t zero;
    asm volatile("mov.b32 %0, 0;" : "=r"(zero));
    return zero;
}

} // namespace kda

#endif
