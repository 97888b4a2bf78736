/* SPDX-License-Identifier: MIT */
/* Cases of any size from a captured one: its tokens and heads again and again. */
#include "captured.h"

#include "case_file.h"
#include "failure.h"

#include <string.h>

/* What a random case takes for granted and a file need not. Fails with a sentence where it does not hold. */
static bool fits(const struct kda_case *from, const char *path) {
    const struct tensor *of_tokens[] = {&from->k, &from->v, &from->g, &from->beta};
    const char *wrong = NULL;
    for (size_t i = 0; i < sizeof of_tokens / sizeof of_tokens[0]; i++)
        if (!type_equal(of_tokens[i]->dl.dtype, from->q.dl.dtype))
            wrong = "q, k, v, g and beta of one dtype";
    if (from->gate != FLASH_KDA_GATE_NONE &&
        !(tensor_present(&from->A_log) && tensor_present(&from->dt_bias) &&
          type_equal(from->A_log.dl.dtype, TYPE_FP32) && type_equal(from->dt_bias.dl.dtype, TYPE_FP32)))
        wrong = "A_log and dt_bias, both in fp32";
    if (from->value_heads != from->heads || from->batch != 1 || tensor_present(&from->cu_seqlens))
        wrong = "one sequence with as many value heads as heads";
    if (from->beta_mode != FLASH_KDA_BETA_SIGMOID || from->flags != FLASH_KDA_QK_NORM || from->scale != 0)
        wrong = "beta of sigmoid, normalised q and k, and no scale of its own";
    if (from->tokens == 0 || from->heads == 0)
        wrong = "at least one token and one head";
    if (wrong)
        failed("%s: cannot be repeated: expected %s", path, wrong);
    return !wrong;
}

static bool read_captured(struct kda_case *from, const char *path) {
    if (!case_file_read(path, from))
        return false;
    bool good = fits(from, path);
    if (!good)
        case_free(from);
    return good;
}

bool captured_describe(struct case_spec *spec) {
    struct kda_case from;
    if (!spec->captured)
        return true;
    if (!read_captured(&from, spec->captured))
        return false;
    spec->regime = REGIME_CAPTURED;
    spec->gate = from.gate;
    spec->lower_bound = from.lower_bound;
    spec->dtype = from.q.dl.dtype;
    spec->key_dim = from.key_dim;
    spec->value_dim = from.value_dim;
    spec->value_heads = 0;
    case_free(&from);
    return true;
}

/* ---- Values ------------------------------------------------------------------------------------ */

/* Rows of `row` elements, [count, heads, row] from [from_count, from_heads, row]. */
static void repeat(struct tensor *to, const struct tensor *from, int64_t heads, int64_t from_heads,
                   int64_t row) {
    size_t bytes = (size_t)row * type_size(to->dl.dtype);
    int64_t count = tensor_count(to) / (heads * row), from_count = tensor_count(from) / (from_heads * row);
    for (int64_t t = 0; t < count; t++) {
        for (int64_t h = 0; h < heads; h++) {
            int64_t source = t % from_count * from_heads + h % from_heads;
            memcpy((char *)to->dl.data + (size_t)(t * heads + h) * bytes,
                   (const char *)from->dl.data + (size_t)source * bytes, bytes);
        }
    }
}

static void repeat_all(struct kda_case *c, const struct kda_case *from) {
    const struct {
        struct tensor *to;
        const struct tensor *from;
        int64_t row;
    } parts[] = {
        {&c->q, &from->q, c->key_dim},
        {&c->k, &from->k, c->key_dim},
        {&c->v, &from->v, c->value_dim},
        {&c->g, &from->g, c->key_dim},
        {&c->beta, &from->beta, 1},
        {&c->A_log, &from->A_log, 1},
        {&c->dt_bias, &from->dt_bias, c->key_dim},
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        if (tensor_present(parts[i].to))
            repeat(parts[i].to, parts[i].from, c->heads, from->heads, parts[i].row);
}

bool captured_generate(struct kda_case *c, const struct case_spec *spec) {
    struct kda_case from;
    if (!spec->captured)
        return case_generate(c, spec);
    if (!read_captured(&from, spec->captured))
        return false;
    bool good = case_generate(c, spec);
    if (good)
        repeat_all(c, &from);
    case_free(&from);
    return good;
}
