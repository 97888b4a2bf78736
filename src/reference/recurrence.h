/* SPDX-License-Identifier: MIT */
/* One token of the recurrence of docs/maths.md in fp64, on any columns of the state: columns never meet. */
#ifndef KDA_REFERENCE_RECURRENCE_H
#define KDA_REFERENCE_RECURRENCE_H

#include "api/tokens.h"

/* What a token does to every column. */
struct kda_token {
    double q[KDA_MAX_KEY_DIM], k[KDA_MAX_KEY_DIM]; /* normalised if asked for */
    double decay[KDA_MAX_KEY_DIM];                 /* exp(a) */
    double beta;
};

/* Columns of V that are worked together. */
struct kda_columns {
    int64_t first, count;
};

struct kda_token kda_load_token(const struct kda_tokens *p, int64_t batch, int64_t token, int64_t head);

/* x [K] becomes what a row of q or k is after the norm. */
void kda_normalise(const struct kda_tokens *p, double *x);

double kda_sigmoid(double x);
double kda_softplus(double x);

/* exp(A_log) of a head, 1 if it is not given; dt_bias of a channel, 0 if not given. */
double kda_gate_factor(const struct kda_tokens *p, int64_t head);
double kda_gate_bias(const struct kda_tokens *p, int64_t head, int64_t c);

/* S [K, count] from memory; zero if there is none. */
void kda_load_state(const struct kda_tokens *p, struct kda_state state, struct kda_columns columns, double *S);

void kda_store_state(const struct kda_tokens *p, struct kda_state state, struct kda_columns columns,
                     const double *S);

/* Decay, delta rule, read-out. u [count] holds v before and o afterwards. */
void kda_recur(const struct kda_tokens *p, const struct kda_token *x, int64_t count, double *S, double *u);

#endif
