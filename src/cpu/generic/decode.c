/* SPDX-License-Identifier: MIT */
/* The kernel of decode for level generic. */
#include "cpu/generic/simd.h"

#include "cpu/decode_tmpl.h"

#include "cpu/level.h"

void kda_generic_decode(const struct kda_decode *d, const struct kda_part *part) { decode_part(d, part); }
