/* SPDX-License-Identifier: MIT */
/* One test for every error that the two halves of prefill and backward, and fold, promise: the status and a message that
 * names the argument. */
#include "expect.h"
#include "fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h> /* after the headers that it needs */

enum { ROWS = 2, COLUMNS = FIXTURE_V + FIXTURE_K };

static void set_tensor(struct fixture_tensor *t, bool index, int ndim, const int64_t *shape) {
    memset(t, 0, sizeof *t);
    memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
    t->dl = (DLTensor){.data = t->memory.bytes,
                       .device = {kDLCPU, 0},
                       .ndim = ndim,
                       .dtype = {index ? kDLInt : kDLFloat, 32, 1},
                       .shape = t->shape};
}

/* ---- Halves ------------------------------------------------------------------------------------------ */

struct halves {
    struct fixture *f;
    struct fixture_tensor incoming_rows, outgoing_rows, summaries, incoming;
};

static void halves_new(struct halves *h) {
    const int64_t rows[1] = {ROWS}, summaries[4] = {ROWS, FIXTURE_HV, COLUMNS, FIXTURE_K};
    const int64_t states[4] = {ROWS, FIXTURE_HV, FIXTURE_V, FIXTURE_K};
    h->f = fixture_new();
    set_tensor(&h->incoming_rows, true, 1, rows);
    set_tensor(&h->outgoing_rows, true, 1, rows);
    set_tensor(&h->summaries, false, 4, summaries);
    set_tensor(&h->incoming, false, 4, states);
    h->incoming_rows.memory.int32[1] = -1;
    h->outgoing_rows.memory.int32[0] = 2;
    h->f->args.phase = FLASH_KDA_PHASE_BEGIN;
    h->f->args.incoming_rows = &h->incoming_rows.dl;
    h->f->args.outgoing_rows = &h->outgoing_rows.dl;
    h->f->args.summaries = &h->summaries.dl;
    h->f->args.incoming = &h->incoming.dl;
}

static void fails(struct halves *h, const char *word) {
    expect_failure("prefill", fixture_prefill(h->f), FLASH_KDA_ERROR_INVALID_ARGUMENT, word);
    free(h->f);
    halves_new(h);
}

static void test_prefill(void **state) {
    (void)state;
    struct halves *h = calloc(1, sizeof *h);
    halves_new(h);
    assert_int_equal(fixture_prefill(h->f), FLASH_KDA_OK);
    h->f->args.phase = FLASH_KDA_PHASE_FINISH;
    assert_int_equal(fixture_prefill(h->f), FLASH_KDA_OK);
    h->f->args.phase = (flash_kda_phase)3;
    fails(h, "phase");
    h->f->args.phase = FLASH_KDA_PHASE_WHOLE;
    fails(h, "incoming_rows");
    h->f->args.summaries = NULL;
    fails(h, "outgoing_rows");
    h->f->args.outgoing_rows = NULL;
    fails(h, "summaries");
    h->f->args.incoming_rows = NULL;
    fails(h, "incoming");
    h->f->args.phase = FLASH_KDA_PHASE_FINISH;
    h->f->args.incoming = NULL;
    fails(h, "incoming");
    h->incoming_rows.memory.int32[0] = FIXTURE_N;
    fails(h, "incoming_rows");
    h->outgoing_rows.memory.int32[0] = -2;
    fails(h, "outgoing_rows");
    h->outgoing_rows.memory.int32[1] = 2; /* twice */
    fails(h, "outgoing_rows");
    h->incoming_rows.dl.dtype.bits = 64;
    fails(h, "incoming_rows");
    h->outgoing_rows.shape[0] = 1;
    fails(h, "summaries");
    h->summaries.shape[2] = FIXTURE_V;
    fails(h, "summaries");
    h->incoming.shape[0] = 1;
    fails(h, "incoming");
    h->incoming.dl.dtype.bits = 16;
    fails(h, "incoming");
    h->summaries.dl.data = h->f->tensor[ARG_OUT].memory.bytes;
    fails(h, "summaries");
    free(h->f);
    free(h);
}

static void test_backward(void **state) {
    (void)state;
    struct halves *h = calloc(1, sizeof *h);
    halves_new(h);
    const int64_t states[4] = {ROWS, FIXTURE_HV, FIXTURE_V, FIXTURE_K}, one[1] = {1};
    flash_kda_backward_args a = FLASH_KDA_BACKWARD_ARGS_INIT;
    const flash_kda_prefill_args *p = &h->f->args;
    a.q = p->q, a.k = p->k, a.v = p->v, a.g = p->g, a.beta = p->beta, a.cu_seqlens = p->cu_seqlens;
    a.gate = p->gate, a.A_log = p->A_log, a.dt_bias = p->dt_bias, a.lower_bound = p->lower_bound;
    a.d_out = p->out;
    a.phase = FLASH_KDA_PHASE_BEGIN;
    a.incoming_rows = &h->incoming_rows.dl;
    a.outgoing_rows = &h->outgoing_rows.dl;
    a.summaries = &h->summaries.dl;
    a.incoming = &h->incoming.dl;
    size_t bytes = 0;
    /* The summary of prefill's shape is none of backward's. */
    expect_failure("backward", flash_kda_backward_workspace_size(&a, &bytes), FLASH_KDA_ERROR_INVALID_ARGUMENT,
                   "summaries");
    set_tensor(&h->summaries, false, 4, states);
    assert_int_equal(flash_kda_backward_workspace_size(&a, &bytes), FLASH_KDA_OK);
    a.phase = FLASH_KDA_PHASE_FINISH;
    a.incoming = NULL;
    expect_failure("backward", flash_kda_backward_workspace_size(&a, &bytes), FLASH_KDA_ERROR_INVALID_ARGUMENT,
                   "incoming");
    a.incoming = &h->incoming.dl;
    set_tensor(&h->outgoing_rows, true, 1, one);
    expect_failure("backward", flash_kda_backward_workspace_size(&a, &bytes), FLASH_KDA_ERROR_INVALID_ARGUMENT,
                   "incoming");
    a.phase = FLASH_KDA_PHASE_WHOLE;
    expect_failure("backward", flash_kda_backward_workspace_size(&a, &bytes), FLASH_KDA_ERROR_INVALID_ARGUMENT,
                   "outgoing_rows");
    free(h->f);
    free(h);
}

/* ---- Fold -------------------------------------------------------------------------------------------- */

enum { J = 3, R = 2, L = 2, SLOTS = 4 };

struct fold {
    flash_kda_fold_args args;
    struct fixture_tensor bias, transitions, chains, initial, indices, states, prefixes;
};

static void fold_new(struct fold *f) {
    const int64_t bias[4] = {J, FIXTURE_HV, FIXTURE_V, FIXTURE_K},
                  square[4] = {J, FIXTURE_HV, FIXTURE_K, FIXTURE_K};
    const int64_t chains[2] = {R, L}, states[4] = {SLOTS, FIXTURE_HV, FIXTURE_V, FIXTURE_K};
    const int64_t prefixes[5] = {R, L, FIXTURE_HV, FIXTURE_V, FIXTURE_K};
    f->args = (flash_kda_fold_args)FLASH_KDA_FOLD_ARGS_INIT;
    set_tensor(&f->bias, false, 4, bias);
    set_tensor(&f->transitions, false, 4, square);
    set_tensor(&f->chains, true, 2, chains);
    set_tensor(&f->initial, false, 4, states);
    set_tensor(&f->indices, true, 1, chains);
    set_tensor(&f->states, false, 4, states);
    set_tensor(&f->prefixes, false, 5, prefixes);
    f->indices.memory.int32[1] = 3;
    f->args.bias = &f->bias.dl;
    f->args.transitions = &f->transitions.dl;
    f->args.chains = &f->chains.dl;
    f->args.initial_state = &f->initial.dl;
    f->args.state_indices = &f->indices.dl;
    f->args.states = &f->states.dl;
    f->args.prefixes = &f->prefixes.dl;
}

static void fold_fails(struct fold *f, flash_kda_status status, const char *word) {
    char text[200] = "";
    expect_failure("fold", flash_kda_fold(&f->args), status, word);
    expect_failure("fold_describe", flash_kda_fold_describe(&f->args, text, sizeof text), status, word);
    fold_new(f);
}

static void test_fold(void **state) {
    (void)state;
    struct fold *f = calloc(1, sizeof *f);
    const flash_kda_status invalid = FLASH_KDA_ERROR_INVALID_ARGUMENT;
    fold_new(f);
    assert_int_equal(flash_kda_fold(&f->args), FLASH_KDA_OK);
    const DLTensor **const required[] = {&f->args.bias, &f->args.transitions, &f->args.chains};
    static const char *const names[] = {"bias", "transitions", "chains"};
    for (int i = 0; i < 3; i++) {
        *required[i] = NULL;
        fold_fails(f, invalid, names[i]);
    }
    f->args.states = NULL;
    f->args.prefixes = NULL;
    fold_fails(f, invalid, "states");
    f->args.initial_state = f->args.states = NULL;
    fold_fails(f, invalid, "state_indices");
    f->args.struct_size -= 8;
    fold_fails(f, invalid, "struct_size");
    f->args.flags = 2;
    fold_fails(f, invalid, "flags");
    f->args.state_layout = (flash_kda_state_layout)2;
    fold_fails(f, invalid, "state_layout");
    f->args.num_threads = -1;
    fold_fails(f, invalid, "num_threads");
    f->args.backend = (flash_kda_backend)9;
    fold_fails(f, invalid, "backend");
    f->bias.dl.device.device_type = kDLVulkan;
    fold_fails(f, FLASH_KDA_ERROR_UNSUPPORTED, "bias");
    f->bias.dl.dtype.bits = 16;
    fold_fails(f, invalid, "bias");
    f->bias.shape[3] = 257;
    fold_fails(f, invalid, "bias");
    f->transitions.shape[2]--;
    fold_fails(f, invalid, "transitions");
    f->chains.memory.int32[3] = J;
    fold_fails(f, invalid, "chains");
    f->indices.memory.int32[0] = SLOTS;
    fold_fails(f, invalid, "state_indices");
    f->indices.memory.int32[0] = 3;
    fold_fails(f, invalid, "state_indices");
    f->states.shape[0]--;
    fold_fails(f, invalid, "states");
    f->prefixes.shape[1]--;
    fold_fails(f, invalid, "prefixes");
    f->states.dl.data = f->bias.memory.bytes;
    fold_fails(f, invalid, "states");
    f->initial.dl.data = f->states.memory.bytes; /* the very same tensor: in place */
    assert_int_equal(flash_kda_fold(&f->args), FLASH_KDA_OK);
    f->initial.dl.byte_offset = 4;
    fold_fails(f, invalid, "states");
    assert_int_equal(flash_kda_fold(NULL), invalid);
    free(f);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_prefill), cmocka_unit_test(test_backward),
                                       cmocka_unit_test(test_fold)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
