/* SPDX-License-Identifier: MIT */
/* CUDA's runtime, as far as the library and the check program call it: one device, whose memory is the host's, and calls that
 * are over when they return. */
#include "tensor_map.h"

#include <cstdlib>
#include <cstring>
#include <cuda_runtime_api.h>

namespace {

/* Few multiprocessors: small problems then need several slabs. */
constexpr int MAJOR = 9, MULTIPROCESSORS = 6;

} // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
const char *cudaGetErrorName(cudaError_t) { return "an error of the emulator"; }
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorNotSupported ? "it is not emulated" : "see cudaError_t";
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? MAJOR
             : attribute == cudaDevAttrMultiProcessorCount  ? MULTIPROCESSORS
                                                            : 0;
    return cudaSuccess;
}

/* Nothing that is compared asks for these. */
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *, int) { return cudaErrorNotSupported; }
cudaError_t cudaDriverGetVersion(int *) { return cudaErrorNotSupported; }
cudaError_t cudaRuntimeGetVersion(int *) { return cudaErrorNotSupported; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *status) {
    bool known = !strcmp(name, "cuTensorMapEncodeTiled");
    *function = known ? reinterpret_cast<void *>(emulator::encode_map) : nullptr;
    *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    constexpr size_t ALIGNMENT = 256;
    *memory = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocManaged(void **, size_t, unsigned) { return cudaErrorNotSupported; }
cudaError_t cudaFree(void *memory) { return free(memory), cudaSuccess; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
    return memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemset(void *to, int byte, size_t bytes) { return memset(to, byte, bytes), cudaSuccess; }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    static char some;
    return *stream = reinterpret_cast<cudaStream_t>(&some), cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
}
