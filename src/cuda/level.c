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

/* What a level does not take goes to those below it, also where it is forced. */
bool kda_level_allowed(const struct kda_cuda_level *level, const struct kda_cuda_device *device) {
    const char *forced = device->override.level;
    bool reached = !forced;
    for (const struct kda_cuda_level *const *l = kda_cuda_levels; *l; l++) {
        reached = reached || !strcmp((*l)->name, forced);
        if (*l == level)
            return reached && level->runs_on(device);
    }
    return false;
}

bool kda_decode_is_fused(const struct kda_decode *d) {
    return d->q_conv.weight.data || d->k_conv.weight.data || d->v_conv.weight.data || d->norm_weight.data;
}
