/* SPDX-License-Identifier: MIT */
/*
 * Stream-K: all chains lie end to end and are divided into equal ranges, one for a multiprocessor
 * (sm90/kernels.h). The host sizes ranges by these functions, and kernels find their work by them.
 *
 * A position counts chunks: head by head, and in a head sequence by sequence, numbered as in chunks.h. A range
 * that begins within a chain splits it there, but never splits off only the chain's last chunk, which may be
 * short. A range in which one chain ends and another begins has two more states to load and store. So where
 * ranges get hardly longer by it, every chain begins with a range of its own; the positions after the chain
 * that this leaves empty are its gap.
 */
#ifndef KDA_CUDA_STREAM_K_H
#define KDA_CUDA_STREAM_K_H

#include "cuda/chunks.h"

enum { KDA_MAX_RANGES = 256 }; /* in kernels a thread looks at one range */

struct kda_stream_k {
    int ranges; /* 0: no stream-K */
    int length; /* the position after all chains */
    int each;   /* chunks of every range, rounded down: the first ranges have one more */
    int gap;    /* empty positions after every chain */
};

/* What of a chain is in a range: chunks from begin to end, without end. */
struct kda_slice {
    int n, head;
    int begin, end, chunks; /* chunks: of the whole chain; 0 where there is nothing to do */
};

/* Chunks of a chain, where all chains are equally long. */
KDA_INLINE int kda_chunks_of_each(const struct kda_prefill *p) { return (int)kda_first_chunk(p, 0, 1); }

/* Positions of one head: chunks of all sequences, as numbered, and gaps. */
KDA_INLINE int kda_positions_of_head(const struct kda_prefill *p, const struct kda_stream_k *stream_k) {
    return (int)kda_first_chunk(p, p->tokens, p->sequences) + (int)p->sequences * stream_k->gap;
}

/* Do all positions fit an int? A gap is shorter than its chain. */
KDA_INLINE bool kda_can_stream_k(const struct kda_prefill *p) {
    return kda_first_chunk(p, p->tokens, p->sequences) <= INT32_MAX / 2 / (p->value_heads ? p->value_heads : 1);
}

/* Divides all chains into `ranges` ranges, or somewhat fewer. */
KDA_INLINE struct kda_stream_k kda_split_evenly(const struct kda_prefill *p, int ranges) {
    enum { STATES = 1 /* chunks that take as long as the states of one more chain */ };
    struct kda_stream_k stream_k = {ranges, 0, 0, 0};
    int64_t chains = p->sequences * p->value_heads;
    int most = p->cu_seqlens.data || !chains ? 0 : (int)(ranges / chains); /* ranges of one chain */
    if (most > 0) {
        int chunks = kda_chunks_of_each(p);
        int each = (chunks + most - 1) / most, count = (chunks + each - 1) / each;
        int longest = each + (chunks % each == 1); /* a last chunk is never alone */
        if (longest <= (chunks * chains + ranges - 1) / ranges + STATES) {
            stream_k.ranges = (int)chains * count;
            stream_k.gap = count * each - chunks;
        }
    }
    stream_k.length = kda_positions_of_head(p, &stream_k) * (int)p->value_heads;
    stream_k.each = stream_k.length / stream_k.ranges;
    return stream_k;
}

/* Is a final state that ranges keep aside stored by its chain? Else by the range in which the chain ends. The
 * fewer of the two need memory. */
KDA_INLINE bool kda_states_by_chain(const struct kda_prefill *p, int ranges) {
    return p->value_heads * p->sequences <= ranges;
}

KDA_INLINE int kda_begin_of_range(const struct kda_stream_k *stream_k, int range) {
    int more = stream_k->length - stream_k->each * stream_k->ranges;
    return range * stream_k->each + (range < more ? range : more);
}

/* A sequence's first position in its head. */
KDA_INLINE int kda_position_of_sequence(const struct kda_prefill *p, const struct kda_stream_k *stream_k,
                                        int n) {
    return (int)kda_first_chunk(p, p->cu_seqlens.data ? kda_sequence(p, n).first : 0, n) + n * stream_k->gap;
}

/* The sequence at a position of its head. A gap belongs to the sequence before it. */
KDA_INLINE int kda_sequence_at(const struct kda_prefill *p, const struct kda_stream_k *stream_k, int position) {
    int first = 0, after = (int)p->sequences;
    if (!p->cu_seqlens.data)
        return position / (kda_chunks_of_each(p) + stream_k->gap);
    while (after - first > 1) {
        int middle = (first + after) / 2;
        if (kda_position_of_sequence(p, stream_k, middle) <= position)
            first = middle;
        else
            after = middle;
    }
    return first;
}

/* A chain's chunks before a split so far after its beginning. Clamped, as wild indices may place chains
 * anywhere. Never splits off only the last chunk. */
KDA_INLINE int kda_chunks_before(int chunks, int distance) {
    return distance <= 0 ? 0 : distance + 1 >= chunks ? chunks : distance;
}

/* Finds the slice of the chain of slice->n and slice->head. False if there is no such chain, or it begins after
 * the range. first: it is the range's first slice. */
KDA_INLINE bool kda_enter_slice(const struct kda_prefill *p, const struct kda_stream_k *stream_k, int range,
                                bool first, struct kda_slice *slice) {
    int position =
        slice->head * kda_positions_of_head(p, stream_k) + kda_position_of_sequence(p, stream_k, slice->n);
    int end = kda_begin_of_range(stream_k, range + 1);
    slice->chunks = slice->begin = slice->end = 0;
    if (position >= end || slice->head >= p->value_heads)
        return false;
    struct kda_sequence sequence = kda_sequence(p, slice->n);
    slice->chunks = sequence.slot < 0 ? 0 : (int)kda_chunk_count(p, slice->n, sequence.length);
    slice->begin = first ? kda_chunks_before(slice->chunks, kda_begin_of_range(stream_k, range) - position) : 0;
    slice->end = kda_chunks_before(slice->chunks, end - position);
    return true;
}

/* The slice that a range begins with. */
KDA_INLINE void kda_first_slice(const struct kda_prefill *p, const struct kda_stream_k *stream_k, int range,
                                struct kda_slice *slice) {
    int all = kda_positions_of_head(p, stream_k), begin = kda_begin_of_range(stream_k, range);
    slice->head = begin / all;
    slice->n = kda_sequence_at(p, stream_k, begin % all);
    kda_enter_slice(p, stream_k, range, true, slice);
}

/* The slice after this one; false if this was the range's last. */
KDA_INLINE bool kda_next_slice(const struct kda_prefill *p, const struct kda_stream_k *stream_k, int range,
                               struct kda_slice *slice) {
    if (++slice->n == p->sequences)
        slice->n = 0, slice->head++;
    return kda_enter_slice(p, stream_k, range, false, slice);
}

/* Is the chain split in front of the slice? After it? */
KDA_INLINE bool kda_split_before(const struct kda_slice *s) { return s->begin > 0 && s->begin < s->end; }
KDA_INLINE bool kda_split_after(const struct kda_slice *s) { return s->end < s->chunks; }

#endif
