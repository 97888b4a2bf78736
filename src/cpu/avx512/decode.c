/* SPDX-License-Identifier: MIT */
/* The kernel of decode for level avx512. */
#include "cpu/avx512/simd.h"

#include "cpu/decode_tmpl.h"

#include "cpu/level.h"

const struct kda_decode_kernels kda_avx512_decode = KDA_DECODE_KERNELS;
