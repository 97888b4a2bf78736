/* SPDX-License-Identifier: MIT */
/* No call needs more than 32 KiB of stack: on painted stacks of 64 KiB, on which the helpers' have to do, too. */
#include "problem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka.h wants the four above first. */
#include <cmocka.h>

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { STACK = 64 << 10, GUARD = 64 << 10, BOUND = 32 << 10, PAINT = 0xa5 };

/* On a thread whose stack is painted before; returns how many bytes of it are not afterwards. */
static size_t stack_of(void *(*work)(void *), void *argument, void **result) {
    pthread_t thread;
    pthread_attr_t attributes;
    unsigned char *memory =
        mmap(NULL, GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(memory, MAP_FAILED);
    assert_int_equal(mprotect(memory, GUARD, PROT_NONE), 0);
    unsigned char *stack = memory + GUARD;
    memset(stack, PAINT, STACK);
    assert_int_equal(pthread_attr_init(&attributes), 0);
    assert_int_equal(pthread_attr_setstack(&attributes, stack, STACK), 0);
    assert_int_equal(pthread_create(&thread, &attributes, work, argument), 0);
    assert_int_equal(pthread_join(thread, result), 0);
    pthread_attr_destroy(&attributes);
    size_t kept = 0;
    while (kept < STACK && stack[kept] == PAINT)
        kept++;
    munmap(memory, GUARD + STACK);
    return STACK - kept;
}

static void *nothing(void *unused) { return unused; }

static void *run_prefill(void *argument) {
    struct problem *p = argument;
    return flash_kda_prefill(&p->prefill, p->workspace, p->workspace_bytes) ? "prefill failed" : NULL;
}

static void *run_decode(void *argument) {
    struct problem *p = argument;
    return flash_kda_decode(&p->decode) ? "decode failed" : NULL;
}

static void *run_backward(void *argument) {
    struct problem *p = argument;
    return flash_kda_backward(&p->backward, p->workspace, p->workspace_bytes) ? "backward failed" : NULL;
}

/* What prints and explains is part of a call, too. */
static void *run_wrong(void *argument) {
    struct problem *p = argument;
    flash_kda_prefill_args args = p->prefill;
    char text[200];
    args.k = args.v;
    flash_kda_prefill(&args, NULL, 0);
    flash_kda_prefill_describe(&p->prefill, text, sizeof text);
    flash_kda_decode_describe(&p->decode, text, sizeof text);
    flash_kda_backward_describe(&p->backward, text, sizeof text);
    return NULL;
}

/* The same memory as states of the other layout. */
static void use_layout(struct problem *p, flash_kda_state_layout layout) {
    int64_t *shape = p->decode.state->shape + 2, K = p->decode.q->shape[3], V = p->decode.v->shape[3];
    shape[0] = layout == FLASH_KDA_STATE_K_FIRST ? K : V;
    shape[1] = layout == FLASH_KDA_STATE_K_FIRST ? V : K;
    p->decode.state_layout = p->prefill.state_layout = p->backward.state_layout = layout;
    memcpy(p->backward.d_initial_state->shape + 2, shape, 2 * sizeof *shape);
}

static void check(struct problem *p, const char *name) {
    static const struct {
        void *(*run)(void *);
        const char *name;
    } calls[] = {
        {run_prefill, "prefill"}, {run_decode, "decode"}, {run_backward, "backward"}, {run_wrong, "an error"}};
    void *wrong = NULL;
    size_t least = stack_of(nothing, NULL, &wrong); /* what a thread keeps there itself */
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        for (int layout = FLASH_KDA_STATE_V_FIRST; layout <= FLASH_KDA_STATE_K_FIRST; layout++) {
            use_layout(p, (flash_kda_state_layout)layout);
            size_t used = stack_of(calls[i].run, p, &wrong) - least;
            assert_string_equal(wrong ? wrong : "", "");
            if (used > BOUND)
                fail_msg("%s, %s, layout %d: %zu bytes of stack", name, calls[i].name, layout, used);
        }
}

/* The last has more values than there may be with a norm. */
static const struct problem_size sizes[] = {{3, 16, 2, 256, 256}, {1, 16, 1, 256, 1024}, {1, 16, 1, 256, 3000}};

static void test_stack(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int threads = 1; threads <= 3; threads += 2)
            for (const char *const *level = flash_kda_cpu_levels(); *level; level++) {
                struct problem p;
                setenv("FLASH_KDA_CPU", *level, 1);
                assert_true(problem_make(&p, sizes[i], FLASH_KDA_BACKEND_CPU, threads));
                check(&p, *level);
                problem_free(&p);
            }
    unsetenv("FLASH_KDA_CPU");
}

static void test_stack_of_reference(void **state) {
    (void)state;
    struct problem p;
    assert_true(problem_make(&p, sizes[0], FLASH_KDA_BACKEND_REFERENCE, 1));
    check(&p, "reference");
    problem_free(&p);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_stack), cmocka_unit_test(test_stack_of_reference)};
    return cmocka_run_group_tests_name("stack", tests, NULL, NULL);
}
