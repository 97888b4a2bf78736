/* SPDX-License-Identifier: MIT */
/* A KDA problem as a safetensors file: docs/file-format.md. */
#include "case_file.h"

#include "file.h"
#include "safetensors.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a file means that does not say. */
static const double default_lower_bound = -5;

static const struct {
    enum safetensors_dtype file;
    const DLDataType *memory;
} dtypes[] = {
    {SAFETENSORS_F32, &TYPE_FP32},  {SAFETENSORS_F16, &TYPE_FP16},  {SAFETENSORS_BF16, &TYPE_BF16},
    {SAFETENSORS_I32, &TYPE_INT32}, {SAFETENSORS_I64, &TYPE_INT64},
};

/* ---- Reading ----------------------------------------------------------------------------------- */

struct source {
    const char *path;
    struct safetensors file;
};

/* Always false, for the caller to return. */
__attribute__((format(printf, 2, 3))) static bool fail(const struct source *source, const char *format, ...) {
    char text[512];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    return failed("%s: %s", source->path, text);
}

static const DLDataType *memory_dtype(enum safetensors_dtype dtype) {
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (dtypes[i].file == dtype)
            return dtypes[i].memory;
    return NULL;
}

/* How a tensor of the file is taken: with or without its leading dimension (B or N, then 1). */
struct expectation {
    const char *name;
    int rank; /* in memory; one less where the file leaves out the leading dimension */
    bool bare, integer, optional;
};

static bool load(const struct source *source, const struct expectation *expected, struct tensor *tensor) {
    const struct safetensors_tensor *found = safetensors_find(&source->file, expected->name);
    if (!found)
        return expected->optional || fail(source, "has no tensor '%s'", expected->name);
    const DLDataType *dtype = memory_dtype(found->dtype);
    if (!dtype || (dtype->code == kDLInt) != expected->integer) {
        return fail(source, "tensor '%s' is %s, expected %s", expected->name,
                    safetensors_dtype_name(found->dtype),
                    expected->integer ? "I32 or I64" : "F32, F16 or BF16");
    }
    int rank = expected->rank - (expected->bare ? 1 : 0);
    if (found->rank != rank)
        return fail(source, "tensor '%s' has %d dimensions, expected %d", expected->name, found->rank, rank);
    int64_t shape[TENSOR_MAX_DIMS] = {1};
    memcpy(shape + (expected->bare ? 1 : 0), found->shape, sizeof *shape * (size_t)rank);
    if (!tensor_alloc(tensor, *dtype, expected->rank, shape))
        return fail(source, "out of memory for tensor '%s'", expected->name);
    memcpy(tensor->dl.data, found->data, found->size); /* in the file it may lie at any byte */
    return true;
}

static bool load_tensors(const struct source *source, struct kda_case *c) {
    const struct safetensors_tensor *q = safetensors_find(&source->file, "q");
    bool packed = safetensors_find(&source->file, "cu_seqlens") != NULL;
    if (q && q->rank != 3 && q->rank != 4)
        return fail(source, "tensor 'q' has %d dimensions, expected [T, H, K] or [B, T, H, K]", q->rank);
    bool no_batch = q && q->rank == 3, no_sequences = no_batch && !packed;
    c->without_batch = no_batch;
    c->without_sequences = no_sequences;
    const struct {
        struct expectation expected;
        struct tensor *tensor;
    } parts[] = {
        {{"q", 4, .bare = no_batch}, &c->q},
        {{"k", 4, .bare = no_batch}, &c->k},
        {{"v", 4, .bare = no_batch}, &c->v},
        {{"g", 4, .bare = no_batch}, &c->g},
        {{"beta", 3, .bare = no_batch}, &c->beta},
        {{"A_log", 1, .optional = true}, &c->A_log},
        {{"dt_bias", 2, .optional = true}, &c->dt_bias},
        {{"cu_seqlens", 1, .integer = true, .optional = true}, &c->cu_seqlens},
        {{"initial_state", 4, .bare = no_sequences, .optional = true}, &c->initial_state},
        {{"o", 4, .bare = no_batch, .optional = true}, &c->expected_out},
        {{"state", 4, .bare = no_sequences, .optional = true}, &c->expected_state},
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        if (!load(source, &parts[i].expected, parts[i].tensor))
            return false;
    return true;
}

static bool read_sizes(const struct source *source, struct kda_case *c) {
    c->batch = c->q.shape[0];
    c->tokens = c->q.shape[1];
    c->heads = c->q.shape[2];
    c->key_dim = c->q.shape[3];
    c->value_heads = c->v.shape[2];
    c->value_dim = c->v.shape[3];
    c->sequences = c->batch;
    if (tensor_present(&c->cu_seqlens)) {
        if (c->cu_seqlens.shape[0] < 1)
            return fail(source, "tensor 'cu_seqlens' is empty, expected N + 1 numbers from 0 to T");
        c->sequences = c->cu_seqlens.shape[0] - 1;
    }
    return true;
}

/* Metadata of that key; NULL where the file is silent or says "". */
static const char *said(const struct source *source, const char *key) {
    const char *value = safetensors_metadata(&source->file, key);
    return value && *value ? value : NULL;
}

static bool read_number(const struct source *source, const char *key, double *number) {
    const char *text = said(source, key);
    if (!text)
        return true;
    char *end = NULL;
    *number = strtod(text, &end);
    return (*end == '\0' && isfinite(*number)) ||
           fail(source, "metadata %s is '%.32s', expected a finite number", key, text);
}

/* names: what the key may say; *index keeps its value where the file is silent. */
static bool read_name(const struct source *source, const char *key, const char *const *names, int *index) {
    const char *text = said(source, key);
    if (!text)
        return true;
    *index = name_index(names, text);
    if (*index >= 0)
        return true;
    char list[64] = "";
    for (int i = 0; names[i]; i++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "", names[i]);
    return fail(source, "metadata %s is '%.32s', expected one of: %s", key, text, list);
}

static bool read_gate(const struct source *source, struct kda_case *c) {
    int gate = -1;
    if (!read_name(source, "gate", gate_names, &gate))
        return false;
    if (gate < 0)
        return fail(source, "metadata does not say the gate: none, softplus or sigmoid");
    c->gate = (flash_kda_gate)gate;
    if (c->gate != FLASH_KDA_GATE_SIGMOID && said(source, "lower_bound")) {
        return fail(source, "metadata lower_bound is '%.32s', but the gate is %s: only sigmoid has one",
                    said(source, "lower_bound"), gate_names[gate]);
    }
    c->lower_bound = default_lower_bound;
    return read_number(source, "lower_bound", &c->lower_bound);
}

static bool read_metadata(const struct source *source, struct kda_case *c) {
    static const char *const flag_names[] = {"false", "true", NULL};
    int beta = FLASH_KDA_BETA_SIGMOID, layout = FLASH_KDA_STATE_V_FIRST, qk_norm = 1;
    if (!read_gate(source, c) || !read_number(source, "scale", &c->scale) ||
        !read_name(source, "beta", beta_names, &beta) ||
        !read_name(source, "state_layout", state_layout_names, &layout) ||
        !read_name(source, "qk_norm", flag_names, &qk_norm))
        return false;
    c->beta_mode = (flash_kda_beta)beta;
    c->state_layout = (flash_kda_state_layout)layout;
    c->flags = qk_norm ? FLASH_KDA_QK_NORM : 0;
    const char *regime = said(source, "regime");
    snprintf(c->regime, sizeof c->regime, "%s", regime ? regime : "");
    return true;
}

static bool check_shape(const struct source *source, const char *name, const struct tensor *tensor,
                        const int64_t shape[TENSOR_MAX_DIMS]) {
    bool same = !tensor_present(tensor) || memcmp(tensor->shape, shape, sizeof tensor->shape) == 0;
    return same || fail(source, "tensor '%s' does not have the shape that q and v give the result", name);
}

static bool check_answer(const struct source *source, const struct kda_case *c) {
    int64_t out[TENSOR_MAX_DIMS] = {0}, state[TENSOR_MAX_DIMS] = {0};
    case_out_shape(c, out);
    case_state_shape(c, state);
    return check_shape(source, "o", &c->expected_out, out) &&
           check_shape(source, "state", &c->expected_state, state);
}

static bool parse(struct source *source, struct kda_case *c, const uint8_t *data, size_t size) {
    if (!safetensors_parse(data, size, &source->file))
        return fail(source, "%s", failure());
    bool good =
        load_tensors(source, c) && read_sizes(source, c) && read_metadata(source, c) && check_answer(source, c);
    safetensors_free(&source->file);
    return good;
}

bool case_file_read(const char *path, struct kda_case *c) {
    struct source source = {.path = path};
    uint8_t *data = NULL;
    size_t size = 0;
    *c = (struct kda_case){0};
    if (!file_read(path, &data, &size))
        return false;
    bool good = parse(&source, c, data, size);
    free(data);
    if (!good)
        case_free(c);
    return good;
}

/* ---- Writing ----------------------------------------------------------------------------------- */

/* The metadata that says how to compute, complete even where the defaults would do. */
static json_t *case_metadata(const struct kda_case *c) {
    json_t *metadata = json_pack("{s:s, s:s, s:s, s:s}", "gate", gate_names[c->gate], "beta",
                                 beta_names[c->beta_mode], "state_layout", state_layout_names[c->state_layout],
                                 "qk_norm", c->flags & FLASH_KDA_QK_NORM ? "true" : "false");
    if (c->gate == FLASH_KDA_GATE_SIGMOID)
        json_object_set_new(metadata, "lower_bound", json_sprintf("%.17g", c->lower_bound));
    if (c->scale != 0)
        json_object_set_new(metadata, "scale", json_sprintf("%.17g", c->scale));
    if (*c->regime)
        json_object_set_new(metadata, "regime", json_string(c->regime));
    return metadata;
}

/* Appends a tensor, if it is there; bare: without its leading dimension, which is 1. */
static void describe(struct safetensors_tensor *list, size_t *count, const char *name,
                     const struct tensor *tensor, bool bare) {
    if (!tensor_present(tensor))
        return;
    struct safetensors_tensor *described = &list[(*count)++];
    *described = (struct safetensors_tensor){.name = name,
                                             .rank = tensor->dl.ndim - (bare ? 1 : 0),
                                             .data = tensor->dl.data,
                                             .size = tensor_bytes(tensor)};
    memcpy(described->shape, tensor->shape + (bare ? 1 : 0), sizeof *tensor->shape * (size_t)described->rank);
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (type_equal(*dtypes[i].memory, tensor->dl.dtype))
            described->dtype = dtypes[i].file;
}

static bool write(const char *path, const struct safetensors_tensor *list, size_t count, json_t *metadata) {
    bool good = safetensors_write(path, list, count, metadata);
    json_decref(metadata);
    return good;
}

bool case_file_write(const char *path, const struct kda_case *c) {
    struct safetensors_tensor list[9];
    size_t count = 0;
    /* Widest elements first, so that each tensor is aligned in the file. */
    describe(list, &count, "cu_seqlens", &c->cu_seqlens, false);
    describe(list, &count, "A_log", &c->A_log, false);
    describe(list, &count, "dt_bias", &c->dt_bias, false);
    describe(list, &count, "initial_state", &c->initial_state, c->without_sequences);
    describe(list, &count, "q", &c->q, c->without_batch);
    describe(list, &count, "k", &c->k, c->without_batch);
    describe(list, &count, "v", &c->v, c->without_batch);
    describe(list, &count, "g", &c->g, c->without_batch);
    describe(list, &count, "beta", &c->beta, c->without_batch);
    return write(path, list, count, case_metadata(c));
}

bool case_file_write_result(const char *path, const struct kda_case *c, const struct trial *trial) {
    struct safetensors_tensor list[2];
    size_t count = 0;
    char ran_on[256];
    describe(list, &count, "state", &trial->state, c->without_sequences);
    describe(list, &count, "o", &trial->out, c->without_batch);
    json_t *metadata = case_metadata(c);
    if (trial_describe(trial, ran_on, sizeof ran_on))
        json_object_set_new(metadata, "ran_on", json_string(ran_on));
    json_object_set_new(metadata, "made_by", json_sprintf("flashkda %s", flash_kda_version()));
    return write(path, list, count, metadata);
}
