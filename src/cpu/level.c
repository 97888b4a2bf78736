/* SPDX-License-Identifier: MIT */
/* Which levels this build has, which this CPU can run, which one was asked for. */
#include "cpu/level.h"

#include "api/status.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* The name of the environment variable that forces a level. */
#define LEVEL_VARIABLE "FLASH_KDA_CPU"

static const struct kda_cpu_level levels[] = {
    {"generic", &kda_generic_kernels, NULL, &kda_generic_decode, &kda_generic_backward},
#if defined(__x86_64__)
    {"avx2", &kda_avx2_kernels, NULL, &kda_avx2_decode, &kda_avx2_backward},
    {"avx512", &kda_avx512_kernels, NULL, &kda_avx512_decode, &kda_avx512_backward},
    {"avx512bf16", &kda_avx512_kernels, &kda_avx512bf16_kernels, &kda_avx512_decode, &kda_avx512_backward},
#elif defined(__aarch64__)
    {"neon", &kda_neon_kernels, NULL, &kda_neon_decode, &kda_neon_backward},
#endif
};

enum { LEVELS = sizeof levels / sizeof *levels };

#if defined(__x86_64__)
/* Every CPU with AVX2 has it, but a virtual machine may hide it; not all compilers know its name. */
static bool has_f16c(void) {
    unsigned eax, ebx, ecx = 0, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

/* How many of `levels` this CPU can run: each needs all that the ones before it need. */
static int runnable(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
        return 1;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 2;
    if (!__builtin_cpu_supports("avx512bf16"))
        return 3;
#endif
    return LEVELS;
}

/* runnable(), asked once: CPUID is slow on a virtual machine, and every call comes here. Threads that meet here first find
 * the same. */
static int levels_here(void) {
    static _Atomic int known;
    int count = atomic_load_explicit(&known, memory_order_relaxed);
    if (!count) {
        count = runnable();
        atomic_store_explicit(&known, count, memory_order_relaxed);
    }
    return count;
}

/* The level of calls that name none: the highest, but on Intel's processors not avx512bf16. VDPBF16PS does no more
 * multiplications a clock there than FMAs do: with what packing costs, bf16 products take 1.4 times as long as fp32's. */
static const struct kda_cpu_level *fastest(void) {
    int count = levels_here();
#if defined(__x86_64__)
    if (count == LEVELS && __builtin_cpu_is("intel"))
        count--;
#endif
    return &levels[count - 1];
}

const struct kda_cpu_level *kda_cpu_level(void) {
    int count = levels_here();
    const char *forced = getenv(LEVEL_VARIABLE);
    if (!forced || !*forced)
        return fastest();
    for (int i = 0; i < LEVELS; i++)
        if (!strcmp(forced, levels[i].name)) {
            if (i < count)
                return &levels[i];
            kda_explain("the environment variable " LEVEL_VARIABLE
                        " is %s, which this CPU cannot run; expected %s or lower",
                        forced, levels[count - 1].name);
            return NULL;
        }
    kda_explain("the environment variable " LEVEL_VARIABLE
                " is %.40s; expected a level of this build, generic to %s",
                forced, levels[LEVELS - 1].name);
    return NULL;
}

const char *const *flash_kda_cpu_levels(void) {
    /* Built once per thread, so that no call needs a lock. */
    static _Thread_local const char *names[LEVELS + 1];
    int count = levels_here();
    for (int i = 0; i < count; i++)
        names[i] = levels[i].name;
    names[count] = NULL;
    return names;
}

const char *flash_kda_cpu_level(void) {
    const struct kda_cpu_level *level = kda_cpu_level();
    return level ? level->name : NULL;
}
