/* SPDX-License-Identifier: MIT */
/* Ranges of all chains end to end: is every chunk in one of them, and does everybody see the same splits? */
#include "cuda/stream_k.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

enum { SEQUENCES = 9, HEADS = 3 };

static struct kda_prefill whole(int64_t batches, int64_t tokens) {
    return (struct kda_prefill){.batches = batches,
                                .tokens = tokens,
                                .sequences = batches,
                                .heads = HEADS,
                                .value_heads = HEADS,
                                .checkpoint_every = KDA_CUDA_CHUNK, /* of which there are none */
                                .key_dim = 128,
                                .value_dim = 128};
}

static struct kda_tensor indices(int64_t *data, int64_t count) {
    return (struct kda_tensor){
        .data = (char *)data, .dtype = KDA_I64, .rank = 1, .shape = {count}, .stride = {sizeof *data}};
}

/* Walks all ranges; every chunk that is to be worked is met once, in order, and splits fit. */
static void check(const struct kda_prefill *p, int ranges) {
    static int met[SEQUENCES][HEADS];
    static bool split[SEQUENCES][HEADS];
    struct kda_stream_k stream_k = kda_split_evenly(p, ranges);
    for (int n = 0; n < p->sequences; n++)
        for (int h = 0; h < HEADS; h++)
            met[n][h] = 0, split[n][h] = false;
    assert_in_range(stream_k.ranges, 1, ranges);
    assert_int_equal(kda_split_evenly(p, stream_k.ranges).ranges, stream_k.ranges); /* asked for again */
    for (int range = 0; range < stream_k.ranges; range++) {
        struct kda_slice s = {.n = 0};
        kda_first_slice(p, &stream_k, range, &s);
        for (bool first = true; first || kda_next_slice(p, &stream_k, range, &s); first = false) {
            assert_in_range(s.n, 0, p->sequences - 1);
            assert_in_range(s.head, 0, HEADS - 1);
            if (s.begin == s.end)
                continue;
            assert_int_equal(met[s.n][s.head], s.begin);
            assert_true(s.begin < s.end && s.end <= s.chunks);
            assert_true(s.end == s.chunks || s.end < s.chunks - 1); /* the last one is never alone */
            assert_true(kda_split_before(&s) == (s.begin > 0) && (first || !kda_split_before(&s)));
            assert_true(s.begin == 0 || split[s.n][s.head]); /* said by the chain's first slice */
            met[s.n][s.head] = s.end;
            split[s.n][s.head] = split[s.n][s.head] || kda_split_after(&s);
        }
    }
    for (int n = 0; n < p->sequences; n++)
        for (int h = 0; h < HEADS; h++) {
            struct kda_sequence sequence = kda_sequence(p, n);
            int64_t chunks = sequence.slot < 0 ? 0 : kda_chunk_count(p, n, sequence.length);
            assert_int_equal(met[n][h], chunks);
        }
}

static void check_all_counts(const struct kda_prefill *p) {
    int length = kda_split_evenly(p, 1).length;
    for (int ranges = 1; ranges <= length / 2 && ranges <= 132; ranges++)
        check(p, ranges);
}

static void test_batches(void **state) {
    (void)state;
    const int64_t lengths[] = {1, 31, 32, 33, 64, 65, 96, 500, 1024, 2048};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (int batches = 1; batches <= 3; batches++) {
            struct kda_prefill p = whole(batches, lengths[i]);
            check_all_counts(&p);
        }
}

/* Where it makes ranges hardly longer, a range has chunks of one chain alone. */
static void test_chains_begin_with_ranges(void **state) {
    (void)state;
    const struct {
        int64_t heads, tokens;
        int ranges, longest;
        bool alone;
    } cases[] = {{8, 4096, 128, 8, true},    {12, 2048, 132, 6, true},  {16, 2048, 128, 8, true},
                 {10, 3072, 120, 8, true},   {32, 8192, 128, 64, true}, {24, 8192, 132, 48, false},
                 {96, 8192, 132, 188, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct kda_prefill p = whole(1, cases[i].tokens);
        p.heads = p.value_heads = cases[i].heads;
        struct kda_stream_k stream_k = kda_split_evenly(&p, 132);
        assert_int_equal(stream_k.ranges, cases[i].ranges);
        int shared = 0;
        for (int range = 0; range < stream_k.ranges; range++) {
            struct kda_slice s = {.n = 0};
            int chunks = 0, slices = 0;
            kda_first_slice(&p, &stream_k, range, &s);
            do
                chunks += s.end - s.begin, slices += s.end > s.begin;
            while (kda_next_slice(&p, &stream_k, range, &s));
            assert_in_range(chunks, 1, cases[i].longest);
            shared += slices > 1;
        }
        assert_int_equal(shared == 0, cases[i].alone);
    }
}

static uint32_t draw(uint32_t *seed, uint32_t below) {
    *seed = *seed * 1664525U + 1013904223U;
    return (*seed >> 8) % below;
}

static void test_packed(void **state) {
    (void)state;
    uint32_t seed = 1;
    for (int round = 0; round < 50; round++) {
        int64_t starts[SEQUENCES + 1] = {0}, slots[SEQUENCES];
        int64_t count = 1 + draw(&seed, SEQUENCES);
        for (int n = 0; n < count; n++) {
            starts[n + 1] = starts[n] + draw(&seed, draw(&seed, 4) ? 700 : 3); /* some without tokens */
            slots[n] = round % 2 && draw(&seed, 4) == 0 ? -1 : n;              /* some padding */
        }
        struct kda_prefill p = whole(1, starts[count]);
        p.sequences = count;
        p.cu_seqlens = indices(starts, count + 1);
        p.state_indices = indices(slots, count);
        p.initial_state.data = (char *)starts; /* never read */
        p.initial_state.shape[0] = p.slots = count;
        if (p.tokens)
            check_all_counts(&p);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_batches),
                                       cmocka_unit_test(test_chains_begin_with_ranges),
                                       cmocka_unit_test(test_packed)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
