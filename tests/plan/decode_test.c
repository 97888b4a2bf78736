/* SPDX-License-Identifier: MIT */
/* Which calls of decode does Hopper's kernel take? */
#include "cuda/sm90/kernels.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

enum { PROCESSORS = 132, SLOTS = 1000 };

static char memory[1]; /* stands for what is on the device */

/* Compact, of `rank` dimensions. */
static struct kda_tensor tensor(enum kda_dtype dtype, int rank, int64_t a, int64_t b, int64_t c, int64_t d) {
    struct kda_tensor t = {.data = memory, .dtype = dtype, .rank = rank, .shape = {a, b, c, d}};
    int64_t bytes = (int64_t)kda_dtype_size(dtype);
    for (int i = rank - 1; i >= 0; bytes *= t.shape[i--])
        t.stride[i] = bytes;
    return t;
}

static struct kda_decode usual(int64_t sequences, int64_t heads, enum kda_dtype state) {
    struct kda_tensor tokens = tensor(KDA_BF16, 4, sequences, 1, heads, 128);
    return (struct kda_decode){.tokens = {.batches = sequences,
                                          .tokens = 1,
                                          .sequences = sequences,
                                          .heads = heads,
                                          .value_heads = heads,
                                          .key_dim = 128,
                                          .value_dim = 128,
                                          .q = tokens,
                                          .k = tokens,
                                          .v = tokens,
                                          .g = tokens,
                                          .out = tokens,
                                          .beta = tensor(KDA_BF16, 3, sequences, 1, heads, 0),
                                          .A_log = tensor(KDA_F32, 1, heads, 0, 0, 0),
                                          .dt_bias = tensor(KDA_F32, 2, heads, 128, 0, 0),
                                          .state_layout = FLASH_KDA_STATE_V_FIRST},
                               .state = tensor(state, 4, SLOTS, heads, 128, 128),
                               .state_indices = tensor(KDA_I32, 1, sequences, 0, 0, 0),
                               .max_tokens = 1};
}

static bool takes(const struct kda_decode *d) { return kda_sm90_decode_takes(d, PROCESSORS); }

static void test_the_usual_call(void **state) {
    (void)state;
    const enum kda_dtype dtypes[] = {KDA_F32, KDA_BF16, KDA_F16};
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        struct kda_decode d = usual(1, 32, dtypes[i]);
        assert_true(takes(&d));
        d.state_indices = (struct kda_tensor){.data = NULL};
        assert_true(takes(&d));
        d.tokens.A_log = d.tokens.dt_bias = d.tokens.out = (struct kda_tensor){.data = NULL};
        assert_true(takes(&d));
        d.keep_state = true;
        assert_true(takes(&d));
    }
}

static void test_many_states_in_16_bits_alone(void **state) {
    (void)state;
    struct kda_decode few = usual(16, 32, KDA_F32), many = usual(17, 32, KDA_F32),
                      half = usual(256, 96, KDA_BF16);
    assert_true(takes(&few));
    assert_false(takes(&many));
    assert_true(takes(&half));
}

/* Each differs from the usual call in one thing. */
static void test_what_the_portable_level_has(void **state) {
    (void)state;
    const struct kda_decode usual_call = usual(2, 8, KDA_F32);
    struct kda_decode d = usual_call;
    assert_true(takes(&d));
    d.max_tokens = d.tokens.tokens = 4;
    assert_false(takes(&d));
    d = usual_call;
    d.tokens.batch_invariant = true;
    assert_false(takes(&d));
    d = usual_call;
    d.tokens.state_layout = FLASH_KDA_STATE_K_FIRST;
    assert_false(takes(&d));
    d = usual_call;
    d.state.stride[2] *= 2; /* room between columns of V */
    assert_false(takes(&d));
    d = usual_call;
    d.tokens.value_dim = 64;
    assert_false(takes(&d));
    d = usual_call;
    d.tokens.key_dim = 64;
    assert_false(takes(&d));
    d = usual_call;
    d.tokens.cu_seqlens = tensor(KDA_I32, 1, 3, 0, 0, 0);
    assert_false(takes(&d));
    d = usual_call;
    d.accepted = tensor(KDA_I32, 1, 2, 0, 0, 0);
    assert_false(takes(&d));
    d = usual_call;
    d.state_indices = tensor(KDA_I32, 2, 2, 1, 0, 0);
    assert_false(takes(&d));
    d = usual_call;
    d.tokens.g.dtype = KDA_F32;
    assert_false(takes(&d));
    d = usual_call;
    d.tokens.A_log.dtype = KDA_BF16;
    assert_false(takes(&d));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_usual_call),
        cmocka_unit_test(test_many_states_in_16_bits_alone),
        cmocka_unit_test(test_what_the_portable_level_has),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
