/* SPDX-License-Identifier: MIT */
/* Programs that were built against an older header: their argument structs, byte by byte, get today's results. */
#include "fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h> /* after the headers that it needs */

/* ---- Layouts that programs were compiled against ----------------------------------------------- */

/* X(member, offset, size) on LP64, as a compiler laid them out. Never change one; a struct that has grown gets another. */
/* clang-format off */
#define PREFILL_0_1(X) \
    X(q, 8, 8) X(k, 16, 8) X(v, 24, 8) X(g, 32, 8) X(beta, 40, 8) X(A_log, 48, 8) X(dt_bias, 56, 8) \
    X(out, 64, 8) X(gate, 72, 4) X(lower_bound, 80, 8) X(beta_mode, 88, 4) X(scale, 96, 8) \
    X(flags, 104, 4) X(cu_seqlens, 112, 8) X(state_layout, 120, 4) X(initial_state, 128, 8) \
    X(final_state, 136, 8) X(state_indices, 144, 8) X(checkpoints, 152, 8) \
    X(checkpoint_every, 160, 8) X(checkpoint_cu_starts, 168, 8) X(checkpoint_indices, 176, 8) \
    X(checkpoint_offsets, 184, 8) X(backend, 192, 4) X(num_threads, 196, 4) X(stream, 200, 8)

#define DECODE_0_1(X) \
    X(q, 8, 8) X(k, 16, 8) X(v, 24, 8) X(g, 32, 8) X(beta, 40, 8) X(A_log, 48, 8) X(dt_bias, 56, 8) \
    X(out, 64, 8) X(gate, 72, 4) X(lower_bound, 80, 8) X(beta_mode, 88, 4) X(scale, 96, 8) \
    X(flags, 104, 4) X(cu_seqlens, 112, 8) X(max_tokens, 120, 8) X(accepted, 128, 8) \
    X(state_layout, 136, 4) X(state, 144, 8) X(state_indices, 152, 8) X(num_accepted_tokens, 160, 8) \
    X(q_conv_weight, 168, 8) X(q_conv_bias, 176, 8) X(q_conv_state, 184, 8) X(k_conv_weight, 192, 8) \
    X(k_conv_bias, 200, 8) X(k_conv_state, 208, 8) X(v_conv_weight, 216, 8) X(v_conv_bias, 224, 8) \
    X(v_conv_state, 232, 8) X(norm_weight, 240, 8) X(norm_gate, 248, 8) X(norm_activation, 256, 4) \
    X(norm_eps, 264, 8) X(backend, 272, 4) X(num_threads, 276, 4) X(stream, 280, 8)
/* clang-format on */

enum { PREFILL_0_1_SIZE = 208, DECODE_0_1_SIZE = 288 };

/* The members without which no call can be described end here, and with them the smallest struct that is taken. */
enum { PREFILL_LEAST = 72, DECODE_LEAST = 152 };

#if __SIZEOF_POINTER__ == 8
#define KEEPS(type, member, at, bytes)                                                          \
    _Static_assert(offsetof(type, member) == (at) && sizeof(((type *)NULL)->member) == (bytes), \
                   #type " has moved " #member);
#define PREFILL_KEEPS(member, at, bytes) KEEPS(flash_kda_prefill_args, member, at, bytes)
#define DECODE_KEEPS(member, at, bytes)  KEEPS(flash_kda_decode_args, member, at, bytes)
PREFILL_0_1(PREFILL_KEEPS)
DECODE_0_1(DECODE_KEEPS)
#endif

enum { PADDING = 0xa5 };

#define PUT(member, at, bytes) memcpy(old + (at), &args->member, bytes);

static void put_prefill_0_1(const flash_kda_prefill_args *args, unsigned char *old) {
    const size_t size = PREFILL_0_1_SIZE;
    memset(old, PADDING, size);
    memcpy(old, &size, sizeof size);
    PREFILL_0_1(PUT)
}

static void put_decode_0_1(const flash_kda_decode_args *args, unsigned char *old) {
    const size_t size = DECODE_0_1_SIZE;
    memset(old, PADDING, size);
    memcpy(old, &size, sizeof size);
    DECODE_0_1(PUT)
}

/* ---- Calls ------------------------------------------------------------------------------------- */

/* What the entries of an operation say, and what they leave in the tensors. */
struct outcome {
    struct fixture *f;
    flash_kda_status status[3];
    char sentence[3][512];
    char description[512];
    size_t bytes;
};

static void keep(struct outcome *o, int entry, flash_kda_status status) {
    o->status[entry] = status;
    if (status)
        snprintf(o->sentence[entry], sizeof o->sentence[entry], "%s", flash_kda_last_error());
}

static void prefill(struct outcome *o, const void *args) {
    keep(o, 0, flash_kda_prefill_workspace_size(args, &o->bytes));
    keep(o, 1, flash_kda_prefill_describe(args, o->description, sizeof o->description));
    keep(o, 2, flash_kda_prefill(args, o->f->workspace, o->f->workspace_bytes));
}

static void decode(struct outcome *o, const void *args) {
    keep(o, 0, flash_kda_decode_describe(args, o->description, sizeof o->description));
    keep(o, 1, flash_kda_decode(args));
}

static flash_kda_decode_args decode_args(struct fixture *f) {
    flash_kda_decode_args args = FLASH_KDA_DECODE_ARGS_INIT;
    const flash_kda_prefill_args *p = &f->args;
    args.q = p->q;
    args.k = p->k;
    args.v = p->v;
    args.g = p->g;
    args.beta = p->beta;
    args.A_log = p->A_log;
    args.dt_bias = p->dt_bias;
    args.out = p->out;
    args.gate = p->gate;
    args.lower_bound = p->lower_bound;
    args.beta_mode = p->beta_mode;
    args.flags = p->flags;
    args.cu_seqlens = p->cu_seqlens;
    args.max_tokens = p->cu_seqlens ? 4 : 0;
    args.state = p->initial_state;
    args.state_indices = p->state_indices;
    args.norm_weight = p->A_log; /* HV = V here */
    args.norm_gate = p->A_log ? p->v : NULL;
    args.norm_activation = FLASH_KDA_NORM_SILU;
    args.norm_eps = 1e-5;
    args.num_threads = 1;
    return args;
}

/* One with everything that there is, or one with as little as can be. */
static struct fixture *new_fixture(bool bare) {
    struct fixture *f = fixture_new();
    f->args.num_threads = 1;
    if (bare) {
        fixture_make_dense(f);
        f->args.A_log = f->args.dt_bias = NULL;
    }
    return f;
}

/* ---- Memory whose end is the end of all that may be read --------------------------------------- */

static unsigned char *border;

static int make_border(void **state) {
    (void)state;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    unsigned char *pages = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages + page, page, PROT_NONE))
        return -1;
    border = pages + page;
    return 0;
}

/* The first `size` bytes of a struct that says to be as large. */
static const void *cut(const void *args, size_t size) {
    memcpy(border - size, args, size);
    memcpy(border - size, &size, sizeof size);
    return border - size;
}

/* ---- The tests --------------------------------------------------------------------------------- */

static void expect_same(const struct outcome *a, const struct outcome *b, size_t size) {
    for (int i = 0; i < 3; i++)
        if (a->status[i] != b->status[i] || strcmp(a->sentence[i], b->sentence[i]) != 0)
            fail_msg("%zu bytes: \"%s\", but \"%s\" with the rest zero", size, a->sentence[i], b->sentence[i]);
    assert_string_equal(a->description, b->description);
    assert_int_equal(a->bytes, b->bytes);
    assert_true(fixture_same_memory(a->f, b->f));
}

static void test_prefill_0_1(void **state) {
    (void)state;
    struct outcome old = {.f = new_fixture(false)}, now = {.f = new_fixture(false)};
    put_prefill_0_1(&old.f->args, border - PREFILL_0_1_SIZE);
    prefill(&old, border - PREFILL_0_1_SIZE);
    prefill(&now, &now.f->args);
    assert_int_equal(now.status[2], FLASH_KDA_OK);
    expect_same(&old, &now, PREFILL_0_1_SIZE);
    free(old.f);
    free(now.f);
}

static void test_decode_0_1(void **state) {
    (void)state;
    struct outcome old = {.f = new_fixture(false)}, now = {.f = new_fixture(false)};
    const flash_kda_decode_args old_args = decode_args(old.f), args = decode_args(now.f);
    put_decode_0_1(&old_args, border - DECODE_0_1_SIZE);
    decode(&old, border - DECODE_0_1_SIZE);
    decode(&now, &args);
    assert_int_equal(now.status[1], FLASH_KDA_OK);
    expect_same(&old, &now, DECODE_0_1_SIZE);
    free(old.f);
    free(now.f);
}

/* A struct that ends before any member from PREFILL_LEAST on: the rest is zero, and is not read. */
static void test_shorter_prefill(void **state) {
    (void)state;
    int ran = 0;
    for (size_t size = PREFILL_LEAST; size <= sizeof(flash_kda_prefill_args); size += 8)
        for (int bare = 0; bare < 2; bare++) {
            struct outcome old = {.f = new_fixture(bare)}, now = {.f = new_fixture(bare)};
            flash_kda_prefill_args args = {0};
            memcpy(&args, &now.f->args, size);
            prefill(&old, cut(&old.f->args, size));
            prefill(&now, &args);
            expect_same(&old, &now, size);
            ran += now.status[2] == FLASH_KDA_OK;
            free(old.f);
            free(now.f);
        }
    assert_true(ran > 10);
}

static void test_shorter_decode(void **state) {
    (void)state;
    int ran = 0;
    for (size_t size = DECODE_LEAST; size <= sizeof(flash_kda_decode_args); size += 8)
        for (int bare = 0; bare < 2; bare++) {
            struct outcome old = {.f = new_fixture(bare)}, now = {.f = new_fixture(bare)};
            const flash_kda_decode_args old_args = decode_args(old.f), whole = decode_args(now.f);
            flash_kda_decode_args args = {0};
            memcpy(&args, &whole, size);
            args.struct_size = sizeof args;
            decode(&old, cut(&old_args, size));
            decode(&now, &args);
            expect_same(&old, &now, size);
            ran += now.status[1] == FLASH_KDA_OK;
            free(old.f);
            free(now.f);
        }
    assert_true(ran > 10);
}

static void expect_refused(flash_kda_status status, size_t size) {
    char words[40];
    snprintf(words, sizeof words, "struct_size %zu,", size);
    assert_int_equal(status, FLASH_KDA_ERROR_INVALID_ARGUMENT);
    if (!strstr(flash_kda_last_error(), words) || !strstr(flash_kda_last_error(), "expected"))
        fail_msg("%s", flash_kda_last_error());
}

/* Nothing but its size is read of a struct that cannot be. */
static void test_sizes_that_are_none(void **state) {
    (void)state;
    const size_t prefill_sizes[] = {0,
                                    8,
                                    PREFILL_LEAST - 8,
                                    PREFILL_LEAST + 1,
                                    sizeof(flash_kda_prefill_args) - 1,
                                    sizeof(flash_kda_prefill_args) + 1,
                                    sizeof(flash_kda_prefill_args) + 8,
                                    SIZE_MAX},
                 decode_sizes[] = {0,
                                   8,
                                   DECODE_LEAST - 8,
                                   DECODE_LEAST + 1,
                                   sizeof(flash_kda_decode_args) - 1,
                                   sizeof(flash_kda_decode_args) + 1,
                                   sizeof(flash_kda_decode_args) + 8,
                                   SIZE_MAX};
    const void *args = border - sizeof(size_t);
    char text[64];
    size_t bytes;
    for (size_t i = 0; i < sizeof prefill_sizes / sizeof *prefill_sizes; i++) {
        memcpy(border - sizeof(size_t), &prefill_sizes[i], sizeof(size_t));
        expect_refused(flash_kda_prefill(args, NULL, 0), prefill_sizes[i]);
        expect_refused(flash_kda_prefill_workspace_size(args, &bytes), prefill_sizes[i]);
        expect_refused(flash_kda_prefill_describe(args, text, sizeof text), prefill_sizes[i]);
    }
    for (size_t i = 0; i < sizeof decode_sizes / sizeof *decode_sizes; i++) {
        memcpy(border - sizeof(size_t), &decode_sizes[i], sizeof(size_t));
        expect_refused(flash_kda_decode(args), decode_sizes[i]);
        expect_refused(flash_kda_decode_describe(args, text, sizeof text), decode_sizes[i]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_prefill_0_1),         cmocka_unit_test(test_decode_0_1),
        cmocka_unit_test(test_shorter_prefill),     cmocka_unit_test(test_shorter_decode),
        cmocka_unit_test(test_sizes_that_are_none),
    };
    return cmocka_run_group_tests_name("older headers", tests, make_border, NULL);
}
