/* SPDX-License-Identifier: MIT */
/* What the API promises besides errors: names and versions, messages that belong to their thread, descriptions,
 * states in place, reentrancy, and the caller's floating-point mode left as it was. */
#include "fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
/* cmocka.h wants the four above first. */
#include <cmocka.h>

#include <fenv.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Names ----------------------------------------------------------------------------------------- */

static void test_version(void **state) {
    (void)state;
    char expected[40];
    snprintf(expected, sizeof expected, "%d.%d.%d", FLASH_KDA_VERSION_MAJOR, FLASH_KDA_VERSION_MINOR,
             FLASH_KDA_VERSION_PATCH);
    assert_string_equal(flash_kda_version(), expected);
}

static void test_status_names(void **state) {
    (void)state;
    assert_string_equal(flash_kda_status_name(FLASH_KDA_OK), "FLASH_KDA_OK");
    assert_string_equal(flash_kda_status_name(FLASH_KDA_ERROR_INVALID_ARGUMENT),
                        "FLASH_KDA_ERROR_INVALID_ARGUMENT");
    assert_string_equal(flash_kda_status_name(FLASH_KDA_ERROR_UNSUPPORTED), "FLASH_KDA_ERROR_UNSUPPORTED");
    assert_string_equal(flash_kda_status_name(FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL),
                        "FLASH_KDA_ERROR_WORKSPACE_TOO_SMALL");
    assert_string_equal(flash_kda_status_name(FLASH_KDA_ERROR_CUDA), "FLASH_KDA_ERROR_CUDA");
    assert_string_equal(flash_kda_status_name(FLASH_KDA_ERROR_OUT_OF_MEMORY), "FLASH_KDA_ERROR_OUT_OF_MEMORY");
    assert_non_null(flash_kda_status_name((flash_kda_status)1000));
}

static void test_backend_names(void **state) {
    (void)state;
    assert_string_equal(flash_kda_backend_name(FLASH_KDA_BACKEND_AUTO), "auto");
    assert_string_equal(flash_kda_backend_name(FLASH_KDA_BACKEND_REFERENCE), "reference");
    assert_string_equal(flash_kda_backend_name(FLASH_KDA_BACKEND_CPU), "cpu");
    assert_string_equal(flash_kda_backend_name(FLASH_KDA_BACKEND_CUDA), "cuda");
    assert_null(flash_kda_backend_name((flash_kda_backend)-1));
    assert_null(flash_kda_backend_name((flash_kda_backend)4));
}

static void test_backends_available(void **state) {
    (void)state;
    assert_int_equal(flash_kda_backend_available(FLASH_KDA_BACKEND_REFERENCE), 1);
    assert_int_equal(flash_kda_backend_available(FLASH_KDA_BACKEND_CPU), 1);
#ifdef KDA_WITH_CUDA /* there may be a GPU */
    assert_in_range(flash_kda_backend_available(FLASH_KDA_BACKEND_CUDA), 0, 1);
#else
    assert_int_equal(flash_kda_backend_available(FLASH_KDA_BACKEND_CUDA), 0);
#endif
    assert_int_equal(flash_kda_backend_available((flash_kda_backend)-1), 0);
    assert_int_equal(flash_kda_backend_available((flash_kda_backend)4), 0);
}

/* ---- Levels ---------------------------------------------------------------------------------------- */

static bool intel(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

static void test_levels(void **state) {
    (void)state;
    const char *const *levels = flash_kda_cpu_levels();
    assert_non_null(levels[0]);
    assert_string_equal(levels[0], "generic");
    unsetenv("FLASH_KDA_CPU");
    const char *fastest = flash_kda_cpu_level(), *expected = NULL;
    for (; *levels; levels++) {
        setenv("FLASH_KDA_CPU", *levels, 1);
        assert_string_equal(flash_kda_cpu_level(), *levels);
        if (!intel() || strcmp(*levels, "avx512bf16") != 0)
            expected = *levels;
    }
    assert_string_equal(fastest, expected);
    unsetenv("FLASH_KDA_CPU");
}

/* The level is looked up at every call and is what a call runs on. */
static void test_level_is_described(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    char text[400];
    for (const char *const *level = flash_kda_cpu_levels(); *level; level++) {
        setenv("FLASH_KDA_CPU", *level, 1);
        assert_int_equal(flash_kda_prefill_describe(&f->args, text, sizeof text), FLASH_KDA_OK);
        assert_non_null(strstr(text, *level));
        assert_non_null(strstr(text, "cpu"));
        assert_null(strchr(text, '\n'));
    }
    unsetenv("FLASH_KDA_CPU");
    f->args.backend = FLASH_KDA_BACKEND_REFERENCE;
    assert_int_equal(flash_kda_prefill_describe(&f->args, text, sizeof text), FLASH_KDA_OK);
    assert_non_null(strstr(text, "reference"));
    free(f);
}

static void test_description_is_cut(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    char whole[400], cut[400];
    assert_int_equal(flash_kda_prefill_describe(&f->args, whole, sizeof whole), FLASH_KDA_OK);
    size_t length = strlen(whole);
    for (size_t size = 1; size <= length + 1; size++) {
        memset(cut, '#', sizeof cut);
        assert_int_equal(flash_kda_prefill_describe(&f->args, cut, size), FLASH_KDA_OK);
        assert_int_equal(strlen(cut), size - 1);
        assert_memory_equal(cut, whole, size - 1);
        assert_int_equal(cut[size], '#');
    }
    free(f);
}

/* ---- Messages -------------------------------------------------------------------------------------- */

struct message_thread {
    pthread_barrier_t *barrier;
    bool null_first; /* which of the two errors this thread makes */
    char before[300], after[300];
};

static void *make_an_error(void *argument) {
    struct message_thread *t = argument;
    struct fixture *f = fixture_new();
    if (t->null_first)
        f->args.k = NULL;
    else
        f->args.lower_bound = 7;
    snprintf(t->before, sizeof t->before, "%s", flash_kda_last_error());
    pthread_barrier_wait(t->barrier);
    fixture_prefill(f);
    pthread_barrier_wait(t->barrier);
    snprintf(t->after, sizeof t->after, "%s", flash_kda_last_error());
    free(f);
    return NULL;
}

static void test_message_belongs_to_thread(void **state) {
    (void)state;
    pthread_barrier_t barrier;
    pthread_t threads[2];
    struct message_thread work[2] = {{.barrier = &barrier, .null_first = true}, {.barrier = &barrier}};
    flash_kda_prefill(NULL, NULL, 0);
    assert_int_equal(pthread_barrier_init(&barrier, NULL, 2), 0);
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, make_an_error, &work[i]), 0);
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_join(threads[i], NULL), 0);
    pthread_barrier_destroy(&barrier);
    assert_string_equal(work[0].before, "");
    assert_string_equal(work[1].before, "");
    assert_non_null(strstr(work[0].after, "k is NULL"));
    assert_non_null(strstr(work[1].after, "lower_bound"));
    assert_non_null(strstr(flash_kda_last_error(), "args"));
}

/* ---- Runs ------------------------------------------------------------------------------------------ */

static void test_in_place(void **state) {
    (void)state;
    struct fixture *apart = fixture_new(), *in_place = fixture_new();
    in_place->args.final_state = in_place->args.initial_state;
    assert_int_equal(fixture_prefill(apart), FLASH_KDA_OK);
    assert_int_equal(fixture_prefill(in_place), FLASH_KDA_OK);
    const int slots[] = {4, 0, 2};
    enum { MATRIX = FIXTURE_HV * FIXTURE_V * FIXTURE_K };
    for (int i = 0; i < FIXTURE_N; i++)
        assert_memory_equal(apart->tensor[ARG_FINAL_STATE].memory.fp32 + slots[i] * MATRIX,
                            in_place->tensor[ARG_INITIAL_STATE].memory.fp32 + slots[i] * MATRIX,
                            MATRIX * sizeof(float));
    assert_memory_equal(apart->tensor[ARG_OUT].memory.bytes, in_place->tensor[ARG_OUT].memory.bytes,
                        FIXTURE_BYTES);
    free(apart);
    free(in_place);
}

/* Two DLTensors of the same memory are in place as well as one used twice. */
static void test_in_place_by_two_tensors(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    f->tensor[ARG_FINAL_STATE].dl.data = f->tensor[ARG_INITIAL_STATE].dl.data;
    fixture_spell_strides(&f->tensor[ARG_FINAL_STATE]);
    assert_int_equal(fixture_prefill(f), FLASH_KDA_OK);
    free(f);
}

/* Slices of one fused buffer, the output among them, lie beside each other and are no overlap. */
static void test_fused_buffer(void **state) {
    (void)state;
    enum { PITCH = 2 * FIXTURE_HV * FIXTURE_V };
    struct fixture *f = fixture_new();
    struct fixture_tensor *v = &f->tensor[ARG_V], *out = &f->tensor[ARG_OUT];
    fixture_spell_strides(v);
    fixture_spell_strides(out);
    v->strides[0] = out->strides[0] = (int64_t)PITCH * FIXTURE_T;
    v->strides[1] = out->strides[1] = PITCH;
    out->dl.data = v->memory.fp32 + PITCH / 2;
    assert_int_equal(fixture_prefill(f), FLASH_KDA_OK);
    free(f);
}

static void test_workspace_may_be_null_if_none_is_needed(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    size_t bytes;
    assert_int_equal(flash_kda_prefill_workspace_size(&f->args, &bytes), FLASH_KDA_OK);
    f->workspace = bytes ? f->workspace_memory : NULL;
    f->workspace_bytes = bytes;
    assert_int_equal(fixture_prefill(f), FLASH_KDA_OK);
    free(f);
}

/* Dense tensors of T tokens, at addresses far apart: nothing may look at them while only the size is asked for. */
static void pretend_tokens(struct fixture *f, int64_t T) {
    static const enum argument tensors[] = {ARG_Q, ARG_K, ARG_V, ARG_G, ARG_BETA, ARG_OUT};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        f->tensor[tensors[i]].shape[1] = T;
        f->tensor[tensors[i]].dl.data = (void *)((uintptr_t)(i + 1) << 40);
    }
}

static void test_workspace_does_not_grow_with_tokens(void **state) {
    (void)state;
    for (int threads = 1; threads <= 64; threads *= 8) {
        struct fixture *f = fixture_new();
        size_t few, many;
        fixture_make_dense(f);
        f->args.num_threads = threads;
        f->args.checkpoints = NULL;
        f->args.checkpoint_every = 0;
        pretend_tokens(f, 1000000);
        assert_int_equal(flash_kda_prefill_workspace_size(&f->args, &few), FLASH_KDA_OK);
        pretend_tokens(f, 12000000);
        assert_int_equal(flash_kda_prefill_workspace_size(&f->args, &many), FLASH_KDA_OK);
        assert_int_equal(few, many);
        free(f);
    }
}

/* Nothing is asked of pointers that a call without them does not need. */
static void test_least_arguments(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    const flash_kda_prefill_args all = f->args;
    f->args = (flash_kda_prefill_args)FLASH_KDA_PREFILL_ARGS_INIT;
    f->args.q = all.q;
    f->args.k = all.k;
    f->args.v = all.v;
    f->args.g = all.g;
    f->args.beta = all.beta;
    f->args.out = all.out;
    assert_int_equal(f->args.gate, FLASH_KDA_GATE_NONE);
    assert_int_equal(fixture_prefill(f), FLASH_KDA_OK);
    free(f);
}

/* ---- Reentrancy ------------------------------------------------------------------------------------ */

enum { REENTRANT_RUNS = 20 };

static void *run_again_and_again(void *argument) {
    struct fixture **own = argument;
    for (int i = 0; i < REENTRANT_RUNS; i++)
        if (fixture_prefill(*own) != FLASH_KDA_OK)
            return "prefill failed";
    return NULL;
}

/* Two threads with the same inputs, each with its own outputs, get what one alone gets. */
static void test_reentrant(void **state) {
    (void)state;
    pthread_t threads[2];
    struct fixture *alone = fixture_new(), *own[2] = {fixture_new(), fixture_new()};
    own[1]->args.q = own[0]->args.q;
    own[1]->args.g = own[0]->args.g;
    assert_int_equal(fixture_prefill(alone), FLASH_KDA_OK);
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, run_again_and_again, &own[i]), 0);
    for (int i = 0; i < 2; i++) {
        void *wrong;
        assert_int_equal(pthread_join(threads[i], &wrong), 0);
        assert_null(wrong);
    }
    for (int i = 0; i < 2; i++) {
        assert_true(fixture_same_memory(alone, own[i]));
        free(own[i]);
    }
    free(alone);
}

/* ---- Floating-point mode ---------------------------------------------------------------------------- */

static bool denormals_work(void) {
    volatile float smallest = 0x1p-140F, half = 0.5F;
    return smallest * half != 0;
}

static void test_float_mode_is_kept(void **state) {
    (void)state;
    struct fixture *f = fixture_new();
    assert_true(denormals_work());
    assert_int_equal(fesetround(FE_UPWARD), 0);
    assert_int_equal(fixture_prefill(f), FLASH_KDA_OK);
    assert_int_equal(fegetround(), FE_UPWARD);
    assert_int_equal(fesetround(FE_TONEAREST), 0);
    assert_int_equal(fixture_prefill(f), FLASH_KDA_OK);
    assert_true(denormals_work());
    free(f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_version),
        cmocka_unit_test(test_status_names),
        cmocka_unit_test(test_backend_names),
        cmocka_unit_test(test_backends_available),
        cmocka_unit_test(test_levels),
        cmocka_unit_test(test_level_is_described),
        cmocka_unit_test(test_description_is_cut),
        cmocka_unit_test(test_message_belongs_to_thread),
        cmocka_unit_test(test_in_place),
        cmocka_unit_test(test_in_place_by_two_tensors),
        cmocka_unit_test(test_fused_buffer),
        cmocka_unit_test(test_workspace_may_be_null_if_none_is_needed),
        cmocka_unit_test(test_workspace_does_not_grow_with_tokens),
        cmocka_unit_test(test_least_arguments),
        cmocka_unit_test(test_reentrant),
        cmocka_unit_test(test_float_mode_is_kept),
    };
    return cmocka_run_group_tests_name("API behaviour", tests, NULL, NULL);
}
