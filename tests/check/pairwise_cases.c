/* SPDX-License-Identifier: MIT */
/* All options against each other: every two values of any two options meet in some case, of prefill and of decode. */
#include "decode_case.h"
#include "decode_families.h"
#include "pairwise.h"
#include "pairwise_values.h"
#include "prefill_compare.h"
#include "prefill_families.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

/* ---- Values ------------------------------------------------------------------------------------ */

static const int64_t key_dims[] = {1, 8, 20, 64, 100, 128, 256}, value_dims[] = {1, 7, 64, 100, 128, 200};
static const int64_t intervals[] = {1, 16, 50};
static const char *const checkpoint_names[] = {"none", "every", "fewer", "offsets", "offsets x3", "indexed"};

static const char *const flag_names[] = {"", ", fresh by bool", ", fresh by int8", ", fresh by int32"};
static const int decode_gates[] = {0, 1, 2, 4, 7, 8};

static const struct {
    enum storage initial, final;
    const char *name;
} states[] = {
    {STORAGE_NONE, STORAGE_NONE, "no state"},         {STORAGE_NONE, STORAGE_FP32, "0->fp32"},
    {STORAGE_NONE, STORAGE_BF16, "0->bf16"},          {STORAGE_FP32, STORAGE_NONE, "fp32->0"},
    {STORAGE_BF16, STORAGE_NONE, "bf16->0"},          {STORAGE_FP32, STORAGE_FP32, "fp32->fp32"},
    {STORAGE_FP32, STORAGE_BF16, "fp32->bf16"},       {STORAGE_BF16, STORAGE_FP32, "bf16->fp32"},
    {STORAGE_BF16, STORAGE_BF16, "bf16->bf16"},       {STORAGE_FP32, STORAGE_IN_PLACE, "fp32 in place"},
    {STORAGE_BF16, STORAGE_IN_PLACE, "bf16 in place"}};

struct sequences {
    enum packing packing;
    int count;
    int64_t lengths[MAX_SEQUENCES];
    const char *name;
};
static const struct sequences prefill_batches[] = {{PACKING_DENSE, 1, {70}, "1x70"},
                                                   {PACKING_DENSE, 3, {35, 35, 35}, "3x35"},
                                                   {PACKING_INT32, 4, {17, 0, 65, 1}, "17 0 65 1 int32"},
                                                   {PACKING_INT64, 3, {0, 33, 90}, "0 33 90 int64"},
                                                   {PACKING_INT64, 2, {5, 2}, "5 2 int64"}},
                              decode_batches[] = {{PACKING_DENSE, 1, {1}, "1x1"},
                                                  {PACKING_DENSE, 5, {1, 1, 1, 1, 1}, "5x1"},
                                                  {PACKING_DENSE, 3, {4, 4, 4}, "3x4"},
                                                  {PACKING_INT32, 4, {2, 0, 5, 1}, "2 0 5 1 int32"},
                                                  {PACKING_INT64, 3, {0, 16, 9}, "0 16 9 int64"}};

/* How decode's states are addressed and what is written. */
static const struct {
    bool pool;
    int64_t columns;
    bool num_accepted, accepted, keep_state, no_out;
    const char *name;
} ways[] = {{false, 0, false, false, false, false, "slot n"},
            {true, 0, false, false, false, false, "pool"},
            {true, 16, false, false, false, false, "a slot a token"},
            {true, 16, true, false, false, false, "verify"},
            {true, 16, true, true, false, false, "verify, accepted"},
            {true, 0, false, false, true, false, "state kept"},
            {true, 16, true, false, true, false, "verify, state kept"},
            {true, 0, false, true, false, true, "commit"},
            {false, 0, false, true, false, false, "accepted"}};

/* ---- Options ----------------------------------------------------------------------------------- */

/* A case in the making, and what its values are called. */
struct pick {
    struct decode_case d; /* of prefill: d.tokens */
    const char *gate, *beta, *batch, *states, *checkpoints, *spacing, *way;
};

static DLDataType float_type(int x) { return x == 0 ? TYPE_FP32 : x == 1 ? TYPE_FP16 : TYPE_BF16; }

static void set_gate(struct pick *p, int x) {
    p->d.tokens.gate = gates[x].gate;
    p->d.tokens.A_log = gates[x].A_log;
    p->d.tokens.dt_bias = gates[x].dt_bias;
    p->gate = gates[x].name;
}

static void set_beta(struct pick *p, int x) {
    p->d.tokens.beta_mode = (flash_kda_beta)x;
    p->beta = beta_names[x];
}

static void set_batch(struct pick *p, const struct sequences *batch) {
    p->d.tokens.packing = batch->packing;
    p->d.tokens.sequences = batch->count;
    memcpy(p->d.tokens.lengths, batch->lengths, sizeof batch->lengths);
    p->batch = batch->name;
}

static void set_states(struct pick *p, int x) {
    p->d.tokens.initial = states[x].initial;
    p->d.tokens.final = states[x].final;
    p->states = states[x].name;
}

static void set_checkpoints(struct pick *p, int x) {
    p->d.tokens.checkpoints = (enum checkpoints)x;
    p->checkpoints = checkpoint_names[x];
}

static void set_inputs(struct pick *p, int x) {
    p->d.tokens.inputs = (enum spacing)x;
    p->spacing = spacing_names[x];
}

static void set_way(struct pick *p, int x) {
    p->d.tokens.pool = ways[x].pool;
    p->d.columns = ways[x].columns;
    p->d.num_accepted = ways[x].num_accepted;
    p->d.accepted = ways[x].accepted;
    p->d.keep_state = ways[x].keep_state;
    p->d.no_out = ways[x].no_out;
    p->way = ways[x].name;
}

#define SETTER(name, member, value) \
    static void set_##name(struct pick *p, int x) { p->d.member = value; }
SETTER(norm, tokens.qk_norm, x)
SETTER(scale, tokens.scale, scales[x])
SETTER(ratio, tokens.group, ratios[x])
SETTER(layout, tokens.layout, (flash_kda_state_layout)x)
SETTER(pool, tokens.pool, x)
SETTER(interval, tokens.every, intervals[x])
SETTER(checkpoint_type, tokens.checkpoints_bf16, x)
SETTER(index_type, tokens.wide_indices, x)
SETTER(flags, tokens.flags, (enum flags)x)
SETTER(padding, tokens.padding_slot, x)
SETTER(state_type, state_type, float_type(x))
SETTER(q_type, tokens.q_type, float_type(x))
SETTER(k_type, tokens.k_type, float_type(x))
SETTER(v_type, tokens.v_type, float_type(x))
SETTER(g_type, tokens.g_type, float_type(x))
SETTER(beta_type, tokens.beta_type, float_type(x))
SETTER(out_type, tokens.out_type, float_type(x))
SETTER(parameter_type, tokens.parameter_type, float_type(x))
SETTER(key_dim, tokens.K, key_dims[x])
SETTER(value_dim, tokens.V, value_dims[x])
SETTER(outputs, tokens.outputs, (enum spacing)x)
SETTER(threads, tokens.threads, thread_counts[x])
SETTER(invariant, tokens.batch_invariant, x)
SETTER(heads, tokens.H, 1 + x)
static void set_prefill_batch(struct pick *p, int x) { set_batch(p, &prefill_batches[x]); }
static void set_decode_batch(struct pick *p, int x) { set_batch(p, &decode_batches[x]); }
static void set_decode_gate(struct pick *p, int x) { set_gate(p, decode_gates[x]); }

struct option {
    int count; /* of values */
    void (*set)(struct pick *p, int x);
};

#define TYPES                                                                                                  \
    {3, set_q_type}, {3, set_k_type}, {3, set_v_type}, {3, set_g_type}, {3, set_beta_type}, {3, set_out_type}, \
    {                                                                                                          \
        3, set_parameter_type                                                                                  \
    }
#define SHAPES                                                                                              \
    {COUNT(key_dims), set_key_dim}, {COUNT(value_dims), set_value_dim}, {COUNT(spacing_names), set_inputs}, \
        {COUNT(spacing_names) - 1, set_outputs} /* nothing is written twice: no repeat */, {                \
        COUNT(thread_counts), set_threads                                                                   \
    }

static const struct option prefill_options[] = {{COUNT(gates), set_gate},
                                                {2, set_norm},
                                                {3, set_beta},
                                                {COUNT(scales), set_scale},
                                                {COUNT(ratios), set_ratio},
                                                {COUNT(prefill_batches), set_prefill_batch},
                                                {COUNT(states), set_states},
                                                {2, set_layout},
                                                {2, set_pool},
                                                {COUNT(checkpoint_names), set_checkpoints},
                                                {COUNT(intervals), set_interval},
                                                {2, set_checkpoint_type},
                                                {2, set_index_type},
                                                {COUNT(flag_names), set_flags},
                                                {2, set_padding},
                                                TYPES,
                                                SHAPES,
                                                {2, set_invariant},
                                                {2, set_heads}},
                           decode_options[] = {{COUNT(decode_gates), set_decode_gate},
                                               {2, set_norm},
                                               {3, set_beta},
                                               {COUNT(scales), set_scale},
                                               {COUNT(ratios), set_ratio},
                                               {COUNT(decode_batches), set_decode_batch},
                                               {COUNT(ways), set_way},
                                               {2, set_layout},
                                               {2, set_index_type},
                                               {COUNT(flag_names), set_flags},
                                               {2, set_padding},
                                               {3, set_state_type},
                                               TYPES,
                                               SHAPES,
                                               {2, set_heads}};

/* What does not go together in prefill: slots need a state, checkpoint indices need packed sequences. */
static bool prefill_forbids(int a, int x, int b, int y) {
    void (*first)(struct pick *, int) = prefill_options[a].set,
                                 (*second)(struct pick *, int) = prefill_options[b].set;
    if (first == set_states && second == set_pool)
        return x == 0 && y == 1;
    if (first == set_prefill_batch && second == set_checkpoints)
        return prefill_batches[x].packing == PACKING_DENSE && y == CHECKPOINTS_INDEXED;
    return false;
}

static bool decode_forbids(int a, int x, int b, int y) {
    (void)a, (void)x, (void)b, (void)y;
    return false;
}

/* ---- Cases ------------------------------------------------------------------------------------- */

static void name_prefill(struct pick *p, int number, const char *variant) {
    struct prefill_case *c = &p->d.tokens;
    snprintf(c->name, sizeof c->name,
             "pairwise %d%s: gate %s, beta %s, %s, H %lld x%lld, K %lld, V %lld, %s%s%s, checkpoints %s, %s",
             number, variant, p->gate, p->beta, p->batch, (long long)c->H, (long long)c->group, (long long)c->K,
             (long long)c->V, p->states, c->pool ? " in a pool" : "", flag_names[c->flags], p->checkpoints,
             p->spacing);
}

/* Twice: with its own dtypes, and with q, k, v and out in bf16, which a level may treat apart. */
static void compare_prefill(struct check *check, struct pick *p, int number) {
    struct prefill_case *c = &p->d.tokens;
    name_prefill(p, number, "");
    prefill_compare(check, c);
    if (check->quick)
        return;
    c->q_type = c->k_type = c->v_type = c->out_type = TYPE_BF16;
    name_prefill(p, number, " in bf16");
    prefill_compare(check, c);
}

static void compare_decode(struct check *check, struct pick *p, int number) {
    struct prefill_case *c = &p->d.tokens;
    (void)number;
    snprintf(c->name, sizeof c->name,
             "gate %s, beta %s, %s, H %lld x%lld, K %lld, V %lld, %s, %s, %s state%s, %s", p->gate, p->beta,
             p->batch, (long long)c->H, (long long)c->group, (long long)c->K, (long long)c->V, p->way,
             p->spacing, type_name(p->d.state_type), flag_names[c->flags], c->layout ? "K first" : "V first");
    decode_compare(check, &p->d);
}

/* An operation: its options, and what is done with a case. */
struct cover {
    const char *name; /* of its random numbers */
    const struct option *options;
    int count;
    bool (*forbids)(int a, int x, int b, int y);
    void (*compare)(struct check *check, struct pick *p, int number);
};

static void run_cover(struct check *check, const struct cover *cover, const struct decode_case *plain) {
    int sizes[PAIRWISE_MAX_DIMS], count, pairs;
    char name[80], text[100];
    for (int d = 0; d < cover->count; d++)
        sizes[d] = cover->options[d].count;
    const struct pairwise p = {cover->count, sizes, cover->forbids};
    struct random r = random_named(check->seed, cover->name);
    int *rows = pairwise_rows(&p, &r, &count);
    int missing = pairwise_missing(&p, rows, count, &pairs);
    snprintf(name, sizeof name, "%s cover", cover->name);
    snprintf(text, sizeof text, "%d cases cover %d pairs, %d wrong", count, pairs, missing);
    if (check_wanted(check, name))
        check_report(check, missing == 0 && pairs > 0, "-", name, text);
    for (int i = 0; i < count; i += check->quick ? 3 : 1) {
        struct pick pick = {.d = *plain};
        for (int d = 0; d < cover->count; d++)
            cover->options[d].set(&pick, rows[i * cover->count + d]);
        cover->compare(check, &pick, i);
    }
    free(rows);
}

void prefill_pairwise(struct check *check) {
    const struct cover cover = {"pairwise", prefill_options, COUNT(prefill_options), prefill_forbids,
                                compare_prefill};
    const struct decode_case plain = {.tokens = prefill_case_plain()};
    run_cover(check, &cover, &plain);
}

void decode_pairwise(struct check *check) {
    const struct cover cover = {"decode pairwise", decode_options, COUNT(decode_options), decode_forbids,
                                compare_decode};
    const struct decode_case plain = decode_case_plain();
    run_cover(check, &cover, &plain);
}
