/* SPDX-License-Identifier: MIT */
/* libFuzzer target: bytes as the arguments of backward, as fuzz_prefill.c does it for prefill: a small call
 * that is often valid, some of it damaged. A call that fails must write nothing; one that succeeds must
 * agree with the oracle. */
#include "flash_kda.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* Shapes of tensors, by the sizes of a call. */
enum kind { KEYS, VALUES, GATES, STEPS, HEADS, CHANNELS, STATES, ROWS, INDICES };

/* X(member, kind, lowest, highest value); what is written comes last. */
/* clang-format off */
#define READ(X) \
    X(q, KEYS, -1, 1) X(k, KEYS, -1, 1) X(v, VALUES, -1, 1) X(g, GATES, -3, 0) X(beta, STEPS, 0, 1) \
    X(A_log, HEADS, -1, 1) X(dt_bias, CHANNELS, -1, 1) X(initial_state, STATES, -1, 1) X(checkpoints, ROWS, -1, 1) \
    X(d_out, VALUES, -1, 1) X(d_final_state, STATES, -1, 1) X(cu_seqlens, INDICES, 0, 0) \
    X(checkpoint_cu_starts, INDICES, 0, 0)
#define WRITTEN(X) \
    X(dq, KEYS, 0, 1) X(dk, KEYS, 0, 1) X(dv, VALUES, 0, 1) X(dg, GATES, 0, 1) X(dbeta, STEPS, 0, 1) \
    X(dA_log, HEADS, 0, 1) X(d_dt_bias, CHANNELS, 0, 1) X(d_initial_state, STATES, 0, 1)
/* clang-format on */

#define PLACE(member, kind, low, high) AT_##member,
enum argument { READ(PLACE) FIRST_WRITTEN, BEFORE_WRITTEN = FIRST_WRITTEN - 1, WRITTEN(PLACE) ARGUMENTS };

static const struct {
    size_t offset; /* of the member */
    enum kind kind;
    float low, high;
} arguments[ARGUMENTS] = {
#define ROW(member, kind, low, high) {offsetof(flash_kda_backward_args, member), kind, low, high},
    READ(ROW) WRITTEN(ROW)};

enum {
    MAX_DIMS = 6,
    MAX_BYTES = 1 << 16, /* of a tensor; larger ones get no memory and are not run */
    MAX_WORK = 1 << 19,  /* multiply-adds of a call that is run */
};

struct slot {
    DLTensor dl;
    int64_t shape[MAX_DIMS], strides[MAX_DIMS];
    unsigned char *memory;
    size_t bytes;
};

struct call {
    flash_kda_backward_args args;
    struct slot slots[ARGUMENTS];
    int64_t N, B, T, H, HV, dim_k, dim_v, rows, lengths[3];
    bool packed, too_large, damaged;
};

static void must(bool holds) {
    if (!holds)
        abort();
}

/* ---- Bytes to choices ---------------------------------------------------------------------------- */

struct bytes {
    const uint8_t *next;
    size_t left;
};

static unsigned take(struct bytes *b) {
    if (!b->left)
        return 0;
    b->left--;
    return *b->next++;
}

static int64_t choose(struct bytes *b, int64_t low, int64_t high) { return low + take(b) % (high - low + 1); }

static int64_t odd_number(struct bytes *b) {
    static const int64_t odd[] = {0,   -1,  1,         2,         7,         31,
                                  256, 257, INT32_MAX, INT64_MAX, INT64_MIN, (int64_t)1 << 40};
    return odd[take(b) % (sizeof odd / sizeof *odd)];
}

/* ---- A call that is often valid -------------------------------------------------------------------- */

static const DLTensor **member(struct call *c, int argument) {
    return (const DLTensor **)(void *)((char *)&c->args + arguments[argument].offset);
}

static void choose_sizes(struct call *c, struct bytes *b) {
    c->packed = take(b) % 2;
    c->N = choose(b, 0, 3);
    c->B = c->packed ? 1 : c->N;
    c->T = c->packed ? 0 : choose(b, 0, 200);
    c->args.checkpoint_every = take(b) % 3 ? 0 : 32 * choose(b, 1, 5);
    for (int64_t n = 0, every = c->args.checkpoint_every; n < c->N; n++) {
        c->lengths[n] = c->packed ? choose(b, 0, 200) : c->T;
        c->T += c->packed ? c->lengths[n] : 0;
        c->rows += every ? (c->lengths[n] + every - 1) / every : 0;
    }
    c->H = choose(b, 1, 2);
    c->HV = c->H * choose(b, 1, 2);
    c->dim_k = choose(b, 1, 40);
    c->dim_v = choose(b, 1, 40);
}

static void describe(struct call *c, int argument, DLDataType type) {
    bool v_first = c->args.state_layout == FLASH_KDA_STATE_V_FIRST;
    const int64_t first = v_first ? c->dim_v : c->dim_k, second = v_first ? c->dim_k : c->dim_v;
    const int64_t shapes[][MAX_DIMS] = {
        [KEYS] = {c->B, c->T, c->H, c->dim_k},
        [VALUES] = {c->B, c->T, c->HV, c->dim_v},
        [GATES] = {c->B, c->T, c->HV, c->dim_k},
        [STEPS] = {c->B, c->T, c->HV},
        [HEADS] = {c->HV},
        [CHANNELS] = {c->HV, c->dim_k},
        [STATES] = {c->N, c->HV, first, second},
        [ROWS] = {c->rows, c->HV, first, second},
        [INDICES] = {c->N + 1},
    };
    static const int ranks[] = {[KEYS] = 4,     [VALUES] = 4, [GATES] = 4, [STEPS] = 3,  [HEADS] = 1,
                                [CHANNELS] = 2, [STATES] = 4, [ROWS] = 4,  [INDICES] = 1};
    struct slot *s = &c->slots[argument];
    enum kind kind = arguments[argument].kind;
    memcpy(s->shape, shapes[kind], sizeof s->shape);
    s->dl = (DLTensor){.device = {kDLCPU, 0}, .ndim = ranks[kind], .dtype = type, .shape = s->shape};
    if (kind == ROWS && !c->packed) {
        memmove(s->shape + 2, s->shape + 1, 3 * sizeof *s->shape);
        s->shape[0] = c->B;
        s->shape[1] = c->N ? c->rows / c->N : 0;
        s->dl.ndim = 5;
    }
    *member(c, argument) = &s->dl;
}

static void choose_tensors(struct call *c, struct bytes *b) {
    static const DLDataType fp32 = {kDLFloat, 32, 1}, bf16 = {kDLBfloat, 16, 1}, int32 = {kDLInt, 32, 1};
    bool gated = c->args.gate != FLASH_KDA_GATE_NONE, kept = c->args.checkpoint_every > 0;
    for (int i = 0; i < ARGUMENTS; i++) {
        bool index = arguments[i].kind == INDICES, given = true;
        unsigned choice = take(b);
        if (arguments[i].kind == HEADS || arguments[i].kind == CHANNELS)
            given = gated;
        else if (i == AT_cu_seqlens)
            given = c->packed;
        else if (i == AT_checkpoint_cu_starts)
            given = c->packed && kept;
        else if (i == AT_checkpoints)
            given = kept;
        else if (i > BEFORE_WRITTEN || arguments[i].kind == STATES)
            given = choice & 2;
        if (given)
            describe(c, i, index ? int32 : choice & 1 ? bf16 : fp32);
    }
}

static void choose_options(struct call *c, struct bytes *b) {
    c->args.gate = (flash_kda_gate)(take(b) % 3);
    c->args.lower_bound = -5;
    c->args.beta_mode = (flash_kda_beta)(take(b) % 3);
    c->args.flags = take(b) & (FLASH_KDA_QK_NORM | FLASH_KDA_BATCH_INVARIANT);
    c->args.state_layout = (flash_kda_state_layout)(take(b) % 2);
    c->args.scale = 0.25;
    c->args.num_threads = (int32_t)choose(b, 0, 9);
}

/* ---- Damage ----------------------------------------------------------------------------------------- */

static void damage_tensor(struct slot *s, struct bytes *b) {
    int d = (int)(take(b) % MAX_DIMS);
    switch (take(b) % 8) {
    case 0:
        s->shape[d] = odd_number(b);
        break;
    case 1:
        s->shape[d] += choose(b, -2, 2);
        break;
    case 2:
        for (int i = 0; i < MAX_DIMS; i++)
            s->strides[i] = take(b) % 4 ? (int64_t)take(b) : odd_number(b);
        s->dl.strides = s->strides;
        break;
    case 3:
        s->dl.ndim = (int)(take(b) % (MAX_DIMS + 1));
        break;
    case 4:
        s->dl.dtype = (DLDataType){(uint8_t)(take(b) % 6), (uint8_t)(8 << take(b) % 4), 1};
        break;
    case 5:
        s->dl.device.device_type = (DLDeviceType)(take(b) % 14);
        break;
    case 6:
        s->dl.shape = NULL;
        break;
    default:
        s->dl.byte_offset = take(b) % 16;
        break;
    }
}

static void damage_options(struct call *c, struct bytes *b) {
    int argument = (int)(take(b) % ARGUMENTS);
    switch (take(b) % 8) {
    case 0:
        c->args.struct_size = (size_t)odd_number(b);
        break;
    case 1:
        c->args.gate = (flash_kda_gate)(take(b) % 5);
        break;
    case 2:
        c->args.flags = take(b);
        break;
    case 3:
        c->args.checkpoint_every = odd_number(b);
        break;
    case 4:
        c->args.num_threads = (int32_t)odd_number(b);
        break;
    case 5:
        c->args.scale = take(b) % 2 ? (double)NAN : 1e300;
        break;
    case 6:
        c->args.backend = (flash_kda_backend)choose(b, -1, 5);
        break;
    default:
        *member(c, argument) = *member(c, argument) ? NULL : &c->slots[argument].dl;
        break;
    }
}

static void damage(struct call *c, struct bytes *b) {
    unsigned choice = take(b) % 8;
    c->damaged = choice > 3;
    for (unsigned i = 3; i < choice; i += 2)
        if (take(b) % 2)
            damage_options(c, b);
        else
            damage_tensor(&c->slots[take(b) % ARGUMENTS], b);
}

/* ---- Memory ----------------------------------------------------------------------------------------- */

/* Bytes from data to behind the last element, or -1 where that is not a small number. */
static int64_t extent(const DLTensor *t) {
    int64_t last = 0, count = 1;
    if (t->ndim < 0 || t->ndim > MAX_DIMS || !t->shape)
        return -1;
    for (int d = t->ndim - 1; d >= 0; d--) {
        int64_t n = t->shape[d], stride = t->strides ? t->strides[d] : count;
        if (n < 0 || n > MAX_BYTES || stride < 0 || stride > MAX_BYTES)
            return -1;
        last += (n ? n - 1 : 0) * stride;
        count *= n ? n : 1;
        if (count > MAX_BYTES || last > MAX_BYTES)
            return -1;
    }
    return (int64_t)t->byte_offset + (last + 1) * (t->dtype.bits / 8);
}

static void fill_floats(struct slot *s, float low, float high, uint32_t seed) {
    for (size_t at = s->dl.byte_offset; at + 4 <= s->bytes; at += s->dl.dtype.bits == 32 ? 4 : 2) {
        seed = seed * 1664525 + 1013904223;
        float x = low + (high - low) * (float)(seed >> 8) / 16777216.0F;
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        uint16_t half = (uint16_t)(bits >> 16);
        memcpy(s->memory + at, s->dl.dtype.bits == 32 ? (const void *)&x : (const void *)&half,
               s->dl.dtype.bits == 32 ? sizeof x : sizeof half);
    }
}

/* One of them is wrong now and then. */
static void fill_indices(struct call *c, struct bytes *b) {
    int32_t tokens = 0, rows = 0, every = (int32_t)c->args.checkpoint_every;
    int32_t wrong = take(b) % 8 ? -1 : (int32_t)(take(b) % 4);
    for (int32_t n = 0; n <= c->N; n++) {
        int32_t token = n == wrong ? (int32_t)odd_number(b) : tokens, row = n == wrong ? token : rows;
        c->damaged |= n == wrong;
        if (c->slots[AT_cu_seqlens].bytes >= 4 * (size_t)(n + 1))
            memcpy(c->slots[AT_cu_seqlens].memory + 4 * n, &token, sizeof token);
        if (c->slots[AT_checkpoint_cu_starts].bytes >= 4 * (size_t)(n + 1))
            memcpy(c->slots[AT_checkpoint_cu_starts].memory + 4 * n, &row, sizeof row);
        tokens += n < c->N ? (int32_t)c->lengths[n] : 0;
        rows += n < c->N && every > 0 ? ((int32_t)c->lengths[n] + every - 1) / every : 0;
    }
}

static void make_memory(struct call *c, struct bytes *b) {
    for (int i = 0; i < ARGUMENTS; i++) {
        struct slot *s = &c->slots[i];
        int64_t bytes = *member(c, i) ? extent(&s->dl) : 0;
        c->too_large |= bytes < 0 || bytes > MAX_BYTES;
        s->bytes = bytes < 0 || bytes > MAX_BYTES ? 0 : (size_t)bytes;
        s->memory = calloc(1, s->bytes ? s->bytes : 1);
        must(s->memory != NULL);
        s->dl.data = s->memory;
        fill_floats(s, arguments[i].low, arguments[i].high, (uint32_t)i + 1);
    }
    fill_indices(c, b);
}

static void build(struct call *c, struct bytes *b) {
    memset(c, 0, sizeof *c);
    c->args = (flash_kda_backward_args)FLASH_KDA_BACKWARD_ARGS_INIT;
    choose_sizes(c, b);
    choose_options(c, b);
    choose_tensors(c, b);
    damage(c, b);
    make_memory(c, b);
}

static void destroy(struct call *c) {
    for (int i = 0; i < ARGUMENTS; i++)
        free(c->slots[i].memory);
}

/* ---- Running ----------------------------------------------------------------------------------------- */

static flash_kda_status run(struct call *c, size_t cut) {
    size_t bytes = 0;
    flash_kda_status sized = flash_kda_backward_workspace_size(&c->args, &bytes);
    double work = (double)(c->B * c->T * c->HV) * (double)(c->dim_k * c->dim_v);
    if (sized == FLASH_KDA_OK && work > MAX_WORK)
        return FLASH_KDA_ERROR_UNSUPPORTED;
    cut = cut < bytes ? cut : bytes;
    unsigned char *workspace = bytes - cut ? malloc(bytes - cut) : NULL;
    if (workspace)
        memset(workspace, 0xff, bytes - cut);
    flash_kda_status status = flash_kda_backward(&c->args, workspace, bytes - cut);
    free(workspace);
    must(sized == FLASH_KDA_OK || status == sized);
    must(status == FLASH_KDA_OK || flash_kda_last_error()[0] != '\0');
    must(status != FLASH_KDA_OK || cut == 0);
    return status;
}

static float value_at(const struct slot *s, size_t at) {
    uint32_t bits = 0;
    uint16_t half;
    float x;
    memcpy(&bits, s->memory + at, s->dl.dtype.bits / 8);
    half = (uint16_t)bits;
    if (s->dl.dtype.bits == 16)
        bits = (uint32_t)half << 16;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void compare(const struct slot *x, const struct slot *ref) {
    size_t item = x->dl.dtype.bits / 8;
    float largest = 0;
    for (size_t at = 0; at + item <= x->bytes; at += item)
        largest = fmaxf(largest, fabsf(value_at(ref, at)));
    for (size_t at = 0; at + item <= x->bytes; at += item)
        must(fabsf(value_at(x, at) - value_at(ref, at)) <= 0.02F * largest + 1e-4F);
}

/* The same bytes again, on the oracle. */
static void compare_with_oracle(const struct call *c, const struct bytes *from) {
    struct bytes b = *from;
    struct call oracle;
    build(&oracle, &b);
    oracle.args.backend = FLASH_KDA_BACKEND_REFERENCE;
    must(run(&oracle, 0) == FLASH_KDA_OK);
    for (int i = FIRST_WRITTEN; i < ARGUMENTS; i++)
        compare(&c->slots[i], &oracle.slots[i]);
    destroy(&oracle);
}

static bool same_memory(const struct call *a, const struct call *b) {
    for (int i = 0; i < ARGUMENTS; i++)
        if (memcmp(a->slots[i].memory, b->slots[i].memory, a->slots[i].bytes) != 0)
            return false;
    return true;
}

static void choose_level(struct bytes *b) {
    const char *const *levels = flash_kda_cpu_levels();
    unsigned count = 0;
    while (levels[count])
        count++;
    setenv("FLASH_KDA_CPU", levels[take(b) % count], 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    struct bytes b = {input, size};
    choose_level(&b);
    size_t cut = take(&b) % 16 == 15;
    const struct bytes from = b;
    struct call c, untouched;
    char text[64];
    build(&c, &b);
    b = from;
    build(&untouched, &b);
    /* Index tensors are read even for a size, and those that are too large have no memory. */
    if (!c.too_large) {
        flash_kda_backward_describe(&c.args, text, sizeof text);
        if (run(&c, cut) != FLASH_KDA_OK)
            must(same_memory(&c, &untouched));
        else if (!c.damaged && c.args.backend != FLASH_KDA_BACKEND_REFERENCE)
            compare_with_oracle(&c, &from);
    }
    destroy(&c);
    destroy(&untouched);
    return 0;
}
