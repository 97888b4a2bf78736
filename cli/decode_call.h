/* SPDX-License-Identifier: MIT */
/* One call of decode on a case, whose states lie in a pool, to be run as often as wanted. */
#ifndef FLASHKDA_DECODE_CALL_H
#define FLASHKDA_DECODE_CALL_H

#include "case.h"

/* What becomes of the states: written back after the last token, left as they are, or written after each token to a slot of
 * its own. */
enum decode_way { DECODE_IN_PLACE, DECODE_STATE_KEPT, DECODE_STATE_EACH };

/* Their names, ended by NULL; the index is the value. */
extern const char *const decode_way_names[];

/* Holds struct tensor: not to be copied or moved. */
struct decode_call {
    flash_kda_decode_args args;
    struct tensor out;   /* [B, T, HV, V] */
    struct tensor state; /* [B slots, HV, V, K], as many slots for each sequence as it writes states, or 1 */
    struct tensor state_indices;  /* [B] or [B, T] */
    struct device_copies *copies; /* of all tensors, where the call runs; NULL: in host memory */
    enum decode_way way;
};

/* Allocates everything, on the CUDA backend with copies on the device; the states start as c's initial ones, in their dtype.
 * The case must be dense, have an initial state and outlive the call. On failure returns false, leaves nothing to free
 * and writes one sentence to error. */
bool decode_prepare(struct decode_call *call, const struct kda_case *c, enum decode_way way,
                    flash_kda_backend backend, int32_t threads, char *error, size_t error_size);

/* Launches it. On failure returns false and writes one sentence to error. */
bool decode_launch(const struct decode_call *call, void *stream, char *error, size_t error_size);

/* Waits for it and brings out and state to host memory. */
bool decode_fetch(const struct decode_call *call, char *error, size_t error_size);

/* Bytes that it must move: every tensor of tokens once, every state once for each time it is read or written. */
int64_t decode_bytes(const struct decode_call *call);

void decode_free(struct decode_call *call);

#endif
