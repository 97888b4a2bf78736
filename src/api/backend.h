/* SPDX-License-Identifier: MIT */
/* The table of backends: one row a backend, one column an operation. */
#ifndef KDA_API_BACKEND_H
#define KDA_API_BACKEND_H

#include "api/backward_problem.h"
#include "api/decode_problem.h"
#include "api/fold_problem.h"
#include "api/workspace.h"

#include <stddef.h>

struct kda_backend {
    const char *name;
    bool on_host; /* works on host memory */
    bool (*available)(void);
    flash_kda_status (*prefill_workspace_size)(const struct kda_prefill *p, size_t *bytes);
    /* workspace is aligned to KDA_WORKSPACE_ALIGNMENT and as large as asked for. */
    flash_kda_status (*prefill)(const struct kda_prefill *p, void *workspace);
    flash_kda_status (*prefill_describe)(const struct kda_prefill *p, char *text, size_t size);
    /* At least one token and one sequence. */
    flash_kda_status (*decode)(const struct kda_decode *d);
    flash_kda_status (*decode_describe)(const struct kda_decode *d, char *text, size_t size);
    /* There may be no token and no sequence: sums over them are still written. */
    flash_kda_status (*backward_workspace_size)(const struct kda_backward *b, size_t *bytes);
    flash_kda_status (*backward)(const struct kda_backward *b, void *workspace);
    flash_kda_status (*backward_describe)(const struct kda_backward *b, char *text, size_t size);
    /* At least one row and one head. */
    flash_kda_status (*fold)(const struct kda_fold *f);
    flash_kda_status (*fold_describe)(const struct kda_fold *f, char *text, size_t size);
};

/* The backend that runs tensors on this device, which is that of the argument `name`. */
flash_kda_status kda_backend_for(flash_kda_backend backend, const char *name, DLDevice device,
                                 const struct kda_backend **out);

extern const struct kda_backend kda_reference_backend;
extern const struct kda_backend kda_cpu_backend;
#ifdef KDA_WITH_CUDA
extern const struct kda_backend kda_cuda_backend;
#endif

/* The entries that stand in files of their own beside a backend's prefill. */
flash_kda_status kda_reference_decode(const struct kda_decode *d);
flash_kda_status kda_reference_decode_describe(const struct kda_decode *d, char *text, size_t size);
flash_kda_status kda_reference_backward_workspace_size(const struct kda_backward *b, size_t *bytes);
flash_kda_status kda_reference_backward(const struct kda_backward *b, void *workspace);
flash_kda_status kda_reference_backward_describe(const struct kda_backward *b, char *text, size_t size);
flash_kda_status kda_cpu_decode(const struct kda_decode *d);
flash_kda_status kda_cpu_decode_describe(const struct kda_decode *d, char *text, size_t size);
flash_kda_status kda_cpu_backward_workspace_size(const struct kda_backward *b, size_t *bytes);
flash_kda_status kda_cpu_backward(const struct kda_backward *b, void *workspace);
flash_kda_status kda_cpu_backward_describe(const struct kda_backward *b, char *text, size_t size);
flash_kda_status kda_cuda_decode(const struct kda_decode *d);
flash_kda_status kda_cuda_decode_describe(const struct kda_decode *d, char *text, size_t size);
flash_kda_status kda_cuda_backward_workspace_size(const struct kda_backward *b, size_t *bytes);
flash_kda_status kda_cuda_backward(const struct kda_backward *b, void *workspace);
flash_kda_status kda_cuda_backward_describe(const struct kda_backward *b, char *text, size_t size);
flash_kda_status kda_reference_fold(const struct kda_fold *f);
flash_kda_status kda_reference_fold_describe(const struct kda_fold *f, char *text, size_t size);
flash_kda_status kda_cpu_fold(const struct kda_fold *f);
flash_kda_status kda_cpu_fold_describe(const struct kda_fold *f, char *text, size_t size);
flash_kda_status kda_cuda_fold(const struct kda_fold *f);
flash_kda_status kda_cuda_fold_describe(const struct kda_fold *f, char *text, size_t size);

/* Can the host read memory of this device? */
bool kda_on_host(DLDevice device);

#endif
