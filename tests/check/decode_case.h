/* SPDX-License-Identifier: MIT */
/* A case of decode: tokens as a short prefill has them, and a pool of states around them. What is right is what prefill makes
 * of the same tokens, with a checkpoint after each. */
#ifndef CHECK_DECODE_CASE_H
#define CHECK_DECODE_CASE_H

#include "check.h"
#include "fused.h"
#include "prefill_case.h"

enum { MAX_COLUMNS = FLASH_KDA_MAX_DECODE_TOKENS };

struct decode_case {
    struct prefill_case tokens; /* its name is the case's; its pool says whether there are state_indices */
    DLDataType state_type;
    int64_t columns;             /* 0: state_indices [N]; C: [N, C] */
    bool num_accepted, accepted; /* whether these tensors are given */
    bool keep_state, no_out;

    struct fused_options fused;
};

/* A small plain case to change from: two sequences of three tokens in a pool, everything fp32. */
struct decode_case decode_case_plain(void);

struct decode_problem {
    struct decode_case c;
    struct prefill_problem p; /* what the oracle runs; its initial_state holds the states as they are stored */
    struct prefill_results exact; /* out, and the state after every token in checkpoints */
    int64_t slots, slot[MAX_SEQUENCES][MAX_COLUMNS];
    int64_t column[MAX_SEQUENCES];    /* that each state is read from */
    int64_t processed[MAX_SEQUENCES]; /* tokens; 0 for padding */
    struct tensor state;              /* as it is before a call: NaN where nothing is to be read */
    struct tensor state_indices, num_accepted_tokens, accepted;
    struct fused_convolution
        conv[CONVOLUTIONS]; /* of q, k, v; absent where the case has none; state like decode_problem.state */
    struct tensor norm_weight, norm_gate;
    bool *out_written, *state_written; /* rows [B T] of out, slots of state */
    flash_kda_decode_args args;        /* everything but out and state */
};

/* NULL, or what went wrong in the oracle. From the closed formula instead if `formula`. */
const char *decode_problem_make(struct decode_problem *d, const struct decode_case *c, bool formula,
                                struct random *r);
void decode_problem_free(struct decode_problem *d);

/* Row of out, and of the exact checkpoints, of token t of sequence n. */
int64_t decode_place(const struct decode_problem *d, int64_t n, int64_t t);
/* The slot that the state after token t of sequence n is to be in; -1: none. */
int64_t decode_target(const struct decode_problem *d, int64_t n, int64_t t);

struct decode_results {
    struct tensor out, state, conv_state[3];
};

/* Input of a channel, counted over heads, at token t of sequence n, as the convolution sees it; t >= -CONV_PAST. */
double decode_conv_input(const struct decode_problem *d, int i, int64_t n, int64_t t, int64_t channel);

/* From the inputs of the convolutions to their outputs, which the oracle runs on; and from the oracle's outputs to their
 * norm. */
void decode_fuse_inputs(struct decode_problem *d, struct random *r);
void decode_fuse_outputs(struct decode_problem *d, struct random *r);

void decode_results_make(struct decode_results *r, const struct decode_problem *d);
void decode_results_free(struct decode_results *r);
flash_kda_decode_args decode_bind(const struct decode_problem *d, struct decode_results *r,
                                  flash_kda_backend backend);

/* Calls decode, on CUDA with copies of all tensors there. NULL, or what went wrong. */
const char *decode_call(const flash_kda_decode_args *args);

/* Runs, compares, reports and, where asked for, times a case on every level under test. */
void decode_compare(struct check *check, const struct decode_case *c);

#endif
