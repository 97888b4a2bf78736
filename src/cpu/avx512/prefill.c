/* SPDX-License-Identifier: MIT */
/* The kernels of prefill for level avx512. */
#include "cpu/avx512/simd.h"

#include "cpu/products_fp32.h"

#include "cpu/prefill_tmpl.h"

#include "cpu/level.h"

const struct kda_cpu_kernels kda_avx512_kernels = KDA_KERNELS;
