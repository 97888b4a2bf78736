/* SPDX-License-Identifier: MIT */
/* A case fed to decode token by token, as a served model would. */
#ifndef FLASHKDA_FEED_H
#define FLASHKDA_FEED_H

#include "call.h"

/* Sets the call's states to those that it starts from, then takes them through every token of c by decode; dense sequences
 * go side by side, packed ones one after the other. Does not wait for the device. */
flash_kda_status feed_tokens(const struct prefill_call *call, const struct kda_case *c);

/* What runs it, as flash_kda_decode_describe() says. */
flash_kda_status feed_describe(const struct prefill_call *call, const struct kda_case *c, char *text,
                               size_t size);

#endif
