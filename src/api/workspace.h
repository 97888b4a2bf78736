/* SPDX-License-Identifier: MIT */
/* A workspace handed out piece by piece. A layout is one function that takes pieces from an arena: on memory it places
 * them, without it says how many bytes they need. */
#ifndef KDA_API_WORKSPACE_H
#define KDA_API_WORKSPACE_H

#include <stddef.h>

/* Callers align workspaces to this. */
enum { KDA_WORKSPACE_ALIGNMENT = 64 };

struct kda_arena {
    char *memory; /* NULL: only count */
    size_t used;  /* bytes */
};

/* Room for `count` elements of `size` bytes; NULL while counting. Pieces begin far enough apart that a GPU never fetches two
 * at once. */
static inline void *kda_take(struct kda_arena *arena, size_t count, size_t size) {
    enum { STEP = 256 };
    void *piece = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += (count * size + STEP - 1) / STEP * STEP;
    return piece;
}

#endif
