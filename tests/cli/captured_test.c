/* SPDX-License-Identifier: MIT */
/* Does a case made of a file hold the file's tokens and heads, again and again? */
#include "captured.h"
#include "case_file.h"
#include "failure.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { TOKENS = 5, HEADS = 3, MADE_TOKENS = 13, MADE_HEADS = 7, KEY_DIM = 8, VALUE_DIM = 4 };

static const char path[] = "captured_test.safetensors";

static const struct case_spec source = {.batch = 1,
                                        .tokens = TOKENS,
                                        .heads = HEADS,
                                        .key_dim = KEY_DIM,
                                        .value_dim = VALUE_DIM,
                                        .dtype = {kDLBfloat, 16, 1},
                                        .gate = FLASH_KDA_GATE_SIGMOID,
                                        .lower_bound = -3,
                                        .regime = REGIME_STRONG,
                                        .seed = 7};

/* Writes the case of a spec to the file that all tests read; the case is the caller's. */
static void write_case(struct kda_case *c, const struct case_spec *spec) {
    assert_true(case_generate(c, spec));
    assert_true(case_file_write(path, c));
}

/* [count, MADE_HEADS, row] repeats [from_count, HEADS, row]. */
static void assert_repeats(const struct tensor *made, const struct tensor *from, int64_t row) {
    int64_t from_count = tensor_count(from) / (HEADS * row);
    for (int64_t i = 0, count = tensor_count(made); i < count; i++) {
        int64_t token = i / row / MADE_HEADS % from_count, head = i / row % MADE_HEADS % HEADS;
        assert_true(tensor_get(made, i) == tensor_get(from, (token * HEADS + head) * row + i % row));
    }
}

static void test_repeats_tokens_and_heads(void **state) {
    struct kda_case from, made;
    struct case_spec spec = {.batch = 2,
                             .tokens = MADE_TOKENS,
                             .heads = MADE_HEADS,
                             .initial_state = true,
                             .dtype = {kDLFloat, 32, 1},
                             .captured = path};
    (void)state;
    write_case(&from, &source);
    assert_true(captured_describe(&spec));
    assert_int_equal(spec.regime, REGIME_CAPTURED);
    assert_int_equal(spec.gate, FLASH_KDA_GATE_SIGMOID);
    assert_true(spec.lower_bound == -3);
    assert_true(type_equal(spec.dtype, TYPE_BF16));
    assert_true(captured_generate(&made, &spec));
    assert_int_equal(tensor_count(&made.q), 2 * MADE_TOKENS * MADE_HEADS * KEY_DIM);
    assert_int_equal(tensor_count(&made.v), 2 * MADE_TOKENS * MADE_HEADS * VALUE_DIM);
    assert_repeats(&made.A_log, &from.A_log, 1);
    assert_repeats(&made.dt_bias, &from.dt_bias, KEY_DIM);
    /* The tokens of all sequences count on. */
    assert_repeats(&made.q, &from.q, KEY_DIM);
    assert_repeats(&made.k, &from.k, KEY_DIM);
    assert_repeats(&made.v, &from.v, VALUE_DIM);
    assert_repeats(&made.g, &from.g, KEY_DIM);
    assert_repeats(&made.beta, &from.beta, 1);
    assert_true(tensor_get(&made.initial_state, 0) != 0);
    case_free(&made);
    case_free(&from);
    remove(path);
}

static void test_refuses_what_it_cannot_repeat(void **state) {
    struct kda_case from;
    struct case_spec grouped = source, spec = {.batch = 1, .tokens = 1, .heads = 1, .captured = path};
    (void)state;
    grouped.value_heads = 2 * HEADS;
    write_case(&from, &grouped);
    case_free(&from);
    assert_false(captured_describe(&spec));
    assert_non_null(strstr(failure(), "expected one sequence with as many value heads as heads"));
    remove(path);
    assert_false(captured_describe(&spec));
    assert_non_null(strstr(failure(), path));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_repeats_tokens_and_heads),
        cmocka_unit_test(test_refuses_what_it_cannot_repeat),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
