/* SPDX-License-Identifier: MIT */
/* One test for every error that decode promises: the status, a message that names the argument, and not a byte written. */
#include "expect.h"
#include "faults.h"
#include "fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- A valid call ------------------------------------------------------------------------------ */

/* X(place in the enum, member of the arguments) */
/* clang-format off */
#define TENSOR_LIST(X) \
    X(Q, q) X(K, k) X(V, v) X(G, g) X(BETA, beta) X(A_LOG, A_log) X(DT_BIAS, dt_bias) X(OUT, out) \
    X(CU_SEQLENS, cu_seqlens) X(ACCEPTED, accepted) X(STATE, state) X(STATE_INDICES, state_indices) \
    X(NUM_ACCEPTED, num_accepted_tokens) X(Q_CONV_WEIGHT, q_conv_weight) X(Q_CONV_BIAS, q_conv_bias) \
    X(Q_CONV_STATE, q_conv_state) X(K_CONV_WEIGHT, k_conv_weight) X(K_CONV_BIAS, k_conv_bias) \
    X(K_CONV_STATE, k_conv_state) X(V_CONV_WEIGHT, v_conv_weight) X(V_CONV_BIAS, v_conv_bias) \
    X(V_CONV_STATE, v_conv_state) X(NORM_WEIGHT, norm_weight) X(NORM_GATE, norm_gate) \
    X(HAS_INITIAL_STATE, has_initial_state)
/* clang-format on */

#define PLACE(place, member) place,
#define NAME(place, member)  #member,
enum decode_argument { TENSOR_LIST(PLACE) TENSORS };
static const char *const names[TENSORS] = {TENSOR_LIST(NAME)};

/* Three sequences of 2, 0 and 3 tokens, verified with three slots each; one is padding. */
enum { N = 3, T = 5, C = 3, SLOTS = 9, H = 2, HV = 4, DIM_K = 8, DIM_V = 4 };

struct call {
    flash_kda_decode_args args;
    struct fixture_tensor tensor[TENSORS];
};

static const DLTensor **member(flash_kda_decode_args *a, enum decode_argument argument) {
#define MEMBER(place, member) &a->member,
    const DLTensor **const members[TENSORS] = {TENSOR_LIST(MEMBER)};
    return members[argument];
}

static void set_tensor(struct call *c, enum decode_argument argument, int ndim, const int64_t *shape) {
    struct fixture_tensor *t = &c->tensor[argument];
    bool index = argument == CU_SEQLENS || argument == ACCEPTED || argument == STATE_INDICES ||
                 argument == NUM_ACCEPTED || argument == HAS_INITIAL_STATE;
    memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
    t->dl = (DLTensor){.data = t->memory.bytes,
                       .device = {kDLCPU, 0},
                       .ndim = ndim,
                       .dtype = {index ? kDLInt : kDLFloat, 32, 1},
                       .shape = t->shape};
    for (int i = 0; i < FIXTURE_BYTES / 4; i++)
        t->memory.fp32[i] = (float)(i * 7 % 13 - 6) / 8;
    *member(&c->args, argument) = &t->dl;
}

static struct call *call_new(void) {
    static const int32_t cu_seqlens[] = {0, 2, 2, 5}, slots[] = {4, 0, 2, -1, 7, 1, 3, 8, -1},
                         read[] = {3, 1, 2}, accepted[] = {1, 0, 3}, has[] = {1, 1, 0};
    struct call *c = calloc(1, sizeof *c);
    assert_non_null(c);
    c->args = (flash_kda_decode_args)FLASH_KDA_DECODE_ARGS_INIT;
    c->args.gate = FLASH_KDA_GATE_SIGMOID;
    c->args.lower_bound = -5;
    c->args.beta_mode = FLASH_KDA_BETA_SIGMOID;
    c->args.flags = FLASH_KDA_QK_NORM;
    set_tensor(c, Q, 4, (int64_t[]){1, T, H, DIM_K});
    set_tensor(c, K, 4, (int64_t[]){1, T, H, DIM_K});
    set_tensor(c, V, 4, (int64_t[]){1, T, HV, DIM_V});
    set_tensor(c, G, 4, (int64_t[]){1, T, HV, DIM_K});
    set_tensor(c, BETA, 3, (int64_t[]){1, T, HV});
    set_tensor(c, A_LOG, 1, (int64_t[]){HV});
    set_tensor(c, DT_BIAS, 2, (int64_t[]){HV, DIM_K});
    set_tensor(c, OUT, 4, (int64_t[]){1, T, HV, DIM_V});
    set_tensor(c, CU_SEQLENS, 1, (int64_t[]){N + 1});
    set_tensor(c, ACCEPTED, 1, (int64_t[]){N});
    set_tensor(c, STATE, 4, (int64_t[]){SLOTS, HV, DIM_V, DIM_K});
    set_tensor(c, STATE_INDICES, 2, (int64_t[]){N, C});
    set_tensor(c, NUM_ACCEPTED, 1, (int64_t[]){N});
    set_tensor(c, Q_CONV_WEIGHT, 2, (int64_t[]){H * DIM_K, 4});
    set_tensor(c, Q_CONV_BIAS, 1, (int64_t[]){H * DIM_K});
    set_tensor(c, Q_CONV_STATE, 3, (int64_t[]){SLOTS, H * DIM_K, 3});
    set_tensor(c, K_CONV_WEIGHT, 2, (int64_t[]){H * DIM_K, 4});
    set_tensor(c, K_CONV_BIAS, 1, (int64_t[]){H * DIM_K});
    set_tensor(c, K_CONV_STATE, 3, (int64_t[]){SLOTS, H * DIM_K, 3});
    set_tensor(c, V_CONV_WEIGHT, 2, (int64_t[]){HV * DIM_V, 4});
    set_tensor(c, V_CONV_BIAS, 1, (int64_t[]){HV * DIM_V});
    set_tensor(c, V_CONV_STATE, 3, (int64_t[]){SLOTS, HV * DIM_V, 3});
    set_tensor(c, NORM_WEIGHT, 1, (int64_t[]){DIM_V});
    set_tensor(c, NORM_GATE, 4, (int64_t[]){1, T, HV, DIM_V});
    c->args.norm_eps = 1e-5;
    memcpy(c->tensor[CU_SEQLENS].memory.int32, cu_seqlens, sizeof cu_seqlens);
    memcpy(c->tensor[ACCEPTED].memory.int32, accepted, sizeof accepted);
    memcpy(c->tensor[STATE_INDICES].memory.int32, slots, sizeof slots);
    memcpy(c->tensor[NUM_ACCEPTED].memory.int32, read, sizeof read);
    set_tensor(c, HAS_INITIAL_STATE, 1, (int64_t[]){N});
    memcpy(c->tensor[HAS_INITIAL_STATE].memory.int32, has, sizeof has);
    return c;
}

static void set_slots(struct call *c, int64_t slots) {
    c->tensor[STATE].shape[0] = c->tensor[Q_CONV_STATE].shape[0] = c->tensor[K_CONV_STATE].shape[0] =
        c->tensor[V_CONV_STATE].shape[0] = slots;
}

/* Five sequences of one token, each in the slot of its number. */
static void make_dense(struct call *c) {
    static const enum decode_argument by_token[] = {Q, K, V, G, BETA, OUT, NORM_GATE};
    c->args.cu_seqlens = c->args.accepted = c->args.state_indices = c->args.num_accepted_tokens =
        c->args.has_initial_state = NULL;
    for (size_t i = 0; i < sizeof by_token / sizeof *by_token; i++) {
        c->tensor[by_token[i]].shape[0] = T;
        c->tensor[by_token[i]].shape[1] = 1;
    }
    set_slots(c, T);
}

/* ---- What every error must do ------------------------------------------------------------------- */

static bool same_memory(const struct call *a, const struct call *b) {
    for (int i = 0; i < TENSORS; i++)
        if (memcmp(a->tensor[i].memory.bytes, b->tensor[i].memory.bytes, FIXTURE_BYTES) != 0)
            return false;
    return true;
}

/* A call that fails leaves a message that names no tensor. */
static void forget_message(void) {
    flash_kda_decode(NULL);
    assert_true(mentions(flash_kda_last_error(), "args"));
}

static void expect_error(struct call *c, flash_kda_status expected, const char *word) {
    struct call *before = malloc(sizeof *before);
    char text[64] = "untouched";
    assert_non_null(before);
    memcpy(before, c, sizeof *before);
    forget_message();
    expect_failure("decode", flash_kda_decode(&c->args), expected, word);
    forget_message();
    expect_failure("describe", flash_kda_decode_describe(&c->args, text, sizeof text), expected, word);
    assert_string_equal(text, "untouched");
    if (!same_memory(before, c))
        fail_msg("a call that failed wrote to a tensor");
    free(before);
}

/* ---- Faults of one tensor ------------------------------------------------------------------------ */

static const struct fault faults[] = {
    {"rank too high", rank_too_high, 0},
    {"rank zero", rank_zero, 0},
    {"no shape", shape_missing, 0},
    {"no data", data_missing, 0},
    {"last dimension wrong", last_dim_wrong, BIT(Q) | BIT(V) | BIT(CU_SEQLENS) | BIT(STATE_INDICES)},
    {"first dimension wrong", first_dim_wrong, BIT(Q) | BIT(V) | BIT(CU_SEQLENS) | BIT(STATE)},
    {"negative dimension", dim_negative, 0},
    {"negative stride", stride_negative, 0},
    {"elements share memory", elements_shared,
     ~(BIT(OUT) | BIT(STATE) | BIT(Q_CONV_STATE) | BIT(K_CONV_STATE) | BIT(V_CONV_STATE))},
    {"uint8", dtype_uint8, 0},
    {"fp64", dtype_fp64, 0},
    {"misaligned", misaligned, 0},
    {"on another device", elsewhere, BIT(Q)},
};
enum { FAULTS = sizeof faults / sizeof *faults };

static void test_tensor_fault(void **state) {
    const struct fault_case *t = *state;
    struct call *c = call_new();
    t->fault->apply(&c->tensor[t->argument]);
    expect_error(c, FLASH_KDA_ERROR_INVALID_ARGUMENT, names[t->argument]);
    free(c);
}

/* ---- All others ---------------------------------------------------------------------------------- */

static void q_null(struct call *c) { c->args.q = NULL; }
static void k_null(struct call *c) { c->args.k = NULL; }
static void v_null(struct call *c) { c->args.v = NULL; }
static void g_null(struct call *c) { c->args.g = NULL; }
static void beta_null(struct call *c) { c->args.beta = NULL; }
static void state_null(struct call *c) { c->args.state = NULL; }
static void struct_size_zero(struct call *c) { c->args.struct_size = 0; }
static void struct_size_large(struct call *c) { c->args.struct_size++; }
static void gate_unknown(struct call *c) { c->args.gate = (flash_kda_gate)3; }
static void beta_mode_unknown(struct call *c) { c->args.beta_mode = (flash_kda_beta)3; }
static void layout_unknown(struct call *c) { c->args.state_layout = (flash_kda_state_layout)2; }
static void flags_unknown(struct call *c) { c->args.flags = 16; }
static void backend_unknown(struct call *c) { c->args.backend = (flash_kda_backend)9; }
static void threads_negative(struct call *c) { c->args.num_threads = -1; }
static void scale_nan(struct call *c) { c->args.scale = (double)NAN; }
static void lower_bound_zero(struct call *c) { c->args.lower_bound = 0; }
static void A_log_without_gate(struct call *c) { c->args.gate = FLASH_KDA_GATE_NONE; }
static void K_too_large(struct call *c) { c->tensor[Q].shape[3] = 257; }
static void HV_no_multiple(struct call *c) { c->tensor[V].shape[2] = 3; }
static void max_tokens_negative(struct call *c) { c->args.max_tokens = -1; }
static void max_tokens_huge(struct call *c) { c->args.max_tokens = 17; }
static void max_tokens_exceeded(struct call *c) { c->args.max_tokens = 2; }
static void max_tokens_without_cu_seqlens(struct call *c) {
    make_dense(c);
    c->args.max_tokens = 1;
}
static void too_many_tokens(struct call *c) {
    static const enum decode_argument by_token[] = {Q, K, V, G, BETA, OUT, NORM_GATE};
    make_dense(c);
    for (size_t i = 0; i < sizeof by_token / sizeof *by_token; i++) {
        c->tensor[by_token[i]].shape[0] = 1;
        c->tensor[by_token[i]].shape[1] = 17;
    }
    set_slots(c, 1);
}
static void cu_seqlens_falls(struct call *c) { c->tensor[CU_SEQLENS].memory.int32[2] = 1; }
static void cu_seqlens_overruns(struct call *c) { c->tensor[CU_SEQLENS].memory.int32[3] = 6; }
static void batch_of_two(struct call *c) {
    static const enum decode_argument by_token[] = {Q, K, V, G, BETA, OUT, NORM_GATE};
    for (size_t i = 0; i < sizeof by_token / sizeof *by_token; i++)
        c->tensor[by_token[i]].shape[0] = 2;
}
static void slot_too_large(struct call *c) { c->tensor[STATE_INDICES].memory.int32[1] = SLOTS; }
static void slot_too_low(struct call *c) { c->tensor[STATE_INDICES].memory.int32[1] = -2; }
static void slot_of_padding_too_large(struct call *c) { c->tensor[STATE_INDICES].memory.int32[5] = SLOTS; }
static void slot_twice(struct call *c) { c->tensor[STATE_INDICES].memory.int32[7] = 4; }
static void slot_twice_in_one_sequence(struct call *c) { c->tensor[STATE_INDICES].memory.int32[1] = 4; }
static void set_padding(struct call *c, int64_t slot) {
    c->args.flags |= FLASH_KDA_PADDING_SLOT;
    c->args.padding_slot = slot;
}
static void padding_without_flag(struct call *c) { c->args.padding_slot = 1; }
static void padding_negative(struct call *c) { set_padding(c, -2); }
static void padding_without_indices(struct call *c) {
    make_dense(c);
    set_padding(c, 0);
}
static void slot_twice_beside_padding(struct call *c) {
    set_padding(c, 0);
    slot_twice(c);
}
static void out_over_has_initial_state(struct call *c) {
    c->tensor[OUT].dl.data = c->tensor[HAS_INITIAL_STATE].memory.bytes;
}
static void columns_too_few(struct call *c) {
    fixture_spell_strides(&c->tensor[STATE_INDICES]);
    c->tensor[STATE_INDICES].shape[1] = 2;
    c->tensor[NUM_ACCEPTED].memory.int32[0] = 1;
}
static void columns_none(struct call *c) { c->tensor[STATE_INDICES].shape[1] = 0; }
static void num_accepted_zero(struct call *c) { c->tensor[NUM_ACCEPTED].memory.int32[0] = 0; }
static void num_accepted_too_large(struct call *c) {
    c->tensor[STATE_INDICES].memory.int32[8] = 5;
    c->tensor[NUM_ACCEPTED].memory.int32[2] = C + 1;
}
static void num_accepted_without_columns(struct call *c) { c->tensor[STATE_INDICES].dl.ndim = 1; }
static void num_accepted_without_slots(struct call *c) { c->args.state_indices = NULL; }
static void accepted_negative(struct call *c) { c->tensor[ACCEPTED].memory.int32[0] = -1; }
static void accepted_too_large(struct call *c) { c->tensor[ACCEPTED].memory.int32[2] = 4; }
static void pool_without_indices(struct call *c) {
    make_dense(c);
    c->tensor[STATE].shape[0] = T + 1;
}
static void nothing_to_write(struct call *c) {
    c->args.out = NULL;
    c->args.flags |= FLASH_KDA_KEEP_STATE;
}

/* Lays one tensor over another. */
static void overlay(struct call *c, enum decode_argument written, enum decode_argument other) {
    c->tensor[written].dl.data = c->tensor[other].memory.bytes;
}
static void out_over_q(struct call *c) { overlay(c, OUT, Q); }
static void out_over_v(struct call *c) { overlay(c, OUT, V); }
static void out_over_A_log(struct call *c) { overlay(c, OUT, A_LOG); }
static void out_over_state(struct call *c) { overlay(c, OUT, STATE); }
static void out_over_state_indices(struct call *c) { overlay(c, OUT, STATE_INDICES); }
static void state_over_k(struct call *c) { overlay(c, STATE, K); }
static void state_over_cu_seqlens(struct call *c) { overlay(c, STATE, CU_SEQLENS); }
static void state_over_accepted(struct call *c) { overlay(c, STATE, ACCEPTED); }
static void state_over_num_accepted(struct call *c) { overlay(c, STATE, NUM_ACCEPTED); }

static void q_conv_without_state(struct call *c) { c->args.q_conv_state = NULL; }
static void k_conv_without_weight(struct call *c) { c->args.k_conv_weight = NULL; }
static void v_conv_state_alone(struct call *c) { c->args.v_conv_weight = c->args.v_conv_bias = NULL; }
static void norm_gate_alone(struct call *c) { c->args.norm_weight = NULL; }
static void norm_activation_unknown(struct call *c) { c->args.norm_activation = (flash_kda_norm_activation)2; }
static void norm_eps_zero(struct call *c) { c->args.norm_eps = 0; }
static void norm_eps_nan(struct call *c) { c->args.norm_eps = (double)NAN; }
static void norm_of_wide_rows(struct call *c) {
    c->args.v_conv_weight = c->args.v_conv_bias = c->args.v_conv_state = NULL;
    c->tensor[V].shape[3] = c->tensor[OUT].shape[3] = c->tensor[STATE].shape[2] =
        c->tensor[NORM_WEIGHT].shape[0] = c->tensor[NORM_GATE].shape[3] = 1025;
}
static void q_conv_state_over_state(struct call *c) { overlay(c, Q_CONV_STATE, STATE); }
static void v_conv_state_over_v(struct call *c) { overlay(c, V_CONV_STATE, V); }
static void out_over_norm_gate(struct call *c) { overlay(c, OUT, NORM_GATE); }

static void all_on_cuda(struct call *c) {
    for (int i = 0; i < TENSORS; i++)
        c->tensor[i].dl.device.device_type = kDLCUDA;
    c->args.backend = FLASH_KDA_BACKEND_CPU;
}

static struct argument_case {
    const char *name;
    void (*apply)(struct call *c);
    flash_kda_status status;
    const char *word;
} cases[] = {
#define INVALID(apply, word) \
    { #apply, apply, FLASH_KDA_ERROR_INVALID_ARGUMENT, word }
    INVALID(q_null, "q"),
    INVALID(k_null, "k"),
    INVALID(v_null, "v"),
    INVALID(g_null, "g"),
    INVALID(beta_null, "beta"),
    INVALID(state_null, "state"),
    INVALID(struct_size_zero, "struct_size"),
    INVALID(struct_size_large, "struct_size"),
    INVALID(gate_unknown, "gate"),
    INVALID(beta_mode_unknown, "beta_mode"),
    INVALID(layout_unknown, "state_layout"),
    INVALID(flags_unknown, "flags"),
    INVALID(backend_unknown, "backend"),
    INVALID(threads_negative, "num_threads"),
    INVALID(scale_nan, "scale"),
    INVALID(lower_bound_zero, "lower_bound"),
    INVALID(A_log_without_gate, "A_log"),
    INVALID(K_too_large, "q"),
    INVALID(HV_no_multiple, "v"),
    INVALID(max_tokens_negative, "max_tokens"),
    INVALID(max_tokens_huge, "max_tokens"),
    INVALID(max_tokens_exceeded, "max_tokens"),
    INVALID(max_tokens_without_cu_seqlens, "max_tokens"),
    INVALID(too_many_tokens, "q"),
    INVALID(cu_seqlens_falls, "cu_seqlens"),
    INVALID(cu_seqlens_overruns, "cu_seqlens"),
    INVALID(batch_of_two, "cu_seqlens"),
    INVALID(slot_too_large, "state_indices"),
    INVALID(slot_too_low, "state_indices"),
    INVALID(slot_of_padding_too_large, "state_indices"),
    INVALID(slot_twice, "state_indices"),
    INVALID(slot_twice_beside_padding, "state_indices"),
    INVALID(padding_without_flag, "padding_slot"),
    INVALID(padding_negative, "padding_slot"),
    INVALID(padding_without_indices, "padding_slot"),
    INVALID(out_over_has_initial_state, "has_initial_state"),
    INVALID(slot_twice_in_one_sequence, "state_indices"),
    INVALID(columns_too_few, "state_indices"),
    INVALID(columns_none, "state_indices"),
    INVALID(num_accepted_zero, "num_accepted_tokens"),
    INVALID(num_accepted_too_large, "num_accepted_tokens"),
    INVALID(num_accepted_without_columns, "num_accepted_tokens"),
    INVALID(num_accepted_without_slots, "num_accepted_tokens"),
    INVALID(accepted_negative, "accepted"),
    INVALID(accepted_too_large, "accepted"),
    INVALID(pool_without_indices, "state"),
    INVALID(nothing_to_write, "out"),
    INVALID(out_over_q, "out"),
    INVALID(out_over_v, "out"),
    INVALID(out_over_A_log, "out"),
    INVALID(out_over_state, "out"),
    INVALID(out_over_state_indices, "out"),
    INVALID(state_over_k, "state"),
    INVALID(state_over_cu_seqlens, "state"),
    INVALID(state_over_accepted, "state"),
    INVALID(state_over_num_accepted, "state"),
    INVALID(q_conv_without_state, "q_conv_state"),
    INVALID(k_conv_without_weight, "k_conv_bias"),
    INVALID(v_conv_state_alone, "v_conv_state"),
    INVALID(norm_gate_alone, "norm_gate"),
    INVALID(norm_activation_unknown, "norm_activation"),
    INVALID(norm_eps_zero, "norm_eps"),
    INVALID(norm_eps_nan, "norm_eps"),
    INVALID(norm_of_wide_rows, "v"),
    INVALID(q_conv_state_over_state, "state"),
    INVALID(v_conv_state_over_v, "v_conv_state"),
    INVALID(out_over_norm_gate, "out"),
    {"all_on_cuda", all_on_cuda, FLASH_KDA_ERROR_UNSUPPORTED, "q"},
};
enum { CASES = sizeof cases / sizeof *cases };

static void test_argument(void **state) {
    const struct argument_case *a = *state;
    struct call *c = call_new();
    a->apply(c);
    expect_error(c, a->status, a->word);
    free(c);
}

/* ---- Calls that must succeed ---------------------------------------------------------------------- */

static void expect_success(struct call *c, bool writes) {
    struct call *before = malloc(sizeof *before);
    assert_non_null(before);
    memcpy(before, c, sizeof *before);
    if (flash_kda_decode(&c->args))
        fail_msg("%s", flash_kda_last_error());
    assert_int_equal(same_memory(before, c), !writes);
    free(before);
    free(c);
}

static void test_valid(void **state) {
    (void)state;
    expect_success(call_new(), true);
}

static void test_valid_dense(void **state) {
    (void)state;
    struct call *c = call_new();
    make_dense(c);
    expect_success(c, true);
}

/* Nothing of a padding row is looked at, whatever its other indices hold. */
static void test_padding_holds_anything(void **state) {
    (void)state;
    struct call *c = call_new();
    c->tensor[NUM_ACCEPTED].memory.int32[1] = -100; /* kept within the columns: the first, which is -1 */
    c->tensor[ACCEPTED].memory.int32[1] = 99;
    expect_success(c, true);
}

/* A padding slot may stand anywhere, and need be none of the pool. */
static void test_padding_slot(void **state) {
    (void)state;
    static const int32_t slots[] = {0, SLOTS, INT32_MAX};
    for (size_t i = 0; i < sizeof slots / sizeof *slots; i++) {
        struct call *c = call_new();
        set_padding(c, slots[i]);
        c->tensor[STATE_INDICES].memory.int32[1] = c->tensor[STATE_INDICES].memory.int32[3] =
            c->tensor[STATE_INDICES].memory.int32[7] = slots[i];
        expect_success(c, true);
    }
}

/* Drafts of several branches may read one state that nothing writes. */
static void test_kept_state_is_shared(void **state) {
    (void)state;
    struct call *c = call_new();
    for (int i = 0; i < N * C; i++)
        c->tensor[STATE_INDICES].memory.int32[i] = 4;
    c->args.flags |= FLASH_KDA_KEEP_STATE;
    unsigned char kept[FIXTURE_BYTES];
    memcpy(kept, c->tensor[STATE].memory.bytes, sizeof kept);
    if (flash_kda_decode(&c->args))
        fail_msg("%s", flash_kda_last_error());
    assert_memory_equal(kept, c->tensor[STATE].memory.bytes, sizeof kept);
    free(c);
}

/* Slots far apart are told apart, and the same ones found, in a pool of any size. */
static void test_large_pool(void **state) {
    (void)state;
    struct call *c = call_new();
    enum { MANY = 200000 };
    c->args.q_conv_weight = c->args.q_conv_bias = c->args.q_conv_state = NULL;
    c->args.k_conv_weight = c->args.k_conv_bias = c->args.k_conv_state = NULL;
    c->args.v_conv_weight = c->args.v_conv_bias = c->args.v_conv_state = NULL;
    float *pool = calloc((size_t)MANY * HV * DIM_V * DIM_K, sizeof *pool);
    assert_non_null(pool);
    c->tensor[STATE].dl.data = pool;
    c->tensor[STATE].shape[0] = MANY;
    c->tensor[STATE_INDICES].memory.int32[0] = 65536;
    c->tensor[STATE_INDICES].memory.int32[1] = 0;
    c->tensor[STATE_INDICES].memory.int32[6] = MANY - 1;
    assert_int_equal(flash_kda_decode(&c->args), FLASH_KDA_OK);
    c->tensor[STATE_INDICES].memory.int32[1] = MANY - 1;
    expect_failure("decode", flash_kda_decode(&c->args), FLASH_KDA_ERROR_INVALID_ARGUMENT, "state_indices");
    free(pool);
    free(c);
}

/* Gives a tensor strides, in elements, and a place in a buffer. */
static void lay(struct call *c, enum decode_argument argument, float *place, const int64_t *strides) {
    struct fixture_tensor *t = &c->tensor[argument];
    memcpy(t->strides, strides, (size_t)t->dl.ndim * sizeof *strides);
    t->dl.strides = t->strides;
    t->dl.data = place;
}

/* One page a slot: the state, then the convolutions' [3, channels], those of q, k and v beside each other. */
enum { MATRICES = HV * DIM_V * DIM_K, KEYS = H * DIM_K, CHANNELS = 2 * KEYS + HV * DIM_V };
enum { PAGE = MATRICES + 3 * CHANNELS + 5 };

static float *lay_in_pages(struct call *c, int64_t overlap) {
    float *pages = calloc((size_t)SLOTS * PAGE, sizeof *pages), *inputs = pages + MATRICES;
    assert_non_null(pages);
    lay(c, STATE, pages, (int64_t[]){PAGE, DIM_V * DIM_K, DIM_K, 1});
    lay(c, Q_CONV_STATE, inputs, (int64_t[]){PAGE, 1, CHANNELS});
    lay(c, K_CONV_STATE, inputs + KEYS, (int64_t[]){PAGE, 1, CHANNELS});
    lay(c, V_CONV_STATE, inputs + (ptrdiff_t)(2 * KEYS - overlap), (int64_t[]){PAGE, 1, CHANNELS});
    return pages;
}

static void test_states_in_pages(void **state) {
    (void)state;
    struct call *c = call_new(), *apart = call_new();
    assert_int_equal(flash_kda_decode(&apart->args), FLASH_KDA_OK);
    for (int64_t overlap = 0; overlap < 2; overlap++) {
        float *pages = lay_in_pages(c, overlap);
        if (overlap)
            expect_failure("decode", flash_kda_decode(&c->args), FLASH_KDA_ERROR_INVALID_ARGUMENT,
                           "k_conv_state");
        else if (flash_kda_decode(&c->args))
            fail_msg("%s", flash_kda_last_error());
        free(pages);
    }
    free(apart);
    free(c);
}

static void test_no_tokens(void **state) {
    (void)state;
    static const enum decode_argument by_token[] = {Q, K, V, G, BETA, OUT, NORM_GATE};
    struct call *c = call_new();
    make_dense(c);
    for (size_t i = 0; i < sizeof by_token / sizeof *by_token; i++)
        c->tensor[by_token[i]].shape[1] = 0;
    expect_success(c, false);
}

static void test_describe(void **state) {
    (void)state;
    struct call *c = call_new();
    char text[200];
    assert_int_equal(flash_kda_decode_describe(&c->args, text, sizeof text), FLASH_KDA_OK);
    assert_non_null(strstr(text, "cpu: level"));
    c->args.backend = FLASH_KDA_BACKEND_REFERENCE;
    assert_int_equal(flash_kda_decode_describe(&c->args, text, sizeof text), FLASH_KDA_OK);
    assert_non_null(strstr(text, "reference"));
    assert_int_equal(flash_kda_decode_describe(&c->args, NULL, 8), FLASH_KDA_ERROR_INVALID_ARGUMENT);
    assert_int_equal(flash_kda_decode_describe(&c->args, text, 0), FLASH_KDA_ERROR_INVALID_ARGUMENT);
    assert_int_equal(flash_kda_decode_describe(NULL, text, sizeof text), FLASH_KDA_ERROR_INVALID_ARGUMENT);
    free(c);
}

static void test_level_unknown(void **state) {
    (void)state;
    struct call *c = call_new();
    setenv("FLASH_KDA_CPU", "sse9", 1);
    expect_error(c, FLASH_KDA_ERROR_UNSUPPORTED, "FLASH_KDA_CPU");
    unsetenv("FLASH_KDA_CPU");
    free(c);
}

/* ---- Running them all ------------------------------------------------------------------------------ */

int main(void) {
    enum { PLAIN = 10 };
    static struct CMUnitTest tests[FAULTS * TENSORS + CASES + PLAIN];
    static struct fault_case fault_cases[FAULTS * TENSORS];
    size_t count = list_fault_cases(tests, fault_cases, test_tensor_fault, faults, FAULTS, names, TENSORS);
    for (int i = 0; i < CASES; i++)
        tests[count++] =
            (struct CMUnitTest){.name = cases[i].name, .test_func = test_argument, .initial_state = &cases[i]};
    const struct CMUnitTest plain[PLAIN] = {cmocka_unit_test(test_valid),
                                            cmocka_unit_test(test_valid_dense),
                                            cmocka_unit_test(test_padding_holds_anything),
                                            cmocka_unit_test(test_padding_slot),
                                            cmocka_unit_test(test_kept_state_is_shared),
                                            cmocka_unit_test(test_large_pool),
                                            cmocka_unit_test(test_states_in_pages),
                                            cmocka_unit_test(test_no_tokens),
                                            cmocka_unit_test(test_describe),
                                            cmocka_unit_test(test_level_unknown)};
    memcpy(tests + count, plain, sizeof plain);
    count += PLAIN;
    return _cmocka_run_group_tests("decode errors", tests, count, NULL, NULL);
}
