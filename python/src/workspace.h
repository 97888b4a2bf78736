/* SPDX-License-Identifier: MIT */
/* Scratch memory for one call. */
#ifndef KDA_PYTHON_WORKSPACE_H
#define KDA_PYTHON_WORKSPACE_H

#include "call.h"

struct workspace {
    void *memory;
    size_t bytes;
    void *host;                      /* to be freed */
    struct dlpack1_managed *managed; /* to be deleted */
    PyObject *array;                 /* to be dropped */
};

/* Takes what call->workspace says: an array that the caller brings, the result of a function, or, with None, malloc() in
 * host memory and the allocator of q's framework elsewhere. false: an exception is set, and nothing is held. */
bool workspace_take(struct workspace *workspace, const struct call *call, size_t bytes);

/* A little memory that each thread keeps for a call on the CPU, whose bytes go to *bytes; NULL where that cannot serve. */
void *workspace_at_hand(const struct call *call, size_t *bytes);

/* An allocator that is ordered by stream may use the memory again for what comes later on the call's stream. */
void workspace_drop(struct workspace *workspace);

#endif
