/* SPDX-License-Identifier: MIT */
/* How a function of the library fails: a status, and a sentence for a person kept for its thread. */
#ifndef KDA_API_STATUS_H
#define KDA_API_STATUS_H

#include "flash_kda.h"

/* Keeps the formatted sentence as flash_kda_last_error() of this thread. */
__attribute__((format(printf, 1, 2))) void kda_explain(const char *format, ...);

/* The status, after its sentence is kept. A macro, so that who reads the call sees that it is not FLASH_KDA_OK. */
#define kda_fail(status, ...) (kda_explain(__VA_ARGS__), (status))

#endif
