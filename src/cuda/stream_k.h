/* SPDX-License-Identifier: MIT */
/*
 * All chains end to end, stream_k in equal ranges over multiprocessors (sm90/kernels.h): where ranges begin, for the host that
 * sizes them and for the kernels that work them.
 *
 * A position counts chunks: head by head, within one sequence by sequence, numbered as in chunks.h. Where a range begins within
 * a chain, this is split; but its last chunk, which may be short, is not split off. A range in which one chain ends and another
 * begins has two states more to load and store: where it makes ranges hardly longer, every chain begins with a range of its own,
 * and after it positions are left empty.
 */
#ifndef KDA_CUDA_STREAM_K_H
#define KDA_CUDA_STREAM_K_H

#include "cuda/chunks.h"

enum { KDA_MAX_RANGES = 256 }; /* a kernel's threads see one each */

struct kda_stream_k {
    int ranges; /* 0: chains are not stream_k */
    int length; /* of all chains: the position after them */
    int each;   /* of every range, rounded down: the first ones have a chunk more */
    int gap;    /* positions left empty after every chain */
};

/* What of a chain is in a range: chunks from begin on, after which the next chain or range begins. */
struct kda_slice {
    int n, head;
    int begin, end, chunks; /* chunks: of the chain; 0 where there is nothing to do */
};

/* Of chains that are all as long. */
KDA_INLINE int kda_chunks_of_each(const struct kda_prefill *p) { return (int)kda_first_chunk(p, 0, 1); }

/* Chunks of all sequences, as numbered, of one head, and gaps. */
KDA_INLINE int kda_positions_of_head(const struct kda_prefill *p, const struct kda_stream_k *stream_k) {
    return (int)kda_first_chunk(p, p->tokens, p->sequences) + (int)p->sequences * stream_k->gap;
}

/* Positions are to fit an int; a gap is shorter than its chain. */
KDA_INLINE bool kda_can_stream_k(const struct kda_prefill *p) {
    return kda_first_chunk(p, p->tokens, p->sequences) <= INT32_MAX / 2 / (p->value_heads ? p->value_heads : 1);
}

/* In so many ranges, or somewhat fewer. */
KDA_INLINE struct kda_stream_k kda_split_evenly(const struct kda_prefill *p, int ranges) {
    enum { STATES = 1 /* chunks that take as long as another chain's states */ };
    struct kda_stream_k stream_k = {ranges, 0, 0, 0};
    int64_t chains = p->sequences * p->value_heads;
    int most = p->cu_seqlens.data || !chains ? 0 : (int)(ranges / chains); /* of one chain */
    if (most > 0) {
        int chunks = kda_chunks_of_each(p);
        int each = (chunks + most - 1) / most, count = (chunks + each - 1) / each;
        int longest = each + (chunks % each == 1); /* as the last one is not split off */
        if (longest <= (chunks * chains + ranges - 1) / ranges + STATES) {
            stream_k.ranges = (int)chains * count;
            stream_k.gap = count * each - chunks;
        }
    }
    stream_k.length = kda_positions_of_head(p, &stream_k) * (int)p->value_heads;
    stream_k.each = stream_k.length / stream_k.ranges;
    return stream_k;
}

/* States after chains that a range ends with: is there a position for every chain, or for every range, as these are fewer? */
KDA_INLINE bool kda_states_by_chain(const struct kda_prefill *p, int ranges) {
    return p->value_heads * p->sequences <= ranges;
}

KDA_INLINE int kda_begin_of_range(const struct kda_stream_k *stream_k, int range) {
    int more = stream_k->length - stream_k->each * stream_k->ranges;
    return range * stream_k->each + (range < more ? range : more);
}

/* Where a sequence begins in its head. */
KDA_INLINE int kda_position_of_sequence(const struct kda_prefill *p, const struct kda_stream_k *stream_k,
                                        int n) {
    return (int)kda_first_chunk(p, p->cu_seqlens.data ? kda_sequence(p, n).first : 0, n) + n * stream_k->gap;
}

/* The sequence that is at a position of its head, or after which this is empty. */
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

/* How many of a chain's chunks come before the position so far after its beginning, or before that by wild indices. */
KDA_INLINE int kda_chunks_before(int chunks, int distance) {
    return distance <= 0 ? 0 : distance + 1 >= chunks ? chunks : distance;
}

/* Finds what of the chain of n and head is in the range; false if that begins after it, or is no chain. */
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

/* And each one's next; false after the range's last one. */
KDA_INLINE bool kda_next_slice(const struct kda_prefill *p, const struct kda_stream_k *stream_k, int range,
                               struct kda_slice *slice) {
    if (++slice->n == p->sequences)
        slice->n = 0, slice->head++;
    return kda_enter_slice(p, stream_k, range, false, slice);
}

/* Is the chain split in front of the slice, after it? */
KDA_INLINE bool kda_split_before(const struct kda_slice *s) { return s->begin > 0 && s->begin < s->end; }
KDA_INLINE bool kda_split_after(const struct kda_slice *s) { return s->end < s->chunks; }

#endif
