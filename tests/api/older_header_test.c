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

#define BACKWARD_0_1(X) \
    X(q, 8, 8) X(k, 16, 8) X(v, 24, 8) X(g, 32, 8) X(beta, 40, 8) X(A_log, 48, 8) X(dt_bias, 56, 8) \
    X(gate, 64, 4) X(lower_bound, 72, 8) X(beta_mode, 80, 4) X(scale, 88, 8) X(flags, 96, 4) \
    X(cu_seqlens, 104, 8) X(state_layout, 112, 4) X(initial_state, 120, 8) X(checkpoints, 128, 8) \
    X(checkpoint_every, 136, 8) X(checkpoint_cu_starts, 144, 8) X(d_out, 152, 8) \
    X(d_final_state, 160, 8) X(dq, 168, 8) X(dk, 176, 8) X(dv, 184, 8) X(dg, 192, 8) X(dbeta, 200, 8) \
    X(dA_log, 208, 8) X(d_dt_bias, 216, 8) X(d_initial_state, 224, 8) X(backend, 232, 4) \
    X(num_threads, 236, 4) X(stream, 240, 8)
/* clang-format on */

/* With the smallest struct that is taken: there end the members without which no call can be described. */
enum {
    PREFILL_0_1_SIZE = 208,
    PREFILL_LEAST = 72,
    DECODE_0_1_SIZE = 288,
    DECODE_LEAST = 152,
    BACKWARD_0_1_SIZE = 248,
    BACKWARD_LEAST = 152,
};

#if __SIZEOF_POINTER__ == 8
#define KEEPS(type, member, at, bytes)                                                          \
    _Static_assert(offsetof(type, member) == (at) && sizeof(((type *)NULL)->member) == (bytes), \
                   #type " has moved " #member);
#define PREFILL_KEEPS(member, at, bytes)  KEEPS(flash_kda_prefill_args, member, at, bytes)
#define DECODE_KEEPS(member, at, bytes)   KEEPS(flash_kda_decode_args, member, at, bytes)
#define BACKWARD_KEEPS(member, at, bytes) KEEPS(flash_kda_backward_args, member, at, bytes)
PREFILL_0_1(PREFILL_KEEPS)
DECODE_0_1(DECODE_KEEPS)
BACKWARD_0_1(BACKWARD_KEEPS)
#endif

enum { PADDING = 0xa5 };

union args {
    flash_kda_prefill_args prefill;
    flash_kda_decode_args decode;
    flash_kda_backward_args backward;
};

#define PUT_PREFILL(member, at, bytes)  memcpy(old + (at), &args->prefill.member, bytes);
#define PUT_DECODE(member, at, bytes)   memcpy(old + (at), &args->decode.member, bytes);
#define PUT_BACKWARD(member, at, bytes) memcpy(old + (at), &args->backward.member, bytes);

static void put_prefill(const union args *args, unsigned char *old) { PREFILL_0_1(PUT_PREFILL) }
static void put_decode(const union args *args, unsigned char *old) { DECODE_0_1(PUT_DECODE) }
static void put_backward(const union args *args, unsigned char *old) { BACKWARD_0_1(PUT_BACKWARD) }

/* ---- Calls ------------------------------------------------------------------------------------- */

/* What the entries of an operation say, and what they leave in the tensors. */
struct outcome {
    struct fixture *f, *gradients; /* of backward, in the tensors of its inputs */
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

/* The last entry of each is the one that computes. */
static void prefill(struct outcome *o, const void *args) {
    keep(o, 0, flash_kda_prefill_workspace_size(args, &o->bytes));
    keep(o, 1, flash_kda_prefill_describe(args, o->description, sizeof o->description));
    keep(o, 2, flash_kda_prefill(args, o->f->workspace, o->f->workspace_bytes));
}

static void decode(struct outcome *o, const void *args) {
    keep(o, 1, flash_kda_decode_describe(args, o->description, sizeof o->description));
    keep(o, 2, flash_kda_decode(args));
}

static void backward(struct outcome *o, const void *args) {
    keep(o, 0, flash_kda_backward_workspace_size(args, &o->bytes));
    keep(o, 1, flash_kda_backward_describe(args, o->description, sizeof o->description));
    keep(o, 2, flash_kda_backward(args, o->f->workspace, o->f->workspace_bytes));
}

static void fill_prefill(const struct outcome *o, union args *args) { args->prefill = o->f->args; }

static void fill_decode(const struct outcome *o, union args *args) {
    const flash_kda_prefill_args *p = &o->f->args;
    flash_kda_decode_args a = FLASH_KDA_DECODE_ARGS_INIT;
    a.q = p->q;
    a.k = p->k;
    a.v = p->v;
    a.g = p->g;
    a.beta = p->beta;
    a.A_log = p->A_log;
    a.dt_bias = p->dt_bias;
    a.out = p->out;
    a.gate = p->gate;
    a.lower_bound = p->lower_bound;
    a.beta_mode = p->beta_mode;
    a.flags = p->flags;
    a.cu_seqlens = p->cu_seqlens;
    a.max_tokens = p->cu_seqlens ? 4 : 0;
    a.state = p->initial_state;
    a.state_indices = p->state_indices;
    a.norm_weight = p->A_log; /* HV = V here */
    a.norm_gate = p->A_log ? p->v : NULL;
    a.norm_activation = FLASH_KDA_NORM_SILU;
    a.norm_eps = 1e-5;
    a.num_threads = 1;
    args->decode = a;
}

/* Without states, which the fixture has more of than sequences. */
static void fill_backward(const struct outcome *o, union args *args) {
    const flash_kda_prefill_args *p = &o->f->args, *d = &o->gradients->args;
    flash_kda_backward_args a = FLASH_KDA_BACKWARD_ARGS_INIT;
    a.q = p->q;
    a.k = p->k;
    a.v = p->v;
    a.g = p->g;
    a.beta = p->beta;
    a.A_log = p->A_log;
    a.dt_bias = p->dt_bias;
    a.gate = p->gate;
    a.lower_bound = p->lower_bound;
    a.beta_mode = p->beta_mode;
    a.flags = p->flags;
    a.cu_seqlens = p->cu_seqlens;
    a.d_out = p->out;
    a.dq = d->q;
    a.dk = d->k;
    a.dv = d->v;
    a.dg = d->g;
    a.dbeta = d->beta;
    a.dA_log = d->A_log;
    a.d_dt_bias = d->dt_bias;
    a.num_threads = 1;
    args->backward = a;
}

static const struct operation {
    size_t old_size, least, size;
    void (*put)(const union args *args, unsigned char *old); /* all members but the first */
    void (*run)(struct outcome *o, const void *args);
    void (*fill)(const struct outcome *o, union args *args);
} operations[] = {
    {PREFILL_0_1_SIZE, PREFILL_LEAST, sizeof(flash_kda_prefill_args), put_prefill, prefill, fill_prefill},
    {DECODE_0_1_SIZE, DECODE_LEAST, sizeof(flash_kda_decode_args), put_decode, decode, fill_decode},
    {BACKWARD_0_1_SIZE, BACKWARD_LEAST, sizeof(flash_kda_backward_args), put_backward, backward, fill_backward},
};

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

static struct outcome new_outcome(bool bare) {
    return (struct outcome){.f = new_fixture(bare), .gradients = new_fixture(bare)};
}

static void free_outcome(struct outcome *o) {
    free(o->f);
    free(o->gradients);
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
    assert_true(fixture_same_memory(a->gradients, b->gradients));
}

static void test_old_layout(void **state) {
    const struct operation *op = *state;
    struct outcome old = new_outcome(false), now = new_outcome(false);
    unsigned char *at = border - op->old_size;
    union args args;
    op->fill(&old, &args);
    memset(at, PADDING, op->old_size);
    memcpy(at, &op->old_size, sizeof op->old_size);
    op->put(&args, at);
    op->run(&old, at);
    op->fill(&now, &args);
    op->run(&now, &args);
    assert_int_equal(now.status[2], FLASH_KDA_OK);
    expect_same(&old, &now, op->old_size);
    free_outcome(&old);
    free_outcome(&now);
}

/* A struct that ends before any member from `least` on: the rest is zero, and is not read. */
static void test_shorter_struct(void **state) {
    const struct operation *op = *state;
    int ran = 0;
    for (size_t size = op->least; size <= op->size; size += 8)
        for (int bare = 0; bare < 2; bare++) {
            struct outcome old = new_outcome(bare), now = new_outcome(bare);
            union args whole, args = {0};
            op->fill(&old, &whole);
            op->run(&old, cut(&whole, size));
            op->fill(&now, &whole);
            memcpy(&args, &whole, size);
            op->run(&now, &args);
            expect_same(&old, &now, size);
            ran += now.status[2] == FLASH_KDA_OK;
            free_outcome(&old);
            free_outcome(&now);
        }
    assert_true(ran > 10);
}

static void expect_refused(flash_kda_status status, const char *sentence, size_t size) {
    char words[40];
    snprintf(words, sizeof words, "struct_size %zu,", size);
    assert_int_equal(status, FLASH_KDA_ERROR_INVALID_ARGUMENT);
    if (!strstr(sentence, words) || !strstr(sentence, "expected"))
        fail_msg("%s", sentence);
}

/* Nothing but its size is read of a struct that cannot be. */
static void test_sizes_that_are_none(void **state) {
    const struct operation *op = *state;
    const size_t sizes[] = {0,       8, op->least - 8, op->least + 1, op->size - 1, op->size + 1, op->size + 8,
                            SIZE_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct outcome o = new_outcome(false);
        memcpy(border - sizeof(size_t), &sizes[i], sizeof(size_t));
        op->run(&o, border - sizeof(size_t));
        for (int entry = op->run == decode; entry < 3; entry++)
            expect_refused(o.status[entry], o.sentence[entry], sizes[i]);
        free_outcome(&o);
    }
}

#define EACH(test)                                                                 \
    {#test ", prefill", test, NULL, NULL, (void *)(uintptr_t)&operations[0]},      \
        {#test ", decode", test, NULL, NULL, (void *)(uintptr_t)&operations[1]}, { \
#test ", backward", test, NULL, NULL, (void *)(uintptr_t)&operations[2]    \
    }

int main(void) {
    const struct CMUnitTest tests[] = {EACH(test_old_layout), EACH(test_shorter_struct),
                                       EACH(test_sizes_that_are_none)};
    return cmocka_run_group_tests_name("older headers", tests, make_border, NULL);
}
