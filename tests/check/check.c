/* SPDX-License-Identifier: MIT */
/* flashkda_check: compares every operation on every level with the oracle, and times what passed. After
 * dav1d's checkasm. */
#include "check.h"

#include "call.h"

#include <argp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* What ctest counts as skipped. */
enum { EXIT_SKIPPED = 77 };

static const struct operation *const operations[] = {&prefill_operation, &decode_operation, &backward_operation,
                                                     &fold_operation, &parallel_operation};
enum { OPERATIONS = sizeof operations / sizeof *operations };

/* ---- Cases ------------------------------------------------------------------------------------- */

/* By its name, so that a case falls into the same part whatever else is chosen. */
static bool in_part(const struct check *check, const char *name) {
    struct random r = random_named(0, name);
    return random_below(&r, check->parts) == check->part;
}

bool check_wanted(const struct check *check, const char *name) {
    if ((check->filter && !strstr(name, check->filter)) || !in_part(check, name))
        return false;
    if (check->list)
        printf("%s\n", name);
    return !check->list;
}

bool check_tests_cuda(const struct check *check) {
    for (int i = 0; i < check->level_count; i++)
        if (level_backend(check->levels[i]) == FLASH_KDA_BACKEND_CUDA)
            return true;
    return false;
}

void check_report(struct check *check, bool passed, const char *level, const char *name, const char *text) {
    if (passed)
        check->passed++;
    else
        check->failed++;
    printf("%s %-10s %s: %s\n", passed ? "ok  " : "FAIL", level, name, text);
    fflush(stdout);
}

void check_leave_out(struct check *check, const char *level, const char *name, const char *why) {
    check->left_out++;
    printf("out  %-10s %s: left out, %s\n", level, name, why);
}

void append_text(char *text, size_t size, const char *format, ...) {
    size_t used = strlen(text);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + used, size - used, format, arguments);
    va_end(arguments);
}

/* ---- Command line ------------------------------------------------------------------------------ */

static const struct argp_option options[] = {
    {"seed", 's', "N", 0, "Seed of all inputs (printed; default: from the clock)", 0},
    {"op", 'o', "NAME", 0, "Only this operation", 0},
    {"level", 'l', "NAME", 0,
     "Level of the CPU backend, 'cuda', 'all' of these that run here (default), or 'reference'", 0},
    {"case", 'c', "TEXT", 0, "Only cases whose name contains TEXT", 0},
    {"part", 'p', "I/N", 0, "Only the Ith of N parts of the cases of a seed, for runs side by side", 0},
    {"long", 'L', NULL, 0, "Run the long cases (accuracy, traps over thousands of tokens), not the short", 0},
    {"quick", 'q', NULL, 0,
     "Fewer cases, and long ones with an eighth of the tokens: for emulators and sanitizers", 0},
    {"threads", 't', "N", 0, "Threads of every case, instead of its own", 0},
    {"bench", 'b', NULL, 0, "Time every case that passed", 0},
    {"list", 'n', NULL, 0, "Print the names of the cases and run none", 0},
#ifdef CHECK_CUDA
    {"bare", 'r', NULL, 0, "CUDA without guards around tensors and fill in workspaces, for compute-sanitizer",
     0},
#endif
    {0},
};

static long long number(const char *text, long long low, long long high, struct argp_state *state) {
    char *end;
    long long value = strtoll(text, &end, 10);
    if (*end || end == text || value < low || value > high)
        argp_error(state, "'%s' is not a number from %lld to %lld", text, low, high);
    return value;
}

static void parse_part(char *text, struct check *check, struct argp_state *state) {
    char *slash = strchr(text, '/');
    if (!slash) {
        argp_error(state, "'%s' is not I/N", text);
        return;
    }
    *slash = '\0';
    check->parts = (int)number(slash + 1, 1, 1024, state);
    check->part = (int)number(text, 1, check->parts, state) - 1;
}

static error_t parse(int key, char *text, struct argp_state *state) {
    struct check *check = state->input;
    switch (key) {
    case 's':
        check->seed = (uint64_t)number(text, 0, INT64_MAX, state);
        break;
    case 'o':
        check->operation = text;
        break;
    case 'l':
        if (strcmp(text, "all") != 0 && !level_exists(text))
            argp_error(state, "there is no level '%s'", text);
        check->level = text;
        break;
    case 'c':
        check->filter = text;
        break;
    case 'p':
        parse_part(text, check, state);
        break;
    case 'L':
        check->long_cases = true;
        break;
    case 'q':
        check->quick = true;
        break;
    case 't':
        check->threads = (int)number(text, 0, 1024, state);
        break;
    case 'b':
        check->bench = true;
        break;
    case 'n':
        check->list = true;
        break;
#ifdef CHECK_CUDA
    case 'r':
        call_bare();
        break;
#endif
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

/* Fills check->levels; false if this machine cannot run the level asked for. */
static bool choose_levels(struct check *check) {
    if (!strcmp(check->level, "reference")) {
        check->levels[check->level_count++] = check->level;
        return true;
    }
    bool all = !strcmp(check->level, "all");
    if ((all || !strcmp(check->level, "cuda")) && flash_kda_backend_available(FLASH_KDA_BACKEND_CUDA))
        check->levels[check->level_count++] = "cuda";
    for (const char *const *level = flash_kda_cpu_levels(); *level; level++)
        if ((all || !strcmp(check->level, *level)) && check->level_count < CHECK_MAX_LEVELS)
            check->levels[check->level_count++] = *level;
    return check->level_count > 0;
}

static bool run_operations(struct check *check) {
    bool known = false;
    for (int i = 0; i < OPERATIONS; i++)
        if (!check->operation || !strcmp(check->operation, operations[i]->name)) {
            operations[i]->run(check);
            known = true;
        }
    return known;
}

int main(int argc, char **argv) {
    const struct argp argp = {
        options, parse, NULL, "Compares libflashkda's operations with its oracle, and times them.",
        NULL,    NULL,  NULL};
    struct check check = {.seed = (uint64_t)time(NULL), .level = "all", .threads = -1, .parts = 1};
    argp_parse(&argp, argc, argv, 0, NULL, &check);
    if (!choose_levels(&check)) {
        printf("level %s: this machine or build cannot run it, skipped\n", check.level);
        return EXIT_SKIPPED;
    }
    if (!check.list)
        printf("seed %llu\n", (unsigned long long)check.seed);
    if (!run_operations(&check)) {
        fprintf(stderr, "no operation is called '%s'\n", check.operation);
        return 2;
    }
    if (check.list)
        return 0;
    if (check.left_out)
        printf("%d left out\n", check.left_out);
    printf("%d passed, %d failed\n", check.passed, check.failed);
    /* Nothing compared is no success. */
    return check.failed || !check.passed;
}
