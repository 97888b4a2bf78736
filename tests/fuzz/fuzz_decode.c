/* SPDX-License-Identifier: MIT */
/* libFuzzer target: bytes as the arguments of decode. They choose a small call that is often valid, and then damage some
 * of it. Every tensor has just the memory its shape and strides need, so that the sanitizers see any other access. A call
 * that fails must write nothing; one that succeeds must agree with the oracle. */
#include "bytes.h"
#include "flash_kda.h"

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* ---- Tensors of a call ----------------------------------------------------------------------------- */

enum { MAX_DIMS = 6, MAX_BYTES = 1 << 16, MAX_SEQUENCES = 4, MAX_COLUMNS = 3 };

enum kind { FLOATS, INDEX, FLAG };

#define MEMBER(name) offsetof(flash_kda_decode_args, name)

static const struct {
    size_t member; /* of flash_kda_decode_args */
    enum kind kind;
} arguments[] = {
    {MEMBER(q), FLOATS},
    {MEMBER(k), FLOATS},
    {MEMBER(v), FLOATS},
    {MEMBER(g), FLOATS},
    {MEMBER(beta), FLOATS},
    {MEMBER(A_log), FLOATS},
    {MEMBER(dt_bias), FLOATS},
    {MEMBER(out), FLOATS},
    {MEMBER(state), FLOATS},
    {MEMBER(q_conv_weight), FLOATS},
    {MEMBER(q_conv_bias), FLOATS},
    {MEMBER(q_conv_state), FLOATS},
    {MEMBER(v_conv_weight), FLOATS},
    {MEMBER(v_conv_state), FLOATS},
    {MEMBER(norm_weight), FLOATS},
    {MEMBER(norm_gate), FLOATS},
    {MEMBER(cu_seqlens), INDEX},
    {MEMBER(accepted), INDEX},
    {MEMBER(state_indices), INDEX},
    {MEMBER(num_accepted_tokens), INDEX},
    {MEMBER(has_initial_state), FLAG},
};
enum {
    Q,
    K,
    V,
    G,
    BETA,
    A_LOG,
    DT_BIAS,
    OUT,
    STATE,
    Q_CONV_WEIGHT,
    Q_CONV_BIAS,
    Q_CONV_STATE,
    V_CONV_WEIGHT,
    V_CONV_STATE,
    NORM_WEIGHT,
    NORM_GATE,
    CU_SEQLENS,
    ACCEPTED,
    STATE_INDICES,
    NUM_ACCEPTED,
    HAS_INITIAL_STATE,
    ARGUMENTS
};

struct slot {
    DLTensor dl;
    int64_t shape[MAX_DIMS], strides[MAX_DIMS];
    unsigned char *memory;
    size_t bytes;
};

struct call {
    flash_kda_decode_args args;
    struct slot slots[ARGUMENTS];
    bool too_large; /* some tensor has no memory */
};

static const DLTensor **member(struct call *c, int argument) {
    return (const DLTensor **)(void *)((char *)&c->args + arguments[argument].member);
}

/* ---- A call that is often valid -------------------------------------------------------------------- */

static DLDataType type_of(struct bytes *b, enum kind kind) {
    static const DLDataType floats[] = {{kDLFloat, 32, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};
    if (kind == FLOATS)
        return floats[take(b) % 3];
    if (kind == FLAG)
        return (DLDataType){take(b) % 2 ? 6 /* bool */ : kDLInt, 8, 1};
    return (DLDataType){kDLInt, take(b) % 2 ? 64 : 32, 1};
}

/* Compact, or with gaps. */
static void give(struct call *c, struct bytes *b, int argument, int ndim, const int64_t *shape) {
    struct slot *s = &c->slots[argument];
    int64_t stride = 1, gap = take(b) % 4 == 3 ? choose(b, 1, 3) : 0;
    s->dl = (DLTensor){
        .device = {kDLCPU, 0}, .ndim = ndim, .dtype = type_of(b, arguments[argument].kind), .shape = s->shape};
    for (int d = ndim - 1; d >= 0; d--) {
        s->shape[d] = shape[d];
        s->strides[d] = stride;
        stride = stride * (shape[d] ? shape[d] : 1) + gap;
    }
    s->dl.strides = gap ? s->strides : NULL;
    *member(c, argument) = &s->dl;
}

struct plan {
    int64_t N, T, B, H, HV, K, V, columns, slots, lengths[MAX_SEQUENCES];
    bool packed;
};

static struct plan plan_of(struct bytes *b) {
    struct plan p = {.N = choose(b, 0, MAX_SEQUENCES),
                     .H = choose(b, 1, 2),
                     .K = choose(b, 1, 20),
                     .V = choose(b, 1, 20),
                     .packed = take(b) % 2};
    p.HV = p.H * choose(b, 1, 2);
    p.columns = choose(b, 0, MAX_COLUMNS);
    p.slots = p.columns ? p.N * p.columns + choose(b, 0, 3) : p.N;
    int64_t most = p.columns > 1 ? p.columns : 16, length = choose(b, 0, most);
    for (int64_t n = 0; n < p.N; n++)
        p.T += p.lengths[n] = p.packed ? choose(b, 0, most) : length;
    p.B = p.packed ? 1 : p.N;
    p.T = p.packed ? p.T : length;
    return p;
}

static void choose_tensors(struct call *c, struct bytes *b, const struct plan *p) {
    unsigned given = take(b);
    int64_t keys = p->H * p->K, values = p->HV * p->V;
    bool k_first = c->args.state_layout == FLASH_KDA_STATE_K_FIRST;
    give(c, b, Q, 4, (int64_t[]){p->B, p->T, p->H, p->K});
    give(c, b, K, 4, (int64_t[]){p->B, p->T, p->H, p->K});
    give(c, b, V, 4, (int64_t[]){p->B, p->T, p->HV, p->V});
    give(c, b, G, 4, (int64_t[]){p->B, p->T, p->HV, p->K});
    give(c, b, BETA, 3, (int64_t[]){p->B, p->T, p->HV});
    give(c, b, STATE, 4, (int64_t[]){p->slots, p->HV, k_first ? p->K : p->V, k_first ? p->V : p->K});
    if (c->args.gate != FLASH_KDA_GATE_NONE) {
        give(c, b, A_LOG, 1, (int64_t[]){p->HV});
        give(c, b, DT_BIAS, 2, (int64_t[]){p->HV, p->K});
    }
    if (given & 7)
        give(c, b, OUT, 4, (int64_t[]){p->B, p->T, p->HV, p->V});
    if (given & 8) {
        give(c, b, Q_CONV_WEIGHT, 2, (int64_t[]){keys, 4});
        give(c, b, Q_CONV_BIAS, 1, (int64_t[]){keys});
        give(c, b, Q_CONV_STATE, 3, (int64_t[]){p->slots, keys, 3});
    }
    if (given & 16) {
        give(c, b, V_CONV_WEIGHT, 2, (int64_t[]){values, 4});
        give(c, b, V_CONV_STATE, 3, (int64_t[]){p->slots, values, 3});
    }
    if (given & 32) {
        give(c, b, NORM_WEIGHT, 1, (int64_t[]){p->V});
        give(c, b, NORM_GATE, 4, (int64_t[]){p->B, p->T, p->HV, p->V});
    }
    if (p->packed)
        give(c, b, CU_SEQLENS, 1, (int64_t[]){p->N + 1});
    if (given & 64)
        give(c, b, ACCEPTED, 1, (int64_t[]){p->N});
    if (p->columns)
        give(c, b, STATE_INDICES, p->columns > 1 ? 2 : 1, (int64_t[]){p->N, p->columns});
    if (p->columns > 1 && given & 128)
        give(c, b, NUM_ACCEPTED, 1, (int64_t[]){p->N});
    if (take(b) % 3 == 2)
        give(c, b, HAS_INITIAL_STATE, 1, (int64_t[]){p->N});
    if (p->columns && take(b) % 3 == 2) {
        c->args.flags |= FLASH_KDA_PADDING_SLOT;
        c->args.padding_slot = take(b) % 4;
    }
}

static void choose_options(struct call *c, struct bytes *b) {
    flash_kda_decode_args *a = &c->args;
    a->gate = (flash_kda_gate)choose(b, 0, 2);
    a->lower_bound = -1 - take(b) % 4;
    a->beta_mode = (flash_kda_beta)choose(b, 0, 2);
    a->flags = FLASH_KDA_QK_NORM | (take(b) % 4 == 3 ? FLASH_KDA_KEEP_STATE : 0);
    a->state_layout = (flash_kda_state_layout)choose(b, 0, 1);
    a->norm_activation = (flash_kda_norm_activation)choose(b, 0, 1);
    a->norm_eps = 1e-5;
    a->num_threads = (int32_t)choose(b, 0, 3);
}

/* ---- Damage ---------------------------------------------------------------------------------------- */

static const int64_t odd[] = {-1, 0, 1, 2, 17, 1 << 20, INT64_MAX, INT64_MIN};

static void damage_tensor(struct slot *s, struct bytes *b) {
    int64_t value = odd[take(b) % (sizeof odd / sizeof *odd)];
    int d = s->dl.ndim > 0 && s->dl.ndim < MAX_DIMS ? (int)(take(b) % (unsigned)s->dl.ndim) : 0;
    switch (take(b) % 7) {
    case 0:
        s->shape[d] = value;
        break;
    case 1:
        s->dl.strides = s->strides;
        s->strides[d] = value;
        break;
    case 2:
        s->dl.ndim = (int32_t)choose(b, 0, MAX_DIMS - 1);
        break;
    case 3:
        s->dl.dtype = (DLDataType){take(b) % 5, (uint8_t)(8 << take(b) % 4), 1};
        break;
    case 4:
        s->dl.device.device_type = (DLDeviceType)(1 + take(b) % 3);
        break;
    case 5:
        s->dl.shape = NULL;
        break;
    default:
        s->dl.byte_offset = take(b) % 8;
    }
}

static void damage_option(flash_kda_decode_args *a, struct bytes *b) {
    int64_t value = odd[take(b) % (sizeof odd / sizeof *odd)];
    switch (take(b) % 9) {
    case 0:
        a->gate = (flash_kda_gate)(take(b) % 5);
        break;
    case 1:
        a->max_tokens = value;
        break;
    case 2:
        a->scale = value % 2 ? (double)NAN : (double)value;
        break;
    case 3:
        a->flags = take(b);
        break;
    case 4:
        a->norm_eps = (double)value;
        break;
    case 5:
        a->num_threads = (int32_t)take(b) - 8;
        break;
    case 6:
        a->norm_activation = (flash_kda_norm_activation)(take(b) % 4);
        break;
    case 7:
        a->padding_slot = value;
        break;
    default:
        a->backend = (flash_kda_backend)(take(b) % 5);
    }
}

static void damage(struct call *c, struct bytes *b) {
    for (unsigned times = take(b) % 3; times; times--) {
        int argument = (int)choose(b, 0, ARGUMENTS - 1);
        unsigned how = take(b) % 4;
        if (how == 0)
            *member(c, argument) = NULL;
        else if (how == 1)
            damage_option(&c->args, b);
        else if (*member(c, argument))
            damage_tensor(&c->slots[argument], b);
    }
}

/* ---- Memory ---------------------------------------------------------------------------------------- */

/* Bytes from data to the end of the last element, or -1 where that is not a small number. */
static int64_t extent(const struct slot *s) {
    int64_t last = 0, compact = 1;
    if (!s->dl.shape || s->dl.ndim < 0 || s->dl.ndim > MAX_DIMS)
        return 0;
    for (int d = s->dl.ndim - 1; d >= 0; d--) {
        int64_t stride = s->dl.strides ? s->strides[d] : compact;
        if (s->shape[d] == 0)
            return 0;
        if (s->shape[d] < 0 || s->shape[d] > MAX_BYTES || stride < 0 || stride > MAX_BYTES)
            return -1;
        last += (s->shape[d] - 1) * stride;
        compact *= s->shape[d];
        if (last > MAX_BYTES || compact > MAX_BYTES)
            return -1;
    }
    return (int64_t)s->dl.byte_offset + (last + 1) * s->dl.dtype.bits / 8;
}

static void make_memory(struct call *c) {
    for (int i = 0; i < ARGUMENTS; i++) {
        struct slot *s = &c->slots[i];
        if (!*member(c, i))
            continue;
        int64_t bytes = extent(s);
        c->too_large |= bytes < 0;
        s->bytes = bytes > 0 ? (size_t)bytes : 0;
        s->dl.data = s->memory = malloc(s->bytes ? s->bytes : 1);
        must(s->memory);
    }
}

static void set_index(struct slot *s, int64_t i, int64_t value) {
    size_t item = s->dl.dtype.bits / 8, at = s->dl.byte_offset + (size_t)i * item;
    if (item >= 4 && at + item <= s->bytes)
        memcpy(s->memory + at, &value, item); /* little end first, as everywhere here */
}

static void fill(struct call *c, struct bytes *b, const struct plan *p) {
    uint32_t seed = take(b);
    for (int i = 0; i < ARGUMENTS; i++)
        for (size_t at = 0; at < c->slots[i].bytes; at++) {
            /* The top byte of a number decides its size: from 0.4 to 1.9 in any float type, with either sign. Decays are
             * negative, or nothing would be bounded. */
            size_t item = c->slots[i].dl.dtype.bits / 8;
            bool top = item && (at - c->slots[i].dl.byte_offset) % item == item - 1;
            seed = seed * 1664525 + 1013904223;
            unsigned sign = i == G ? 0x80 : seed >> 24 & 0x80;
            c->slots[i].memory[at] = (unsigned char)(top ? sign | 0x3f : (seed >> 24 & 0x7f) | 0x40);
            if (arguments[i].kind != FLOATS)
                c->slots[i].memory[at] = 0;
        }
    for (int64_t n = 0, end = 0; n < p->N; n++) {
        int64_t columns = p->columns > 1 ? p->columns : 1;
        set_index(&c->slots[CU_SEQLENS], n + 1, end += p->lengths[n]);
        set_index(&c->slots[ACCEPTED], n, p->lengths[n] ? take(b) % (p->lengths[n] + 1) : 0);
        set_index(&c->slots[NUM_ACCEPTED], n, choose(b, 1, columns));
        if ((size_t)n < c->slots[HAS_INITIAL_STATE].bytes)
            c->slots[HAS_INITIAL_STATE].memory[n] = take(b) % 2;
        for (int64_t t = 0; t < columns; t++)
            set_index(&c->slots[STATE_INDICES], n * columns + t, take(b) % 5 ? (n * columns + t) : -1);
    }
    for (unsigned times = take(b) % 3; times; times--)
        set_index(&c->slots[choose(b, CU_SEQLENS, NUM_ACCEPTED)], choose(b, 0, 8),
                  odd[take(b) % (sizeof odd / sizeof *odd)]);
}

static void build(struct call *c, struct bytes *b) {
    *c = (struct call){.args = FLASH_KDA_DECODE_ARGS_INIT};
    const struct plan p = plan_of(b);
    choose_options(c, b);
    choose_tensors(c, b, &p);
    damage(c, b);
    make_memory(c);
    fill(c, b, &p);
    if (take(b) % 8 == 7) { /* an alias that is not allowed, where it fits */
        struct slot *s = &c->slots[take(b) % 2 ? OUT : STATE], *other = &c->slots[choose(b, 0, ARGUMENTS - 1)];
        if (s->memory && other->memory && other->bytes >= s->bytes)
            s->dl.data = other->memory;
    }
}

static void destroy(struct call *c) {
    for (int i = 0; i < ARGUMENTS; i++)
        free(c->slots[i].memory);
}

/* ---- Running --------------------------------------------------------------------------------------- */

static bool same_memory(const struct call *a, const struct call *b) {
    for (int i = 0; i < ARGUMENTS; i++)
        if (a->slots[i].bytes && memcmp(a->slots[i].memory, b->slots[i].memory, a->slots[i].bytes) != 0)
            return false;
    return true;
}

/* fp32 alone, whose bytes need no decoding: the dtypes differ in their last step only. */
static void compare(const struct slot *x, const struct slot *ref) {
    const float *a = (const float *)(const void *)x->memory, *b = (const float *)(const void *)ref->memory;
    float largest = 0;
    if (x->dl.dtype.bits != 32 || x->dl.byte_offset)
        return;
    for (size_t i = 0; i < x->bytes / sizeof *a; i++)
        largest = fmaxf(largest, fabsf(b[i]));
    for (size_t i = 0; i < x->bytes / sizeof *a && largest < 1e30F; i++)
        must(fabsf(a[i] - b[i]) <= 1e-3F * largest + 1e-5F ||
             (isnan(a[i]) && isnan(b[i]))); /* what is not written keeps what it held */
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    const struct bytes from = {input, size};
    struct call c, untouched;
    struct bytes b = from;
    char text[64];
    build(&c, &b);
    b = from;
    build(&untouched, &b);
    if (!c.too_large) {
        flash_kda_status status = flash_kda_decode_describe(&c.args, text, sizeof text);
        must(flash_kda_decode(&c.args) == status);
        if (status) {
            must(flash_kda_last_error()[0] != '\0');
            must(same_memory(&c, &untouched));
        } else {
            untouched.args.backend = FLASH_KDA_BACKEND_REFERENCE;
            must(flash_kda_decode(&untouched.args) == FLASH_KDA_OK);
            if (fabs(c.args.scale) < 1e6) /* the norm's squares are fp32 numbers */
                compare(&c.slots[OUT], &untouched.slots[OUT]);
            compare(&c.slots[STATE], &untouched.slots[STATE]);
            compare(&c.slots[Q_CONV_STATE], &untouched.slots[Q_CONV_STATE]);
        }
    }
    destroy(&c);
    destroy(&untouched);
    return 0;
}
