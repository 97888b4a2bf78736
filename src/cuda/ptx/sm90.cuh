/* SPDX-License-Identifier: MIT */
/* Instructions of sm_90a that cuda::ptx does not wrap: wgmma with its first operand in registers, moving
 * registers between warpgroups, electing a lane, copies with a cache policy or to a cache, and an arrival at
 * another CTA that waits for no memory. A warpgroup's accumulator d [64][N] is, warp by warp, 16 rows of mma's
 * accumulator tiles (sm80.cuh). */
#ifndef KDA_CUDA_PTX_SM90_CUH
#define KDA_CUDA_PTX_SM90_CUH

#include <cstdint>
#include <cuda.h>

namespace kda {

/* How a second operand's 16-byte pieces are permuted in shared memory. */
enum Swizzle : uint64_t { SWIZZLE_128 = 1, SWIZZLE_64 = 2 };

/* Describes a second operand at `tile`: `leading` bytes between panels of columns (read along them only),
 * `stride` bytes between groups of eight rows. PTX ISA, "Shared Memory Matrix Layout". */
__device__ __forceinline__ uint64_t wgmma_operand(const void *tile, uint32_t leading, uint32_t stride,
                                                  Swizzle swizzle) {
    uint64_t address = (uint32_t)__cvta_generic_to_shared(tile);
    return (address & 0x3ffff) >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
           (uint64_t)swizzle << 62;
}

/* The operand `bytes` further on. */
__device__ __forceinline__ uint64_t advanced(uint64_t operand, uint32_t bytes) {
    return operand + (bytes >> 4);
}

/* Needed before the first wgmma after registers were written. */
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Waits until at most `pending` of the newest groups are under way. */
template <int pending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* A warpgroup gives registers away, or takes some that others gave: its threads then have `count` each. */
template <int count> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

/* threadIdx.x, read anew. What follows from it is then computed where it is used, and not kept in registers
 * through all of a chunk. */
__device__ __forceinline__ uint32_t thread() {
    uint32_t x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

__device__ __forceinline__ uint32_t shared_address(const void *x) {
    return (uint32_t)__cvta_generic_to_shared(x);
}
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

/* Makes what the thread wrote to shared memory visible to wgmma and to the copy engine. */
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* True in one lane of the warp; all lanes must call it. The compiler then makes no loop over lanes around
 * copies. */
__device__ __forceinline__ bool elected() {
    uint32_t one;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(one));
    return one;
}

/* Prefetches a tensor's map for the copy engine. */
__device__ __forceinline__ void prefetch_map(const CUtensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/* Data that is read once is the first that the L2 cache gives up; else it would give up the kernels' code. */
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint64_t read_again() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/* Has the copy engine bring a box of a tensor of four dimensions. */
__device__ __forceinline__ void bring_box(void *to, const CUtensorMap &map, const int32_t (&at)[4],
                                          uint64_t &barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
        "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
        "r"((uint32_t)__cvta_generic_to_shared(&barrier)), "l"(policy)
        : "memory");
}

/* Has the copy engine bring bytes to the L2 cache: address and number are multiples of 16. */
__device__ __forceinline__ void bring_to_cache(const void *from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

/* Named barriers of `threads` threads: one waits for all, the other only arrives. */
__device__ __forceinline__ void barrier_wait(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* A count in global memory that tells other CTAs what the thread has written, or has seen written, before. */
__device__ __forceinline__ void count_up(uint32_t *count) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
/* Is it there within so many looks, of some hundred nanoseconds each? */
__device__ __forceinline__ bool wait_for_count(const uint32_t *count, uint32_t wanted, int looks) {
    uint32_t x;
    do
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(count) : "memory");
    while (x < wanted && --looks > 0);
    return x >= wanted;
}

/* Arrives at the barrier of the cluster's CTA `rank` that lies where `barrier` does here, after all earlier
 * reads. It makes no write visible there: cuda::ptx has only a release to the cluster, which waits for all
 * memory. */
__device__ __forceinline__ void arrive_at(uint64_t &barrier, int rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.release.cta.shared::cluster.b64 _, [there];\n}" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(&barrier)),
                 "r"(rank)
                 : "memory");
}

/* Four 8x8 matrices of 2-byte elements; lane i gives the address of row i % 8 of matrix i / 8. */
__device__ __forceinline__ void stmatrix(uint32_t row, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}
/* Transposed. */
__device__ __forceinline__ void stmatrix_transposed(uint32_t row, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}
__device__ __forceinline__ void stmatrix_transposed(void *row, const uint32_t (&a)[2], const uint32_t (&b)[2]) {
    const uint32_t x[4] = {a[0], a[1], b[0], b[1]};
    stmatrix_transposed(shared_address(row), x);
}

/* Multiplies two bf16 numbers by two. */
__device__ __forceinline__ uint32_t multiply_pair(uint32_t pair, uint32_t factors) {
    uint32_t product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(factors));
    return product;
}

/* A 1 that the compiler does not know. */
__device__ __forceinline__ float some_one() {
    float one;
    asm volatile("mov.f32 %0, 0f3f800000;" : "=f"(one));
    return one;
}

/* Keeps the compiler from moving what is done with d across the fence or wait beside it. */
template <int TILES> __device__ __forceinline__ void pin(float (&d)[TILES][4]) {
#pragma unroll
    for (int i = 0; i < TILES; i++)
        asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

#define KDA_TILE(i)   "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define KDA_TILES4(i) KDA_TILE(i), KDA_TILE(i + 1), KDA_TILE(i + 2), KDA_TILE(i + 3)
#define KDA_TILES8(i) KDA_TILES4(i), KDA_TILES4(i + 4)

/* d [64][8 TILES] += a [64][16] b [16][8 TILES], bf16 operands, fp32 sums; -= if negative, and = if !accumulate. The
 * rows of b lie contiguous in memory if b_rows, else its columns do. */
template <bool b_rows, bool accumulate, bool negative = false, int TILES>
__device__ __forceinline__ void wgmma(float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (TILES == 4)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                     "{%16, %17, %18, %19}, %20, p, %23, 1, %22;\n}\n"
                     : KDA_TILES4(0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(accumulate), "n"(b_rows),
                       "n"(negative ? -1 : 1));
    else if constexpr (TILES == 8)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                     "{%32, %33, %34, %35}, %36, p, %39, 1, %38;\n}\n"
                     : KDA_TILES8(0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(accumulate), "n"(b_rows),
                       "n"(negative ? -1 : 1));
    else if constexpr (TILES == 16)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                     "{%64, %65, %66, %67}, %68, p, %71, 1, %70;\n}\n"
                     : KDA_TILES8(0), KDA_TILES8(8)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(accumulate), "n"(b_rows),
                       "n"(negative ? -1 : 1));
    else
        static_assert(TILES == 4, "4, 8 or 16 tiles");
}

/* d [64][32] += a [64][16] b [16][32], fp16 operands, fp32 sums; = if !accumulate. The columns of b lie
 * contiguous in memory. */
template <bool accumulate>
__device__ __forceinline__ void wgmma_half(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "{%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"
                 : KDA_TILES4(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(accumulate));
}

/* d [64][32] += a [64][8] b [8][32], tf32 operands, of which only the upper bits count; = if !accumulate. The
 * columns of b lie contiguous in memory. */
template <bool accumulate>
__device__ __forceinline__ void wgmma_tf32(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "{%16, %17, %18, %19}, %20, p, 1, 1;\n}\n"
                 : KDA_TILES4(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(accumulate));
}

/* d [64][32] += a [64][16] b [16][32], bf16 operands both in shared memory, fp32 sums; = if !accumulate. The
 * rows of a and the columns of b lie contiguous in memory. */
template <bool accumulate>
__device__ __forceinline__ void wgmma_shared(float (&d)[4][4], uint64_t a, uint64_t b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "%16, %17, p, 1, 1, 0, 0;\n}\n"
                 : KDA_TILES4(0)
                 : "l"(a), "l"(b), "n"(accumulate));
}

/* And for 16 columns. */
template <bool accumulate>
__device__ __forceinline__ void wgmma_shared(float (&d)[2][4], uint64_t a, uint64_t b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, 0, 0;\n}\n"
                 : KDA_TILE(0), KDA_TILE(1)
                 : "l"(a), "l"(b), "n"(accumulate));
}

/* d [64][8 TILES] += a [64][16] b [16][8 TILES], bf16 operands both in shared memory, fp32 sums; -= if negative, and = if
 * !accumulate. The columns of a lie contiguous in memory if a_columns, else its rows do; the rows of b if b_rows, else
 * its columns. */
template <bool a_columns, bool b_rows, bool accumulate, bool negative = false, int TILES>
__device__ __forceinline__ void wgmma_both(float (&d)[TILES][4], uint64_t a, uint64_t b) {
    if constexpr (TILES == 2)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, %11, 1, %12, %13;\n}\n"
                     : KDA_TILE(0), KDA_TILE(1)
                     : "l"(a), "l"(b), "n"(accumulate), "n"(negative ? -1 : 1), "n"(a_columns), "n"(b_rows));
    else if constexpr (TILES == 4)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                     "%16, %17, p, %19, 1, %20, %21;\n}\n"
                     : KDA_TILES4(0)
                     : "l"(a), "l"(b), "n"(accumulate), "n"(negative ? -1 : 1), "n"(a_columns), "n"(b_rows));
    else if constexpr (TILES == 8)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                     "%32, %33, p, %35, 1, %36, %37;\n}\n"
                     : KDA_TILES8(0)
                     : "l"(a), "l"(b), "n"(accumulate), "n"(negative ? -1 : 1), "n"(a_columns), "n"(b_rows));
    else if constexpr (TILES == 16)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                     "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                     "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                     "%64, %65, p, %67, 1, %68, %69;\n}\n"
                     : KDA_TILES8(0), KDA_TILES8(8)
                     : "l"(a), "l"(b), "n"(accumulate), "n"(negative ? -1 : 1), "n"(a_columns), "n"(b_rows));
    else
        static_assert(TILES == 2, "2, 4, 8 or 16 tiles");
}

#undef KDA_TILE
#undef KDA_TILES4
#undef KDA_TILES8

} // namespace kda

#endif
