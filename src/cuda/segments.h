/* SPDX-License-Identifier: MIT */
/*
 * How backward divides sequences into segments: runs of whole chunks whose first state forward keeps. The host sizes
 * grids by these functions, and kernels find their work by them.
 *
 * Segments of all sequences share one numbering, in the order of tokens. It may have gaps in a packed batch: a
 * sequence's first number follows from its first token alone, and no sum over sequences is needed.
 */
#ifndef KDA_CUDA_SEGMENTS_H
#define KDA_CUDA_SEGMENTS_H

#include "api/backward_problem.h"
#include "cuda/chunks.h"

/* Segments of a sequence: at least 1, because an empty one's gradient of its state is passed on, too. */
KDA_INLINE int64_t kda_segments_of(int64_t length, int64_t segment) {
    int64_t count = (length + segment - 1) / segment;
    return count > 1 ? count : 1;
}

/* The number of sequence n's first segment of `segment` tokens; `first` is the sequence's first token in a packed
 * batch. For n = N and first = T it is the number of segments. */
KDA_INLINE int64_t kda_first_segment(const struct kda_tokens *x, int64_t segment, int64_t first, int64_t n) {
    return x->cu_seqlens.data ? first / segment + n : n * kda_segments_of(x->tokens, segment);
}

/* The last sequence whose segments begin at or before `number`; there is one. */
KDA_INLINE int64_t kda_sequence_of_segment(const struct kda_tokens *x, int64_t segment, int64_t number) {
    int64_t low = 0, high = x->sequences - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (kda_first_segment(x, segment, kda_tokens_of(x, middle).first, middle) <= number)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* The tokens of a chunk: number `chunk` from the sequence's beginning. */
KDA_INLINE struct kda_span kda_span_of_chunk(int64_t length, int64_t chunk) {
    struct kda_span span = {chunk * KDA_CUDA_CHUNK, 0};
    if (span.first >= 0 && span.first < length)
        span.count = kda_min64(length - span.first, KDA_CUDA_CHUNK);
    return span;
}

#endif
