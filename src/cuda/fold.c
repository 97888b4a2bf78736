/* SPDX-License-Identifier: MIT */
/* The CUDA backend's fold: one kernel a call, by the rules of prefill.c. */
#include "api/backend.h"
#include "cuda/device.h"
#include "cuda/sm80/kernels.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>

static flash_kda_status check_size(const struct kda_fold *f) {
    const struct kda_tokens heads = {.value_heads = f->value_heads};
    if (f->rows > INT_MAX / f->value_heads)
        return kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT,
                        "chains has %lld rows; expected at most %d rows times value heads on CUDA",
                        (long long)f->rows, INT_MAX);
    return kda_cuda_check_heads(&heads);
}

flash_kda_status kda_cuda_fold(const struct kda_fold *f) {
    int previous = 0;
    flash_kda_status status = check_size(f);
    if (!status)
        status = kda_cuda_enter(f->device, &previous);
    if (status)
        return status;
    status = kda_cuda_status(kda_sm80_fold(f), "fold, kernel fold");
    kda_cuda_leave(f->device, previous);
    return status;
}

flash_kda_status kda_cuda_fold_describe(const struct kda_fold *f, char *text, size_t size) {
    flash_kda_status status = check_size(f);
    if (!status)
        snprintf(text, size, "cuda: fp32 arithmetic, %" PRId64 " states in one kernel",
                 f->rows * f->value_heads);
    return status;
}
