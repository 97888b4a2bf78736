/* SPDX-License-Identifier: MIT */
/* What a call that fails must have said. */
#include "expect.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
/* cmocka.h wants the four above first. */
#include <cmocka.h>

#include <ctype.h>
#include <string.h>

bool mentions(const char *message, const char *word) {
    size_t length = strlen(word);
    for (const char *at = strstr(message, word); at; at = strstr(at + 1, word)) {
        bool begins = at == message || !(isalnum((unsigned char)at[-1]) || at[-1] == '_');
        bool ends = !(isalnum((unsigned char)at[length]) || at[length] == '_');
        if (begins && ends)
            return true;
    }
    return false;
}

void expect_failure(const char *entry, flash_kda_status status, flash_kda_status expected, const char *word) {
    const char *message = flash_kda_last_error();
    if (status != expected)
        fail_msg("%s: %s, expected %s (last error: %s)", entry, flash_kda_status_name(status),
                 flash_kda_status_name(expected), message);
    if (!mentions(message, word))
        fail_msg("%s: \"%s\" does not name %s", entry, message, word);
    if (!strstr(message, "expected") && !strstr(message, "which"))
        fail_msg("%s: \"%s\" does not say what was expected", entry, message);
}
