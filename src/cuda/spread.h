/* SPDX-License-Identifier: MIT */
/*
 * All chains end to end, spread in equal parts over multiprocessors (sm90/kernels.h): where parts begin, for the host that
 * sizes them and for the kernels that work them.
 *
 * A place counts chunks: head by head, within one sequence by sequence, numbered as in chunks.h. Where a part begins within
 * a chain, this is cut; but its last chunk, which may be short, is not cut off.
 */
#ifndef KDA_CUDA_SPREAD_H
#define KDA_CUDA_SPREAD_H

#include "cuda/chunks.h"

enum { KDA_MAX_PARTS = 256 }; /* a kernel's threads see one each */

struct kda_spread {
    int parts;  /* 0: chains are not spread */
    int length; /* of all chains: the place behind them */
    int each;   /* of every part, rounded down: the first ones have a chunk more */
};

/* What of a chain is in a part: chunks from begin on, behind which the next chain or part begins. */
struct kda_stretch {
    int n, head;
    int begin, end, chunks; /* chunks: of the chain; 0 where there is nothing to do */
};

/* Chunks of all sequences, as numbered, of one head. */
KDA_INLINE int kda_chunks_of_head(const struct kda_prefill *p) {
    return (int)kda_first_chunk(p, p->tokens, p->sequences);
}

/* Places are to fit an int. */
KDA_INLINE bool kda_can_spread(const struct kda_prefill *p) {
    return kda_first_chunk(p, p->tokens, p->sequences) <= INT32_MAX / (p->value_heads ? p->value_heads : 1);
}

KDA_INLINE struct kda_spread kda_spread(const struct kda_prefill *p, int parts) {
    int length = kda_chunks_of_head(p) * (int)p->value_heads;
    struct kda_spread spread = {parts, length, length / parts};
    return spread;
}

KDA_INLINE int kda_place_of_part(const struct kda_spread *spread, int part) {
    int more = spread->length - spread->each * spread->parts;
    return part * spread->each + (part < more ? part : more);
}

/* Number of a sequence's first chunk. */
KDA_INLINE int kda_number_of_sequence(const struct kda_prefill *p, int n) {
    return (int)kda_first_chunk(p, p->cu_seqlens.data ? kda_sequence(p, n).first : 0, n);
}

/* The sequence that has chunk `number`, or the gap behind which this is. */
KDA_INLINE int kda_sequence_at(const struct kda_prefill *p, int number) {
    int first = 0, behind = (int)p->sequences;
    if (!p->cu_seqlens.data)
        return number / (int)kda_first_chunk(p, 0, 1);
    while (behind - first > 1) {
        int middle = (first + behind) / 2;
        if (kda_number_of_sequence(p, middle) <= number)
            first = middle;
        else
            behind = middle;
    }
    return first;
}

/* How many of a chain's chunks come before the place so far behind its beginning, or before that by wild indices. */
KDA_INLINE int kda_chunks_before(int chunks, int distance) {
    return distance <= 0 ? 0 : distance + 1 >= chunks ? chunks : distance;
}

/* Finds what of the chain of n and head is in the part; false if that begins behind it, or is no chain. */
KDA_INLINE bool kda_enter_stretch(const struct kda_prefill *p, const struct kda_spread *spread, int part,
                                  bool first, struct kda_stretch *stretch) {
    int place = stretch->head * kda_chunks_of_head(p) + kda_number_of_sequence(p, stretch->n);
    int end = kda_place_of_part(spread, part + 1);
    stretch->chunks = stretch->begin = stretch->end = 0;
    if (place >= end || stretch->head >= p->value_heads)
        return false;
    struct kda_sequence sequence = kda_sequence(p, stretch->n);
    stretch->chunks = sequence.slot < 0 ? 0 : (int)kda_chunk_count(p, stretch->n, sequence.length);
    stretch->begin = first ? kda_chunks_before(stretch->chunks, kda_place_of_part(spread, part) - place) : 0;
    stretch->end = kda_chunks_before(stretch->chunks, end - place);
    return true;
}

/* The stretch that a part begins with. */
KDA_INLINE void kda_first_stretch(const struct kda_prefill *p, const struct kda_spread *spread, int part,
                                  struct kda_stretch *stretch) {
    int all = kda_chunks_of_head(p), begin = kda_place_of_part(spread, part);
    stretch->head = begin / all;
    stretch->n = kda_sequence_at(p, begin % all);
    kda_enter_stretch(p, spread, part, true, stretch);
}

/* And each one's next; false behind the part's last one. */
KDA_INLINE bool kda_next_stretch(const struct kda_prefill *p, const struct kda_spread *spread, int part,
                                 struct kda_stretch *stretch) {
    if (++stretch->n == p->sequences)
        stretch->n = 0, stretch->head++;
    return kda_enter_stretch(p, spread, part, false, stretch);
}

/* Is the chain cut in front of the stretch, behind it? */
KDA_INLINE bool kda_cut_before(const struct kda_stretch *s) { return s->begin > 0 && s->begin < s->end; }
KDA_INLINE bool kda_cut_behind(const struct kda_stretch *s) { return s->end < s->chunks; }

#endif
