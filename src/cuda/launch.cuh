/* SPDX-License-Identifier: MIT */
/* Launches a kernel of a plan. The CTAs of a kernel that overlaps start as soon as there is room beside the
 * last CTAs of the kernel before it. So each kernel calls let_next_begin() at its start, and
 * wait_for_kernel_before() before it reads what that kernel wrote. */
#ifndef KDA_CUDA_LAUNCH_CUH
#define KDA_CUDA_LAUNCH_CUH

#include "cuda/plan.h"

#include <cuda_runtime.h>

namespace kda {

/* Before sm_90 no kernel overlaps. */
inline __device__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}
inline __device__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

/* At the end of a kernel that reads nothing of that before it: it ends after it nevertheless, so that a kernel
 * that waits for this one has waited for both. */
inline __device__ void end_after_kernel_before() {
    if (blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1)
        wait_for_kernel_before();
}

/* bytes: a CTA's dynamic shared memory. overlaps: with the kernel before it. */
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const unsigned (&grid)[2], int threads, size_t bytes,
                          void *stream, bool overlaps, const Arguments &...arguments) {
    cudaError_t error =
        bytes ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes)
              : cudaSuccess;
    if (error)
        return error;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid[0], grid[1]), config.blockDim = dim3((unsigned)threads),
    config.dynamicSmemBytes = bytes, config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute, config.numAttrs = overlaps;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const kda_launch &launch, int threads, size_t bytes,
                          void *stream, const Arguments &...arguments) {
    return launch_kernel(kernel, launch.grid, threads, bytes, stream, launch.overlaps, arguments...);
}

} // namespace kda

#endif
