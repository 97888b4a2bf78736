/* SPDX-License-Identifier: MIT */
/* What every subcommand of flashkda shares: its exit statuses, how it reports errors, how it reads options. */
#ifndef FLASHKDA_COMMAND_H
#define FLASHKDA_COMMAND_H

#include <argp.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    STATUS_OK = 0,
    STATUS_WRONG_RESULT = 1, /* outside tolerance */
    STATUS_ERROR = 2,        /* a bad file or argument, or no memory or disk left */
    MAX_THREADS = 1024,      /* the library's own limit */
};

/* Each takes its own name ("flashkda run") as argv[0] and returns the exit status. */
int command_run(int argc, char **argv);
int command_gen(int argc, char **argv);
int command_bench(int argc, char **argv);
int command_info(int argc, char **argv);

/* Parses the arguments of a program or subcommand; prints help and leaves on --help and -h. False, after one line on
 * stderr, if they are wrong. input is what the parser finds in state->input. */
bool parse_arguments(const struct argp *argp, int argc, char **argv, unsigned flags, void *input);

/* One line on stderr, whatever bytes the text has: "flashkda run: ...". Returns STATUS_ERROR. */
__attribute__((format(printf, 2, 3))) int report_error(const char *program, const char *format, ...);

/* For argp parsers: reports what is wrong with an argument and stops the parsing. */
__attribute__((format(printf, 2, 3))) error_t argument_error(const struct argp_state *state, const char *format,
                                                             ...);

/* For argp parsers: a whole number or a finite number from lowest to highest. */
error_t parse_integer(const struct argp_state *state, const char *option, const char *text, int64_t lowest,
                      int64_t highest, int64_t *value);
error_t parse_real(const struct argp_state *state, const char *option, const char *text, double lowest,
                   double highest, double *value);

/* For argp parsers: one of a NULL-ended list of names; *index is its place. */
error_t parse_name(const struct argp_state *state, const char *option, const char *text,
                   const char *const *names, int *index);

#endif
