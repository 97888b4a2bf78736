/* SPDX-License-Identifier: MIT */
/* Numbers below 2^-126 are treated as 0 while kernels run: a state that decays towards 0 must not slow down. */
#ifndef KDA_CPU_DENORMALS_H
#define KDA_CPU_DENORMALS_H

#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
enum { FLUSH_BITS = 0x8040 }; /* MXCSR: flush to zero, denormals are zero */
static inline uint64_t kda_float_mode(void) { return _mm_getcsr(); }
static inline void kda_set_float_mode(uint64_t mode) { _mm_setcsr((unsigned)mode); }
#elif defined(__aarch64__)
enum { FLUSH_BITS = 1 << 24 }; /* FPCR.FZ */
static inline uint64_t kda_float_mode(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static inline void kda_set_float_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode)); }
#else
enum { FLUSH_BITS = 0 };
static inline uint64_t kda_float_mode(void) { return 0; }
static inline void kda_set_float_mode(uint64_t mode) { (void)mode; }
#endif

/* Returns the calling thread's mode, to be given back to kda_set_float_mode. */
static inline uint64_t kda_flush_denormals(void) {
    uint64_t mode = kda_float_mode();
    kda_set_float_mode(mode | FLUSH_BITS);
    return mode;
}

#endif
