/* SPDX-License-Identifier: MIT */
#include "cuda/level.h"

#include <string.h>

const struct kda_cuda_level *const kda_cuda_levels[] = {
#ifdef KDA_WITH_SM90
    &kda_sm90_level,
#endif
    &kda_sm80_level,
    NULL,
};

/* A forced level still leaves what it does not take to the levels below it. */
bool kda_level_allowed(const struct kda_cuda_level *level, const struct kda_cuda_device *device) {
    const char *forced = device->override.level;
    const struct kda_cuda_level *const *above = kda_cuda_levels;
    while (forced && *above != level && strcmp((*above)->name, forced) != 0)
        above++;
    return level->runs_on(device) && (!forced || !strcmp((*above)->name, forced));
}
