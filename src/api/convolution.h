/* SPDX-License-Identifier: MIT */
/* Where a short convolution's inputs lie in host memory: those before the first token of a call are in its state. */
#ifndef KDA_API_CONVOLUTION_H
#define KDA_API_CONVOLUTION_H

#include "api/decode_problem.h"

/* Address of input `i` of a channel in a slot, 0 the oldest. */
static inline char *kda_conv_past(const struct kda_convolution *conv, int64_t slot, int64_t channel,
                                  int64_t i) {
    const struct kda_tensor *s = &conv->state;
    return s->data + slot * s->stride[0] + channel * s->stride[1] + i * s->stride[2];
}

/* x [B, T, heads, dim] at token t of a sequence, t >= -KDA_CONV_PAST. */
static inline float kda_conv_input(const struct kda_tensor *x, const struct kda_convolution *conv,
                                   const struct kda_sequence *s, int64_t t, int64_t head, int64_t c) {
    if (t < 0 && (s->from_zero || !conv->state.data))
        return 0;
    if (t < 0)
        return kda_load(kda_conv_past(conv, s->slot, head * x->shape[3] + c, KDA_CONV_PAST + t),
                        conv->state.dtype, 0);
    return kda_load(kda_row(x, s->batch, s->first + t, head), x->dtype, c);
}

/* The weights of a channel, the oldest input's first, then its bias, `stride` apart. */
static inline void kda_conv_taps(const struct kda_convolution *conv, int64_t channel, int64_t stride,
                                 float *taps) {
    const char *weight = conv->weight.data + channel * conv->weight.stride[0];
    for (int64_t i = 0; i < KDA_CONV_WIDTH; i++)
        taps[i * stride] = kda_load(weight, conv->weight.dtype, i);
    taps[KDA_CONV_WIDTH * stride] = conv->bias.data ? kda_load(conv->bias.data, conv->bias.dtype, channel) : 0;
}

/* Takes the state of channel (head, c) through the tokens of sequence n, once nobody reads what it was. */
static inline void kda_conv_advance(const struct kda_decode *d, const struct kda_tensor *x,
                                    const struct kda_convolution *conv, int64_t n, const struct kda_sequence *s,
                                    int64_t head, int64_t c) {
    float inputs[KDA_CONV_PAST + FLASH_KDA_MAX_DECODE_TOKENS];
    for (int64_t t = -KDA_CONV_PAST; t < s->length; t++)
        inputs[KDA_CONV_PAST + t] = kda_conv_input(x, conv, s, t, head, c);
    for (int64_t t = 0; t < s->length; t++) {
        int64_t slot = kda_decode_written_slot(d, n, s, t);
        for (int64_t i = 0; i < KDA_CONV_PAST && slot >= 0; i++)
            kda_store(kda_conv_past(conv, slot, head * x->shape[3] + c, i), conv->state.dtype, 0,
                      inputs[t + 1 + i]);
    }
}

/* The state of channel (head, c) of a prefill becomes its last inputs, once nobody reads what it was. */
static inline void kda_conv_finish(const struct kda_tensor *x, const struct kda_convolution *conv,
                                   const struct kda_sequence *s, int64_t head, int64_t c) {
    float inputs[KDA_CONV_PAST];
    for (int64_t i = 0; i < KDA_CONV_PAST; i++)
        inputs[i] = kda_conv_input(x, conv, s, s->length - KDA_CONV_PAST + i, head, c);
    for (int64_t i = 0; i < KDA_CONV_PAST; i++)
        kda_store(kda_conv_past(conv, s->slot, head * x->shape[3] + c, i), conv->state.dtype, 0, inputs[i]);
}

#endif
