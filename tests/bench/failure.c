/* SPDX-License-Identifier: MIT */
#include "failure.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char sentence[SENTENCE_SIZE];

/* Bytes of the character that the text begins with; 0 if it is none or controls a terminal. */
static size_t character(const unsigned char *text) {
    static const uint32_t lowest[] = {0, 0x20, 0xa0, 0x800, 0x10000}; /* of so many bytes; below are controls */
    size_t length = *text < 0x80 ? 1 : *text >> 5 == 6 ? 2 : *text >> 4 == 14 ? 3 : *text >> 3 == 30 ? 4 : 0;
    uint32_t code = *text & (length == 1 ? 0x7f : 0x3f >> (length ? length - 1 : 0));
    for (size_t i = 1; i < length; i++) {
        if (text[i] >> 6 != 2)
            return 0;
        code = code << 6 | (text[i] & 0x3f);
    }
    bool good = code >= lowest[length] && code != 0x7f && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff);
    return good ? length : 0;
}

void printable(char *to, size_t size, const char *from) {
    size_t used = 0;
    while (*from) {
        size_t length = character((const unsigned char *)from), needed = length ? length : 4;
        if (used + needed >= size)
            break;
        if (length)
            memcpy(to + used, from, length);
        else
            snprintf(to + used, size - used, "\\x%02x", (unsigned char)*from);
        used += needed;
        from += length ? length : 1;
    }
    to[used] = '\0';
}

bool failed(const char *format, ...) {
    char text[SENTENCE_SIZE];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values); /* the values may hold the sentence before */
    va_end(values);
    printable(sentence, sizeof sentence, text);
    return false;
}

const char *failure(void) { return sentence; }
