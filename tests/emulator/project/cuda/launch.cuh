/* SPDX-License-Identifier: MIT */
/* In place of src/cuda/launch.cuh: a launch runs the kernel before it returns. */
#ifndef KDA_CUDA_LAUNCH_CUH
#define KDA_CUDA_LAUNCH_CUH

#include "cuda/plan.h"

namespace kda {

inline void let_next_begin() {}
inline void wait_for_kernel_before() {}
inline void end_after_kernel_before() {}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const unsigned (&grid)[2], int threads, size_t bytes,
                          void *, bool, const Arguments &...arguments) {
    emulator::run(grid[0], grid[1], threads, bytes, [&] { kernel(arguments...); });
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const kda_launch &launch, int threads, size_t bytes,
                          void *stream, const Arguments &...arguments) {
    return launch_kernel(kernel, launch.grid, threads, bytes, stream, launch.overlaps, arguments...);
}

} // namespace kda

#endif
