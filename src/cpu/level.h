/* SPDX-License-Identifier: MIT */
/* The levels of the CPU backend: sets of kernels for growing instruction sets. */
#ifndef KDA_CPU_LEVEL_H
#define KDA_CPU_LEVEL_H

#include "cpu/backward.h"
#include "cpu/decode.h"
#include "cpu/prefill.h"

struct kda_cpu_level {
    const char *name;
    const struct kda_cpu_kernels *fp32; /* fp32 arithmetic */
    const struct kda_cpu_kernels *bf16; /* large products on bf16 operands; NULL where the level has none */
    const struct kda_decode_kernels *decode;
    const struct kda_backward_kernels *backward;
};

/* The level to run on: the highest that this CPU has, or the one that FLASH_KDA_CPU names. NULL with an error
 * if that one cannot run here. */
const struct kda_cpu_level *kda_cpu_level(void);

extern const struct kda_cpu_kernels kda_generic_kernels;
extern const struct kda_cpu_kernels kda_avx2_kernels;
extern const struct kda_cpu_kernels kda_avx512_kernels;
extern const struct kda_cpu_kernels kda_avx512bf16_kernels;
extern const struct kda_cpu_kernels kda_neon_kernels;

extern const struct kda_decode_kernels kda_generic_decode;
extern const struct kda_decode_kernels kda_avx2_decode;
extern const struct kda_decode_kernels kda_avx512_decode;
extern const struct kda_decode_kernels kda_neon_decode;

extern const struct kda_backward_kernels kda_generic_backward;
extern const struct kda_backward_kernels kda_avx2_backward;
extern const struct kda_backward_kernels kda_avx512_backward;
extern const struct kda_backward_kernels kda_neon_backward;

#endif
