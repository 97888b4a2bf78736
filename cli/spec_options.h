/* SPDX-License-Identifier: MIT */
/* The options that describe a random case, shared by gen and bench. */
#ifndef FLASHKDA_SPEC_OPTIONS_H
#define FLASHKDA_SPEC_OPTIONS_H

#include "command.h"
#include "generate.h"

struct spec_options {
    struct case_spec spec;
    bool given;                  /* at least one of the options was there */
    bool said_by_file;           /* one of them was that a file of captured inputs leaves no choice in */
    bool tokens, lower_bound, g; /* which of these were there */
};

/* What no option changes. */
extern const struct case_spec default_spec;

/* An argp child whose input is a struct spec_options. */
extern const struct argp spec_argp;

#endif
