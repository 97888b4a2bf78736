/* SPDX-License-Identifier: MIT */
/* The kernel of backward for level avx2. */
#include "cpu/avx2/simd.h"

#include "cpu/products_fp32.h"

#include "cpu/backward_tmpl.h"

#include "cpu/level.h"

const struct kda_backward_kernels kda_avx2_backward = KDA_BACKWARD_KERNELS;
