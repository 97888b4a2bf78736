/* SPDX-License-Identifier: MIT */
#include "copy.h"

namespace {

constexpr int THREADS = 256, PIECES = 4; /* of 16 bytes, under way in a thread at once */

__global__ void __launch_bounds__(THREADS) copy(uint4 *to, const uint4 *from, size_t count) {
    size_t first = (size_t)blockIdx.x * THREADS * PIECES + threadIdx.x;
    uint4 pieces[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (first + i * THREADS < count)
            pieces[i] = from[first + i * THREADS];
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (first + i * THREADS < count)
            to[first + i * THREADS] = pieces[i];
}

} // namespace

cudaError_t copy_on_device(void *to, const void *from, size_t bytes, cudaStream_t stream) {
    size_t count = bytes / sizeof(uint4), each = THREADS * PIECES;
    copy<<<(unsigned)((count + each - 1) / each), THREADS, 0, stream>>>(
        static_cast<uint4 *>(to), static_cast<const uint4 *>(from), count);
    return cudaGetLastError();
}
