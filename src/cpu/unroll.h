/* SPDX-License-Identifier: MIT */
/* UNROLL before a loop of constant length keeps arrays that it indexes in registers. */
#ifndef KDA_CPU_UNROLL_H
#define KDA_CPU_UNROLL_H

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#endif
