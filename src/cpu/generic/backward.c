/* SPDX-License-Identifier: MIT */
/* The kernel of backward for level generic. */
#include "cpu/generic/simd.h"

#include "cpu/products_fp32.h"

#include "cpu/backward_tmpl.h"

#include "cpu/level.h"

const struct kda_backward_kernels kda_generic_backward = KDA_BACKWARD_KERNELS;
