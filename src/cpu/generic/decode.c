/* SPDX-License-Identifier: MIT */
/* The kernel of decode for level generic. */
#include "cpu/generic/simd.h"

#include "cpu/decode_tmpl.h"

#include "cpu/level.h"

const struct kda_decode_kernels kda_generic_decode = KDA_DECODE_KERNELS;
