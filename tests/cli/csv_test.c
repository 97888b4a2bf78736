/* SPDX-License-Identifier: MIT */
/* What does flashkda bench --csv say of results? Every line has the head's columns. */
#include "bench.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct bench_result result_of(bool passed, int warm_repeats) {
    return (struct bench_result){.name = "H8-B2-T4-fp32, state each",
                                 .spec = {.batch = 2, .heads = 8, .key_dim = 128, .value_dim = 128},
                                 .tokens = 4,
                                 .level = "sm90",
                                 .bytes = 1000,
                                 .workspace_bytes = 64,
                                 .output_error = 0.002,
                                 .passed = passed,
                                 .timing = {1, 2, 4, 8, 16, 5},
                                 .warm = {0.125, 0.125, 0.25, 0.5, 0.5, warm_repeats}};
}

/* Passed with a warm time, without one, and wrong. */
static int make_csv(void **state) {
    const struct bench_result results[] = {result_of(true, 5), result_of(true, 0), result_of(false, 0)};
    *state = bench_csv(results, 3);
    return *state ? 0 : -1;
}

static int free_csv(void **state) {
    free(*state);
    return 0;
}

/* Copies the field at this place of a line; false: the line has no such field. */
static bool field_at(const char *line, int place, char *field, size_t size) {
    size_t length = 0;
    bool quoted = false;
    for (; *line && *line != '\n'; line++) {
        if (*line == '"') {
            quoted = !quoted;
        } else if (*line == ',' && !quoted) {
            place--;
        } else if (place == 0 && length + 1 < size) {
            field[length++] = *line;
        }
    }
    field[length] = '\0';
    return place <= 0;
}

/* The line with this number, the head's being 0. */
static const char *line_at(const char *text, int number) {
    while (number-- > 0) {
        text = strchr(text, '\n') + 1;
    }
    return text;
}

static void assert_field(const char *text, int line, const char *column, const char *expected) {
    char name[64], value[64];
    for (int place = 0; field_at(text, place, name, sizeof name); place++) {
        if (strcmp(name, column) == 0) {
            assert_true(field_at(line_at(text, line), place, value, sizeof value));
            assert_string_equal(value, expected);
            return;
        }
    }
    fail_msg("there is no column %s", column);
}

static int columns_of(const char *line) {
    char field[64];
    int count = 0;
    while (field_at(line, count, field, sizeof field)) {
        count++;
    }
    return count;
}

static void test_lines_are_whole(void **state) {
    const char *text = *state;
    int columns = columns_of(text);
    for (int line = 1; line <= 3; line++) {
        assert_int_equal(columns_of(line_at(text, line)), columns);
        assert_field(text, line, "case", "H8-B2-T4-fp32, state each");
        assert_field(text, line, "bytes", "1000");
        assert_field(text, line, "workspace_bytes", "64");
    }
    assert_string_equal(line_at(text, 4), "");
}

static void test_times_are_there_if_right(void **state) {
    assert_field(*state, 1, "median_s", "4");
    assert_field(*state, 1, "repeats", "5");
    assert_field(*state, 1, "tokens_per_s", "2");
    assert_field(*state, 3, "median_s", "");
    assert_field(*state, 3, "tokens_per_s", "");
}

static void test_warm_is_there_if_measured(void **state) {
    assert_field(*state, 1, "warm_median_s", "0.25");
    assert_field(*state, 2, "warm_median_s", "");
    assert_field(*state, 3, "warm_median_s", "");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lines_are_whole),
        cmocka_unit_test(test_times_are_there_if_right),
        cmocka_unit_test(test_warm_is_there_if_measured),
    };
    return cmocka_run_group_tests(tests, make_csv, free_csv);
}
