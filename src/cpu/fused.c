/* SPDX-License-Identifier: MIT */
#include "cpu/fused.h"

#include "api/convolution.h"
#include "cpu/prefill.h"

#include <string.h>

static const struct kda_tensor *input_of(const struct kda_prefill *p, int i) {
    return i == 0 ? &p->q : i == 1 ? &p->k : &p->v;
}

static int64_t padded_values(const struct kda_prefill *p) { return kda_tiles(p->value_dim) * KDA_TILE; }

static size_t count_taps(const struct kda_prefill *p, int i, int64_t padded) {
    return (size_t)(input_of(p, i)->shape[2] * (KDA_CONV_WIDTH + 1) * padded);
}

void kda_cpu_lay_out_fused(const struct kda_prefill *p, struct kda_arena *arena, struct kda_cpu_fused *fused) {
    *fused = (struct kda_cpu_fused){.args = p->fused};
    for (int i = 0; p->fused && i < KDA_CONVOLUTIONS; i++) {
        fused->padded[i] = i < 2 ? kda_padded_key_dim(p) : padded_values(p);
        if (kda_convolution_of(p->fused, i)->weight.data)
            fused->taps[i] = kda_take(arena, count_taps(p, i, fused->padded[i]), sizeof(float));
    }
    if (p->fused && p->fused->norm_weight.data)
        fused->norm_weight = kda_take(arena, (size_t)padded_values(p), sizeof(float));
}

void kda_cpu_fill_fused(const struct kda_prefill *p, struct kda_cpu_fused *fused) {
    for (int i = 0; i < KDA_CONVOLUTIONS; i++) {
        int64_t padded = fused->padded[i], dim = input_of(p, i)->shape[3];
        if (!fused->taps[i])
            continue;
        memset(fused->taps[i], 0, count_taps(p, i, padded) * sizeof(float));
        for (int64_t head = 0; head < input_of(p, i)->shape[2]; head++)
            for (int64_t c = 0; c < dim; c++)
                kda_conv_taps(kda_convolution_of(fused->args, i), head * dim + c, padded,
                              fused->taps[i] + head * (KDA_CONV_WIDTH + 1) * padded + c);
    }
    for (int64_t j = 0; fused->norm_weight && j < fused->padded[2]; j++)
        fused->norm_weight[j] =
            j < p->value_dim ? kda_load(fused->args->norm_weight.data, fused->args->norm_weight.dtype, j) : 0;
}

static int64_t heads_with_state(const struct kda_prefill *p, int i) {
    return p->fused && kda_convolution_of(p->fused, i)->state.data ? input_of(p, i)->shape[2] : 0;
}

int64_t kda_cpu_conv_pieces(const struct kda_prefill *p) {
    int64_t heads = 0;
    for (int i = 0; i < KDA_CONVOLUTIONS; i++)
        heads += heads_with_state(p, i);
    return p->sequences * heads;
}

void kda_cpu_conv_piece(const struct kda_prefill *p, int64_t piece) {
    const struct kda_sequence s = kda_sequence(p, piece % p->sequences);
    int64_t head = piece / p->sequences;
    int i = 0;
    while (head >= heads_with_state(p, i))
        head -= heads_with_state(p, i++);
    for (int64_t c = 0; c < input_of(p, i)->shape[3] && s.slot >= 0; c++)
        kda_conv_finish(input_of(p, i), kda_convolution_of(p->fused, i), &s, head, c);
}
