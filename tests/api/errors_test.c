/* SPDX-License-Identifier: MIT */
/* One test for every error that prefill promises: the status, a message that names the argument, and not a
 * byte written. Faults that any tensor can have are tried on every tensor; the rest is a table. */
#include "expect.h"
#include "faults.h"
#include "fixture.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- What every error must do ------------------------------------------------------------------- */

/* A call that fails leaves a message that names no tensor. */
static void forget_message(void) {
    flash_kda_prefill(NULL, NULL, 0);
    assert_true(mentions(flash_kda_last_error(), "args"));
}

/* Some errors need memory to find, or are about the workspace: only prefill itself reports those. */
enum reporters { ALL_ENTRIES, PREFILL_ONLY };

static void expect_error(struct fixture *f, flash_kda_status expected, const char *word,
                         enum reporters reporters) {
    struct fixture *before = malloc(sizeof *before);
    assert_non_null(before);
    memcpy(before, f, sizeof *before);
    size_t bytes = 12345;
    char text[64] = "untouched";

    forget_message();
    expect_failure("prefill", fixture_prefill(f), expected, word);
    if (reporters == ALL_ENTRIES) {
        forget_message();
        expect_failure("workspace_size", flash_kda_prefill_workspace_size(&f->args, &bytes), expected, word);
        assert_int_equal(bytes, 12345);
        forget_message();
        expect_failure("describe", flash_kda_prefill_describe(&f->args, text, sizeof text), expected, word);
        assert_string_equal(text, "untouched");
    }
    if (!fixture_same_memory(before, f))
        fail_msg("a call that failed wrote to a tensor");
    free(before);
}

/* ---- Faults that any tensor can have ------------------------------------------------------------ */

/* Tensors whose last dimension may have any stride. */
#define CONV_STATES (BIT(ARG_Q_CONV_STATE) | BIT(ARG_K_CONV_STATE) | BIT(ARG_V_CONV_STATE))
#define LOOSE                                                                                    \
    (BIT(ARG_BETA) | BIT(ARG_A_LOG) | BIT(ARG_CU_SEQLENS) | BIT(ARG_STATE_INDICES) |             \
     BIT(ARG_CHECKPOINT_CU_STARTS) | BIT(ARG_CHECKPOINT_INDICES) | BIT(ARG_CHECKPOINT_OFFSETS) | \
     BIT(ARG_HAS_INITIAL_STATE) | CONV_STATES)
#define INDICES                                                                     \
    (BIT(ARG_CU_SEQLENS) | BIT(ARG_STATE_INDICES) | BIT(ARG_CHECKPOINT_CU_STARTS) | \
     BIT(ARG_CHECKPOINT_INDICES) | BIT(ARG_CHECKPOINT_OFFSETS))
#define NOT_WRITTEN (~(BIT(ARG_OUT) | BIT(ARG_FINAL_STATE) | BIT(ARG_CHECKPOINTS) | CONV_STATES))
/* Their sizes are what others are measured by: a wrong one is reported as another tensor's. */
#define MEASURES                                                                                     \
    (BIT(ARG_Q) | BIT(ARG_V) | BIT(ARG_CU_SEQLENS) | BIT(ARG_INITIAL_STATE) | BIT(ARG_CHECKPOINTS) | \
     BIT(ARG_CHECKPOINT_INDICES))

#define STATES (BIT(ARG_INITIAL_STATE) | BIT(ARG_FINAL_STATE) | BIT(ARG_CHECKPOINTS))

static const struct fault faults[] = {
    {"one dimension too many", rank_too_high, 0},
    {"no dimension", rank_zero, 0},
    {"a negative number of dimensions", rank_negative, 0},
    {"INT32_MAX dimensions", rank_huge, 0},
    {"shape NULL", shape_missing, 0},
    {"data NULL", data_missing, 0},
    {"first size one too large", first_dim_wrong, MEASURES},
    {"second size one too large", second_dim_wrong,
     BIT(ARG_Q) | BIT(ARG_CU_SEQLENS) | BIT(ARG_CHECKPOINT_INDICES) | BIT(ARG_CHECKPOINT_OFFSETS)},
    {"last size one too large", last_dim_wrong, (MEASURES & ~STATES) | BIT(ARG_CHECKPOINT_OFFSETS)},
    {"first size -1", dim_negative, 0},
    {"last size INT64_MIN", dim_lowest, 0},
    {"negative stride", stride_negative, 0},
    {"last stride -1", last_stride_negative, 0},
    {"last stride 2", last_stride_two, LOOSE},
    {"last stride 0", last_stride_zero, LOOSE},
    {"rows that share memory", rows_share_memory, NOT_WRITTEN},
    {"rows that overlap", rows_overlap, NOT_WRITTEN},
    {"a stride beyond all memory", stride_overflows, 0},
    {"uint8", dtype_uint8, 0},
    {"fp64", dtype_fp64, 0},
    {"fp16", dtype_fp16, ~(STATES | INDICES | BIT(ARG_HAS_INITIAL_STATE))},
    {"int32", dtype_int32, INDICES | BIT(ARG_HAS_INITIAL_STATE)},
    {"int64", dtype_int64, INDICES},
    {"uint32", dtype_uint32, 0},
    {"fp32", dtype_fp32, ~(INDICES | BIT(ARG_HAS_INITIAL_STATE))},
    {"two lanes", dtype_lanes, 0},
    {"no lanes", dtype_no_lanes, 0},
    {"another device", elsewhere, BIT(ARG_Q)},
    {"an odd address", misaligned, 0},
};
enum { FAULTS = sizeof faults / sizeof *faults };

static void test_tensor_fault(void **state) {
    const struct fault_case *c = *state;
    struct fixture *f = fixture_new();
    if (c->argument == ARG_CHECKPOINT_OFFSETS)
        fixture_use_offsets(f);
    if (c->argument == ARG_HAS_INITIAL_STATE)
        fixture_use_has_initial_state(f);
    if (c->argument >= ARG_Q_CONV_WEIGHT)
        fixture_use_fused(f);
    c->fault->apply(&f->tensor[c->argument]);
    expect_error(f, FLASH_KDA_ERROR_INVALID_ARGUMENT, argument_names[c->argument], ALL_ENTRIES);
    free(f);
}

/* ---- Everything else ----------------------------------------------------------------------------- */

static void q_null(struct fixture *f) { f->args.q = NULL; }
static void k_null(struct fixture *f) { f->args.k = NULL; }
static void v_null(struct fixture *f) { f->args.v = NULL; }
static void g_null(struct fixture *f) { f->args.g = NULL; }
static void beta_null(struct fixture *f) { f->args.beta = NULL; }
static void out_null(struct fixture *f) { f->args.out = NULL; }

static void struct_size_zero(struct fixture *f) { f->args.struct_size = 0; }
static void struct_size_small(struct fixture *f) { f->args.struct_size -= 1; }
static void struct_size_large(struct fixture *f) { f->args.struct_size += 8; }

static void gate_unknown(struct fixture *f) { f->args.gate = (flash_kda_gate)3; }
static void gate_negative(struct fixture *f) { f->args.gate = (flash_kda_gate)-1; }
static void beta_mode_unknown(struct fixture *f) { f->args.beta_mode = (flash_kda_beta)3; }
static void state_layout_unknown(struct fixture *f) { f->args.state_layout = (flash_kda_state_layout)2; }
static void flags_unknown(struct fixture *f) { f->args.flags |= 1u << 31; }
static void backend_unknown(struct fixture *f) { f->args.backend = (flash_kda_backend)99; }
static void backend_negative(struct fixture *f) { f->args.backend = (flash_kda_backend)-1; }
static void backend_cuda(struct fixture *f) { f->args.backend = FLASH_KDA_BACKEND_CUDA; }
static void num_threads_negative(struct fixture *f) { f->args.num_threads = -1; }
static void num_threads_huge(struct fixture *f) { f->args.num_threads = INT32_MAX; }
static void scale_nan(struct fixture *f) { f->args.scale = (double)NAN; }
static void scale_infinite(struct fixture *f) { f->args.scale = -HUGE_VAL; }
static void scale_beyond_fp32(struct fixture *f) { f->args.scale = 1e301; }
static void checkpoint_every_negative(struct fixture *f) { f->args.checkpoint_every = -1; }

static void lower_bound_too_low(struct fixture *f) { f->args.lower_bound = nextafter(-5, -6); }
static void lower_bound_zero(struct fixture *f) { f->args.lower_bound = 0; }
static void lower_bound_positive(struct fixture *f) { f->args.lower_bound = 1; }
static void lower_bound_nan(struct fixture *f) { f->args.lower_bound = (double)NAN; }

static void A_log_without_gate(struct fixture *f) {
    f->args.gate = FLASH_KDA_GATE_NONE;
    f->args.dt_bias = NULL;
}
static void dt_bias_without_gate(struct fixture *f) {
    f->args.gate = FLASH_KDA_GATE_NONE;
    f->args.A_log = NULL;
}

static void q_on_cuda_on_cpu_backend(struct fixture *f) {
    f->tensor[ARG_Q].dl.device.device_type = kDLCUDA;
    f->args.backend = FLASH_KDA_BACKEND_CPU;
}
static void all_on_cuda(struct fixture *f) {
    for (int i = 0; i < ARGUMENTS; i++)
        f->tensor[i].dl.device.device_type = kDLCUDA;
#ifdef KDA_WITH_CUDA /* which would take it at its word */
    f->args.backend = FLASH_KDA_BACKEND_CPU;
#endif
}
static void all_on_vulkan_on_cpu_backend(struct fixture *f) {
    for (int i = 0; i < ARGUMENTS; i++)
        f->tensor[i].dl.device.device_type = kDLVulkan;
    f->args.backend = FLASH_KDA_BACKEND_CPU;
}

/* Every tensor with a dimension of HV, V or K gets another one, so that only the limit itself is wrong. */
static void set_key_dim(struct fixture *f, int64_t K) {
    for (int i = 0; i < ARGUMENTS; i++) {
        struct fixture_tensor *t = &f->tensor[i];
        for (int d = 0; d < t->dl.ndim; d++)
            if (t->shape[d] == FIXTURE_K)
                t->shape[d] = K;
    }
}
static void K_too_large(struct fixture *f) { set_key_dim(f, 257); }
static void K_zero(struct fixture *f) { set_key_dim(f, 0); }
static void V_zero(struct fixture *f) {
    f->tensor[ARG_V].shape[3] = f->tensor[ARG_OUT].shape[3] = 0;
    f->tensor[ARG_INITIAL_STATE].shape[2] = f->tensor[ARG_FINAL_STATE].shape[2] =
        f->tensor[ARG_CHECKPOINTS].shape[2] = 0;
}
static void H_too_many(struct fixture *f) { f->tensor[ARG_Q].shape[2] = f->tensor[ARG_K].shape[2] = 3; }
static void H_zero(struct fixture *f) { f->tensor[ARG_Q].shape[2] = f->tensor[ARG_K].shape[2] = 0; }

static void batch_of_two_with_cu_seqlens(struct fixture *f) {
    static const enum argument tensors[] = {ARG_Q, ARG_K, ARG_V, ARG_G, ARG_BETA, ARG_OUT};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        f->tensor[tensors[i]].shape[0] = 2;
        f->tensor[tensors[i]].shape[1] = FIXTURE_T / 2;
    }
}

static void set_cu_seqlens(struct fixture *f, int32_t a, int32_t b, int32_t c, int32_t d) {
    int32_t *x = f->tensor[ARG_CU_SEQLENS].memory.int32;
    x[0] = a;
    x[1] = b;
    x[2] = c;
    x[3] = d;
}
static void cu_seqlens_starts_late(struct fixture *f) { set_cu_seqlens(f, 1, 2, 2, 6); }
static void cu_seqlens_starts_negative(struct fixture *f) { set_cu_seqlens(f, -1, 2, 2, 6); }
static void cu_seqlens_falls(struct fixture *f) { set_cu_seqlens(f, 0, 3, 2, 6); }
static void cu_seqlens_overruns(struct fixture *f) { set_cu_seqlens(f, 0, 2, 2, 7); }
static void cu_seqlens_overruns_inside(struct fixture *f) { set_cu_seqlens(f, 0, INT32_MAX, 2, 6); }
static void cu_seqlens_ends_early(struct fixture *f) { set_cu_seqlens(f, 0, 2, 2, 5); }
static void cu_seqlens_lowest(struct fixture *f) { set_cu_seqlens(f, 0, INT32_MIN, 2, 6); }
static void cu_seqlens_int64_overruns(struct fixture *f) {
    static const int64_t values[] = {0, 2, INT64_C(1) << 32, 6};
    struct fixture_tensor *t = &f->tensor[ARG_CU_SEQLENS];
    t->dl.dtype.bits = 64;
    memcpy(t->memory.int64, values, sizeof values);
}
static void cu_seqlens_empty(struct fixture *f) { f->tensor[ARG_CU_SEQLENS].shape[0] = 0; }

static void slot_too_large(struct fixture *f) { f->tensor[ARG_STATE_INDICES].memory.int32[1] = FIXTURE_SLOTS; }
static void slot_too_low(struct fixture *f) { f->tensor[ARG_STATE_INDICES].memory.int32[1] = -2; }
static void slot_twice(struct fixture *f) { f->tensor[ARG_STATE_INDICES].memory.int32[1] = 4; }
static void slots_without_states(struct fixture *f) { f->args.initial_state = f->args.final_state = NULL; }
static void states_of_different_pools(struct fixture *f) {
    f->tensor[ARG_FINAL_STATE].shape[0] = FIXTURE_SLOTS - 1;
}
static void bias_without_weight(struct fixture *f) {
    fixture_use_fused(f);
    f->args.k_conv_weight = NULL;
}
static void conv_state_without_weight(struct fixture *f) {
    fixture_use_fused(f);
    f->args.v_conv_weight = f->args.v_conv_bias = NULL;
}
static void norm_gate_without_weight(struct fixture *f) {
    fixture_use_fused(f);
    f->args.norm_weight = NULL;
}
static void norm_eps_zero(struct fixture *f) {
    fixture_use_fused(f);
    f->args.norm_eps = 0;
}
static void norm_eps_nan(struct fixture *f) {
    fixture_use_fused(f);
    f->args.norm_eps = (double)NAN;
}
static void norm_activation_unknown(struct fixture *f) {
    f->args.norm_activation = (flash_kda_norm_activation)2;
}
static void conv_states_of_another_pool(struct fixture *f) {
    fixture_use_fused(f);
    f->args.initial_state = f->args.final_state = NULL;
    f->tensor[ARG_K_CONV_STATE].shape[0] = FIXTURE_SLOTS - 1;
}
static void conv_state_over(struct fixture *f, enum argument other) {
    fixture_use_fused(f);
    f->tensor[ARG_Q_CONV_STATE].dl.data = f->tensor[other].memory.bytes;
}
static void conv_state_over_k(struct fixture *f) { conv_state_over(f, ARG_K); }
static void conv_state_over_initial_state(struct fixture *f) { conv_state_over(f, ARG_INITIAL_STATE); }
static void conv_state_over_another(struct fixture *f) { conv_state_over(f, ARG_V_CONV_STATE); }
static void conv_state_over_weight(struct fixture *f) { conv_state_over(f, ARG_Q_CONV_WEIGHT); }
static void out_over_norm_gate(struct fixture *f) {
    fixture_use_fused(f);
    f->tensor[ARG_OUT].dl.data = f->tensor[ARG_NORM_GATE].memory.bytes;
}
static void flags_without_states(struct fixture *f) {
    fixture_use_has_initial_state(f);
    f->args.initial_state = NULL;
}
static void set_padding(struct fixture *f, int64_t slot) {
    f->args.flags |= FLASH_KDA_PADDING_SLOT;
    f->args.padding_slot = slot;
}
static void padding_without_flag(struct fixture *f) { f->args.padding_slot = 1; }
static void padding_negative(struct fixture *f) { set_padding(f, -1); }
static void padding_without_indices(struct fixture *f) {
    fixture_make_dense(f);
    set_padding(f, 0);
}
static void slot_twice_beside_padding(struct fixture *f) {
    set_padding(f, 0);
    slot_twice(f);
}
static void final_over_has_initial_state(struct fixture *f) {
    fixture_use_has_initial_state(f);
    f->tensor[ARG_FINAL_STATE].dl.data = f->tensor[ARG_HAS_INITIAL_STATE].memory.bytes;
}
static void pool_without_indices(struct fixture *f) { f->args.state_indices = NULL; }

static void both_contracts(struct fixture *f) {
    fixture_use_offsets(f);
    f->args.checkpoint_every = FIXTURE_EVERY;
}
static void neither_contract(struct fixture *f) {
    fixture_use_offsets(f);
    f->args.checkpoint_offsets = NULL;
}
static void every_without_checkpoints(struct fixture *f) { f->args.checkpoints = NULL; }
static void offsets_without_checkpoints(struct fixture *f) {
    fixture_use_offsets(f);
    f->args.checkpoints = NULL;
}
static void packed_without_cu_starts(struct fixture *f) {
    f->args.checkpoint_cu_starts = f->args.checkpoint_indices = NULL;
}
static void cu_starts_without_cu_seqlens(struct fixture *f) {
    fixture_make_dense(f);
    f->args.checkpoint_cu_starts = &f->tensor[ARG_CHECKPOINT_CU_STARTS].dl;
}
static void indices_without_cu_starts(struct fixture *f) {
    fixture_make_dense(f);
    f->args.checkpoint_indices = &f->tensor[ARG_CHECKPOINT_INDICES].dl;
}
static void cu_starts_with_offsets(struct fixture *f) {
    fixture_use_offsets(f);
    f->args.checkpoint_cu_starts = &f->tensor[ARG_CHECKPOINT_CU_STARTS].dl;
}
static void dense_rows_too_many(struct fixture *f) {
    fixture_make_dense(f);
    f->tensor[ARG_CHECKPOINTS].shape[1] = 4;
}
static void cu_starts_rows_too_many(struct fixture *f) {
    static const int32_t starts[] = {0, 2, 2, 3};
    memcpy(f->tensor[ARG_CHECKPOINT_CU_STARTS].memory.int32, starts, sizeof starts);
}
static void cu_starts_falls(struct fixture *f) { f->tensor[ARG_CHECKPOINT_CU_STARTS].memory.int32[2] = 0; }
static void cu_starts_starts_late(struct fixture *f) {
    f->tensor[ARG_CHECKPOINT_CU_STARTS].memory.int32[0] = 1;
}
static void cu_starts_overruns(struct fixture *f) { f->tensor[ARG_CHECKPOINT_CU_STARTS].memory.int32[3] = 4; }
static void cu_starts_ends_early(struct fixture *f) { f->tensor[ARG_CHECKPOINT_CU_STARTS].memory.int32[3] = 2; }
static void row_too_large(struct fixture *f) {
    f->tensor[ARG_CHECKPOINT_INDICES].memory.int32[2] = FIXTURE_PLACES;
}
static void row_too_low(struct fixture *f) { f->tensor[ARG_CHECKPOINT_INDICES].memory.int32[2] = -2; }
static void row_twice(struct fixture *f) { f->tensor[ARG_CHECKPOINT_INDICES].memory.int32[2] = 2; }
static void offset_too_large(struct fixture *f) {
    fixture_use_offsets(f);
    f->tensor[ARG_CHECKPOINT_OFFSETS].memory.int64[0] = 3; /* of a sequence of 2 tokens */
}
static void offset_too_low(struct fixture *f) {
    fixture_use_offsets(f);
    f->tensor[ARG_CHECKPOINT_OFFSETS].memory.int64[0] = -2;
}

/* Aliasing: a tensor's memory laid over another's, from its last bytes on or its first. */
static void lay_over(struct fixture *f, enum argument argument, enum argument over, int bytes) {
    f->tensor[argument].dl.data = f->tensor[over].memory.bytes + bytes;
}
static void out_over_v(struct fixture *f) { lay_over(f, ARG_OUT, ARG_V, 0); }
static void out_over_end_of_q(struct fixture *f) {
    lay_over(f, ARG_OUT, ARG_Q, 4 * (FIXTURE_T * FIXTURE_H * FIXTURE_K - 1));
}
static void out_over_beta(struct fixture *f) { lay_over(f, ARG_OUT, ARG_BETA, 16); }
static void out_over_A_log(struct fixture *f) { lay_over(f, ARG_OUT, ARG_A_LOG, 0); }
static void out_over_dt_bias(struct fixture *f) { lay_over(f, ARG_OUT, ARG_DT_BIAS, 0); }
static void out_over_initial_state(struct fixture *f) { lay_over(f, ARG_OUT, ARG_INITIAL_STATE, 0); }
static void out_over_final_state(struct fixture *f) { lay_over(f, ARG_OUT, ARG_FINAL_STATE, 0); }
static void out_over_cu_seqlens(struct fixture *f) { lay_over(f, ARG_OUT, ARG_CU_SEQLENS, 0); }
static void out_over_state_indices(struct fixture *f) { lay_over(f, ARG_OUT, ARG_STATE_INDICES, 0); }
static void checkpoints_over_cu_starts(struct fixture *f) {
    lay_over(f, ARG_CHECKPOINTS, ARG_CHECKPOINT_CU_STARTS, 0);
}
static void checkpoints_over_indices(struct fixture *f) {
    lay_over(f, ARG_CHECKPOINTS, ARG_CHECKPOINT_INDICES, 0);
}
static void checkpoints_over_k(struct fixture *f) { lay_over(f, ARG_CHECKPOINTS, ARG_K, 0); }
static void checkpoints_over_out(struct fixture *f) { lay_over(f, ARG_CHECKPOINTS, ARG_OUT, 0); }
static void checkpoints_over_offsets(struct fixture *f) {
    fixture_use_offsets(f);
    lay_over(f, ARG_CHECKPOINTS, ARG_CHECKPOINT_OFFSETS, 0);
}
/* Final state and checkpoints of one address, but not one tensor. */
static void checkpoints_over_final_state(struct fixture *f) {
    lay_over(f, ARG_CHECKPOINTS, ARG_FINAL_STATE, 0);
}
static void checkpoints_over_initial_state(struct fixture *f) {
    lay_over(f, ARG_CHECKPOINTS, ARG_INITIAL_STATE, 0);
}
static void final_state_over_g(struct fixture *f) { lay_over(f, ARG_FINAL_STATE, ARG_G, 0); }
static void final_state_one_row_further(struct fixture *f) {
    lay_over(f, ARG_FINAL_STATE, ARG_INITIAL_STATE, 4 * FIXTURE_HV * FIXTURE_V * FIXTURE_K);
}
static void in_place_with_other_strides(struct fixture *f) {
    struct fixture_tensor *t = &f->tensor[ARG_FINAL_STATE];
    lay_over(f, ARG_FINAL_STATE, ARG_INITIAL_STATE, 0);
    fixture_spell_strides(t);
    t->strides[0] += 8;
}
static void in_place_with_other_dtype(struct fixture *f) {
    lay_over(f, ARG_FINAL_STATE, ARG_INITIAL_STATE, 0);
    f->tensor[ARG_FINAL_STATE].dl.dtype = (DLDataType){kDLBfloat, 16, 1};
}
/* The pool may hold the checkpoints, but no slot both a state and a checkpoint. */
static void pool_slot_of_state_and_checkpoint(struct fixture *f) {
    f->args.final_state = f->args.checkpoints = f->args.initial_state;
    f->tensor[ARG_CHECKPOINT_INDICES].memory.int32[0] = 4;
    f->tensor[ARG_CHECKPOINT_INDICES].memory.int32[1] = 1;
    f->tensor[ARG_CHECKPOINT_INDICES].memory.int32[2] = 3;
}
/* The last few bytes that the call needs of its workspace are a tensor's first. */
static void lay_over_workspace(struct fixture *f, enum argument argument) {
    size_t needed;
    assert_int_equal(flash_kda_prefill_workspace_size(&f->args, &needed), FLASH_KDA_OK);
    unsigned char *place = f->workspace_memory + (needed - 1) / 8 * 8;
    memcpy(place, f->tensor[argument].memory.bytes, 64);
    f->tensor[argument].dl.data = place;
    f->workspace_bytes = needed;
}
static void workspace_over_q(struct fixture *f) { lay_over_workspace(f, ARG_Q); }
static void workspace_over_beta(struct fixture *f) { lay_over_workspace(f, ARG_BETA); }
static void workspace_over_out(struct fixture *f) { lay_over_workspace(f, ARG_OUT); }
static void workspace_over_final_state(struct fixture *f) { lay_over_workspace(f, ARG_FINAL_STATE); }
static void workspace_over_cu_seqlens(struct fixture *f) { lay_over_workspace(f, ARG_CU_SEQLENS); }
static void workspace_over_checkpoint_indices(struct fixture *f) {
    lay_over_workspace(f, ARG_CHECKPOINT_INDICES);
}

static void workspace_null(struct fixture *f) { f->workspace = NULL; }
static void workspace_none(struct fixture *f) { f->workspace_bytes = 0; }
static void workspace_one_byte_short(struct fixture *f) {
    assert_int_equal(flash_kda_prefill_workspace_size(&f->args, &f->workspace_bytes), FLASH_KDA_OK);
    assert_true(f->workspace_bytes > 0);
    f->workspace_bytes--;
}

/* Sizes that are right one by one and consistent, but whose product does not fit. */
static void tokens_overflow(struct fixture *f) {
    static const enum argument tensors[] = {ARG_Q, ARG_K, ARG_V, ARG_G, ARG_BETA, ARG_OUT};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        f->tensor[tensors[i]].shape[1] = INT64_MAX / 16;
}
static void slots_overflow(struct fixture *f) {
    f->tensor[ARG_INITIAL_STATE].shape[0] = f->tensor[ARG_FINAL_STATE].shape[0] = INT64_MAX / 64;
}
static void value_dim_overflows(struct fixture *f) {
    f->tensor[ARG_V].shape[3] = f->tensor[ARG_OUT].shape[3] = INT64_C(1) << 60;
}

static const struct argument_case {
    const char *name;
    void (*apply)(struct fixture *f);
    flash_kda_status status;
    const char *word;
    enum reporters reporters;
} cases[] = {
#define INVALID(apply, word) \
    { #apply, apply, FLASH_KDA_ERROR_INVALID_ARGUMENT, word, ALL_ENTRIES }
#define INVALID_LATE(apply, word) \
    { #apply, apply, FLASH_KDA_ERROR_INVALID_ARGUMENT, word, PREFILL_ONLY }
#define UNSUPPORTED(apply, word) \
    { #apply, apply, FLASH_KDA_ERROR_UNSUPPORTED, word, ALL_ENTRIES }
#define TOO_SMALL(apply) \
    { #apply, apply, FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL, "workspace", PREFILL_ONLY }
    INVALID(q_null, "q"),
    INVALID(k_null, "k"),
    INVALID(v_null, "v"),
    INVALID(g_null, "g"),
    INVALID(beta_null, "beta"),
    INVALID(out_null, "out"),
    INVALID(struct_size_zero, "struct_size"),
    INVALID(struct_size_small, "struct_size"),
    INVALID(struct_size_large, "struct_size"),
    INVALID(gate_unknown, "gate"),
    INVALID(gate_negative, "gate"),
    INVALID(beta_mode_unknown, "beta_mode"),
    INVALID(state_layout_unknown, "state_layout"),
    INVALID(flags_unknown, "flags"),
    INVALID(backend_unknown, "backend"),
    INVALID(backend_negative, "backend"),
    UNSUPPORTED(backend_cuda, "backend"),
    INVALID(num_threads_negative, "num_threads"),
    INVALID(num_threads_huge, "num_threads"),
    INVALID(scale_nan, "scale"),
    INVALID(scale_infinite, "scale"),
    INVALID(scale_beyond_fp32, "scale"),
    INVALID(checkpoint_every_negative, "checkpoint_every"),
    INVALID(lower_bound_too_low, "lower_bound"),
    INVALID(lower_bound_zero, "lower_bound"),
    INVALID(lower_bound_positive, "lower_bound"),
    INVALID(lower_bound_nan, "lower_bound"),
    INVALID(A_log_without_gate, "A_log"),
    INVALID(dt_bias_without_gate, "dt_bias"),
    UNSUPPORTED(q_on_cuda_on_cpu_backend, "q"),
    UNSUPPORTED(all_on_cuda, "q"),
    UNSUPPORTED(all_on_vulkan_on_cpu_backend, "q"),
    INVALID(K_too_large, "q"),
    INVALID(K_zero, "q"),
    INVALID(V_zero, "v"),
    INVALID(H_too_many, "v"),
    INVALID(H_zero, "q"),
    INVALID(batch_of_two_with_cu_seqlens, "cu_seqlens"),
    INVALID(cu_seqlens_starts_late, "cu_seqlens"),
    INVALID(cu_seqlens_starts_negative, "cu_seqlens"),
    INVALID(cu_seqlens_falls, "cu_seqlens"),
    INVALID(cu_seqlens_overruns, "cu_seqlens"),
    INVALID(cu_seqlens_overruns_inside, "cu_seqlens"),
    INVALID(cu_seqlens_ends_early, "cu_seqlens"),
    INVALID(cu_seqlens_lowest, "cu_seqlens"),
    INVALID(cu_seqlens_int64_overruns, "cu_seqlens"),
    INVALID(cu_seqlens_empty, "cu_seqlens"),
    INVALID(slot_too_large, "state_indices"),
    INVALID(slot_too_low, "state_indices"),
    INVALID_LATE(slot_twice, "state_indices"),
    INVALID(slots_without_states, "state_indices"),
    INVALID(flags_without_states, "has_initial_state"),
    INVALID(bias_without_weight, "k_conv_bias"),
    INVALID(conv_state_without_weight, "v_conv_state"),
    INVALID(norm_gate_without_weight, "norm_gate"),
    INVALID(norm_eps_zero, "norm_eps"),
    INVALID(norm_eps_nan, "norm_eps"),
    INVALID(norm_activation_unknown, "norm_activation"),
    INVALID(conv_states_of_another_pool, "k_conv_state"),
    INVALID(conv_state_over_k, "q_conv_state"),
    INVALID(conv_state_over_initial_state, "q_conv_state"),
    INVALID(conv_state_over_another, "q_conv_state"),
    INVALID(conv_state_over_weight, "q_conv_state"),
    INVALID(out_over_norm_gate, "norm_gate"),
    INVALID(padding_without_flag, "padding_slot"),
    INVALID(padding_negative, "padding_slot"),
    INVALID(padding_without_indices, "padding_slot"),
    INVALID_LATE(slot_twice_beside_padding, "state_indices"),
    INVALID(final_over_has_initial_state, "has_initial_state"),
    INVALID(states_of_different_pools, "final_state"),
    INVALID(pool_without_indices, "initial_state"),
    INVALID(both_contracts, "checkpoint_offsets"),
    INVALID(neither_contract, "checkpoints"),
    INVALID(every_without_checkpoints, "checkpoints"),
    INVALID(offsets_without_checkpoints, "checkpoints"),
    INVALID(packed_without_cu_starts, "checkpoint_cu_starts"),
    INVALID(cu_starts_without_cu_seqlens, "checkpoint_cu_starts"),
    INVALID(indices_without_cu_starts, "checkpoint_indices"),
    INVALID(cu_starts_with_offsets, "checkpoint_cu_starts"),
    INVALID(dense_rows_too_many, "checkpoints"),
    INVALID(cu_starts_rows_too_many, "checkpoint_cu_starts"),
    INVALID(cu_starts_falls, "checkpoint_cu_starts"),
    INVALID(cu_starts_starts_late, "checkpoint_cu_starts"),
    INVALID(cu_starts_overruns, "checkpoint_cu_starts"),
    INVALID(cu_starts_ends_early, "checkpoint_cu_starts"),
    INVALID(row_too_large, "checkpoint_indices"),
    INVALID(row_too_low, "checkpoint_indices"),
    INVALID_LATE(row_twice, "checkpoint_indices"),
    INVALID(offset_too_large, "checkpoint_offsets"),
    INVALID(offset_too_low, "checkpoint_offsets"),
    INVALID(out_over_v, "out"),
    INVALID(out_over_end_of_q, "out"),
    INVALID(out_over_beta, "out"),
    INVALID(out_over_A_log, "out"),
    INVALID(out_over_dt_bias, "out"),
    INVALID(out_over_initial_state, "out"),
    INVALID(out_over_final_state, "out"),
    INVALID(out_over_cu_seqlens, "out"),
    INVALID(out_over_state_indices, "out"),
    INVALID(checkpoints_over_cu_starts, "checkpoints"),
    INVALID(checkpoints_over_indices, "checkpoints"),
    INVALID(checkpoints_over_k, "checkpoints"),
    INVALID(checkpoints_over_out, "checkpoints"),
    INVALID(checkpoints_over_offsets, "checkpoints"),
    INVALID(checkpoints_over_final_state, "checkpoints"),
    INVALID(checkpoints_over_initial_state, "checkpoints"),
    INVALID(final_state_over_g, "final_state"),
    INVALID(final_state_one_row_further, "final_state"),
    INVALID(in_place_with_other_strides, "final_state"),
    INVALID(in_place_with_other_dtype, "final_state"),
    INVALID_LATE(pool_slot_of_state_and_checkpoint, "checkpoint_indices"),
    INVALID_LATE(workspace_over_q, "q"),
    INVALID_LATE(workspace_over_beta, "beta"),
    INVALID_LATE(workspace_over_out, "out"),
    INVALID_LATE(workspace_over_final_state, "final_state"),
    INVALID_LATE(workspace_over_cu_seqlens, "cu_seqlens"),
    INVALID_LATE(workspace_over_checkpoint_indices, "checkpoint_indices"),
    TOO_SMALL(workspace_null),
    TOO_SMALL(workspace_none),
    TOO_SMALL(workspace_one_byte_short),
    INVALID(tokens_overflow, "q"),
    INVALID(slots_overflow, "initial_state"),
    INVALID(value_dim_overflows, "v"),
};
enum { CASES = sizeof cases / sizeof *cases };

static void test_argument(void **state) {
    const struct argument_case *c = *state;
    struct fixture *f = fixture_new();
    c->apply(f);
    expect_error(f, c->status, c->word, c->reporters);
    free(f);
}

/* The calls that the tests above start from must themselves succeed and write. */
static void expect_success(struct fixture *f) {
    struct fixture *before = malloc(sizeof *before);
    assert_non_null(before);
    memcpy(before, f, sizeof *before);
    if (fixture_prefill(f))
        fail_msg("%s", flash_kda_last_error());
    assert_false(fixture_same_memory(before, f));
    free(before);
    free(f);
}

static void test_valid(void **state) {
    (void)state;
    expect_success(fixture_new());
}
static void test_valid_dense(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    fixture_make_dense(f);
    expect_success(f);
}
static void test_valid_offsets(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    fixture_use_offsets(f);
    expect_success(f);
}

/* A padding slot may stand there twice, and need be none of the pool. */
static void test_valid_padding(void **state) {
    (void)state;
    static const int64_t slots[] = {0, FIXTURE_SLOTS, INT64_MAX};
    for (size_t i = 0; i < sizeof slots / sizeof *slots; i++) {
        struct fixture *f = fixture_new();
        struct fixture_tensor *t = &f->tensor[ARG_STATE_INDICES];
        set_padding(f, slots[i]);
        t->dl.dtype.bits = 64;
        t->memory.int64[0] = 4;
        t->memory.int64[1] = t->memory.int64[2] = slots[i];
        expect_success(f);
    }
}

static void test_valid_fused(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    fixture_use_fused(f);
    expect_success(f);
}

/* States of convolutions alone: state_indices are theirs. */
static void test_valid_conv_states_alone(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    fixture_use_fused(f);
    f->args.initial_state = f->args.final_state = NULL;
    expect_success(f);
}

static void test_args_null(void **state) {
    (void)state;
    const flash_kda_status invalid = FLASH_KDA_ERROR_INVALID_ARGUMENT;
    size_t bytes = 0;
    char text[8];
    expect_failure("prefill", flash_kda_prefill(NULL, NULL, 0), invalid, "args");
    expect_failure("workspace_size", flash_kda_prefill_workspace_size(NULL, &bytes), invalid, "args");
    expect_failure("describe", flash_kda_prefill_describe(NULL, text, sizeof text), invalid, "args");
}

static void test_results_null(void **state) {
    (void)state;
    const flash_kda_status invalid = FLASH_KDA_ERROR_INVALID_ARGUMENT;
    struct fixture *f = fixture_new();
    char text[8] = "keep";
    expect_failure("workspace_size", flash_kda_prefill_workspace_size(&f->args, NULL), invalid, "bytes");
    expect_failure("describe", flash_kda_prefill_describe(&f->args, NULL, 8), invalid, "text");
    expect_failure("describe", flash_kda_prefill_describe(&f->args, text, 0), invalid, "text");
    assert_string_equal(text, "keep");
    free(f);
}

/* The dtype is called what array libraries call it, and so are those that are taken. */
static void test_dtype_in_words(void **state) {
    (void)state;
    static const struct {
        DLDataType dtype;
        const char *words;
    } others[] = {
        {{kDLFloat, 64, 1}, "dtype float64;"},
        {{kDLInt, 64, 1}, "dtype int64;"},
        {{kDLUInt, 8, 1}, "dtype uint8;"},
        {{kDLComplex, 64, 1}, "dtype complex64;"},
        {{6, 8, 1}, "dtype bool;"},
        {{10, 8, 1}, "dtype float8_e4m3fn;"},
        {{200, 12, 1}, "dtype of DLPack code 200, 12 bits;"},
        {{kDLFloat, 32, 4}, "dtype float32 in vectors of 4;"},
    };
    struct fixture *f = fixture_new();
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        f->tensor[ARG_V].dl.dtype = others[i].dtype;
        expect_error(f, FLASH_KDA_ERROR_INVALID_ARGUMENT, "v", ALL_ENTRIES);
        if (!strstr(flash_kda_last_error(), others[i].words) ||
            !strstr(flash_kda_last_error(), "expected float32, float16 or bfloat16"))
            fail_msg("\"%s\" does not say \"%s\"", flash_kda_last_error(), others[i].words);
    }
    free(f);
}

static void test_level_unknown(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    setenv("FLASH_KDA_CPU", "sse9", 1);
    expect_error(f, FLASH_KDA_ERROR_UNSUPPORTED, "FLASH_KDA_CPU", ALL_ENTRIES);
    assert_null(flash_kda_cpu_level());
    assert_true(mentions(flash_kda_last_error(), "sse9"));
    /* The oracle has no levels. */
    f->args.backend = FLASH_KDA_BACKEND_REFERENCE;
    assert_int_equal(fixture_prefill(f), FLASH_KDA_OK);
    unsetenv("FLASH_KDA_CPU");
    free(f);
}

/* A level of another machine is an error too, never a fallback. */
static void test_level_of_another_machine(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
#if defined(__aarch64__)
    setenv("FLASH_KDA_CPU", "avx2", 1);
#else
    setenv("FLASH_KDA_CPU", "neon", 1);
#endif
    expect_error(f, FLASH_KDA_ERROR_UNSUPPORTED, "FLASH_KDA_CPU", ALL_ENTRIES);
    unsetenv("FLASH_KDA_CPU");
    free(f);
}

/* ---- Running them all ------------------------------------------------------------------------------ */

int main(void) {
    enum { PLAIN = 11 };
    static struct CMUnitTest tests[FAULTS * ARGUMENTS + CASES + PLAIN];
    static struct fault_case fault_cases[FAULTS * ARGUMENTS];
    static struct argument_case writable_cases[CASES];
    size_t count =
        list_fault_cases(tests, fault_cases, test_tensor_fault, faults, FAULTS, argument_names, ARGUMENTS);
    memcpy(writable_cases, cases, sizeof cases);
    for (int i = 0; i < CASES; i++)
        tests[count++] = (struct CMUnitTest){
            .name = cases[i].name, .test_func = test_argument, .initial_state = &writable_cases[i]};
    const struct CMUnitTest plain[PLAIN] = {cmocka_unit_test(test_valid),
                                            cmocka_unit_test(test_valid_dense),
                                            cmocka_unit_test(test_valid_offsets),
                                            cmocka_unit_test(test_args_null),
                                            cmocka_unit_test(test_valid_padding),
                                            cmocka_unit_test(test_valid_fused),
                                            cmocka_unit_test(test_valid_conv_states_alone),
                                            cmocka_unit_test(test_results_null),
                                            cmocka_unit_test(test_dtype_in_words),
                                            cmocka_unit_test(test_level_unknown),
                                            cmocka_unit_test(test_level_of_another_machine)};
    memcpy(tests + count, plain, sizeof plain);
    count += PLAIN;
    return _cmocka_run_group_tests("prefill errors", tests, count, NULL, NULL);
}
