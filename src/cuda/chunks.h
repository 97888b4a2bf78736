/* SPDX-License-Identifier: MIT */
/*
 * How sequences are divided into chunks. The host sizes grids by these functions, and kernels find their work
 * by them.
 *
 * A chunk has up to KDA_CUDA_CHUNK tokens and never crosses a checkpoint. Chunks of all sequences share one
 * numbering. It has gaps in a packed batch: a sequence's first number then follows from its first token, and no
 * sum over sequences is needed.
 */
#ifndef KDA_CUDA_CHUNKS_H
#define KDA_CUDA_CHUNKS_H

#include "api/problem.h"

enum { KDA_CUDA_CHUNK = 32 };

struct kda_span {
    int64_t first, count; /* tokens within the sequence; count 0: after its end */
};

KDA_INLINE int64_t kda_chunks_of(int64_t tokens) { return (tokens + KDA_CUDA_CHUNK - 1) / KDA_CUDA_CHUNK; }

/* Do checkpoints every checkpoint_every tokens fall between whole chunks? */
KDA_INLINE bool kda_splits_chunks(const struct kda_prefill *p) {
    return p->checkpoints.data && p->checkpoint_every > 0 && p->checkpoint_every % KDA_CUDA_CHUNK != 0;
}

/* At most so many times do explicit checkpoint offsets split chunks of one sequence. */
KDA_INLINE int64_t kda_checkpoint_splits(const struct kda_prefill *p) {
    return p->checkpoints.data && p->checkpoint_offsets.data ? kda_checkpoint_count(p, 0) : 0;
}

/* The number of sequence n's first chunk; `first` is the sequence's first token in a packed batch. For n = N
 * and first = T it is the number of chunks. */
KDA_INLINE int64_t kda_first_chunk(const struct kda_prefill *p, int64_t first, int64_t n) {
    int64_t every = kda_splits_chunks(p) ? p->checkpoint_every : 0;
    if (p->cu_seqlens.data)
        return first / KDA_CUDA_CHUNK + (every ? first / every : 0) + n * (kda_checkpoint_splits(p) + 2);
    int64_t each = kda_chunks_of(p->tokens) + kda_checkpoint_splits(p) + (every ? p->tokens / every : 0);
    return n * each;
}

/* The tokens of a chunk where all but a sequence's last one are whole. */
KDA_INLINE struct kda_span kda_whole_chunk(int64_t length, int64_t chunk) {
    struct kda_span span = {chunk * KDA_CUDA_CHUNK, 0};
    if (span.first < length)
        span.count = kda_min64(length - span.first, KDA_CUDA_CHUNK);
    return span;
}

/* The tokens of chunk number `chunk`, counted within sequence n. */
KDA_INLINE struct kda_span kda_chunk_span(const struct kda_prefill *p, int64_t n, int64_t length,
                                          int64_t chunk) {
    int64_t begin = 0, end = length;
    if (!p->checkpoints.data) /* the common case, in few instructions */
        return kda_whole_chunk(length, chunk);
    if (kda_splits_chunks(p)) {
        int64_t each = kda_chunks_of(p->checkpoint_every);
        begin = chunk / each * p->checkpoint_every;
        end = kda_min64(length, begin + p->checkpoint_every);
        chunk %= each;
    }
    while (kda_checkpoint_splits(p)) {
        end = kda_min64(length, kda_next_checkpoint(p, n, begin));
        int64_t chunks = kda_chunks_of(end - begin);
        if (chunk < chunks || end >= length)
            break;
        begin = end;
        chunk -= chunks;
    }
    struct kda_span span = {begin + chunk * KDA_CUDA_CHUNK, 0};
    if (span.first < end)
        span.count = kda_min64(end - span.first, KDA_CUDA_CHUNK);
    return span;
}

/* The first chunk of a segment; it may lie after the sequence's last chunk. The first segment does not
 * propagate the identity, so its chunks take a sixteenth less time and it is longer. The others are equally
 * long, but the last ones have what is left. */
KDA_INLINE int kda_begin_of_segment(int chunks, int segments, int segment) {
    int each = (16 * chunks + 16 * segments) / (16 * segments + 1); /* rounded up */
    int first = chunks - (segments - 1) * each;
    return segment == 0 ? 0 : (first > each ? first : each) + (segment - 1) * each;
}

/* The number of sequence n's first checkpoint, where these are in equal steps: numbered as chunks are, without those
 * within the first `skipped` tokens, which sequences may have in common where they are equally long. For n = N and
 * first = T it is the number of checkpoints. */
KDA_INLINE int64_t kda_first_checkpoint(const struct kda_prefill *p, int64_t skipped, int64_t first,
                                        int64_t n) {
    int64_t every = p->checkpoint_every;
    if (p->cu_seqlens.data)
        return first / every + n;
    return n * ((p->tokens + every - 1) / every - skipped / every);
}

/* Chunks of sequence n: at least 1, because the state of an empty sequence is passed on, too. */
KDA_INLINE int64_t kda_chunk_count(const struct kda_prefill *p, int64_t n, int64_t length) {
    int64_t chunks = 0;
    if (kda_checkpoint_splits(p))
        while (kda_chunk_span(p, n, length, chunks).count)
            chunks++;
    else if (kda_splits_chunks(p))
        chunks = length / p->checkpoint_every * kda_chunks_of(p->checkpoint_every) +
                 kda_chunks_of(length % p->checkpoint_every);
    else
        chunks = kda_chunks_of(length);
    return chunks > 1 ? chunks : 1;
}

#endif
