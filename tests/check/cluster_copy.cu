/* SPDX-License-Identifier: MIT */
#include "cluster_copy.h"

#include "cuda/ptx/sm90.cuh"

#include <cuda/ptx>
#include <cuda_runtime.h>

namespace {

namespace ptx = cuda::ptx;

constexpr int PAIR = 2, THREADS = 256, ROUNDS = 1000;
constexpr int WORDS = 6656; /* a chunk's operands in sm90/cluster/cluster.cu are about as many bytes */
constexpr uint32_t SENT = 0xa0000000u, LATER = 0xb0000000u;

struct Shared {
    alignas(128) uint32_t source[WORDS];
    alignas(128) uint32_t received[WORDS];
    uint64_t full;
};

template <class T> __device__ T *of_other(T *mine, int rank) {
    return static_cast<T *>(__cluster_map_shared_rank(mine, rank ^ 1));
}

__global__ void __cluster_dims__(PAIR) copy_and_overwrite(bool waits, unsigned long long *overwritten) {
    extern __shared__ __align__(128) char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    int rank = (int)__clusterRelativeBlockRank();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.full, 1);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    unsigned long long wrong = 0;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        for (int i = threadIdx.x; i < WORDS; i += THREADS)
            shared.source[i] = SENT + round, shared.received[i] = 0;
        ptx::fence_proxy_async(ptx::space_shared);
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &shared.full,
                                           (uint32_t)sizeof shared.source);
            ptx::cp_async_bulk(ptx::space_cluster, ptx::space_shared, of_other(shared.received, rank),
                               shared.source, (uint32_t)sizeof shared.source, of_other(&shared.full, rank));
            ptx::cp_async_bulk_commit_group();
            if (waits)
                ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
        }
        __syncthreads();
        /* Last words first: they are the last to be read. */
        for (int i = WORDS - 1 - (int)threadIdx.x; i >= 0; i -= THREADS)
            shared.source[i] = LATER + round;
        while (!ptx::mbarrier_try_wait_parity(&shared.full, round & 1))
            ;
        for (int i = threadIdx.x; i < WORDS; i += THREADS)
            wrong += shared.received[i] != SENT + round;
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
    }
    atomicAdd(overwritten, wrong);
}

} // namespace

bool cluster_copy_can_run(void) {
    int major;
    return !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) && major == 9;
}

double cluster_copy_overwritten(bool waits) {
    int multiprocessors = 0;
    unsigned long long count = 0, *there = nullptr;
    bool good = !cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0) &&
                !cudaFuncSetAttribute(copy_and_overwrite, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      (int)sizeof(Shared)) &&
                !cudaMalloc(&there, sizeof count) && !cudaMemset(there, 0, sizeof count);
    int blocks = multiprocessors / PAIR * PAIR;
    if (good) {
        copy_and_overwrite<<<blocks, THREADS, sizeof(Shared)>>>(waits, there);
        good = !cudaGetLastError() && !cudaMemcpy(&count, there, sizeof count, cudaMemcpyDeviceToHost);
    }
    cudaFree(there);
    return good ? (double)count / ((double)blocks * ROUNDS * WORDS) : -1;
}
