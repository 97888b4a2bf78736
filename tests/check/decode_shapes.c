/* SPDX-License-Identifier: MIT */
/* Decode of every number of tokens, and of head dims around every size that a kernel may work in. */
#include "decode_case.h"
#include "decode_families.h"

#include <stdio.h>

static const struct {
    flash_kda_state_layout layout;
    DLDataType type;
    const char *name;
} states[] = {{FLASH_KDA_STATE_V_FIRST, {kDLFloat, 32, 1}, "V first, fp32"},
              {FLASH_KDA_STATE_K_FIRST, {kDLBfloat, 16, 1}, "K first, bf16"},
              {FLASH_KDA_STATE_V_FIRST, {kDLFloat, 16, 1}, "V first, fp16"}};
enum { STATES = sizeof states / sizeof *states };

static void set_state(struct decode_case *c, int i) {
    c->tokens.layout = states[i].layout;
    c->state_type = states[i].type;
}

static void counts(struct check *check) {
    for (int64_t count = 0; count <= FLASH_KDA_MAX_DECODE_TOKENS; count++)
        for (int i = 0; i < STATES; i++) {
            struct decode_case c = decode_case_plain();
            set_state(&c, i);
            c.tokens.lengths[0] = c.tokens.lengths[1] = count;
            snprintf(c.tokens.name, sizeof c.tokens.name, "%lld tokens, %s", (long long)count, states[i].name);
            decode_compare(check, &c);
        }
}

static void ragged(struct check *check) {
    static const int64_t lengths[] = {16, 0, 3, 1, 0, 7, 2};
    struct decode_case c = decode_case_plain();
    c.tokens.sequences = sizeof lengths / sizeof *lengths;
    for (int n = 0; n < c.tokens.sequences; n++)
        c.tokens.lengths[n] = lengths[n];
    for (int wide = 0; wide < 2; wide++) {
        c.tokens.packing = wide ? PACKING_INT64 : PACKING_INT32;
        snprintf(c.tokens.name, sizeof c.tokens.name, "0 to 16 tokens a sequence, %s",
                 wide ? "int64" : "int32");
        decode_compare(check, &c);
    }
}

static void head_dims(struct check *check) {
    static const int64_t keys[] = {1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 200, 255, 256};
    static const int64_t values[] = {64, 1, 3, 7, 8, 9, 15, 17, 33, 63, 65, 100, 127, 128, 130, 200, 257};
    for (size_t j = 0; j < sizeof keys / sizeof *keys; j++)
        for (int i = 0; i < STATES; i++) {
            struct decode_case c = decode_case_plain();
            set_state(&c, i);
            c.tokens.K = keys[j];
            c.tokens.V = values[j];
            c.tokens.lengths[0] = c.tokens.lengths[1] = 1 + (int64_t)j % 2 * 3;
            snprintf(c.tokens.name, sizeof c.tokens.name, "K %lld, V %lld, %s", (long long)c.tokens.K,
                     (long long)c.tokens.V, states[i].name);
            decode_compare(check, &c);
        }
}

/* The shapes that are timed. */
static void served(struct check *check) {
    for (int64_t tokens = 1; tokens <= 4; tokens += 3)
        for (int i = 0; i < STATES; i++) {
            struct decode_case c = decode_case_plain();
            set_state(&c, i);
            c.tokens.H = 8;
            c.tokens.K = c.tokens.V = 128;
            c.tokens.q_type = c.tokens.k_type = c.tokens.v_type = c.tokens.out_type = TYPE_BF16;
            c.tokens.g_type = c.tokens.beta_type = TYPE_BF16;
            c.tokens.lengths[0] = c.tokens.lengths[1] = tokens;
            snprintf(c.tokens.name, sizeof c.tokens.name, "H 8, K = V = 128, %lld tokens, bf16, %s",
                     (long long)tokens, states[i].name);
            decode_compare(check, &c);
        }
}

void decode_shapes(struct check *check) {
    counts(check);
    ragged(check);
    head_dims(check);
    served(check);
}
