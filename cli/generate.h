/* SPDX-License-Identifier: MIT */
/* Random cases: the regimes that KDA kernels are measured on. */
#ifndef FLASHKDA_GENERATE_H
#define FLASHKDA_GENERATE_H

#include "case.h"

/*
 * strong:         q, k, v, g, beta ~ N(0, 1); A_log, dt_bias ~ U(0, 1): the past is soon forgotten
 * slow:           the same with g ~ N(-7, 1), dt_bias 0: decay near 1, as trained heads have
 * uniform:        q, k, v ~ U(0, 1), g constant, the rest as strong
 * near-collinear: every key equal, v repeating every 16 tokens, almost no decay: hard on the arithmetic
 * captured:       zeros, for captured.h to fill
 */
enum regime { REGIME_STRONG, REGIME_SLOW, REGIME_UNIFORM, REGIME_NEAR_COLLINEAR, REGIME_CAPTURED };

/* Their names, ended by NULL; the index is the value. */
extern const char *const regime_names[];

struct case_spec {
    int64_t batch, tokens, heads;
    int64_t value_heads; /* 0: heads */
    int64_t key_dim, value_dim;
    const char *lengths;  /* of packed sequences, "1300,547": tokens is their sum; NULL: dense */
    const char *captured; /* the file of regime captured; NULL for the others */
    DLDataType dtype;     /* of q, k, v, g and beta */
    flash_kda_gate gate;
    double lower_bound;
    enum regime regime;
    double constant_g; /* of regime uniform */
    bool initial_state, bf16_state, batch_invariant;
    int64_t checkpoint_every; /* of a dense case; 0: no checkpoints */
    bool fused;               /* prefill between convolutions and a gated norm */
    uint64_t seed;
};

/* Makes the case: q and k unnormalised, beta logits, g raw (with gate none the log decay that the sigmoid gate
 * would give). The same bits for the same spec. On failure returns false, with failure(), and leaves
 * nothing to free. */
bool case_generate(struct kda_case *c, const struct case_spec *spec);

/* A short name that tells specs apart, for example "T4096-H8-softplus-slow". */
void case_spec_name(const struct case_spec *spec, char *name, size_t size);

/* Tokens of a spec: the sum of its lengths if it has them. -1 if they are not whole numbers from 0 up. */
int64_t case_spec_tokens(const struct case_spec *spec);

#endif
