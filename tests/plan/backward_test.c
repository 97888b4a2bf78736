/* SPDX-License-Identifier: MIT */
/* How the portable level plans backward: segments and their numbers, slabs, launches, memory. */
#include "cuda/sm80/backward_plan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

enum { PROCESSORS = 132, KERNELS = KDA_SM80_BACKWARD_SUMS + 1 };

static char memory[1]; /* stands for what is on the device */
static const struct kda_tensor given = {.data = memory, .dtype = KDA_BF16};

static struct kda_backward problem(int64_t sequences, int64_t tokens, int64_t heads) {
    return (struct kda_backward){.forward = {.batches = sequences,
                                             .tokens = tokens,
                                             .sequences = sequences,
                                             .heads = heads,
                                             .value_heads = heads,
                                             .key_dim = 128,
                                             .value_dim = 128},
                                 .d_out = given,
                                 .dq = given,
                                 .dv = given,
                                 .dA_log = given};
}

static struct kda_backward_plan plan_on(const struct kda_backward *b, bool overlaps) {
    struct kda_backward_plan plan = kda_backward_plan_begin(b, "sm80", PROCESSORS, overlaps);
    kda_sm80_backward_plan(b, &plan);
    return plan;
}

static struct kda_backward_plan plan_of(const struct kda_backward *b) { return plan_on(b, false); }

/* Counts launches by kernel and looks at each one. */
static void count_launches(const struct kda_backward *b, const struct kda_backward_plan *plan, int *counts) {
    memset(counts, 0, KERNELS * sizeof *counts);
    for (int i = 0; i < plan->count; i++) {
        struct kda_backward_launch launch = kda_sm80_backward_launch_at(b, plan, i);
        assert_in_range(launch.kernel, 0, KERNELS - 1);
        assert_true(launch.grid[0] > 0 && launch.grid[1] > 0);
        assert_true(launch.slab == 0 || launch.slab < plan->slabs);
        assert_int_equal(launch.overlaps, plan->overlaps && i > 0 && launch.kernel != KDA_SM80_BACKWARD_SUMS);
        counts[launch.kernel]++;
    }
}

/* Every slab is prepared before its chains run and these before its gradients; slabs go back. Where launches overlap,
 * gradients stand behind the chains of the next slab. */
static void expect_order(const struct kda_backward *b, const struct kda_backward_plan *plan) {
    int64_t prepared = -1, chained = -1, next = plan->slabs - 1, next_states = 0, next_gradients = next;
    for (int i = 0; i < plan->count; i++) {
        struct kda_backward_launch launch = kda_sm80_backward_launch_at(b, plan, i);
        switch (launch.kernel) {
        case KDA_SM80_BACKWARD_PREPARE:
            prepared = launch.slab;
            break;
        case KDA_SM80_BACKWARD_STATES:
            assert_int_equal(launch.slab, next_states++);
            assert_int_equal(launch.slab, prepared);
            break;
        case KDA_SM80_BACKWARD_CHAINS:
            assert_int_equal(launch.slab, next--);
            assert_int_equal(launch.slab, prepared);
            chained = launch.slab;
            break;
        case KDA_SM80_BACKWARD_GRADIENTS:
            assert_int_equal(launch.slab, next_gradients--);
            assert_int_equal(chained, plan->overlaps && launch.slab > 0 ? launch.slab - 1 : launch.slab);
            break;
        default:
            assert_int_equal(i, plan->count - 1);
        }
    }
    assert_int_equal(next, -1);
    assert_int_equal(next_states, plan->finds_states ? plan->slabs : 0);
}

static void expect_launches(const struct kda_backward *b, const struct kda_backward_plan *plan, int prepare,
                            int states, int chains, int gradients, int sums) {
    const int expected[KERNELS] = {prepare, states, chains, gradients, sums};
    int counts[KERNELS];
    count_launches(b, plan, counts);
    for (int i = 0; i < KERNELS; i++)
        assert_int_equal(counts[i], expected[i]);
    expect_order(b, plan);
}

static void test_long_sequence(void **state) {
    (void)state;
    struct kda_backward b = problem(1, 8192, 32);
    struct kda_backward_plan found = plan_of(&b);
    assert_int_equal(found.segment, 128);
    assert_int_equal(found.segments, 64);
    assert_int_equal(found.slabs, 8);
    expect_launches(&b, &found, 15, 8, 8, 8, 1);
    b.forward.checkpoints = given;
    b.forward.checkpoint_every = 128;
    struct kda_backward_plan kept = plan_of(&b);
    expect_launches(&b, &kept, 8, 0, 8, 8, 1);
    /* The states that are kept elsewhere: 64 of 32 heads, and two carried in fp32 instead of four. */
    assert_int_equal(found.workspace - kept.workspace, (64 * 2 + 2 * 4) * 32 * 128 * 128);
    assert_true(kept.workspace < (size_t)140 << 20);
    struct kda_backward_plan beside = plan_on(&b, true);
    expect_launches(&b, &beside, 8, 0, 8, 8, 1);
    assert_true(beside.workspace < (size_t)310 << 20);
    b.forward.checkpoints.data = NULL;
    beside = plan_on(&b, true);
    expect_launches(&b, &beside, 15, 8, 8, 8, 1);
    b = problem(1, 200, 2); /* one slab has nothing beside it */
    beside = plan_on(&b, true);
    expect_launches(&b, &beside, 1, 1, 1, 1, 1);
    assert_int_equal(beside.workspace, plan_of(&b).workspace);
}

/* Memory beside the kept states and the sums does not grow with tokens. */
static void test_memory(void **state) {
    (void)state;
    struct kda_backward b = problem(1, 8192, 8), longer = problem(1, 1 << 20, 8);
    b.dA_log = longer.dA_log = (struct kda_tensor){.data = NULL};
    b.forward.checkpoints = longer.forward.checkpoints = given;
    b.forward.checkpoint_every = longer.forward.checkpoint_every = 64;
    assert_int_equal(plan_of(&b).workspace, plan_of(&longer).workspace);
}

static void test_intervals(void **state) {
    (void)state;
    static const struct {
        int64_t every, segment;
        bool finds;
    } cases[] = {{32, 128, false},  {64, 128, false},  {96, 96, false},
                 {128, 128, false}, {512, 512, false}, {544, 128, true}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct kda_backward b = problem(1, 4096, 4);
        b.forward.checkpoints = given;
        b.forward.checkpoint_every = cases[i].every;
        struct kda_backward_plan plan = plan_of(&b);
        assert_int_equal(plan.segment, cases[i].segment);
        assert_int_equal(plan.finds_states, cases[i].finds);
    }
}

static void test_what_is_asked_for(void **state) {
    (void)state;
    struct kda_backward b = problem(4, 300, 4);
    b.dq = b.dA_log = (struct kda_tensor){.data = NULL};
    struct kda_backward_plan plan = plan_of(&b);
    expect_launches(&b, &plan, 1, 0, 1, 0, 0); /* values alone: no state */
    b.dv = (struct kda_tensor){.data = NULL};
    assert_int_equal(plan_of(&b).count, 0);
    assert_int_equal(plan_of(&b).workspace, 0);
}

static void test_short_sequences(void **state) {
    (void)state;
    struct kda_backward b = problem(64, 33, 2);
    struct kda_backward_plan plan = plan_of(&b);
    assert_int_equal(plan.segment, 64);
    assert_int_equal(plan.segments, 64);
    assert_false(plan.finds_states);
    b = problem(3, 0, 2); /* states are passed on */
    plan = plan_of(&b);
    assert_int_equal(plan.segments, 3);
    expect_launches(&b, &plan, 1, 0, 1, 1, 1);
    b = problem(0, 100, 2); /* sums of nothing */
    plan = plan_of(&b);
    expect_launches(&b, &plan, 0, 0, 0, 0, 1);
}

/* Of a packed batch: sequences do not share numbers, and each is found by its numbers. */
static void test_numbers(void **state) {
    (void)state;
    enum { N = 7, SEGMENT = 128 };
    int32_t starts[N + 1] = {0, 1, 1, 257, 257, 384, 385, 640};
    struct kda_tokens x = {.tokens = 640, .sequences = N};
    int64_t next = 0;
    x.cu_seqlens = (struct kda_tensor){
        .data = (char *)starts, .dtype = KDA_I32, .rank = 1, .shape = {N + 1}, .stride = {sizeof *starts}};
    for (int n = 0; n < N; n++) {
        struct kda_sequence s = kda_tokens_of(&x, n);
        int64_t first = kda_first_segment(&x, SEGMENT, s.first, n), count = kda_segments_of(s.length, SEGMENT);
        assert_true(first >= next);
        for (next = first; next < first + count; next++)
            assert_int_equal(kda_sequence_of_segment(&x, SEGMENT, next), n);
    }
    assert_true(next <= kda_first_segment(&x, SEGMENT, x.tokens, N));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_long_sequence),   cmocka_unit_test(test_memory),
        cmocka_unit_test(test_intervals),       cmocka_unit_test(test_what_is_asked_for),
        cmocka_unit_test(test_short_sequences), cmocka_unit_test(test_numbers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
