/* SPDX-License-Identifier: MIT */
/* One token of the recurrence of docs/maths.md in fp64, on any columns of the state: columns never meet. */
#ifndef KDA_REFERENCE_RECURRENCE_H
#define KDA_REFERENCE_RECURRENCE_H

#include "api/tokens.h"

enum { KDA_REFERENCE_MAX_K = 256 };

/* What a token does to every column. */
struct kda_token {
    double q[KDA_REFERENCE_MAX_K], k[KDA_REFERENCE_MAX_K]; /* normalised if asked for */
    double decay[KDA_REFERENCE_MAX_K];                     /* exp(a) */
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

/* S [K, count] from memory; zero if there is none. */
void kda_load_state(const struct kda_tokens *p, struct kda_state state, struct kda_columns columns, double *S);

void kda_store_state(const struct kda_tokens *p, struct kda_state state, struct kda_columns columns,
                     const double *S);

/* Decay, delta rule, read-out. u [count] holds v before and o afterwards. */
void kda_recur(const struct kda_tokens *p, const struct kda_token *x, int64_t count, double *S, double *u);

#endif
