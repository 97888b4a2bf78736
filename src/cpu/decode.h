/* SPDX-License-Identifier: MIT */
/* Decode on the CPU: what its driver (decode.c) and the kernels of each level (decode_tmpl.h) share. */
#ifndef KDA_CPU_DECODE_H
#define KDA_CPU_DECODE_H

#include "api/decode_problem.h"

enum {
    KDA_PART = 64
}; /* values of a part, but for a head's last: rows of the state that a thread takes at least */

/* Values first .. first + count - 1 of a head of sequence n: columns of S, which never meet. */
struct kda_part {
    int64_t sequence, head;
    struct kda_sequence tokens;
    int64_t first, count;
};

struct kda_decode_kernels {
    /* Bytes of scratch that a thread needs for this call; a multiple of 64. */
    size_t (*scratch)(const struct kda_decode *d);
    /* Takes a part of the state through all tokens of its sequence. scratch is aligned to 64. */
    void (*run)(const struct kda_decode *d, const struct kda_part *part, void *scratch);
};

#endif
