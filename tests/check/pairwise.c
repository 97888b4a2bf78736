/* SPDX-License-Identifier: MIT */
/* Pairwise cover by random greedy search: a row starts from a pair not yet covered and then takes, dimension
 * by dimension in random order, the value that covers most. The best of a few such rows is kept. */
#include "pairwise.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CANDIDATES = 30, UNSET = -1 };

struct search {
    const struct pairwise *p;
    struct random *r;
    int values;                   /* of all dimensions together */
    int first[PAIRWISE_MAX_DIMS]; /* number of a dimension's value 0 among all values */
    bool *open;                   /* [values][values]: pair allowed and not yet covered */
    int open_count;
};

static bool allowed(const struct pairwise *p, int a, int x, int b, int y) {
    return a < b ? !p->forbidden(a, x, b, y) : !p->forbidden(b, y, a, x);
}

static bool *open_pair(const struct search *s, int a, int x, int b, int y) {
    int i = s->first[a] + x, j = s->first[b] + y;
    return a < b ? &s->open[i * s->values + j] : &s->open[j * s->values + i];
}

static void open_all(struct search *s) {
    const struct pairwise *p = s->p;
    for (int a = 0; a < p->dims; a++)
        for (int b = a + 1; b < p->dims; b++)
            for (int x = 0; x < p->sizes[a]; x++)
                for (int y = 0; y < p->sizes[b]; y++)
                    s->open_count += *open_pair(s, a, x, b, y) = allowed(p, a, x, b, y);
}

/* Puts the n-th open pair into an empty row. */
static void start_row(const struct search *s, int n, int *row) {
    const struct pairwise *p = s->p;
    for (int a = 0; a < p->dims; a++)
        for (int b = a + 1; b < p->dims; b++)
            for (int x = 0; x < p->sizes[a]; x++)
                for (int y = 0; y < p->sizes[b]; y++)
                    if (*open_pair(s, a, x, b, y) && n-- == 0) {
                        row[a] = x;
                        row[b] = y;
                        return;
                    }
}

/* Open pairs that value x of dimension d closes in a row, or -1 if it is not allowed there. */
static int gain(const struct search *s, const int *row, int d, int x) {
    int sum = 0;
    for (int b = 0; b < s->p->dims; b++) {
        if (b == d || row[b] == UNSET)
            continue;
        if (!allowed(s->p, d, x, b, row[b]))
            return -1;
        sum += *open_pair(s, d, x, b, row[b]);
    }
    return sum;
}

static bool choose_value(const struct search *s, int *row, int d) {
    int best = -1, start = (int)random_below(s->r, s->p->sizes[d]);
    for (int i = 0; i < s->p->sizes[d]; i++) {
        int x = (start + i) % s->p->sizes[d];
        int g = gain(s, row, d, x);
        if (g > best) {
            best = g;
            row[d] = x;
        }
    }
    return best >= 0;
}

/* A full row around one open pair; false if the forbidden pairs left no value for some dimension. */
static bool grow_row(const struct search *s, int *row) {
    int order[PAIRWISE_MAX_DIMS];
    for (int d = 0; d < s->p->dims; d++) {
        int i = (int)random_below(s->r, d + 1);
        order[d] = order[i];
        order[i] = d;
        row[d] = UNSET;
    }
    start_row(s, (int)random_below(s->r, s->open_count), row);
    for (int i = 0; i < s->p->dims; i++)
        if (row[order[i]] == UNSET && !choose_value(s, row, order[i]))
            return false;
    return true;
}

/* Sum over the row's pairs still open; closes them if asked to. */
static int row_gain(struct search *s, const int *row, bool close) {
    int sum = 0;
    for (int a = 0; a < s->p->dims; a++)
        for (int b = a + 1; b < s->p->dims; b++) {
            bool *pair = open_pair(s, a, row[a], b, row[b]);
            sum += *pair;
            *pair = *pair && !close;
        }
    return sum;
}

static void best_row(struct search *s, int *best) {
    int row[PAIRWISE_MAX_DIMS] = {0}, most = 0;
    /* Some pairs can only be reached from few starts: keep going until a row covers something. */
    for (int i = 0; i < CANDIDATES || !most; i++) {
        if (!grow_row(s, row))
            continue;
        int g = row_gain(s, row, false);
        if (g > most) {
            most = g;
            memcpy(best, row, (size_t)s->p->dims * sizeof *row);
        }
    }
    s->open_count -= row_gain(s, best, true);
}

static void *must(void *memory) {
    if (!memory) {
        fprintf(stderr, "out of memory in the pairwise generator\n");
        exit(2);
    }
    return memory;
}

int *pairwise_rows(const struct pairwise *p, struct random *r, int *count) {
    struct search s = {.p = p, .r = r};
    for (int d = 0; d < p->dims; d++) {
        s.first[d] = s.values;
        s.values += p->sizes[d];
    }
    s.open = must(calloc((size_t)s.values * (size_t)s.values, sizeof *s.open));
    open_all(&s);
    int *rows = NULL;
    for (*count = 0; s.open_count; ++*count) {
        rows = must(realloc(rows, (size_t)(*count + 1) * (size_t)p->dims * sizeof *rows));
        best_row(&s, rows + *count * p->dims);
    }
    free(s.open);
    return rows;
}

static bool some_row_has(const struct pairwise *p, const int *rows, int count, int a, int x, int b, int y) {
    for (int i = 0; i < count; i++)
        if (rows[i * p->dims + a] == x && rows[i * p->dims + b] == y)
            return true;
    return false;
}

int pairwise_missing(const struct pairwise *p, const int *rows, int count, int *pairs) {
    int wrong = 0;
    *pairs = 0;
    for (int a = 0; a < p->dims; a++)
        for (int b = a + 1; b < p->dims; b++)
            for (int x = 0; x < p->sizes[a]; x++)
                for (int y = 0; y < p->sizes[b]; y++) {
                    bool wanted = !p->forbidden(a, x, b, y);
                    *pairs += wanted;
                    wrong += some_row_has(p, rows, count, a, x, b, y) != wanted;
                }
    return wrong;
}
