/* SPDX-License-Identifier: MIT */
/* The kernels of prefill with bf16 products for level avx512bf16. */
#include "cpu/avx512/simd.h"

#include "cpu/avx512bf16/products_bf16.h"

#include "cpu/prefill_tmpl.h"

#include "cpu/level.h"

const struct kda_cpu_kernels kda_avx512bf16_kernels = KDA_KERNELS;
