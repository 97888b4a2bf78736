/* SPDX-License-Identifier: MIT */
/* The oracle's backward: the gradients of the recurrence in fp64, one token after the other from the last to the first.
 * docs/maths.md derives them. */
#include "api/backend.h"
#include "reference/recurrence.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* Tokens from one kept state to the next; between them all are found again. */
enum { SEGMENT = 64 };

/* ---- Memory ------------------------------------------------------------------------------------ */

struct memory {
    double *dA_log, *d_dt_bias; /* [HV], [HV, K]: sums over all tokens */
    double *dq, *dk; /* [T, K]: of a q/k head of a sequence, after the norm, summed over value heads */
    double *kept;    /* [T / SEGMENT, K, V]: the state before each segment */
    double *inner;   /* [SEGMENT, K, V]: the state before each token of a segment */
    double *R;       /* [K, V]: gradient of the state */
    double *e, *u, *du, *d_out; /* [V] */
};

/* Gives the parts of the workspace their places; returns the bytes of all. */
static size_t lay_out(const struct kda_tokens *x, double *workspace, struct memory *m) {
    size_t T = (size_t)x->tokens, HV = (size_t)x->value_heads, K = (size_t)x->key_dim, V = (size_t)x->value_dim;
    const struct {
        double **at;
        size_t count;
    } parts[] = {{&m->dA_log, HV},
                 {&m->d_dt_bias, HV * K},
                 {&m->dq, T * K},
                 {&m->dk, T * K},
                 {&m->kept, (T + SEGMENT - 1) / SEGMENT * K * V},
                 {&m->inner, SEGMENT * K * V},
                 {&m->R, K * V},
                 {&m->e, V},
                 {&m->u, V},
                 {&m->du, V},
                 {&m->d_out, V}};
    size_t used = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].at = workspace ? workspace + used : NULL;
        used += parts[i].count;
    }
    return used * sizeof(double);
}

/* ---- One value head of one sequence ------------------------------------------------------------ */

struct chain {
    const struct kda_backward *b;
    const struct kda_tokens *x;
    struct memory *m;
    int64_t n, head;
    struct kda_sequence s;
};

static void load_values(const struct chain *c, const struct kda_tensor *t, int64_t token, double *row) {
    const char *from = kda_row(t, c->s.batch, c->s.first + token, c->head);
    for (int64_t j = 0; j < c->x->value_dim; j++)
        row[j] = t->data ? kda_load(from, t->dtype, j) : 0;
}

/* S [K, V] through token t; where prefill kept the state after it, that. */
static void advance(const struct chain *c, int64_t t, double *S) {
    const struct kda_token token = kda_load_token(c->x, c->s.batch, c->s.first + t, c->head);
    const struct kda_state kept = kda_kept_state(c->b, c->n, t + 1, c->head);
    load_values(c, &c->x->v, t, c->m->u);
    kda_recur(c->x, &token, c->x->value_dim, S, c->m->u);
    if (kept.data)
        kda_load_state(c->x, kept, (struct kda_columns){0, c->x->value_dim}, S);
}

/* S is the state before token t and becomes what its decay leaves of it; R is the gradient of the state after the
 * token and becomes that of the state before it. Gradients of this token: dq, dk [K] are added to, m->du [V] is
 * v's, da [K] the log decay's; returns beta's, or a multiple of it that does not divide by the step: u . du. */
static double step_back(const struct chain *c, int64_t t, const struct kda_token *x, double *S, double *dq,
                        double *dk, double *da) {
    const struct memory *m = c->m;
    int64_t K = c->x->key_dim, V = c->x->value_dim;
    double *D = S, *R = m->R, *e = m->e, *u = m->u, *du = m->du, d_beta = 0;
    load_values(c, &c->x->v, t, e);
    load_values(c, &c->b->d_out, t, m->d_out);
    for (int64_t i = 0; i < K; i++) /* D = diag(exp(a)) S, e = v - D^T k */
        for (int64_t j = 0; j < V; j++) {
            D[i * V + j] *= x->decay[i];
            e[j] -= D[i * V + j] * x->k[i];
        }
    for (int64_t j = 0; j < V; j++) {
        u[j] = x->beta * e[j];
        du[j] = 0;
    }
    for (int64_t i = 0; i < K; i++) /* R += scale q dO^T, dq = scale (D + k u^T) dO, du = R^T k */
        for (int64_t j = 0; j < V; j++) {
            R[i * V + j] += c->x->scale * x->q[i] * m->d_out[j];
            dq[i] += c->x->scale * (D[i * V + j] + x->k[i] * u[j]) * m->d_out[j];
            du[j] += R[i * V + j] * x->k[i];
        }
    for (int64_t j = 0; j < V; j++) {
        d_beta += du[j] * (c->x->beta_mode == FLASH_KDA_BETA_GIVEN ? e[j] : u[j]);
        du[j] *= x->beta; /* which is de = dv */
    }
    for (int64_t i = 0; i < K; i++) { /* dk = R u - D de, R -= k de^T, da = sum of R * D, R = diag(exp(a)) R */
        da[i] = 0;
        for (int64_t j = 0; j < V; j++) {
            dk[i] += R[i * V + j] * u[j] - D[i * V + j] * du[j];
            R[i * V + j] -= x->k[i] * du[j];
            da[i] += R[i * V + j] * D[i * V + j];
            R[i * V + j] *= x->decay[i];
        }
    }
    return d_beta;
}

/* ---- From the recurrence to the arguments -------------------------------------------------------- */

/* A product of which one factor may be infinite where the other is 0. */
static double times(double x, double y) { return x == 0 || y == 0 ? 0 : x * y; }

/* g's gradient from the log decay's, and what it adds to the sums over tokens. */
static void store_gate(const struct chain *c, int64_t t, const double *da) {
    const struct kda_tokens *x = c->x;
    const struct kda_tensor *dg_out = &c->b->dg;
    const char *g = kda_row(&x->g, c->s.batch, c->s.first + t, c->head);
    double A = kda_gate_factor(x, c->head);
    for (int64_t i = 0; i < x->key_dim; i++) {
        double z = kda_load(g, x->g.dtype, i) + kda_gate_bias(x, c->head, i), dg = da[i], dA_log = 0;
        if (x->gate == FLASH_KDA_GATE_SOFTPLUS) { /* a = -A softplus(z) */
            dg = times(-A * kda_sigmoid(z), da[i]);
            dA_log = times(-A * kda_softplus(z), da[i]);
        } else if (x->gate == FLASH_KDA_GATE_SIGMOID) { /* a = lower_bound sigmoid(y), y = A z */
            double y = A * z, dy = x->lower_bound * kda_sigmoid(y) * kda_sigmoid(-y) * da[i];
            dg = times(A, dy);
            dA_log = times(y, dy);
        }
        c->m->dA_log[c->head] += dA_log;
        c->m->d_dt_bias[c->head * x->key_dim + i] += dg;
        if (dg_out->data)
            kda_store(kda_row(dg_out, c->s.batch, c->s.first + t, c->head), dg_out->dtype, i, (float)dg);
    }
}

/* beta's gradient from what step_back returns. */
static void store_beta(const struct chain *c, int64_t t, double d_beta) {
    const struct kda_tensor *out = &c->b->dbeta, *beta = &c->x->beta;
    int64_t token = c->s.first + t;
    if (c->x->beta_mode != FLASH_KDA_BETA_GIVEN)
        d_beta *= kda_sigmoid(-(double)kda_load(kda_row(beta, c->s.batch, token, c->head), beta->dtype, 0));
    if (out->data)
        kda_store(kda_row(out, c->s.batch, token, c->head), out->dtype, 0, (float)d_beta);
}

/* dx [K], the gradient of a row of q or k after the norm, becomes that of the row: dx = r (dy - y (y . dy)), y = r
 * x. */
static void store_key(const struct kda_tokens *x, const struct kda_tensor *t, const struct kda_tensor *out,
                      int64_t batch, int64_t token, int64_t head, const double *dy) {
    const char *row = kda_row(t, batch, token, head);
    double squares = 1e-6, along = 0;
    if (!out->data)
        return;
    for (int64_t i = 0; i < x->key_dim; i++) {
        double value = kda_load(row, t->dtype, i);
        squares += value * value;
        along += value * dy[i];
    }
    for (int64_t i = 0; i < x->key_dim; i++) {
        double dx = x->qk_norm ? (dy[i] - kda_load(row, t->dtype, i) * along / squares) / sqrt(squares) : dy[i];
        kda_store(kda_row(out, batch, token, head), out->dtype, i, (float)dx);
    }
}

static void store_values(const struct chain *c, int64_t t) {
    const struct kda_tensor *out = &c->b->dv;
    for (int64_t j = 0; out->data && j < c->x->value_dim; j++)
        kda_store(kda_row(out, c->s.batch, c->s.first + t, c->head), out->dtype, j, (float)c->m->du[j]);
}

/* ---- The whole sequence -------------------------------------------------------------------------- */

/* Tokens first .. first + SEGMENT - 1, from the last one on. */
static void run_segment(const struct chain *c, int64_t first) {
    int64_t K = c->x->key_dim, KV = K * c->x->value_dim, count = kda_min64(SEGMENT, c->s.length - first);
    double *inner = c->m->inner, da[KDA_MAX_KEY_DIM];
    memcpy(inner, c->m->kept + first / SEGMENT * KV, (size_t)KV * sizeof *inner);
    for (int64_t i = 1; i < count; i++) {
        memcpy(inner + i * KV, inner + (i - 1) * KV, (size_t)KV * sizeof *inner);
        advance(c, first + i - 1, inner + i * KV);
    }
    for (int64_t i = count - 1, t = first + i; i >= 0; i--, t--) {
        const struct kda_token x = kda_load_token(c->x, c->s.batch, c->s.first + t, c->head);
        double d_beta = step_back(c, t, &x, inner + i * KV, c->m->dq + t * K, c->m->dk + t * K, da);
        store_values(c, t);
        store_beta(c, t, d_beta);
        store_gate(c, t, da);
    }
}

/* R after the last token: from elsewhere, or d_final_state. */
static void load_last_R(const struct chain *c) {
    int64_t awaited = kda_awaited_by(&c->b->border, c->n);
    const struct kda_tensor *from = awaited >= 0 ? &c->b->border.states : &c->b->d_final_state;
    kda_load_state(c->x, kda_state_in(c->x, from, awaited >= 0 ? awaited : c->n, c->head),
                   (struct kda_columns){0, c->x->value_dim}, c->m->R);
}

static void store_summary(const struct chain *c) {
    int64_t place = kda_summary_of(&c->b->border, c->n);
    if (place >= 0)
        kda_store_state(c->x, kda_state_in(c->x, &c->b->border.summaries, place, c->head),
                        (struct kda_columns){0, c->x->value_dim}, c->m->R);
}

/* What R becomes on its way back from 0; no gradient of a token needs the states. */
static void summarise_chain(const struct chain *c) {
    int64_t K = c->x->key_dim, V = c->x->value_dim;
    double *R = c->m->R, *du = c->m->du, *d_out = c->m->d_out;
    memset(R, 0, (size_t)(K * V) * sizeof *R);
    for (int64_t t = c->s.length - 1; t >= 0; t--) {
        const struct kda_token x = kda_load_token(c->x, c->s.batch, c->s.first + t, c->head);
        load_values(c, &c->b->d_out, t, d_out);
        memset(du, 0, (size_t)V * sizeof *du);
        for (int64_t i = 0; i < K; i++)
            for (int64_t j = 0; j < V; j++) {
                R[i * V + j] += c->x->scale * x.q[i] * d_out[j];
                du[j] += R[i * V + j] * x.k[i];
            }
        for (int64_t i = 0; i < K; i++)
            for (int64_t j = 0; j < V; j++)
                R[i * V + j] = x.decay[i] * (R[i * V + j] - x.k[i] * x.beta * du[j]);
    }
    store_summary(c);
}

static void run_chain(const struct chain *c) {
    const struct kda_columns all = {0, c->x->value_dim};
    int64_t KV = c->x->key_dim * c->x->value_dim, first = 0;
    double *S = c->m->inner;
    kda_load_state(c->x, kda_state_in(c->x, &c->b->forward.initial_state, c->n, c->head), all, S);
    for (int64_t t = 0; t < c->s.length; t++) {
        if (t % SEGMENT == 0)
            memcpy(c->m->kept + t / SEGMENT * KV, S, (size_t)KV * sizeof *S);
        advance(c, t, S);
    }
    load_last_R(c);
    while (first + SEGMENT < c->s.length)
        first += SEGMENT;
    for (; c->s.length && first >= 0; first -= SEGMENT)
        run_segment(c, first);
    if (c->b->d_initial_state.data)
        kda_store_state(c->x, kda_state_in(c->x, &c->b->d_initial_state, c->n, c->head), all, c->m->R);
    store_summary(c);
}

/* A q/k head of a sequence, with all value heads that read it. */
static void run_head(const struct kda_backward *b, struct memory *m, int64_t n, int64_t head) {
    const struct kda_tokens *x = &b->forward.base;
    const struct kda_sequence s = kda_tokens_of(x, n);
    int64_t group = x->value_heads / x->heads, K = x->key_dim;
    enum kda_work work = kda_work_on(&b->border, n);
    for (int64_t i = 0; work == KDA_WORK_SUMMARY && i < group; i++)
        summarise_chain(&(struct chain){.b = b, .x = x, .m = m, .n = n, .head = head * group + i, .s = s});
    if (work != KDA_WORK_ALL)
        return;
    memset(m->dq, 0, (size_t)(s.length * K) * sizeof *m->dq);
    memset(m->dk, 0, (size_t)(s.length * K) * sizeof *m->dk);
    for (int64_t i = 0; i < group; i++)
        run_chain(&(struct chain){.b = b, .x = x, .m = m, .n = n, .head = head * group + i, .s = s});
    for (int64_t t = 0; t < s.length; t++) {
        store_key(x, &x->q, &b->dq, s.batch, s.first + t, head, m->dq + t * K);
        store_key(x, &x->k, &b->dk, s.batch, s.first + t, head, m->dk + t * K);
    }
}

static void store_sums(const struct kda_backward *b, const struct memory *m) {
    const struct kda_tensor *A = &b->dA_log, *bias = &b->d_dt_bias;
    int64_t K = b->forward.key_dim;
    for (int64_t head = 0; head < b->forward.value_heads; head++) {
        if (A->data)
            kda_store(A->data + head * A->stride[0], A->dtype, 0, (float)m->dA_log[head]);
        for (int64_t i = 0; bias->data && i < K; i++)
            kda_store(bias->data + head * bias->stride[0], bias->dtype, i, (float)m->d_dt_bias[head * K + i]);
    }
}

flash_kda_status kda_reference_backward(const struct kda_backward *b, void *workspace) {
    const struct kda_tokens *x = &b->forward.base;
    struct memory m;
    lay_out(x, workspace, &m);
    if (b->border.phase != FLASH_KDA_PHASE_FINISH) { /* or it goes on with BEGIN's sums */
        memset(m.dA_log, 0, (size_t)x->value_heads * sizeof *m.dA_log);
        memset(m.d_dt_bias, 0, (size_t)(x->value_heads * x->key_dim) * sizeof *m.d_dt_bias);
    }
    for (int64_t n = 0; n < x->sequences; n++)
        for (int64_t head = 0; head < x->heads; head++)
            run_head(b, &m, n, head);
    if (b->border.phase != FLASH_KDA_PHASE_BEGIN)
        store_sums(b, &m);
    return FLASH_KDA_OK;
}

flash_kda_status kda_reference_backward_workspace_size(const struct kda_backward *b, size_t *bytes) {
    struct memory m;
    *bytes = lay_out(&b->forward.base, NULL, &m);
    return FLASH_KDA_OK;
}

flash_kda_status kda_reference_backward_describe(const struct kda_backward *b, char *text, size_t size) {
    snprintf(text, size, "reference: token recurrence in fp64, %" PRId64 " chains on 1 thread%s",
             b->forward.sequences * b->forward.value_heads, kda_phase_text(&b->border));
    return FLASH_KDA_OK;
}
