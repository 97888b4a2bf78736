/* SPDX-License-Identifier: MIT */
/* The kernel of backward for level neon. */
#include "cpu/neon/simd.h"

#include "cpu/products_fp32.h"

#include "cpu/backward_tmpl.h"

#include "cpu/level.h"

const struct kda_backward_kernels kda_neon_backward = KDA_BACKWARD_KERNELS;
