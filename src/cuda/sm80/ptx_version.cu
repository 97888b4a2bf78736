/* SPDX-License-Identifier: MIT */
#include "cuda/sm80/kernels.h"

namespace kda {
namespace {
__global__ void any_kernel() {}
} // namespace
} // namespace kda

cudaError_t kda_sm80_ptx_version(int *version) {
    cudaFuncAttributes found = {};
    cudaError_t error = cudaFuncGetAttributes(&found, kda::any_kernel);
    *version = found.ptxVersion;
    return error;
}
