/* SPDX-License-Identifier: MIT */
/* libFuzzer target: bytes as the arguments of prefill. They choose a small call that is often valid, and then
 * damage some of it. Every tensor has just the memory its shape and strides need, so that the sanitizers see
 * any other access. A call that fails must write nothing; one that succeeds must agree with the oracle. */
#include "bytes.h"
#include "flash_kda.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum argument {
    Q,
    K,
    V,
    G,
    BETA,
    A_LOG,
    DT_BIAS,
    OUT,
    CU_SEQLENS,
    INITIAL_STATE,
    FINAL_STATE,
    STATE_INDICES,
    CHECKPOINTS,
    CHECKPOINT_CU_STARTS,
    CHECKPOINT_INDICES,
    CHECKPOINT_OFFSETS,
    HAS_INITIAL_STATE,
    Q_CONV_WEIGHT,
    Q_CONV_BIAS,
    Q_CONV_STATE,
    V_CONV_WEIGHT,
    V_CONV_STATE,
    NORM_WEIGHT,
    NORM_GATE,
    ARGUMENTS
};

enum {
    MAX_DIMS = 8,
    MAX_BYTES = 1 << 16,   /* of a tensor; larger ones get no memory and are not run */
    MAX_INDICES = 1 << 10, /* of an index tensor, whose values are read even when only asked for a size */
    MAX_WORK = 1 << 20,    /* multiply-adds of a call that is run */
    SMALL_WORKSPACE = 1 << 24,
};

struct slot {
    DLTensor dl;
    int64_t shape[MAX_DIMS], strides[MAX_DIMS];
    unsigned char *memory; /* its own; NULL if it uses another's */
    size_t bytes;
};

struct call {
    flash_kda_prefill_args args;
    struct slot slots[ARGUMENTS];
    bool given[ARGUMENTS];
    int64_t lengths[4];
    int64_t B, T, N, H, HV, dim_k, dim_v, checkpoint_rows;
    bool packed, wild_values, too_large;
};

/* ---- A call that is often valid -------------------------------------------------------------------- */

static int64_t take64(struct bytes *b) {
    uint64_t x = 0;
    for (int i = 0; i < 8; i++)
        x = x << 8 | take(b);
    return (int64_t)x;
}

static const DLDataType floats[] = {{kDLFloat, 32, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};
static const DLDataType int32 = {kDLInt, 32, 1}, int64 = {kDLInt, 64, 1};

static void describe(struct call *c, struct bytes *b, enum argument argument, DLDataType type, int ndim,
                     const int64_t *shape) {
    struct slot *s = &c->slots[argument];
    int64_t stride = 1, gap = take(b) % 4 == 3 ? choose(b, 1, 5) : 0;
    s->dl = (DLTensor){.device = {kDLCPU, 0}, .ndim = ndim, .dtype = type, .shape = s->shape};
    for (int d = ndim - 1; d >= 0; d--) {
        s->shape[d] = shape[d];
        s->strides[d] = stride;
        stride = stride * (shape[d] ? shape[d] : 1) + gap;
    }
    if (gap)
        s->dl.strides = s->strides;
    c->given[argument] = true;
}

static DLDataType float_type(struct bytes *b) { return floats[take(b) % 3]; }
static DLDataType state_type(struct bytes *b) { return floats[take(b) % 2]; }
static DLDataType index_type(struct bytes *b) { return take(b) % 2 ? int64 : int32; }

static void choose_sequences(struct call *c, struct bytes *b) {
    c->packed = take(b) % 2;
    c->N = choose(b, 0, 3);
    c->B = c->packed ? 1 : c->N;
    c->T = c->packed ? 0 : choose(b, 0, 40);
    for (int64_t n = 0; n < c->N; n++) {
        c->lengths[n] = c->packed ? choose(b, 0, 40) : c->T;
        c->T += c->packed ? c->lengths[n] : 0;
    }
}

static void choose_inputs(struct call *c, struct bytes *b) {
    c->H = choose(b, 1, 2);
    c->HV = c->H * choose(b, 1, 2);
    c->dim_k = choose(b, 1, 40);
    c->dim_v = choose(b, 1, 40);
    const int64_t keys[] = {c->B, c->T, c->H, c->dim_k}, gates[] = {c->B, c->T, c->HV, c->dim_k};
    const int64_t values[] = {c->B, c->T, c->HV, c->dim_v};
    bool all_bf16 = take(b) % 2;
    describe(c, b, Q, all_bf16 ? floats[1] : float_type(b), 4, keys);
    describe(c, b, K, all_bf16 ? floats[1] : float_type(b), 4, keys);
    describe(c, b, V, all_bf16 ? floats[1] : float_type(b), 4, values);
    describe(c, b, OUT, all_bf16 ? floats[1] : float_type(b), 4, values);
    describe(c, b, G, float_type(b), 4, gates);
    describe(c, b, BETA, float_type(b), 3, gates);
    c->args.gate = (flash_kda_gate)(take(b) % 3);
    if (c->args.gate && take(b) % 2)
        describe(c, b, A_LOG, float_type(b), 1, gates + 2);
    if (c->args.gate && take(b) % 2)
        describe(c, b, DT_BIAS, float_type(b), 2, gates + 2);
    if (c->packed)
        describe(c, b, CU_SEQLENS, index_type(b), 1, (const int64_t[]){c->N + 1});
}

static void choose_options(struct call *c, struct bytes *b) {
    unsigned flags = take(b);
    c->args.struct_size = sizeof c->args;
    c->args.lower_bound = -5.0 * (1 + take(b) % 16) / 16;
    c->args.beta_mode = (flash_kda_beta)(take(b) % 3);
    c->args.scale = take(b) % 4 ? 0 : 0.25;
    c->args.flags = flags & (FLASH_KDA_QK_NORM | FLASH_KDA_BATCH_INVARIANT);
    c->args.num_threads = (int32_t)choose(b, 0, 3);
    c->wild_values = take(b) % 4 == 3;
}

static void choose_states(struct call *c, struct bytes *b) {
    unsigned use = take(b);
    c->args.state_layout = (flash_kda_state_layout)(take(b) % 2);
    bool v_first = c->args.state_layout == FLASH_KDA_STATE_V_FIRST, pool = use & 4;
    const int64_t shape[] = {c->N + (pool ? 2 : 0), c->HV, v_first ? c->dim_v : c->dim_k,
                             v_first ? c->dim_k : c->dim_v};
    if (use & 1)
        describe(c, b, INITIAL_STATE, state_type(b), 4, shape);
    if (use & 2)
        describe(c, b, FINAL_STATE, state_type(b), 4, shape);
    if (pool && (use & 3))
        describe(c, b, STATE_INDICES, index_type(b), 1, (const int64_t[]){c->N});
}

static int64_t checkpoint_rows(const struct call *c, int64_t n) {
    return (c->lengths[n] + c->args.checkpoint_every - 1) / c->args.checkpoint_every;
}

static void choose_checkpoints(struct call *c, struct bytes *b) {
    bool v_first = c->args.state_layout == FLASH_KDA_STATE_V_FIRST;
    const int64_t first = v_first ? c->dim_v : c->dim_k, second = v_first ? c->dim_k : c->dim_v;
    const int64_t C = choose(b, 1, 3);
    const int64_t by_offset[] = {c->N, C, c->HV, first, second};
    switch (take(b) % 4) {
    case 1:
        describe(c, b, CHECKPOINT_OFFSETS, index_type(b), 2, by_offset);
        describe(c, b, CHECKPOINTS, state_type(b), 5, by_offset);
        break;
    case 2:
    case 3:
        c->args.checkpoint_every = choose(b, 1, 20);
        if (!c->packed) {
            int64_t rows = (c->T + c->args.checkpoint_every - 1) / c->args.checkpoint_every;
            describe(c, b, CHECKPOINTS, state_type(b), 5, (const int64_t[]){c->B, rows, c->HV, first, second});
            break;
        }
        for (int64_t n = 0; n < c->N; n++)
            c->checkpoint_rows += checkpoint_rows(c, n);
        describe(c, b, CHECKPOINT_CU_STARTS, index_type(b), 1, (const int64_t[]){c->N + 1});
        describe(c, b, CHECKPOINTS, state_type(b), 4,
                 (const int64_t[]){c->checkpoint_rows, c->HV, first, second});
        if (take(b) % 2)
            describe(c, b, CHECKPOINT_INDICES, index_type(b), 1, &c->checkpoint_rows);
        break;
    default:
        break;
    }
}

static void choose_marks(struct call *c, struct bytes *b) {
    const DLDataType flags[] = {{6, 8, 1} /* bool */, {kDLInt, 8, 1}, int32};
    if (c->given[INITIAL_STATE] && take(b) % 3 == 2)
        describe(c, b, HAS_INITIAL_STATE, flags[take(b) % 3], 1, (const int64_t[]){c->N});
    if (c->given[STATE_INDICES] && take(b) % 3 == 2) {
        c->args.flags |= FLASH_KDA_PADDING_SLOT;
        c->args.padding_slot = take(b) % 4;
    }
}

static void choose_fused(struct call *c, struct bytes *b) {
    unsigned given = take(b);
    bool pool = c->given[STATE_INDICES];
    int64_t slots = c->N + (pool ? 2 : 0), keys = c->H * c->dim_k, values = c->HV * c->dim_v;
    c->args.norm_eps = 1e-5;
    c->args.norm_activation = (flash_kda_norm_activation)(take(b) % 2);
    if (given % 4 == 3) {
        describe(c, b, Q_CONV_WEIGHT, float_type(b), 2, (const int64_t[]){keys, 4});
        if (given & 4)
            describe(c, b, Q_CONV_BIAS, float_type(b), 1, &keys);
        if (given & 8)
            describe(c, b, Q_CONV_STATE, float_type(b), 3, (const int64_t[]){slots, keys, 3});
    }
    if ((given & 0x30) == 0x30) {
        describe(c, b, V_CONV_WEIGHT, float_type(b), 2, (const int64_t[]){values, 4});
        describe(c, b, V_CONV_STATE, float_type(b), 3, (const int64_t[]){slots, values, 3});
    }
    if ((given & 0xc0) == 0xc0) {
        describe(c, b, NORM_WEIGHT, float_type(b), 1, &c->dim_v);
        if (take(b) % 2)
            describe(c, b, NORM_GATE, float_type(b), 4, (const int64_t[]){c->B, c->T, c->HV, c->dim_v});
    }
}

/* ---- Damage ----------------------------------------------------------------------------------------- */

static void damage_tensor(struct slot *s, struct bytes *b) {
    int d = (int)(take(b) % MAX_DIMS);
    switch (take(b) % 9) {
    case 0:
        s->shape[d] = take64(b);
        break;
    case 1:
        s->shape[d] += (int64_t)(take(b) % 5) - 2;
        break;
    case 2:
        s->strides[d] = take64(b);
        s->dl.strides = s->strides;
        break;
    case 3:
        s->strides[d] = (int64_t)(take(b) % 64);
        s->dl.strides = s->strides;
        break;
    case 4:
        s->dl.ndim = (int)(take(b) % (MAX_DIMS + 1));
        break;
    case 5:
        s->dl.dtype = (DLDataType){(uint8_t)take(b), (uint8_t)(8 * (take(b) % 9)), (uint16_t)(take(b) % 3)};
        break;
    case 6:
        s->dl.device.device_type = (DLDeviceType)(take(b) % 14);
        break;
    case 7:
        s->dl.shape = NULL;
        break;
    default:
        s->dl.byte_offset = take(b) % 16; /* memory is made for it */
        break;
    }
}

static void damage_options(struct call *c, struct bytes *b) {
    switch (take(b) % 12) {
    case 0:
        c->args.struct_size = take(b);
        break;
    case 1:
        c->args.gate = (flash_kda_gate)(take(b) % 5);
        break;
    case 2:
        c->args.beta_mode = (flash_kda_beta)(take(b) % 5);
        break;
    case 3:
        c->args.flags = (uint32_t)take64(b);
        break;
    case 4:
        c->args.state_layout = (flash_kda_state_layout)(take(b) % 4);
        break;
    case 5:
        c->args.backend = (flash_kda_backend)((int)(take(b) % 7) - 1);
        break;
    case 6:
        c->args.num_threads = (int32_t)take64(b);
        break;
    case 7:
        c->args.checkpoint_every = take64(b);
        break;
    case 8: {
        int64_t bits = take64(b);
        memcpy(take(b) % 2 ? &c->args.scale : &c->args.lower_bound, &bits, sizeof bits);
        break;
    }
    case 9:
        c->args.padding_slot = take64(b);
        break;
    case 10:
        c->args.norm_eps = (double)take64(b);
        c->args.norm_activation = (flash_kda_norm_activation)(take(b) % 4);
        break;
    default:
        c->given[take(b) % ARGUMENTS] ^= true;
        break;
    }
}

static void damage(struct call *c, struct bytes *b) {
    static const int how_often[] = {0, 0, 0, 1, 1, 2, 4, 0};
    for (int i = how_often[take(b) % 8]; i > 0; i--) {
        if (take(b) % 2)
            damage_options(c, b);
        else
            damage_tensor(&c->slots[take(b) % ARGUMENTS], b);
    }
}

/* ---- Memory ----------------------------------------------------------------------------------------- */

/* Bytes from data to the end of the last element, or -1 where that is not a small number. */
static int64_t extent(const struct slot *s) {
    int64_t last = 0, count = 1, item = s->dl.dtype.bits / 8;
    if (s->dl.ndim < 0 || s->dl.ndim > MAX_DIMS || !s->dl.shape)
        return -1;
    for (int d = s->dl.ndim - 1; d >= 0; d--) {
        int64_t n = s->shape[d], stride = s->dl.strides ? s->strides[d] : count, reach;
        if (n < 0 || n > MAX_BYTES || stride < 0 || __builtin_mul_overflow(n ? n - 1 : 0, stride, &reach) ||
            reach > MAX_BYTES)
            return -1;
        last += reach;
        count *= n ? n : 1;
        if (count > MAX_BYTES)
            return -1;
    }
    for (int d = 0; d < s->dl.ndim; d++)
        if (s->shape[d] == 0)
            return (int64_t)s->dl.byte_offset;
    return (int64_t)s->dl.byte_offset + (last + 1) * item;
}

static bool is_index(enum argument argument) {
    return argument == CU_SEQLENS || argument == STATE_INDICES || argument == CHECKPOINT_CU_STARTS ||
           argument == CHECKPOINT_INDICES || argument == CHECKPOINT_OFFSETS;
}

static uint16_t half_of(DLDataType type, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (type.code == kDLBfloat)
        return (uint16_t)(bits >> 16);
    /* fp16, truncated; every value here is 0 or a normal number */
    int exponent = (int)(bits >> 23 & 255) - 112;
    return exponent <= 0 ? 0
                         : (uint16_t)((bits >> 16 & 0x8000) | (unsigned)exponent << 10 | (bits >> 13 & 1023));
}

static void fill_floats(struct slot *s, float low, float high, uint32_t seed) {
    size_t item = s->dl.dtype.bits == 32 ? 4 : 2, offset = s->dl.byte_offset % item;
    for (size_t at = offset; at + item <= s->bytes; at += item) {
        seed = seed * 1664525 + 1013904223;
        float x = low + (high - low) * (float)(seed >> 8) / 16777216.0F;
        uint16_t half = half_of(s->dl.dtype, x);
        memcpy(s->memory + at, item == 4 ? (const void *)&x : (const void *)&half, item);
    }
}

static void fill_wild(struct slot *s, struct bytes *b) {
    for (size_t i = 0; i < s->bytes; i++)
        s->memory[i] = (unsigned char)(take(b) ^ (i * 37));
}

static void set_index(struct slot *s, int64_t i, int64_t value) {
    int64_t stride = s->dl.strides ? s->strides[0] : 1, item = s->dl.dtype.bits / 8;
    int32_t narrow = (int32_t)value;
    if (stride < 0 || stride > (int64_t)s->bytes)
        return;
    int64_t at = (int64_t)s->dl.byte_offset + i * stride * item;
    if (s->dl.ndim != 1 || (item != 4 && item != 8) || at < 0 || at + item > (int64_t)s->bytes)
        return;
    memcpy(s->memory + at, item == 4 ? (const void *)&narrow : (const void *)&value, (size_t)item);
}

/* Right values for the index tensors, before one or two of them are damaged. */
static void fill_indices(struct call *c, struct bytes *b) {
    int64_t tokens = 0, rows = 0;
    for (int64_t n = 0; n < c->N; n++) {
        set_index(&c->slots[STATE_INDICES], n, take(b) % 4 == 3 ? -1 : n + 1);
        set_index(&c->slots[CU_SEQLENS], n, tokens);
        set_index(&c->slots[CHECKPOINT_CU_STARTS], n, rows);
        tokens += c->lengths[n];
        rows += c->args.checkpoint_every > 0 ? checkpoint_rows(c, n) : 0;
    }
    set_index(&c->slots[CU_SEQLENS], c->N, tokens);
    set_index(&c->slots[CHECKPOINT_CU_STARTS], c->N, rows);
    for (int64_t i = 0; i < c->checkpoint_rows; i++)
        set_index(&c->slots[CHECKPOINT_INDICES], i, take(b) % 8 == 7 ? -1 : c->checkpoint_rows - 1 - i);
    struct slot *offsets = &c->slots[CHECKPOINT_OFFSETS];
    for (size_t i = 0; i < offsets->bytes; i++)
        offsets->memory[i] = 0;
    for (size_t i = 0; i < offsets->bytes; i += 8)
        offsets->memory[i] = (unsigned char)(take(b) % 8);
    static const enum argument indices[] = {CU_SEQLENS, STATE_INDICES, CHECKPOINT_CU_STARTS,
                                            CHECKPOINT_INDICES};
    for (unsigned i = take(b) % 4; i < 2; i++) {
        enum argument argument = indices[take(b) % (sizeof indices / sizeof *indices)];
        int64_t place = (int64_t)(take(b) % 4);
        set_index(&c->slots[argument], place, take(b) % 4 ? (int64_t)(take(b) % 64) - 2 : take64(b));
    }
}

static void make_memory(struct call *c) {
    for (int i = 0; i < ARGUMENTS; i++) {
        struct slot *s = &c->slots[i];
        int64_t bytes = c->given[i] ? extent(s) : 0;
        bool many = is_index((enum argument)i) && bytes > MAX_INDICES * 8;
        c->too_large |= bytes < 0 || bytes > MAX_BYTES || many;
        s->bytes = bytes < 0 || bytes > MAX_BYTES ? 0 : (size_t)bytes;
        s->memory = malloc(s->bytes ? s->bytes : 1);
        must(s->memory != NULL);
        memset(s->memory, 0, s->bytes ? s->bytes : 1);
        s->dl.data = s->memory;
    }
}

static void fill_values(struct call *c, struct bytes *b) {
    float unit = 1 / sqrtf((float)c->dim_k);
    const struct {
        float low, high;
    } ranges[ARGUMENTS] = {[Q] = {-unit, unit},
                           [K] = {-unit, unit},
                           [V] = {-1, 1},
                           [G] = {-4, 0},
                           [BETA] = {0, 1},
                           [A_LOG] = {-1, 1},
                           [DT_BIAS] = {-1, 1},
                           [INITIAL_STATE] = {-1, 1},
                           [Q_CONV_WEIGHT] = {-1, 1},
                           [Q_CONV_BIAS] = {-1, 1},
                           [Q_CONV_STATE] = {-1, 1},
                           [V_CONV_WEIGHT] = {-1, 1},
                           [V_CONV_STATE] = {-1, 1},
                           [NORM_WEIGHT] = {-1, 1},
                           [NORM_GATE] = {-2, 2}};
    fill_indices(c, b);
    for (int i = 0; i < ARGUMENTS; i++) {
        if (is_index((enum argument)i))
            continue;
        for (size_t at = 0; i == HAS_INITIAL_STATE && at < c->slots[i].bytes; at++)
            c->slots[i].memory[at] = take(b) % 2;
        if (i == HAS_INITIAL_STATE)
            continue;
        if (c->wild_values)
            fill_wild(&c->slots[i], b);
        else
            fill_floats(&c->slots[i], ranges[i].low, ranges[i].high, (uint32_t)i + 1);
    }
}

/* In place, a shared pool, or an alias that is not allowed: one tensor's memory is another's if it fits. */
static void choose_aliases(struct call *c, struct bytes *b) {
    unsigned choice = take(b) % 8;
    struct slot *from = &c->slots[INITIAL_STATE], *to = &c->slots[FINAL_STATE];
    if (choice < 5)
        return;
    if (choice == 6) {
        from = &c->slots[take(b) % ARGUMENTS];
        to = &c->slots[take(b) % ARGUMENTS];
        c->wild_values = true; /* what is g to one may be a step of thousands to the other */
    }
    if (from == to || to->bytes > from->bytes || !to->memory)
        return;
    free(to->memory);
    to->memory = NULL;
    to->dl.data = from->dl.data;
}

static void build(struct call *c, struct bytes *b) {
    memset(c, 0, sizeof *c);
    choose_sequences(c, b);
    choose_options(c, b);
    choose_inputs(c, b);
    choose_states(c, b);
    choose_checkpoints(c, b);
    choose_marks(c, b);
    choose_fused(c, b);
    damage(c, b);
    make_memory(c);
    fill_values(c, b);
    choose_aliases(c, b);
    flash_kda_prefill_args *a = &c->args;
    const DLTensor **const members[ARGUMENTS] = {
        &a->q,
        &a->k,
        &a->v,
        &a->g,
        &a->beta,
        &a->A_log,
        &a->dt_bias,
        &a->out,
        &a->cu_seqlens,
        &a->initial_state,
        &a->final_state,
        &a->state_indices,
        &a->checkpoints,
        &a->checkpoint_cu_starts,
        &a->checkpoint_indices,
        &a->checkpoint_offsets,
        &a->has_initial_state,
        &a->q_conv_weight,
        &a->q_conv_bias,
        &a->q_conv_state,
        &a->v_conv_weight,
        &a->v_conv_state,
        &a->norm_weight,
        &a->norm_gate,
    };
    for (int i = 0; i < ARGUMENTS; i++)
        *members[i] = c->given[i] ? &c->slots[i].dl : NULL;
}

static void destroy(struct call *c) {
    for (int i = 0; i < ARGUMENTS; i++)
        free(c->slots[i].memory);
}

/* ---- Running ----------------------------------------------------------------------------------------- */

/* Multiply-adds from shapes that were accepted. */
static double work(const struct call *c) {
    const int64_t *g = c->slots[G].shape, *v = c->slots[V].shape;
    double sequences = c->given[CU_SEQLENS] ? (double)c->slots[CU_SEQLENS].shape[0] : (double)g[0];
    return ((double)g[0] * (double)g[1] + sequences) * (double)g[2] * (double)g[3] * (double)v[3];
}

static flash_kda_status run(struct call *c, size_t cut) {
    size_t bytes = 0;
    flash_kda_status sized = flash_kda_prefill_workspace_size(&c->args, &bytes);
    if (sized == FLASH_KDA_OK && (bytes > SMALL_WORKSPACE || work(c) > MAX_WORK))
        return FLASH_KDA_ERROR_UNSUPPORTED;
    if (cut > bytes)
        cut = bytes;
    unsigned char *workspace = bytes - cut ? malloc(bytes - cut) : NULL;
    flash_kda_status status = flash_kda_prefill(&c->args, workspace, bytes - cut);
    free(workspace);
    must(sized == FLASH_KDA_OK || status == sized);
    must(status == FLASH_KDA_OK || flash_kda_last_error()[0] != '\0');
    must(status != FLASH_KDA_OK || cut == 0);
    return status;
}

static bool same_memory(const struct call *a, const struct call *b) {
    for (int i = 0; i < ARGUMENTS; i++)
        if (a->slots[i].memory && memcmp(a->slots[i].memory, b->slots[i].memory, a->slots[i].bytes) != 0)
            return false;
    return true;
}

static float value_at(const struct slot *s, size_t at) {
    uint32_t bits = 0;
    uint16_t half;
    float x;
    if (s->dl.dtype.bits == 32) {
        memcpy(&x, s->memory + at, sizeof x);
        return x;
    }
    memcpy(&half, s->memory + at, sizeof half);
    if (s->dl.dtype.code == kDLFloat)
        return ldexpf((float)((half & 1023) | (half >> 10 & 31 ? 1024 : 0)),
                      (half >> 10 & 31 ? (half >> 10 & 31) : 1) - 25) *
               (half & 0x8000 ? -1.0F : 1.0F);
    bits = (uint32_t)half << 16;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Whole buffers, padding included: both calls started from the same bytes. Values and states are of order 1 and may
 * cancel to almost nothing; bf16 products then keep the error of what cancelled, at most `cancelled`. Where a huge scale
 * brings the oracle's values near the end of fp32, sums of them may overflow on the way. */
static void compare(const struct slot *x, const struct slot *ref, float cancelled) {
    size_t item = x->dl.dtype.bits / 8;
    float largest = 0;
    if (!x->memory || !x->bytes)
        return;
    for (size_t at = x->dl.byte_offset % item; at + item <= x->bytes; at += item)
        largest = fmaxf(largest, fabsf(value_at(ref, at)));
    if (largest > 1e30F)
        return;
    for (size_t at = x->dl.byte_offset % item; at + item <= x->bytes; at += item)
        must(fabsf(value_at(x, at) - value_at(ref, at)) <= 0.05F * largest + cancelled);
}

static const char *choose_level(struct bytes *b) {
    const char *const *levels = flash_kda_cpu_levels();
    int count = 0;
    while (levels[count])
        count++;
    return levels[take(b) % (unsigned)count];
}

/* The same bytes again, on the oracle. */
static void compare_with_oracle(const struct call *c, const struct bytes *from) {
    struct bytes b = *from;
    struct call oracle;
    build(&oracle, &b);
    oracle.args.backend = FLASH_KDA_BACKEND_REFERENCE;
    must(run(&oracle, 0) == FLASH_KDA_OK);
    char plan[256];
    must(flash_kda_prefill_describe(&c->args, plan, sizeof plan) == FLASH_KDA_OK);
    const float cancelled = strstr(plan, "bf16 products") ? 0.01F : 1e-5F;
    compare(&c->slots[OUT], &oracle.slots[OUT], cancelled * fmaxf(1, (float)fabs(c->args.scale)));
    compare(&c->slots[INITIAL_STATE], &oracle.slots[INITIAL_STATE], cancelled);
    compare(&c->slots[FINAL_STATE], &oracle.slots[FINAL_STATE], cancelled);
    compare(&c->slots[CHECKPOINTS], &oracle.slots[CHECKPOINTS], cancelled);
    compare(&c->slots[Q_CONV_STATE], &oracle.slots[Q_CONV_STATE], cancelled);
    compare(&c->slots[V_CONV_STATE], &oracle.slots[V_CONV_STATE], cancelled);
    destroy(&oracle);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    struct bytes b = {input, size};
    setenv("FLASH_KDA_CPU", choose_level(&b), 1);
    size_t cut = take(&b) % 16 == 15;
    const struct bytes from = b;
    struct call c, untouched;
    char text[64];
    build(&c, &b);
    b = from;
    build(&untouched, &b);
    if (c.too_large && (c.given[CU_SEQLENS] || c.given[STATE_INDICES] || c.given[CHECKPOINT_OFFSETS])) {
        /* Index tensors are read even for a size, and these may have no memory. */
    } else if (c.too_large) {
        size_t bytes;
        flash_kda_prefill_workspace_size(&c.args, &bytes);
        flash_kda_prefill_describe(&c.args, text, sizeof text);
    } else {
        flash_kda_prefill_describe(&c.args, text, take(&b) % (sizeof text + 1));
        if (run(&c, cut) != FLASH_KDA_OK)
            must(same_memory(&c, &untouched));
        else if (!c.wild_values && c.args.backend != FLASH_KDA_BACKEND_REFERENCE)
            compare_with_oracle(&c, &from);
    }
    destroy(&c);
    destroy(&untouched);
    return 0;
}
