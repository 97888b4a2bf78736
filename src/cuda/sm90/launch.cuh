/* SPDX-License-Identifier: MIT */
/* Kernels of one call that follow each other closely: the next one's CTAs begin as soon as there is room beside the last
 * ones of the kernel before. Each calls let_next_begin() at once, and wait_for_kernel_before() before it reads what that
 * kernel wrote. */
#ifndef KDA_CUDA_SM90_LAUNCH_CUH
#define KDA_CUDA_SM90_LAUNCH_CUH

#include <cuda_runtime.h>

namespace kda {

inline __device__ void let_next_begin() { cudaTriggerProgrammaticLaunchCompletion(); }
inline __device__ void wait_for_kernel_before() { cudaGridDependencySynchronize(); }

/* Behind a kernel of the call if `behind`, else when all before it in the stream is done. */
template <class... Parameters, class... Arguments>
cudaError_t launch_behind_if(bool behind, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                             size_t bytes, cudaStream_t stream, const Arguments &...arguments) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes,
    config.stream = stream;
    config.attrs = &attribute, config.numAttrs = behind;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_behind(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t bytes,
                          cudaStream_t stream, const Arguments &...arguments) {
    return launch_behind_if(true, kernel, grid, threads, bytes, stream, arguments...);
}

} // namespace kda

#endif
