/* SPDX-License-Identifier: MIT */
/* Checks of what the arguments of prefill and decode have in common. Each describes what it has checked in *p. */
#ifndef KDA_API_CHECK_H
#define KDA_API_CHECK_H

#include "api/backend.h"
#include "api/problem.h"
#include "api/status.h"

#define INVALID(...) kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT, __VA_ARGS__)

/* Runs a check and leaves the function with its status if it failed. */
#define TRY(check)                             \
    do {                                       \
        flash_kda_status try_status = (check); \
        if (try_status)                        \
            return try_status;                 \
    } while (0)

/* Options, tensors of tokens, cu_seqlens and device of `a`, whose states and checkpoints are not looked at; and the
 * backend for them. flags: the flash_kda_flags that may be set; needs_out: out may not be NULL. */
flash_kda_status kda_check_tokens(const flash_kda_prefill_args *a, uint32_t flags, bool needs_out,
                                  struct kda_prefill *p, const struct kda_backend **backend);

/* An argument of any float dtype that is read or written in rows. */
struct kda_tensor_spec kda_floats(const char *name, const char *form, int rank, const int64_t *shape,
                                  const DLDevice *device);

/* An index tensor of the dtypes that `dtypes` allows. */
flash_kda_status kda_check_indices(const DLTensor *t, const char *name, const char *form, unsigned dtypes,
                                   int rank, const int64_t *shape, const DLDevice *device,
                                   struct kda_tensor *out);

/* The values of cu_seqlens or checkpoint_cu_starts: from 0 to `end`, never falling. */
flash_kda_status kda_check_cumulative(const struct kda_tensor *t, int64_t end, const char *what);

/* A tensor of states: [outer, HV, V, K] or, with rank 5, [outer, rows, HV, V, K]; -1: any. */
flash_kda_status kda_check_state(const DLTensor *t, const char *name, const char *form, unsigned dtypes,
                                 int rank, int64_t outer, int64_t rows, const DLDevice *device, bool written,
                                 const struct kda_prefill *p, struct kda_tensor *out);

/* The form of a tensor of states in p's layout. */
const char *kda_state_form(const struct kda_prefill *p, const char *v_first, const char *k_first);

#endif
