/* SPDX-License-Identifier: MIT */
/*
 * All chains end to end, spread in equal parts over multiprocessors (sm90/kernels.h): where parts begin, for the host that
 * sizes them and for the kernels that work them.
 *
 * A place counts chunks: head by head, within one sequence by sequence, numbered as in chunks.h. Where a part begins within
 * a chain, this is cut; but its last chunk, which may be short, is not cut off. A part in which one chain ends and another
 * begins has two states more to load and store: where it makes parts hardly longer, every chain begins with a part of its own,
 * and behind it places are left empty.
 */
#ifndef KDA_CUDA_SPREAD_H
#define KDA_CUDA_SPREAD_H

#include "cuda/chunks.h"

enum { KDA_MAX_PARTS = 256 }; /* a kernel's threads see one each */

struct kda_spread {
    int parts;  /* 0: chains are not spread */
    int length; /* of all chains: the place behind them */
    int each;   /* of every part, rounded down: the first ones have a chunk more */
    int gap;    /* places left empty behind every chain */
};

/* What of a chain is in a part: chunks from begin on, behind which the next chain or part begins. */
struct kda_stretch {
    int n, head;
    int begin, end, chunks; /* chunks: of the chain; 0 where there is nothing to do */
};

/* Of chains that are all as long. */
KDA_INLINE int kda_chunks_of_each(const struct kda_prefill *p) { return (int)kda_first_chunk(p, 0, 1); }

/* Chunks of all sequences, as numbered, of one head, and gaps. */
KDA_INLINE int kda_places_of_head(const struct kda_prefill *p, const struct kda_spread *spread) {
    return (int)kda_first_chunk(p, p->tokens, p->sequences) + (int)p->sequences * spread->gap;
}

/* Places are to fit an int; a gap is shorter than its chain. */
KDA_INLINE bool kda_can_spread(const struct kda_prefill *p) {
    return kda_first_chunk(p, p->tokens, p->sequences) <= INT32_MAX / 2 / (p->value_heads ? p->value_heads : 1);
}

/* In so many parts, or somewhat fewer. */
KDA_INLINE struct kda_spread kda_spread(const struct kda_prefill *p, int parts) {
    enum { STATES = 1 /* chunks that take as long as another chain's states */ };
    struct kda_spread spread = {parts, 0, 0, 0};
    int64_t chains = p->sequences * p->value_heads;
    int most = p->cu_seqlens.data || !chains ? 0 : (int)(parts / chains); /* of one chain */
    if (most > 0) {
        int chunks = kda_chunks_of_each(p);
        int each = (chunks + most - 1) / most, count = (chunks + each - 1) / each;
        int longest = each + (chunks % each == 1); /* as the last one is not cut off */
        if (longest <= (chunks * chains + parts - 1) / parts + STATES) {
            spread.parts = (int)chains * count;
            spread.gap = count * each - chunks;
        }
    }
    spread.length = kda_places_of_head(p, &spread) * (int)p->value_heads;
    spread.each = spread.length / spread.parts;
    return spread;
}

/* States behind chains that a part ends with: is there a place for every chain, or for every part, as these are fewer? */
KDA_INLINE bool kda_states_by_chain(const struct kda_prefill *p, int parts) {
    return p->value_heads * p->sequences <= parts;
}

KDA_INLINE int kda_place_of_part(const struct kda_spread *spread, int part) {
    int more = spread->length - spread->each * spread->parts;
    return part * spread->each + (part < more ? part : more);
}

/* Where a sequence begins in its head. */
KDA_INLINE int kda_place_of_sequence(const struct kda_prefill *p, const struct kda_spread *spread, int n) {
    return (int)kda_first_chunk(p, p->cu_seqlens.data ? kda_sequence(p, n).first : 0, n) + n * spread->gap;
}

/* The sequence that is at a place of its head, or behind which this is empty. */
KDA_INLINE int kda_sequence_at(const struct kda_prefill *p, const struct kda_spread *spread, int place) {
    int first = 0, behind = (int)p->sequences;
    if (!p->cu_seqlens.data)
        return place / (kda_chunks_of_each(p) + spread->gap);
    while (behind - first > 1) {
        int middle = (first + behind) / 2;
        if (kda_place_of_sequence(p, spread, middle) <= place)
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
    int place = stretch->head * kda_places_of_head(p, spread) + kda_place_of_sequence(p, spread, stretch->n);
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
    int all = kda_places_of_head(p, spread), begin = kda_place_of_part(spread, part);
    stretch->head = begin / all;
    stretch->n = kda_sequence_at(p, spread, begin % all);
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
