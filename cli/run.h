/* SPDX-License-Identifier: MIT */
/* What flashkda run found, for run.c to fill and run_report.c to print. */
#ifndef FLASHKDA_RUN_H
#define FLASHKDA_RUN_H

#include "check.h"
#include "gate_stats.h"
#include "timing.h"

#include <stdio.h>

struct run_check {
    const char *what, *against;
    struct comparison comparison;
};

struct run_report {
    const char *path, *out_path; /* out_path: NULL if nothing was written */
    const struct kda_case *problem;
    char ran_on[256];
    DLDataType out_dtype;
    struct head_decay *heads; /* [value_heads] */
    int64_t gate_tokens;      /* that heads was taken from */
    struct timing timing;
    double tokens_per_second;
    int64_t non_finite; /* elements of the output and the final state */
    struct run_check checks[8];
    int check_count; /* 0: not checked */
    bool passed;     /* every check, and nothing that is not finite */
};

void run_report_text(const struct run_report *report, FILE *stream);

/* One JSON object. False if out of memory. */
bool run_report_json(const struct run_report *report);

#endif
