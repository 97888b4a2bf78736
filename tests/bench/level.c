/* SPDX-License-Identifier: MIT */
#include "level.h"

#include "tensor.h"

#include <stdlib.h>
#include <string.h>

flash_kda_backend level_backend(const char *level) {
    if (!strcmp(level, "cuda"))
        return FLASH_KDA_BACKEND_CUDA;
    return strcmp(level, "reference") ? FLASH_KDA_BACKEND_CPU : FLASH_KDA_BACKEND_REFERENCE;
}

bool level_exists(const char *level) {
    static const char *const names[] = {"reference", "cuda", "generic", "avx2", "avx512", "avx512bf16", "neon"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(level, names[i]))
            return true;
    return false;
}

const char *level_of(flash_kda_backend backend) {
    bool own = backend == FLASH_KDA_BACKEND_CUDA || backend == FLASH_KDA_BACKEND_REFERENCE;
    const char *level = own ? flash_kda_backend_name(backend) : flash_kda_cpu_level();
    return level ? level : "";
}

void level_select(const char *level) { setenv("FLASH_KDA_CPU", level, 1); }

bool level_rounds(const char *level, const flash_kda_prefill_args *args) {
    if (!strcmp(level, "cuda"))
        return true;
    return !strcmp(level, "avx512bf16") && type_equal(args->q->dtype, TYPE_BF16) &&
           type_equal(args->k->dtype, TYPE_BF16) && type_equal(args->v->dtype, TYPE_BF16) &&
           type_equal(args->out->dtype, TYPE_BF16);
}

bool level_rounds_gradients(const char *level) { return !strcmp(level, "cuda"); }
