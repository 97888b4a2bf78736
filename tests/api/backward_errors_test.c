/* SPDX-License-Identifier: MIT */
/* One test for every error that backward promises: the status, a message that names the argument, and not a byte
 * written. */
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
    X(Q, q) X(K, k) X(V, v) X(G, g) X(BETA, beta) X(A_LOG, A_log) X(DT_BIAS, dt_bias) \
    X(CU_SEQLENS, cu_seqlens) X(INITIAL_STATE, initial_state) X(CHECKPOINTS, checkpoints) \
    X(CHECKPOINT_CU_STARTS, checkpoint_cu_starts) X(D_OUT, d_out) X(D_FINAL_STATE, d_final_state) \
    X(DQ, dq) X(DK, dk) X(DV, dv) X(DG, dg) X(DBETA, dbeta) X(DA_LOG, dA_log) \
    X(D_DT_BIAS, d_dt_bias) X(D_INITIAL_STATE, d_initial_state)
/* clang-format on */

#define PLACE(place, member) place,
#define NAME(place, member)  #member,
enum backward_argument { TENSOR_LIST(PLACE) TENSORS };
static const char *const names[TENSORS] = {TENSOR_LIST(NAME)};

/* Two sequences of 40 and 0 tokens, and one of 33; two rows and one of checkpoints every 32 tokens, whose last ones
 * are left out. */
enum { N = 3, T = 73, H = 1, HV = 2, DIM_K = 8, DIM_V = 4, ROWS = 2, BYTES = FIXTURE_BYTES };

struct call {
    flash_kda_backward_args args;
    struct fixture_tensor tensor[TENSORS];
    void *workspace;
    size_t workspace_bytes;
    unsigned char workspace_memory[FIXTURE_WORKSPACE];
};

static const DLTensor **member(flash_kda_backward_args *a, enum backward_argument argument) {
#define MEMBER(place, member) &a->member,
    const DLTensor **const members[TENSORS] = {TENSOR_LIST(MEMBER)};
    return members[argument];
}

static void set_tensor(struct call *c, enum backward_argument argument, int ndim, const int64_t *shape) {
    struct fixture_tensor *t = &c->tensor[argument];
    bool index = argument == CU_SEQLENS || argument == CHECKPOINT_CU_STARTS;
    memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
    t->dl = (DLTensor){.data = t->memory.bytes,
                       .device = {kDLCPU, 0},
                       .ndim = ndim,
                       .dtype = {index ? kDLInt : kDLFloat, 32, 1},
                       .shape = t->shape};
    for (int i = 0; i < BYTES / 4; i++)
        t->memory.fp32[i] = (float)(i * 7 % 13 - 6) / 8;
    *member(&c->args, argument) = &t->dl;
}

static struct call *call_new(void) {
    static const int32_t cu_seqlens[] = {0, 40, 40, T}, starts[] = {0, 1, 1, ROWS};
    struct call *c = calloc(1, sizeof *c);
    assert_non_null(c);
    c->args = (flash_kda_backward_args)FLASH_KDA_BACKWARD_ARGS_INIT;
    c->args.gate = FLASH_KDA_GATE_SIGMOID;
    c->args.lower_bound = -5;
    c->args.beta_mode = FLASH_KDA_BETA_SIGMOID;
    c->args.flags = FLASH_KDA_QK_NORM;
    c->args.checkpoint_every = 32;
    const int64_t keys[] = {1, T, H, DIM_K}, values[] = {1, T, HV, DIM_V}, gates[] = {1, T, HV, DIM_K};
    const int64_t states[] = {N, HV, DIM_V, DIM_K}, rows[] = {ROWS, HV, DIM_V, DIM_K}, boundaries[] = {N + 1};
    static const enum backward_argument like_q[] = {Q, K, DQ, DK}, like_v[] = {V, D_OUT, DV},
                                        like_g[] = {G, DG};
    static const enum backward_argument like_states[] = {INITIAL_STATE, D_FINAL_STATE, D_INITIAL_STATE};
    for (int i = 0; i < 4; i++)
        set_tensor(c, like_q[i], 4, keys);
    for (int i = 0; i < 3; i++)
        set_tensor(c, like_v[i], 4, values);
    for (int i = 0; i < 2; i++)
        set_tensor(c, like_g[i], 4, gates);
    for (int i = 0; i < 3; i++)
        set_tensor(c, like_states[i], 4, states);
    set_tensor(c, BETA, 3, gates);
    set_tensor(c, DBETA, 3, gates);
    set_tensor(c, A_LOG, 1, gates + 2);
    set_tensor(c, DA_LOG, 1, gates + 2);
    set_tensor(c, DT_BIAS, 2, gates + 2);
    set_tensor(c, D_DT_BIAS, 2, gates + 2);
    set_tensor(c, CHECKPOINTS, 4, rows);
    set_tensor(c, CU_SEQLENS, 1, boundaries);
    set_tensor(c, CHECKPOINT_CU_STARTS, 1, boundaries);
    memcpy(c->tensor[CU_SEQLENS].memory.int32, cu_seqlens, sizeof cu_seqlens);
    memcpy(c->tensor[CHECKPOINT_CU_STARTS].memory.int32, starts, sizeof starts);
    c->workspace = c->workspace_memory;
    c->workspace_bytes = sizeof c->workspace_memory;
    return c;
}

static void make_dense(struct call *c) {
    c->args.cu_seqlens = c->args.checkpoint_cu_starts = NULL;
    c->tensor[INITIAL_STATE].shape[0] = c->tensor[D_FINAL_STATE].shape[0] = 1;
    c->tensor[D_INITIAL_STATE].shape[0] = 1;
    c->tensor[CHECKPOINTS].dl.ndim = 5;
    memcpy(c->tensor[CHECKPOINTS].shape, (int64_t[]){1, 2, HV, DIM_V, DIM_K}, 5 * sizeof(int64_t));
}

static flash_kda_status run(struct call *c) {
    return flash_kda_backward(&c->args, c->workspace, c->workspace_bytes);
}

/* ---- What every error must do ------------------------------------------------------------------- */

static bool same_memory(const struct call *a, const struct call *b) {
    for (int i = 0; i < TENSORS; i++)
        if (memcmp(a->tensor[i].memory.bytes, b->tensor[i].memory.bytes, BYTES) != 0)
            return false;
    return true;
}

/* A call that fails leaves a message that names no tensor. */
static void forget_message(void) {
    flash_kda_backward(NULL, NULL, 0);
    assert_true(mentions(flash_kda_last_error(), "args"));
}

enum reporters { ALL_ENTRIES, BACKWARD_ONLY };

static void expect_error(struct call *c, flash_kda_status expected, const char *word,
                         enum reporters reporters) {
    struct call *before = malloc(sizeof *before);
    char text[64] = "untouched";
    size_t bytes = 12345;
    assert_non_null(before);
    memcpy(before, c, sizeof *before);
    forget_message();
    expect_failure("backward", run(c), expected, word);
    if (reporters == ALL_ENTRIES) {
        forget_message();
        expect_failure("workspace_size", flash_kda_backward_workspace_size(&c->args, &bytes), expected, word);
        assert_int_equal(bytes, 12345);
        forget_message();
        expect_failure("describe", flash_kda_backward_describe(&c->args, text, sizeof text), expected, word);
        assert_string_equal(text, "untouched");
    }
    if (!same_memory(before, c))
        fail_msg("a call that failed wrote to a tensor");
    free(before);
}

/* ---- Faults of one tensor ------------------------------------------------------------------------ */

#define WRITTEN \
    (BIT(DQ) | BIT(DK) | BIT(DV) | BIT(DG) | BIT(DBETA) | BIT(DA_LOG) | BIT(D_DT_BIAS) | BIT(D_INITIAL_STATE))
#define LOOSE  (BIT(BETA) | BIT(DBETA) | BIT(A_LOG) | BIT(DA_LOG) | BIT(CU_SEQLENS) | BIT(CHECKPOINT_CU_STARTS))
#define STATES (BIT(INITIAL_STATE) | BIT(CHECKPOINTS) | BIT(D_FINAL_STATE) | BIT(D_INITIAL_STATE))
/* Their sizes are what others are measured by: a wrong one is reported as another tensor's. */
#define MEASURES (BIT(Q) | BIT(V) | BIT(CU_SEQLENS))

static const struct fault faults[] = {
    {"rank too high", rank_too_high, 0},
    {"rank zero", rank_zero, 0},
    {"no shape", shape_missing, 0},
    {"no data", data_missing, 0},
    {"last dimension wrong", last_dim_wrong, MEASURES},
    {"first dimension wrong", first_dim_wrong, MEASURES | BIT(CHECKPOINTS)},
    {"negative dimension", dim_negative, 0},
    {"negative stride", stride_negative, 0},
    {"last stride 2", last_stride_two, LOOSE},
    {"elements share memory", elements_shared, ~WRITTEN},
    {"uint8", dtype_uint8, 0},
    {"fp64", dtype_fp64, 0},
    {"fp16", dtype_fp16, ~(STATES | BIT(CU_SEQLENS) | BIT(CHECKPOINT_CU_STARTS))},
    {"misaligned", misaligned, 0},
    {"on another device", elsewhere, BIT(Q)},
};
enum { FAULTS = sizeof faults / sizeof *faults };

static void test_tensor_fault(void **state) {
    const struct fault_case *t = *state;
    struct call *c = call_new();
    t->fault->apply(&c->tensor[t->argument]);
    expect_error(c, FLASH_KDA_ERROR_INVALID_ARGUMENT, names[t->argument], ALL_ENTRIES);
    free(c);
}

/* ---- All others ---------------------------------------------------------------------------------- */

static void q_null(struct call *c) { c->args.q = NULL; }
static void k_null(struct call *c) { c->args.k = NULL; }
static void v_null(struct call *c) { c->args.v = NULL; }
static void g_null(struct call *c) { c->args.g = NULL; }
static void beta_null(struct call *c) { c->args.beta = NULL; }
static void struct_size_zero(struct call *c) { c->args.struct_size = 0; }
static void struct_size_small(struct call *c) {
    c->args.struct_size = offsetof(flash_kda_backward_args, d_out) - 8;
}
static void struct_size_large(struct call *c) { c->args.struct_size += 8; }
static void gate_unknown(struct call *c) { c->args.gate = (flash_kda_gate)3; }
static void beta_mode_unknown(struct call *c) { c->args.beta_mode = (flash_kda_beta)3; }
static void layout_unknown(struct call *c) { c->args.state_layout = (flash_kda_state_layout)2; }
static void flags_keep_state(struct call *c) { c->args.flags = FLASH_KDA_KEEP_STATE; }
static void backend_unknown(struct call *c) { c->args.backend = (flash_kda_backend)9; }
static void threads_negative(struct call *c) { c->args.num_threads = -1; }
static void scale_nan(struct call *c) { c->args.scale = (double)NAN; }
static void lower_bound_zero(struct call *c) { c->args.lower_bound = 0; }
static void A_log_without_gate(struct call *c) { c->args.gate = FLASH_KDA_GATE_NONE; }
static void K_too_large(struct call *c) { c->tensor[Q].shape[3] = 257; }
static void HV_no_multiple(struct call *c) { c->tensor[Q].shape[2] = c->tensor[K].shape[2] = 3; }
static void cu_seqlens_falls(struct call *c) { c->tensor[CU_SEQLENS].memory.int32[1] = T + 1; }

static void backend_none(struct call *c) { c->args.backend = FLASH_KDA_BACKEND_CUDA; }

static void no_gradient_given(struct call *c) { c->args.d_out = c->args.d_final_state = NULL; }
static void dA_log_without_A_log(struct call *c) { c->args.A_log = NULL; }
static void d_dt_bias_without_dt_bias(struct call *c) { c->args.dt_bias = NULL; }

static void every_negative(struct call *c) { c->args.checkpoint_every = -32; }
static void every_odd(struct call *c) { c->args.checkpoint_every = 48; }
static void every_zero(struct call *c) { c->args.checkpoint_every = 0; }
static void every_alone(struct call *c) { c->args.checkpoints = c->args.checkpoint_cu_starts = NULL; }
static void starts_alone(struct call *c) {
    c->args.checkpoints = NULL;
    c->args.checkpoint_every = 0;
}
static void starts_missing(struct call *c) { c->args.checkpoint_cu_starts = NULL; }
static void starts_of_dense(struct call *c) {
    make_dense(c);
    c->args.checkpoint_cu_starts = &c->tensor[CHECKPOINT_CU_STARTS].dl;
}
static void rows_too_few(struct call *c) { c->tensor[CHECKPOINT_CU_STARTS].memory.int32[1] = 0; }
static void rows_too_many(struct call *c) {
    static const int32_t starts[] = {0, 3, 3, 4};
    memcpy(c->tensor[CHECKPOINT_CU_STARTS].memory.int32, starts, sizeof starts);
    c->tensor[CHECKPOINTS].shape[0] = 4;
}
static void dense_rows_too_few(struct call *c) {
    make_dense(c);
    c->tensor[CHECKPOINTS].shape[1] = 1;
}

static void lay_over(struct call *c, enum backward_argument argument, enum backward_argument other,
                     size_t offset) {
    c->tensor[argument].dl.data = c->tensor[other].memory.bytes + offset;
}
static void dq_over_dk(struct call *c) { lay_over(c, DQ, DK, 0); }
static void dv_over_v(struct call *c) { lay_over(c, DV, V, 0); }
static void dg_over_d_out(struct call *c) { lay_over(c, DG, D_OUT, 16); }
static void dbeta_over_beta(struct call *c) { lay_over(c, DBETA, BETA, 0); }
static void dA_log_over_A_log(struct call *c) { lay_over(c, DA_LOG, A_LOG, 0); }
static void d_dt_bias_over_checkpoints(struct call *c) { lay_over(c, D_DT_BIAS, CHECKPOINTS, 0); }
static void d_initial_over_initial(struct call *c) { lay_over(c, D_INITIAL_STATE, INITIAL_STATE, 0); }
static void d_initial_one_row_further(struct call *c) {
    lay_over(c, D_INITIAL_STATE, D_FINAL_STATE, 4 * DIM_K);
}

static void workspace_null(struct call *c) { c->workspace = NULL; }
static void workspace_short(struct call *c) {
    assert_int_equal(flash_kda_backward_workspace_size(&c->args, &c->workspace_bytes), FLASH_KDA_OK);
    assert_true(c->workspace_bytes > 0 && c->workspace_bytes < FIXTURE_WORKSPACE);
    c->workspace_bytes--;
}
/* The last few bytes that the call needs of its workspace are a tensor's first. */
static void lay_over_workspace(struct call *c, enum backward_argument argument) {
    size_t needed;
    assert_int_equal(flash_kda_backward_workspace_size(&c->args, &needed), FLASH_KDA_OK);
    c->tensor[argument].dl.data = c->workspace_memory + (needed - 1) / 8 * 8;
    c->workspace_bytes = needed;
}
static void workspace_over_dv(struct call *c) { lay_over_workspace(c, DV); }
static void workspace_over_d_out(struct call *c) { lay_over_workspace(c, D_OUT); }

static const struct argument_case {
    const char *name;
    void (*apply)(struct call *c);
    flash_kda_status status;
    const char *word;
    enum reporters reporters;
} cases[] = {
#define CASE(apply, word) \
    { #apply, apply, FLASH_KDA_ERROR_INVALID_ARGUMENT, word, ALL_ENTRIES }
#define LATE(apply, status, word) \
    { #apply, apply, status, word, BACKWARD_ONLY }
    CASE(q_null, "q"),
    CASE(k_null, "k"),
    CASE(v_null, "v"),
    CASE(g_null, "g"),
    CASE(beta_null, "beta"),
    CASE(struct_size_zero, "struct_size"),
    CASE(struct_size_small, "struct_size"),
    CASE(struct_size_large, "struct_size"),
    CASE(gate_unknown, "gate"),
    CASE(beta_mode_unknown, "beta_mode"),
    CASE(layout_unknown, "state_layout"),
    CASE(flags_keep_state, "flags"),
    CASE(backend_unknown, "backend"),
    CASE(threads_negative, "num_threads"),
    CASE(scale_nan, "scale"),
    CASE(lower_bound_zero, "lower_bound"),
    CASE(A_log_without_gate, "A_log"),
    CASE(K_too_large, "q"),
    CASE(HV_no_multiple, "v"),
    CASE(cu_seqlens_falls, "cu_seqlens"),
    {"backend_none", backend_none, FLASH_KDA_ERROR_UNSUPPORTED, "backend", ALL_ENTRIES},
    CASE(no_gradient_given, "d_out"),
    CASE(dA_log_without_A_log, "dA_log"),
    CASE(d_dt_bias_without_dt_bias, "d_dt_bias"),
    CASE(every_negative, "checkpoint_every"),
    CASE(every_odd, "checkpoint_every"),
    CASE(every_zero, "checkpoint_every"),
    CASE(every_alone, "checkpoints"),
    CASE(starts_alone, "checkpoints"),
    CASE(starts_missing, "checkpoint_cu_starts"),
    CASE(starts_of_dense, "checkpoint_cu_starts"),
    CASE(rows_too_few, "checkpoint_cu_starts"),
    CASE(rows_too_many, "checkpoint_cu_starts"),
    CASE(dense_rows_too_few, "checkpoints"),
    CASE(dq_over_dk, "dq"),
    CASE(dv_over_v, "dv"),
    CASE(dg_over_d_out, "dg"),
    CASE(dbeta_over_beta, "dbeta"),
    CASE(dA_log_over_A_log, "dA_log"),
    CASE(d_dt_bias_over_checkpoints, "d_dt_bias"),
    CASE(d_initial_over_initial, "d_initial_state"),
    CASE(d_initial_one_row_further, "d_initial_state"),
    LATE(workspace_null, FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL, "workspace"),
    LATE(workspace_short, FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL, "workspace"),
    LATE(workspace_over_dv, FLASH_KDA_ERROR_INVALID_ARGUMENT, "dv"),
    LATE(workspace_over_d_out, FLASH_KDA_ERROR_INVALID_ARGUMENT, "d_out"),
};
enum { CASES = sizeof cases / sizeof *cases };

static void test_argument(void **state) {
    const struct argument_case *a = *state;
    struct call *c = call_new();
    a->apply(c);
    expect_error(c, a->status, a->word, a->reporters);
    free(c);
}

/* The calls that the tests above start from succeed, and write every gradient and nothing else. */
static void expect_success(struct call *c) {
    struct call *before = malloc(sizeof *before);
    assert_non_null(before);
    memcpy(before, c, sizeof *before);
    if (run(c))
        fail_msg("%s", flash_kda_last_error());
    for (int i = 0; i < TENSORS; i++) {
        bool same = memcmp(c->tensor[i].memory.bytes, before->tensor[i].memory.bytes, BYTES) == 0;
        if (same == (WRITTEN >> i & 1))
            fail_msg("%s is %s", names[i], same ? "not written" : "written");
    }
    free(before);
    free(c);
}

static void test_valid(void **state) {
    (void)state;
    expect_success(call_new());
}
static void test_valid_dense(void **state) {
    (void)state;
    struct call *c = call_new();
    make_dense(c);
    expect_success(c);
}
static void test_valid_reference(void **state) {
    (void)state;
    struct call *c = call_new();
    c->args.backend = FLASH_KDA_BACKEND_REFERENCE;
    expect_success(c);
}

static void test_nothing_asked_for(void **state) {
    (void)state;
    struct call *c = call_new(), *before = malloc(sizeof *before);
    assert_non_null(before);
    memcpy(before, c, sizeof *before);
    for (int i = 0; i < TENSORS; i++)
        if (WRITTEN >> i & 1)
            *member(&c->args, (enum backward_argument)i) = NULL;
    assert_int_equal(run(c), FLASH_KDA_OK);
    assert_true(same_memory(before, c));
    free(before);
    free(c);
}

/* Sums over no tokens are 0, and the gradient of a state that nothing happened to passes through. */
static void no_tokens(flash_kda_backend backend) {
    static const enum backward_argument by_token[] = {Q, K, V, G, BETA, D_OUT, DQ, DK, DV, DG, DBETA};
    struct call *c = call_new();
    make_dense(c);
    c->args.backend = backend;
    c->args.checkpoints = NULL;
    c->args.checkpoint_every = 0;
    for (size_t i = 0; i < sizeof by_token / sizeof *by_token; i++)
        c->tensor[by_token[i]].shape[1] = 0;
    assert_int_equal(run(c), FLASH_KDA_OK);
    for (int i = 0; i < HV; i++)
        assert_true(c->tensor[DA_LOG].memory.fp32[i] == 0);
    for (int i = 0; i < HV * DIM_K; i++)
        assert_true(c->tensor[D_DT_BIAS].memory.fp32[i] == 0);
    assert_memory_equal(c->tensor[D_INITIAL_STATE].memory.bytes, c->tensor[D_FINAL_STATE].memory.bytes,
                        4 * HV * DIM_V * DIM_K);
    free(c);
}
static void test_no_tokens(void **state) {
    (void)state;
    no_tokens(FLASH_KDA_BACKEND_CPU);
    no_tokens(FLASH_KDA_BACKEND_REFERENCE);
}

static void test_args_null(void **state) {
    (void)state;
    struct call *c = call_new();
    size_t bytes = 0;
    char text[8] = "keep";
    const flash_kda_status invalid = FLASH_KDA_ERROR_INVALID_ARGUMENT;
    expect_failure("backward", flash_kda_backward(NULL, NULL, 0), invalid, "args");
    expect_failure("workspace_size", flash_kda_backward_workspace_size(NULL, &bytes), invalid, "args");
    expect_failure("workspace_size", flash_kda_backward_workspace_size(&c->args, NULL), invalid, "bytes");
    expect_failure("describe", flash_kda_backward_describe(NULL, text, sizeof text), invalid, "args");
    expect_failure("describe", flash_kda_backward_describe(&c->args, NULL, 8), invalid, "text");
    expect_failure("describe", flash_kda_backward_describe(&c->args, text, 0), invalid, "text");
    assert_string_equal(text, "keep");
    free(c);
}

/* A description is one line of the backend that runs, cut to what there is room for. */
static void test_description(void **state) {
    (void)state;
    struct call *c = call_new();
    char whole[400], cut[400];
    assert_int_equal(flash_kda_backward_describe(&c->args, whole, sizeof whole), FLASH_KDA_OK);
    assert_non_null(strstr(whole, "cpu"));
    assert_non_null(strstr(whole, flash_kda_cpu_level()));
    c->args.backend = FLASH_KDA_BACKEND_REFERENCE;
    assert_int_equal(flash_kda_backward_describe(&c->args, whole, sizeof whole), FLASH_KDA_OK);
    assert_non_null(strstr(whole, "reference"));
    assert_null(strchr(whole, '\n'));
    assert_int_equal(flash_kda_backward_describe(&c->args, cut, 5), FLASH_KDA_OK);
    assert_int_equal(strlen(cut), 4);
    assert_memory_equal(cut, whole, 4);
    free(c);
}

/* A program of a header that ended before a member runs as if it had left that member out. */
static void test_shorter_struct(void **state) {
    (void)state;
    int ran = 0;
    for (size_t size = offsetof(flash_kda_backward_args, d_out); size <= sizeof(flash_kda_backward_args);
         size += 8) {
        struct call *shorter = call_new(), *whole = call_new();
        char *rest = (char *)&whole->args + size;
        shorter->args.struct_size = size;
        memset(rest, 0, sizeof whole->args - size);
        flash_kda_status status = run(shorter);
        assert_int_equal(status, run(whole));
        assert_true(same_memory(shorter, whole));
        ran += !status;
        free(shorter);
        free(whole);
    }
    assert_true(ran > 8);
}

/* ---- Running them all ------------------------------------------------------------------------------ */

int main(void) {
    static struct CMUnitTest tests[FAULTS * TENSORS + CASES + 10];
    static struct fault_case fault_cases[FAULTS * TENSORS];
    static struct argument_case writable_cases[CASES];
    size_t count = list_fault_cases(tests, fault_cases, test_tensor_fault, faults, FAULTS, names, TENSORS);
    memcpy(writable_cases, cases, sizeof cases);
    for (int i = 0; i < CASES; i++)
        tests[count++] = (struct CMUnitTest){
            .name = cases[i].name, .test_func = test_argument, .initial_state = &writable_cases[i]};
    const struct CMUnitTest plain[] = {cmocka_unit_test(test_valid),
                                       cmocka_unit_test(test_valid_dense),
                                       cmocka_unit_test(test_nothing_asked_for),
                                       cmocka_unit_test(test_no_tokens),
                                       cmocka_unit_test(test_args_null),
                                       cmocka_unit_test(test_description),
                                       cmocka_unit_test(test_shorter_struct),
                                       cmocka_unit_test(test_valid_reference)};
    memcpy(tests + count, plain, sizeof plain);
    count += sizeof plain / sizeof *plain;
    return _cmocka_run_group_tests("backward errors", tests, count, NULL, NULL);
}
