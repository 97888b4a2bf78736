/* SPDX-License-Identifier: MIT */
/* What may the environment ask of the CUDA backend, and what is it told otherwise? */
#include "cuda/override.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include <cmocka.h>

static void assert_asks(const char *value, const char *level, enum kda_schedule schedule, int segments,
                        bool stream_k) {
    struct kda_override asked = {"none", KDA_SCHEDULE_CLUSTER, -1, true};
    if (kda_read_override(&asked, value))
        fail_msg("%s: %s", value, flash_kda_last_error());
    if (level)
        assert_string_equal(asked.level, level);
    else
        assert_null(asked.level);
    assert_int_equal(asked.schedule, schedule);
    assert_int_equal(asked.segments, segments);
    assert_int_equal(asked.stream_k, stream_k);
}

static void assert_refused(const char *value, const char *shown) {
    struct kda_override asked;
    char sentence[512];
    if (kda_read_override(&asked, value) != FLASH_KDA_ERROR_UNSUPPORTED)
        fail_msg("%s was not refused", value);
    snprintf(
        sentence, sizeof sentence,
        "the environment variable FLASH_KDA_CUDA is %s; expected sm80, sm90, sm90/general, sm90/persistent, "
        "sm90/cluster, sm90/stream_k, sm90/stream_k+persistent or sm90/stream_k+cluster; /N after general or "
        "cluster asks for N segments, N from 1 to 64",
        shown);
    assert_string_equal(flash_kda_last_error(), sentence);
}

static void test_nothing(void **state) {
    (void)state;
    assert_asks(NULL, NULL, KDA_SCHEDULE_ANY, 0, false);
    assert_asks("", NULL, KDA_SCHEDULE_ANY, 0, false);
}

static void test_levels_and_schedules(void **state) {
    (void)state;
    assert_asks("sm80", "sm80", KDA_SCHEDULE_ANY, 0, false);
    assert_asks("sm90", "sm90", KDA_SCHEDULE_ANY, 0, false);
    assert_asks("sm90/general", "sm90", KDA_SCHEDULE_GENERAL, 0, false);
    assert_asks("sm90/persistent", "sm90", KDA_SCHEDULE_PERSISTENT, 0, false);
    assert_asks("sm90/cluster", "sm90", KDA_SCHEDULE_CLUSTER, 0, false);
    assert_asks("sm90/stream_k", "sm90", KDA_SCHEDULE_ANY, 0, true);
    assert_asks("sm90/stream_k+persistent", "sm90", KDA_SCHEDULE_PERSISTENT, 0, true);
    assert_asks("sm90/stream_k+cluster", "sm90", KDA_SCHEDULE_CLUSTER, 0, true);
    assert_asks("sm90/stream_k+cluster/7", "sm90", KDA_SCHEDULE_CLUSTER, 7, true);
}

static void test_names_of_version_0_1(void **state) {
    (void)state;
    assert_asks("sm90/5", "sm90", KDA_SCHEDULE_GENERAL, 5, false);
    assert_asks("sm90/fused", "sm90", KDA_SCHEDULE_PERSISTENT, 0, false);
    assert_asks("sm90/pairs", "sm90", KDA_SCHEDULE_CLUSTER, 0, false);
    assert_asks("sm90/pairs/3", "sm90", KDA_SCHEDULE_CLUSTER, 3, false);
    assert_asks("sm90/spread", "sm90", KDA_SCHEDULE_ANY, 0, true);
}

static void test_segments(void **state) {
    (void)state;
    char value[32];
    for (int count = 1; count <= 64; count++) {
        snprintf(value, sizeof value, "sm90/general/%d", count);
        assert_asks(value, "sm90", KDA_SCHEDULE_GENERAL, count, false);
        snprintf(value, sizeof value, "sm90/cluster/%d", count);
        assert_asks(value, "sm90", KDA_SCHEDULE_CLUSTER, count, false);
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
                                         "sm80/persistent",
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
                                         "sm90/clusters",
                                         "sm90/clusterx",
                                         "sm90/cluster/",
                                         "sm90/cluster/0",
                                         "sm90/cluster/65",
                                         "sm90/cluster/x",
                                         "sm90/cluster/ 2",
                                         "sm90/cluster/2x",
                                         "sm90/persistentx",
                                         "sm90/persistent/",
                                         "sm90/persistent/2",
                                         "sm90/stream_k/2",
                                         "sm90/stream_k+",
                                         "sm90/stream_k+2",
                                         "sm90/stream_k+general",
                                         "sm90/stream_k+general/2",
                                         "sm90/cluster+stream_k",
                                         "cluster",
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
        cmocka_unit_test(test_levels_and_schedules),
        cmocka_unit_test(test_names_of_version_0_1),
        cmocka_unit_test(test_segments),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_long_values_are_cut),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
