/* SPDX-License-Identifier: MIT */
/* What every subcommand of flashkda shares: how it reports errors, how it reads options. */
#include "command.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Text out of a file may hold anything; a terminal gets no control characters from us. */
static void print_line(const char *program, const char *format, va_list values) {
    char text[MESSAGE_SIZE];
    vsnprintf(text, sizeof text, format, values);
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f)
            *c = '?';
    fprintf(stderr, "%s: %s\n", program, text);
}

int report_error(const char *program, const char *format, ...) {
    va_list values;
    va_start(values, format);
    print_line(program, format, values);
    va_end(values);
    return STATUS_ERROR;
}

error_t argument_error(const struct argp_state *state, const char *format, ...) {
    va_list values;
    va_start(values, format);
    print_line(state->name, format, values);
    va_end(values);
    return EINVAL;
}

bool parse_arguments(const struct argp *argp, int argc, char **argv, unsigned flags, void *input) {
    return argp_parse(argp, argc, argv, flags, NULL, input) == 0;
}

error_t parse_integer(const struct argp_state *state, const char *option, const char *text, int64_t lowest,
                      int64_t highest, int64_t *value) {
    char *end = NULL;
    errno = 0;
    *value = strtoll(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || *value < lowest || *value > highest) {
        return argument_error(state, "--%s is '%s', expected a whole number from %lld to %lld", option, text,
                              (long long)lowest, (long long)highest);
    }
    return 0;
}

error_t parse_real(const struct argp_state *state, const char *option, const char *text, double lowest,
                   double highest, double *value) {
    char *end = NULL;
    *value = strtod(text, &end);
    if (end == text || *end != '\0' || !(*value >= lowest && *value <= highest)) {
        return argument_error(state, "--%s is '%s', expected a number from %g to %g", option, text, lowest,
                              highest);
    }
    return 0;
}

error_t parse_name(const struct argp_state *state, const char *option, const char *text,
                   const char *const *names, int *index) {
    char list[128] = "";
    for (*index = 0; names[*index]; ++*index) {
        if (strcmp(names[*index], text) == 0)
            return 0;
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, "%s%s", used ? ", " : "", names[*index]);
    }
    return argument_error(state, "--%s is '%s', expected one of: %s", option, text, list);
}
