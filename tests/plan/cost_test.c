/* SPDX-License-Identifier: MIT */
/* When are sequences split into segments, and into how many? On a device of 132 multiprocessors, K = V = 128. */
#include "cuda/chunks.h"
#include "cuda/sm90/cost.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

enum { PROCESSORS = 132, PARTS = 2 };

static struct kda_segment_problem problem_of(int64_t chains, int64_t chunks) {
    return (struct kda_segment_problem){.chains = chains,
                                        .chunks = chunks,
                                        .may_split = true,
                                        .ctas_per_chain = PARTS,
                                        .ctas_per_identity = PARTS,
                                        .processors = PROCESSORS};
}

static int segments(int64_t chains, int64_t chunks) {
    struct kda_segment_problem problem = problem_of(chains, chunks);
    return kda_general_segments(&problem);
}

static int clusters(int64_t chains, int64_t chunks, double *microseconds) {
    struct kda_segment_problem problem = problem_of(chains, chunks);
    return kda_cluster_segments(&problem, microseconds);
}

static void test_many_chains_stay_whole(void **state) {
    (void)state;
    double time;
    for (int64_t chains = PROCESSORS / PARTS; chains < 1000; chains += 7) {
        struct kda_segment_problem problem = problem_of(chains, 256);
        assert_int_equal(segments(chains, 256), 1);
        int count = clusters(chains, 256, &time);
        if (chains == PROCESSORS / PARTS) /* a cluster each */
            assert_int_equal(count, 1);
        else if (chains <= PROCESSORS) /* the persistent schedule is taken, which splits nothing */
            assert_true(kda_persistent_cost(&problem) < time);
        else /* in whole rounds of either kernel clusters are at best as fast, as measured */
            assert_true(kda_persistent_cost(&problem) < time * 1.02);
    }
}

static void test_short_sequences_stay_whole(void **state) {
    (void)state;
    double time;
    for (int64_t chunks = 0; chunks < 12; chunks++)
        assert_int_equal(segments(1, chunks), 1);
    for (int64_t chunks = 0; chunks < 8; chunks++)
        assert_int_equal(clusters(1, chunks, &time), 1);
}

static void test_a_long_chain_uses_the_device(void **state) {
    (void)state;
    double time;
    int count = segments(1, 4096);
    assert_true(count >= 16 && count <= KDA_MAX_SEGMENTS);
    count = clusters(1, 4096, &time);
    assert_true(count >= 32 && count <= KDA_MAX_SEGMENTS);
    assert_true(time < 4096 / 10.0); /* not split, a step takes more than a microsecond */
}

/* Two segments of prepared operands need no A and gain nothing: the second waits for the first. */
static void test_never_two(void **state) {
    (void)state;
    for (int64_t chains = 1; chains < 100; chains++)
        for (int64_t chunks = 1; chunks < 3000; chunks += 37)
            assert_int_not_equal(segments(chains, chunks), 2);
}

static void test_longer_is_never_expected_faster(void **state) {
    (void)state;
    for (int64_t chains = 1; chains < 100; chains += 3) {
        double last = 0, time;
        for (int64_t chunks = 64; chunks < 100000; chunks *= 2) {
            clusters(chains, chunks, &time);
            assert_true(time > last);
            last = time;
        }
    }
}

/* Calls with FLASH_KDA_CUDA=sm90/cluster/SEGMENTS on an H200, slow gates, in microseconds. */
static const struct measured {
    int64_t chains, chunks;
    int segments;
    double time;
} measured[] = {{1, 4096, 32, 316.2}, {1, 4096, 64, 225.1}, {4, 32, 8, 38.2},     {4, 32, 11, 35.2},
                {4, 32, 16, 37.5},    {4, 1024, 8, 296.8},  {4, 1024, 16, 191.3}, {4, 1024, 32, 213.9},
                {8, 128, 4, 89.2},    {8, 128, 8, 65.0},    {8, 128, 16, 82.5},   {8, 256, 4, 156.6},
                {8, 256, 8, 102.4},   {8, 256, 16, 122.3},  {8, 2048, 4, 1074.4}, {8, 2048, 8, 642.8},
                {8, 2048, 16, 668.0}, {10, 96, 3, 89.1},    {10, 96, 4, 76.3},    {10, 96, 6, 65.4},
                {10, 96, 12, 83.5},   {12, 64, 4, 61.8},    {12, 64, 5, 58.2},    {12, 64, 8, 78.1},
                {12, 64, 11, 74.8},   {12, 128, 4, 97.7},   {12, 128, 5, 89.8},   {12, 128, 10, 106.5},
                {12, 128, 16, 125.1}, {12, 256, 2, 274.8},  {12, 256, 5, 152.8},  {12, 256, 10, 171.4},
                {12, 256, 11, 164.5}, {16, 64, 4, 63.9},    {16, 64, 8, 81.5},    {16, 256, 1, 367.3},
                {16, 256, 2, 277.5},  {16, 256, 4, 182.8},  {16, 256, 8, 198.7},  {20, 256, 1, 364.6},
                {20, 256, 3, 226.5},  {20, 256, 6, 256.9},  {24, 256, 2, 292.2},  {24, 256, 3, 390.2},
                {24, 256, 5, 295.9},  {24, 256, 8, 307.5},  {24, 256, 11, 317.4}, {32, 256, 1, 369.9},
                {32, 256, 2, 304.3},  {32, 256, 4, 349.3},  {32, 256, 6, 377.7},  {40, 256, 1, 370.5},
                {40, 256, 3, 433.8},  {40, 256, 5, 540.3},  {64, 256, 1, 373.7},  {64, 256, 2, 596.6}};
enum { MEASURED = sizeof measured / sizeof *measured };

/* What is chosen was measured, is the fastest or nearly so, and takes about as long as is expected. */
static void test_clusters_as_measured(void **state) {
    (void)state;
    for (const struct measured *i = measured; i < measured + MEASURED; i++) {
        double expected, fastest = i->time, chosen = 0;
        int count = clusters(i->chains, i->chunks, &expected);
        for (const struct measured *j = measured; j < measured + MEASURED; j++) {
            if (j->chains != i->chains || j->chunks != i->chunks)
                continue;
            fastest = j->time < fastest ? j->time : fastest;
            chosen = j->segments == count ? j->time : chosen;
        }
        assert_true(chosen > 0 && chosen <= fastest * 1.02);
        assert_true(expected > chosen * 0.93 && expected < chosen * 1.07);
    }
}

/* As measured before. */
static void test_48_chains_are_not_split(void **state) {
    (void)state;
    double time;
    assert_int_equal(clusters(48, 64, &time), 1);
}

static void test_not_where_it_may_not_split(void **state) {
    (void)state;
    double time;
    struct kda_segment_problem problem = problem_of(1, 4096);
    problem.may_split = false;
    assert_int_equal(kda_general_segments(&problem), 1);
    assert_int_equal(kda_cluster_segments(&problem, &time), 1);
}

/* Checkpoints are stored and, within segments, finished; sequences are split nevertheless. */
static void test_checkpoints_cost(void **state) {
    (void)state;
    double without, rare, with;
    struct kda_segment_problem problem = problem_of(8, 256);
    kda_cluster_segments(&problem, &without);
    problem.kept_every = 4;
    assert_true(kda_cluster_segments(&problem, &rare) > 1);
    problem.kept_every = 2;
    assert_true(kda_cluster_segments(&problem, &with) > 1);
    assert_true(without < rare && rare < with && with < without * 1.6);
    problem.kept_every = 0;
    without = kda_persistent_cost(&problem);
    problem.kept_every = 2;
    assert_true(kda_persistent_cost(&problem) > without);
}

/* As measured on an H200. */
static void test_persistent_where_there_are_many_chains(void **state) {
    (void)state;
    double otherwise;
    const struct {
        int64_t chains, chunks;
        bool packed, wins;
    } cases[] = {{96, 256, false, true},  {576, 43, true, true},  {768, 32, false, true},
                 {64, 256, false, false}, {192, 43, true, true},  {32, 256, false, false},
                 {48, 64, false, false},  {128, 64, false, true}, {2048, 2, false, true},
                 {8, 2048, false, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct kda_segment_problem problem = problem_of(cases[i].chains, cases[i].chunks);
        problem.packed = cases[i].packed;
        kda_cluster_segments(&problem, &otherwise);
        assert_int_equal(kda_persistent_cost(&problem) < otherwise, cases[i].wins);
    }
}

/* Segments of the cluster schedule: one after the other, all of a sequence, and the first one the longest. */
static void test_segments_meet(void **state) {
    (void)state;
    for (int chunks = 1; chunks < 300; chunks++)
        for (int count = 1; count <= KDA_MAX_SEGMENTS; count++) {
            int first = kda_begin_of_segment(chunks, count, 1);
            assert_int_equal(kda_begin_of_segment(chunks, count, 0), 0);
            assert_true(kda_begin_of_segment(chunks, count, count) >= chunks);
            for (int s = 1; s < count; s++) {
                int begin = kda_begin_of_segment(chunks, count, s);
                assert_in_range(kda_begin_of_segment(chunks, count, s + 1) - begin, 1, first);
            }
        }
    assert_int_equal(kda_begin_of_segment(256, 2, 1), 131);
    assert_int_equal(kda_begin_of_segment(256, 2, 2), 256);
}

/* Where ranges gain more with strong gates than probing costs with slow ones, as measured on an H200. */
static void test_stream_k_where_it_pays(void **state) {
    (void)state;
    const struct {
        int64_t chains, chunks;
        bool packed, pay;
    } cases[] = {{96, 256, false, true},  {576, 43, true, false}, {768, 32, false, false},
                 {64, 256, false, true},  {8, 256, false, true},  {1, 4096, false, true},
                 {12, 128, false, true},  {48, 64, false, true},  {4, 32, false, false},
                 {12, 64, false, true},   {16, 64, false, true},  {128, 64, false, false},
                 {1024, 8, false, false}, {2048, 2, false, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct kda_segment_problem problem = problem_of(cases[i].chains, cases[i].chunks);
        problem.packed = cases[i].packed;
        double cluster, persistent = kda_persistent_cost(&problem);
        kda_cluster_segments(&problem, &cluster);
        int ranges = kda_stream_k_ranges(&problem);
        assert_in_range(ranges, 2, PROCESSORS);
        assert_int_equal(kda_stream_k_pays(&problem, ranges, persistent < cluster ? persistent : cluster),
                         cases[i].pay);
        assert_false(kda_stream_k_pays(&problem, 0, 1e9));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_many_chains_stay_whole),
        cmocka_unit_test(test_short_sequences_stay_whole),
        cmocka_unit_test(test_a_long_chain_uses_the_device),
        cmocka_unit_test(test_never_two),
        cmocka_unit_test(test_longer_is_never_expected_faster),
        cmocka_unit_test(test_clusters_as_measured),
        cmocka_unit_test(test_48_chains_are_not_split),
        cmocka_unit_test(test_not_where_it_may_not_split),
        cmocka_unit_test(test_checkpoints_cost),
        cmocka_unit_test(test_persistent_where_there_are_many_chains),
        cmocka_unit_test(test_stream_k_where_it_pays),
        cmocka_unit_test(test_segments_meet),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
