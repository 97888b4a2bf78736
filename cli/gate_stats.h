/* SPDX-License-Identifier: MIT */
/* How fast the heads of a case forget. */
#ifndef FLASHKDA_GATE_STATS_H
#define FLASHKDA_GATE_STATS_H

#include "case.h"

/* Log decays in nats a token. Only gate none, whose log decays are the caller's, can have some above 0. */
struct head_decay {
    double mean;    /* over tokens and channels */
    double slowest; /* mean over tokens of the largest log decay of all channels */
    double largest; /* over tokens and channels */
};

/* Fills heads[value_heads]. Looks at no more than some thousand tokens, evenly spread; returns how many. */
int64_t gate_stats(const struct kda_case *c, struct head_decay *heads);

/* Tokens after which half is forgotten at this log decay a token; infinite at 0. */
double half_life(double log_decay);

#endif
