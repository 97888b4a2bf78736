/* SPDX-License-Identifier: MIT */
/* What may the environment ask of the CUDA backend, and what is it told otherwise? */
#include "cuda/wish.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include <cmocka.h>

static void assert_wish(const char *value, struct kda_cuda_wish expected) {
    struct kda_cuda_wish wish = {true, true, true, true, true, -1};
    if (kda_cuda_read_wish(&wish, value))
        fail_msg("%s: %s", value, flash_kda_last_error());
    assert_int_equal(wish.sm80, expected.sm80);
    assert_int_equal(wish.sm90, expected.sm90);
    assert_int_equal(wish.fused, expected.fused);
    assert_int_equal(wish.pairs, expected.pairs);
    assert_int_equal(wish.spread, expected.spread);
    assert_int_equal(wish.segments, expected.segments);
}

static void assert_refused(const char *value, const char *shown) {
    struct kda_cuda_wish wish;
    char sentence[512];
    if (kda_cuda_read_wish(&wish, value) != FLASH_KDA_ERROR_UNSUPPORTED)
        fail_msg("%s was not refused", value);
    snprintf(sentence, sizeof sentence,
             "the environment variable FLASH_KDA_CUDA is %s; expected sm80, sm90, sm90/fused, sm90/pairs, "
             "sm90/spread or, for N segments, sm90/N or sm90/pairs/N with N from 1 to 64",
             shown);
    assert_string_equal(flash_kda_last_error(), sentence);
}

static void test_nothing(void **state) {
    (void)state;
    assert_wish(NULL, (struct kda_cuda_wish){.segments = 0});
    assert_wish("", (struct kda_cuda_wish){.segments = 0});
}

static void test_levels_and_ways(void **state) {
    (void)state;
    assert_wish("sm80", (struct kda_cuda_wish){.sm80 = true});
    assert_wish("sm90", (struct kda_cuda_wish){.sm90 = true});
    assert_wish("sm90/fused", (struct kda_cuda_wish){.sm90 = true, .fused = true});
    assert_wish("sm90/pairs", (struct kda_cuda_wish){.sm90 = true, .pairs = true});
    assert_wish("sm90/spread", (struct kda_cuda_wish){.sm90 = true, .spread = true});
}

static void test_segments(void **state) {
    (void)state;
    char value[32];
    for (int count = 1; count <= 64; count++) {
        snprintf(value, sizeof value, "sm90/%d", count);
        assert_wish(value, (struct kda_cuda_wish){.sm90 = true, .segments = count});
        snprintf(value, sizeof value, "sm90/pairs/%d", count);
        assert_wish(value, (struct kda_cuda_wish){.sm90 = true, .pairs = true, .segments = count});
    }
}

static void test_refused(void **state) {
    (void)state;
    static const char *const values[] = {"sm70",
                                         "sm8",
                                         "sm800",
                                         "SM80",
                                         " sm80",
                                         "sm80 ",
                                         "sm80/",
                                         "sm80/2",
                                         "sm80/fused",
                                         "sm90x",
                                         "sm90/",
                                         "sm90//2",
                                         "sm90/x",
                                         "sm90/0",
                                         "sm90/65",
                                         "sm90/-1",
                                         "sm90/+2",
                                         "sm90/ 2",
                                         "sm90/2x",
                                         "sm90/2/",
                                         "sm90/2/2",
                                         "sm90/1e1",
                                         "sm90/pair",
                                         "sm90/pairsx",
                                         "sm90/pairs/",
                                         "sm90/pairs/0",
                                         "sm90/pairs/65",
                                         "sm90/pairs/x",
                                         "sm90/pairs/ 2",
                                         "sm90/pairs/2x",
                                         "sm90/fusedx",
                                         "sm90/fused/",
                                         "sm90/fused/2",
                                         "sm90/spread/2",
                                         "pairs",
                                         "/",
                                         "/2",
                                         "sm90/4294967297"};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        assert_refused(values[i], values[i]);
}

/* The sentence stays one, and what can be forced is still in it. */
static void test_long_values_are_cut(void **state) {
    (void)state;
    assert_refused("sm90/99999999999999999999999999999999999999", "sm90/99999999999999999999999999999999999");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nothing),
        cmocka_unit_test(test_levels_and_ways),
        cmocka_unit_test(test_segments),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_long_values_are_cut),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
