/* SPDX-License-Identifier: MIT */
/* How the portable level plans a prefill. Plain host code: no device is needed. */
#ifndef KDA_CUDA_SM80_PLAN_H
#define KDA_CUDA_SM80_PLAN_H

#include "cuda/override.h"
#include "cuda/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Columns of V that a CTA of the kernel `general` works. */
enum { KDA_SM80_COLUMNS = 64 };

/* Bytes of the operands of one chunk of one value head, whose K is padded to KP (operands.cuh): KT, QT and KR,
 * the inverse, M, the carry, and the growth. */
#define KDA_SM80_OPERANDS(KP) \
    (3 * KDA_CUDA_CHUNK * (KP)*2 + KDA_CUDA_CHUNK * KDA_CUDA_CHUNK * (4 + 2) + (KP)*4 + 16)

size_t kda_sm80_operands(const struct kda_prefill *p);

/* Adds the kernel that writes the operands of all chunks. */
void kda_sm80_plan_prepare(const struct kda_prefill *p, struct kda_plan *plan);

bool kda_sm80_takes(const struct kda_prefill *p);
void kda_sm80_plan(const struct kda_prefill *p, int multiprocessors, const struct kda_override *override,
                   struct kda_plan *plan);

#ifdef __cplusplus
}
#endif

#endif
