/* SPDX-License-Identifier: MIT */
/* The kernel of decode for level neon. */
#include "cpu/neon/simd.h"

#include "cpu/decode_tmpl.h"

#include "cpu/level.h"

const struct kda_decode_kernels kda_neon_decode = KDA_DECODE_KERNELS;
