/* SPDX-License-Identifier: MIT */
/* Which backwards Hopper's kernels take, and how they are planned. */
#include "cuda/sm90/backward/plan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

enum { PROCESSORS = 132, DIM = 128 };

static _Alignas(16) char memory[16]; /* stands for what is on the device */

/* Compact, of `rank` dimensions. */
static struct kda_tensor tensor(enum kda_dtype dtype, int rank, int64_t a, int64_t b, int64_t c, int64_t d) {
    struct kda_tensor t = {.data = memory, .dtype = dtype, .rank = rank, .shape = {a, b, c, d}};
    int64_t bytes = (int64_t)kda_dtype_size(dtype);
    for (int i = rank - 1; i >= 0; bytes *= t.shape[i--])
        t.stride[i] = bytes;
    return t;
}

/* What a model is trained with. */
static struct kda_backward usual(int64_t tokens, int64_t heads, int64_t value_heads) {
    struct kda_tensor q = tensor(KDA_BF16, 4, 1, tokens, heads, DIM),
                      v = tensor(KDA_BF16, 4, 1, tokens, value_heads, DIM);
    struct kda_tensor beta = tensor(KDA_BF16, 3, 1, tokens, value_heads, 0);
    return (struct kda_backward){.forward = {.batches = 1,
                                             .tokens = tokens,
                                             .sequences = 1,
                                             .heads = heads,
                                             .value_heads = value_heads,
                                             .key_dim = DIM,
                                             .value_dim = DIM,
                                             .q = q,
                                             .k = q,
                                             .v = v,
                                             .g = v,
                                             .beta = beta,
                                             .gate = FLASH_KDA_GATE_SIGMOID,
                                             .beta_mode = FLASH_KDA_BETA_SIGMOID,
                                             .scale = 0.1f,
                                             .qk_norm = true,
                                             .checkpoints = tensor(KDA_BF16, 4, 1, 1, 1, 1),
                                             .checkpoint_every = 128},
                                 .d_out = v,
                                 .dq = q,
                                 .dk = q,
                                 .dv = v,
                                 .dg = v,
                                 .dbeta = beta,
                                 .dA_log = tensor(KDA_F32, 1, value_heads, 0, 0, 0)};
}

static void test_takes(void **state) {
    (void)state;
    struct kda_backward b = usual(8192, 32, 32);
    assert_true(kda_sm90_backward_takes(&b));
    b.forward.gate = FLASH_KDA_GATE_SOFTPLUS;
    b.forward.beta_mode = FLASH_KDA_BETA_GIVEN;
    b.forward.checkpoint_every = 32;
    b.dA_log.data = NULL;
    assert_true(kda_sm90_backward_takes(&b));
    b = usual(128, 4, 16);
    b.forward.checkpoints.data = NULL; /* one segment starts from the first state */
    assert_true(kda_sm90_backward_takes(&b));
}

static void test_leaves(void **state) {
    (void)state;
    struct kda_backward b = usual(8192, 32, 32), other = b;
    other.forward.checkpoints.data = NULL;
    assert_false(kda_sm90_backward_takes(&other));
    other = b, other.forward.checkpoint_every = 96;
    assert_false(kda_sm90_backward_takes(&other));
    other = b, other.forward.gate = FLASH_KDA_GATE_NONE;
    assert_false(kda_sm90_backward_takes(&other));
    other = b, other.dk.data = NULL;
    assert_false(kda_sm90_backward_takes(&other));
    other = b, other.dg.dtype = KDA_F32;
    assert_false(kda_sm90_backward_takes(&other));
    other = b, other.d_out.stride[1] += 2;
    assert_false(kda_sm90_backward_takes(&other));
    other = b, other.forward.value_dim = 64;
    assert_false(kda_sm90_backward_takes(&other));
}

static void expect(const struct kda_backward *b, int count, const char *const *names,
                   const unsigned (*grids)[2]) {
    struct kda_backward_plan plan = kda_backward_plan_begin(b, "sm90", PROCESSORS, true);
    kda_sm90_backward_plan(b, &plan);
    assert_int_equal(plan.count, count);
    for (int i = 0; i < count; i++) {
        struct kda_backward_launch launch = kda_sm90_backward_launch_at(b, &plan, i);
        assert_string_equal(launch.name, names[i]);
        assert_int_equal(launch.grid[0], grids[i][0]);
        assert_int_equal(launch.grid[1], grids[i][1]);
    }
}

static void test_launches(void **state) {
    (void)state;
    static const char *const all[] = {"backward_prepare", "backward_adjoint", "backward_gradients",
                                      "backward_sums", "backward_heads"};
    static const char *const few[] = {"backward_prepare", "backward_adjoint", "backward_gradients",
                                      "backward_heads"};
    const unsigned grids[][2] = {{64, 32}, {32, 2}, {64 * 32, 1}, {32, 1}};
    const unsigned few_heads[][2] = {{256, 8}, {8, 2}, {64 * 8, 1}, {8, 1}}; /* a CTA prepares a chunk */
    const unsigned shared[][2] = {{64, 32}, {32, 2}, {64 * 32, 1}, {32, 1}, {256, 8}};
    const unsigned without_sums[][2] = {{64, 32}, {32, 2}, {64 * 32, 1}, {256, 8}};
    struct kda_backward b = usual(8192, 32, 32);
    expect(&b, 4, all, grids);
    b = usual(8192, 8, 8);
    expect(&b, 4, all, few_heads);
    b = usual(8192, 8, 32);
    expect(&b, 5, all, shared);
    b.dA_log.data = NULL;
    expect(&b, 4, few, without_sums);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_takes), cmocka_unit_test(test_leaves),
                                       cmocka_unit_test(test_launches)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
