/* SPDX-License-Identifier: MIT */
/* Random cases: the regimes that KDA kernels are measured on. */
#include "generate.h"

#include "failure.h"
#include "parallel.h"
#include "random.h"

#include <errno.h>
#include <flash_kda.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REPEAT_TOKENS = 16 /* v of near-collinear */, FILL_BLOCK = 1 << 16 };

const char *const regime_names[] = {
    [REGIME_STRONG] = "strong",     [REGIME_SLOW] = "slow",
    [REGIME_UNIFORM] = "uniform",   [REGIME_NEAR_COLLINEAR] = "near-collinear",
    [REGIME_CAPTURED] = "captured", NULL,
};

/* ---- Lengths ----------------------------------------------------------------------------------- */

/* Takes the next length from the text; false at its end or where it is no number. */
static bool next_length(const char **text, int64_t *length) {
    char *end = NULL;
    if (**text < '0' || **text > '9')
        return false;
    errno = 0;
    *length = strtoll(*text, &end, 10);
    if (errno != 0 || (*end != ',' && *end != '\0'))
        return false;
    *text = *end == ',' ? end + 1 : end;
    return true;
}

/* The number of lengths, or -1; their sum to *tokens. */
static int64_t read_lengths(const char *text, int64_t *tokens) {
    int64_t count = 0, length = 0;
    *tokens = 0;
    while (next_length(&text, &length)) {
        count++;
        if (__builtin_add_overflow(*tokens, length, tokens))
            return -1;
    }
    bool complete = count > 0 && *text == '\0' && text[-1] != ',';
    return complete ? count : -1;
}

int64_t case_spec_tokens(const struct case_spec *spec) {
    int64_t tokens = spec->tokens;
    return spec->lengths && read_lengths(spec->lengths, &tokens) < 0 ? -1 : tokens;
}

static void fill_cu_seqlens(struct kda_case *c, const char *lengths) {
    int64_t *values = c->cu_seqlens.dl.data, length = 0;
    for (int64_t n = 1; next_length(&lengths, &length); n++)
        values[n] = values[n - 1] + length;
}

/* ---- Memory ------------------------------------------------------------------------------------ */

static bool allocate(struct kda_case *c, const struct case_spec *spec) {
    const int64_t qk[] = {c->batch, c->tokens, c->heads, c->key_dim};
    const int64_t v[] = {c->batch, c->tokens, c->value_heads, c->value_dim};
    const int64_t g[] = {c->batch, c->tokens, c->value_heads, c->key_dim};
    const int64_t cu_seqlens[] = {c->sequences + 1};
    int64_t state[TENSOR_MAX_DIMS];
    case_state_shape(c, state);
    bool gated = spec->gate != FLASH_KDA_GATE_NONE;
    return tensor_alloc(&c->q, spec->dtype, 4, qk) && tensor_alloc(&c->k, spec->dtype, 4, qk) &&
           tensor_alloc(&c->v, spec->dtype, 4, v) && tensor_alloc(&c->g, spec->dtype, 4, g) &&
           tensor_alloc(&c->beta, spec->dtype, 3, g) &&
           (!gated ||
            (tensor_alloc(&c->A_log, TYPE_FP32, 1, g + 2) && tensor_alloc(&c->dt_bias, TYPE_FP32, 2, g + 2))) &&
           (!spec->initial_state ||
            tensor_alloc(&c->initial_state, c->bf16_state ? TYPE_BF16 : TYPE_FP32, 4, state)) &&
           (!spec->lengths || tensor_alloc(&c->cu_seqlens, TYPE_INT64, 1, cu_seqlens));
}

/* ---- Values ------------------------------------------------------------------------------------ */

struct normal_fill {
    struct tensor *tensor;
    struct random stream;
    double mean;
    int threads;
};

/* Every `threads`-th block, from the one numbered i. */
static void fill_blocks(void *context, int i) {
    const struct normal_fill *fill = context;
    int64_t count = tensor_count(fill->tensor), step = (int64_t)fill->threads * FILL_BLOCK;
    for (int64_t first = (int64_t)i * FILL_BLOCK; first < count; first += step) {
        struct random block = random_after_normal(fill->stream, first);
        for (int64_t j = first; j < count && j < first + FILL_BLOCK; j++)
            tensor_set(fill->tensor, j, fill->mean + random_normal(&block));
    }
}

/* In blocks, on all threads: a case for a GPU has 10^9 numbers. */
static void fill_normal(struct tensor *tensor, struct random stream, double mean) {
    int64_t blocks = tensor_count(tensor) / FILL_BLOCK + 1;
    int threads = flash_kda_cpu_threads();
    threads = threads < blocks ? threads : (int)blocks;
    struct normal_fill fill = {tensor, stream, mean, threads > 0 ? threads : 1};
    parallel_run(fill.threads, fill_blocks, &fill);
}

static void fill_uniform(struct tensor *tensor, struct random stream) {
    for (int64_t i = 0, count = tensor_count(tensor); i < count; i++)
        tensor_set(tensor, i, random_uniform(&stream, 0, 1));
}

/* Every REPEAT_TOKENS tokens the same. */
static void fill_repeating(struct tensor *tensor, struct random stream) {
    int64_t period = REPEAT_TOKENS * tensor->shape[2] * tensor->shape[3];
    for (int64_t i = 0, count = tensor_count(tensor); i < count; i++)
        tensor_set(tensor, i, i < period ? random_normal(&stream) : tensor_get(tensor, i - period));
}

static void fill_parameters(struct kda_case *c, const struct case_spec *spec) {
    if (spec->regime == REGIME_NEAR_COLLINEAR || spec->regime == REGIME_CAPTURED)
        return; /* both 0 */
    fill_uniform(&c->A_log, random_named(spec->seed, "A_log"));
    if (spec->regime != REGIME_SLOW)
        fill_uniform(&c->dt_bias, random_named(spec->seed, "dt_bias"));
}

static void fill_tokens(struct kda_case *c, const struct case_spec *spec) {
    struct random q = random_named(spec->seed, "q"), k = random_named(spec->seed, "k"),
                  v = random_named(spec->seed, "v"), g = random_named(spec->seed, "g"),
                  beta = random_named(spec->seed, "beta");
    switch (spec->regime) {
    case REGIME_NEAR_COLLINEAR:
        tensor_fill(&c->q, 1);
        tensor_fill(&c->k, 1);
        fill_repeating(&c->v, v);
        tensor_fill(&c->g, -12);
        tensor_fill(&c->beta, 8);
        return;
    case REGIME_UNIFORM:
        fill_uniform(&c->q, q);
        fill_uniform(&c->k, k);
        fill_uniform(&c->v, v);
        tensor_fill(&c->g, spec->constant_g);
        break;
    case REGIME_CAPTURED:
        return;
    case REGIME_STRONG:
    case REGIME_SLOW:
        fill_normal(&c->q, q, 0);
        fill_normal(&c->k, k, 0);
        fill_normal(&c->v, v, 0);
        fill_normal(&c->g, g, spec->regime == REGIME_SLOW ? -7 : 0);
        break;
    }
    fill_normal(&c->beta, beta, 0);
}

/* Gate none: the raw gates become the log decays that the sigmoid gate makes of them. */
static void replace_g_by_decay(struct kda_case *c, const struct case_spec *spec) {
    for (int64_t i = 0, count = tensor_count(&c->g); i < count; i++)
        tensor_set(&c->g, i, spec->lower_bound / (1 + exp(-tensor_get(&c->g, i))));
}

static void fill(struct kda_case *c, const struct case_spec *spec) {
    fill_tokens(c, spec);
    if (spec->gate == FLASH_KDA_GATE_NONE)
        replace_g_by_decay(c, spec);
    else
        fill_parameters(c, spec);
    if (spec->initial_state)
        fill_normal(&c->initial_state, random_named(spec->seed, "initial_state"), 0);
    if (spec->lengths)
        fill_cu_seqlens(c, spec->lengths);
}

bool case_generate(struct kda_case *c, const struct case_spec *spec) {
    int64_t tokens = spec->tokens, sequences = spec->batch;
    if (spec->lengths)
        sequences = read_lengths(spec->lengths, &tokens);
    *c = (struct kda_case){.batch = spec->batch,
                           .tokens = tokens,
                           .heads = spec->heads,
                           .value_heads = spec->value_heads ? spec->value_heads : spec->heads,
                           .key_dim = spec->key_dim,
                           .value_dim = spec->value_dim,
                           .sequences = sequences,
                           .without_batch = spec->batch == 1,
                           .without_sequences = spec->batch == 1 && !spec->lengths,
                           .gate = spec->gate,
                           .lower_bound = spec->lower_bound,
                           .beta_mode = FLASH_KDA_BETA_SIGMOID,
                           .flags = FLASH_KDA_QK_NORM,
                           .state_layout = FLASH_KDA_STATE_V_FIRST,
                           .bf16_state = spec->bf16_state,
                           .checkpoint_every = spec->checkpoint_every,
                           .fused = spec->fused};
    if (spec->batch_invariant)
        c->flags |= FLASH_KDA_BATCH_INVARIANT;
    snprintf(c->regime, sizeof c->regime, "%s", regime_names[spec->regime]);
    if (!allocate(c, spec)) {
        failed("out of memory for a case of %lld tokens", (long long)tokens);
        case_free(c);
        return false;
    }
    fill(c, spec);
    return true;
}

void case_spec_name(const struct case_spec *spec, char *name, size_t size) {
    int64_t tokens = spec->tokens, sequences = 0;
    if (spec->lengths)
        sequences = read_lengths(spec->lengths, &tokens);
    char batch[32] = "", value_heads[32] = "", dims[64] = "", every[32] = "";
    if (sequences > 0)
        snprintf(batch, sizeof batch, "N%lld-", (long long)sequences);
    else if (spec->batch > 1)
        snprintf(batch, sizeof batch, "B%lld-", (long long)spec->batch);
    if (spec->value_heads && spec->value_heads != spec->heads)
        snprintf(value_heads, sizeof value_heads, "-HV%lld", (long long)spec->value_heads);
    if (spec->key_dim != 128 || spec->value_dim != 128)
        snprintf(dims, sizeof dims, "-K%lld-V%lld", (long long)spec->key_dim, (long long)spec->value_dim);
    if (spec->checkpoint_every)
        snprintf(every, sizeof every, "-every%lld", (long long)spec->checkpoint_every);
    snprintf(name, size, "%sT%lld-H%lld%s%s-%s-%s%s%s%s%s", batch, (long long)tokens, (long long)spec->heads,
             value_heads, dims, gate_names[spec->gate], regime_names[spec->regime],
             spec->bf16_state ? "-bf16state" : "", every, spec->batch_invariant ? "-invariant" : "",
             spec->fused ? "-fused" : "");
}
