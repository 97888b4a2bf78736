/* SPDX-License-Identifier: MIT */
/* What every subcommand of flashkda shares: how it reports errors, how it reads options. */
#include "command.h"

#include "failure.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* An argument may hold anything; a terminal gets no control characters from us. */
static void print_line(const char *program, const char *format, va_list values) {
    char text[SENTENCE_SIZE], line[SENTENCE_SIZE];
    vsnprintf(text, sizeof text, format, values);
    printable(line, sizeof line, text);
    fprintf(stderr, "%s: %s\n", program, line);
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

/* What every parser does: input is handed on. */
static error_t parse_common(int key, char *argument, /* NOLINT(readability-non-const-parameter): argp's type */
                            struct argp_state *state) {
    (void)argument;
    if (key == ARGP_KEY_INIT) {
        state->err_stream = NULL; /* getopt's own line is enough */
        state->child_inputs[0] = state->input;
    } else if (key == 'h') {
        argp_state_help(state, stdout, ARGP_HELP_STD_HELP);
    } else {
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

bool parse_arguments(const struct argp *argp, int argc, char **argv, unsigned flags, void *input) {
    static const struct argp_option help[] = {{NULL, 'h', NULL, 0, "Give this help list", -1}, {0}};
    const struct argp own = {.options = argp->options, .parser = argp->parser, .children = argp->children};
    const struct argp_child children[] = {{&own, 0, NULL, 0}, {0}};
    const struct argp all = {.options = help,
                             .parser = parse_common,
                             .args_doc = argp->args_doc,
                             .doc = argp->doc,
                             .children = children};
    return argp_parse(&all, argc, argv, flags, NULL, input) == 0;
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
