/* SPDX-License-Identifier: MIT */
/* Loads and stores for a kernel that reads and writes everything once: they pass through the caches and have a condition
 * instead of a branch, so that none of many waits for another. */
#ifndef KDA_CUDA_PTX_STREAM_CUH
#define KDA_CUDA_PTX_STREAM_CUH

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

} // namespace kda

#endif
