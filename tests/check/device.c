/* SPDX-License-Identifier: MIT */
/* The CUDA backend on tensors of host memory: copies there, a call, copies back. */
#include "device.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdio.h>

enum { TENSORS = 16 };

/* One tensor's bytes, from its first to behind its last element, on both sides. */
struct copy {
    DLTensor dl;
    char *host, *device;
    size_t bytes;
};

static size_t extent(const DLTensor *t) {
    int64_t elements = 1, compact = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] == 0)
            return 0;
        elements += (t->shape[i] - 1) * (t->strides ? t->strides[i] : compact);
        compact *= t->shape[i];
    }
    return (size_t)elements * t->dtype.bits / 8;
}

/* The device's memory for these bytes: that of an earlier tensor which has the same, or new. */
static bool place(struct copy *copies, int n) {
    struct copy *copy = &copies[n];
    copy->host = (char *)copy->dl.data + copy->dl.byte_offset;
    copy->bytes = extent(&copy->dl);
    for (int i = 0; i < n; i++)
        if (copies[i].host == copy->host && copies[i].bytes == copy->bytes)
            copy->device = copies[i].device;
    if (!copy->device && cudaMalloc((void **)&copy->device, copy->bytes + 1))
        return false;
    copy->dl.data = copy->device;
    copy->dl.byte_offset = 0;
    copy->dl.device = (DLDevice){kDLCUDA, 0};
    return !cudaMemcpy(copy->device, copy->host, copy->bytes, cudaMemcpyHostToDevice);
}

static flash_kda_status call(const flash_kda_prefill_args *args, int fill) {
    size_t bytes = 0;
    void *workspace = NULL;
    flash_kda_status status = flash_kda_prefill_workspace_size(args, &bytes);
    if (status)
        return status;
    if (cudaMalloc(&workspace, bytes + 1) || cudaMemset(workspace, fill, bytes))
        return FLASH_KDA_ERROR_CUDA;
    status = flash_kda_prefill(args, workspace, bytes);
    if (!status && cudaDeviceSynchronize())
        status = FLASH_KDA_ERROR_CUDA;
    cudaFree(workspace);
    return status;
}

const char *device_prefill(const flash_kda_prefill_args *args, int fill) {
    flash_kda_prefill_args there = *args;
    const DLTensor **const tensors[TENSORS] = {&there.out,
                                               &there.final_state,
                                               &there.checkpoints,
                                               &there.q,
                                               &there.k,
                                               &there.v,
                                               &there.g,
                                               &there.beta,
                                               &there.A_log,
                                               &there.dt_bias,
                                               &there.cu_seqlens,
                                               &there.initial_state,
                                               &there.state_indices,
                                               &there.checkpoint_cu_starts,
                                               &there.checkpoint_indices,
                                               &there.checkpoint_offsets};
    enum { WRITTEN = 3 };
    static char text[700];
    struct copy copies[TENSORS] = {{.device = NULL}};
    bool good = true;
    int count = 0, written = 0;
    for (int i = 0; i < TENSORS && good; i++)
        if (*tensors[i]) {
            copies[count].dl = **tensors[i];
            good = place(copies, count);
            *tensors[i] = &copies[count++].dl;
            written += i < WRITTEN;
        }
    flash_kda_status status = good ? call(&there, fill) : FLASH_KDA_ERROR_CUDA;
    for (int i = 0; i < written && !status; i++)
        if (cudaMemcpy(copies[i].host, copies[i].device, copies[i].bytes, cudaMemcpyDeviceToHost))
            status = FLASH_KDA_ERROR_CUDA;
    for (int i = 0; i < count; i++) {
        bool shared = false;
        for (int n = 0; n < i; n++)
            shared |= copies[n].device == copies[i].device;
        if (!shared)
            cudaFree(copies[i].device);
    }
    snprintf(text, sizeof text, "%s: %s; CUDA says %s", flash_kda_status_name(status), flash_kda_last_error(),
             cudaGetErrorName(cudaGetLastError()));
    return status ? text : NULL;
}
