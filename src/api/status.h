/* SPDX-License-Identifier: MIT */
/* How a function of the library fails: a status, and a sentence for a person kept for its thread. */
#ifndef KDA_API_STATUS_H
#define KDA_API_STATUS_H

#include "flash_kda.h"

/* Keeps the formatted sentence as flash_kda_last_error() of this thread and returns status. */
__attribute__((format(printf, 2, 3))) flash_kda_status kda_fail(flash_kda_status status, const char *format,
                                                                ...);

#endif
