/* SPDX-License-Identifier: MIT */
/* What a call that fails must have said. */
#ifndef API_EXPECT_H
#define API_EXPECT_H

#include "flash_kda.h"

#include <stdbool.h>

/* Whether a message has `word` as a whole word, so that "q" is not found in "required". */
bool mentions(const char *message, const char *word);

/* Fails the test unless this status was expected and the last error names `word` and says what was expected of it. */
void expect_failure(const char *entry, flash_kda_status status, flash_kda_status expected, const char *word);

#endif
