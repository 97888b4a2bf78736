/* SPDX-License-Identifier: MIT */
/* The kernel of decode for level avx2. */
#include "cpu/avx2/simd.h"

#include "cpu/decode_tmpl.h"

#include "cpu/level.h"

const struct kda_decode_kernels kda_avx2_decode = KDA_DECODE_KERNELS;
