/* SPDX-License-Identifier: MIT */
/*
 * The kernel of backward, written once for all levels: the chunked form of docs/maths.md, one head on one thread.
 *
 * States are found again from one segment's first to its last token, with everything that a chunk needs of its way there; then
 * chunks are taken from the last to the first. Between the tokens of a chunk decays are multiplied along, so no exponent is
 * positive, and the gradient of a decay is the sum of all products that it is a factor of: there is no difference in it, and
 * after a hard reset it is exactly 0.
 */
#include "cpu/backward.h"
#include "cpu/chunk_tmpl.h"

enum {
    SEGMENT = 128, /* tokens between states that are kept over the whole sequence */
    CHUNKS = SEGMENT / KDA_CHUNK,
    PAIRS = KDA_CHUNK * (KDA_CHUNK - 1) / 2,
};

/* ---- Memory ------------------------------------------------------------------------------------ */

/* A chunk on its way there. Matrices with V columns are [tiles][rows][KDA_TILE]. */
struct step {
    struct kda_chunk chunk; /* L is not times beta */
    struct rows rows;       /* k, q and decay stay */
    float *S;               /* K rows: the state before the chunk */
    float *u, *e;           /* KDA_CHUNK rows: u = beta e, e = v - D^T k */
};

struct memory {
    struct step steps[CHUNKS];
    float *kept;            /* [segments]: the state before each; NULL where prefill kept all of them */
    float *R;               /* K rows: gradient of the state after the chunk */
    float *given;           /* 2 KDA_CHUNK rows: -dX, then dO; what KT and QT give to R */
    float *z;               /* KDA_CHUNK rows: gradient of u */
    float *to_state;        /* [2 KDA_CHUNK][Kp]: S (-dX), S dO */
    float *to_R;            /* [KDA_CHUNK][Kp]: R u */
    float *across;          /* [Kp]: sum over columns of S R */
    float *pairs;           /* [2 KDA_CHUNK][KDA_CHUNK]: gradients of L, then of M */
    float *dq, *dk;         /* [KDA_CHUNK][Kp]; of the scaled q */
    float *sums_q, *sums_k; /* [T][Kp]: over the value heads of a q/k head, where there are several */
    float *keys;            /* [pairs of tokens][LANES]: what channels_back keeps */
    float *raw, *da;        /* [KDA_CHUNK][Kp]: g, and the gradient of the log decay, then of g */
};

/* One value head of one sequence. */
struct head {
    const struct kda_backward *b;
    const struct kda_prefill *p;
    struct memory *m;
    struct kda_chain chain;
    int64_t Kp, tiles, state; /* floats of a state */
    bool first, last;         /* of the value heads of a q/k head */
    double *sums;
};

/* Does every segment begin with a state that prefill kept? */
static inline bool all_kept(const struct kda_prefill *p) {
    return p->checkpoints.data && SEGMENT % p->checkpoint_every == 0;
}

static inline void lay_out_step(int64_t Kp, int64_t Vp, struct kda_arena *arena, struct step *s) {
    size_t row = (size_t)Kp * sizeof(float), column = (size_t)Vp * sizeof(float);
    s->chunk.carry = kda_take(arena, 1, row);
    s->chunk.beta = kda_take(arena, KDA_CHUNK, sizeof(float));
    s->chunk.L = kda_take(arena, (size_t)KDA_CHUNK * KDA_CHUNK, sizeof(float));
    s->chunk.M = kda_take(arena, (size_t)KDA_CHUNK * KDA_CHUNK, sizeof(float));
    s->chunk.queries_keys = kda_take(arena, 2 * KDA_CHUNK, row);
    s->chunk.keys_to_end = kda_take(arena, KDA_CHUNK, row);
    s->rows.k = kda_take(arena, KDA_CHUNK, row);
    s->rows.q = kda_take(arena, KDA_CHUNK, row);
    s->rows.decay = kda_take(arena, KDA_CHUNK, row);
    s->S = kda_take(arena, (size_t)Kp, column);
    s->u = kda_take(arena, KDA_CHUNK, column);
    s->e = kda_take(arena, KDA_CHUNK, column);
}

static inline void lay_out_all(const struct kda_backward *b, struct kda_arena *arena, struct memory *m) {
    const struct kda_prefill *p = &b->forward;
    int64_t Kp = kda_padded_key_dim(p), Vp = kda_tiles(p->value_dim) * KDA_TILE;
    size_t row = (size_t)Kp * sizeof(float), column = (size_t)Vp * sizeof(float);
    size_t segments = all_kept(p) ? 0 : (size_t)(p->tokens + SEGMENT - 1) / SEGMENT;
    size_t summed = p->value_heads > p->heads ? (size_t)p->tokens : 0;
    for (int i = 0; i < CHUNKS; i++)
        lay_out_step(Kp, Vp, arena, &m->steps[i]);
    float *to_here = kda_take(arena, KDA_CHUNK, row);
    for (int i = 0; i < CHUNKS; i++)
        m->steps[i].rows.to_here = to_here;
    m->kept = kda_take(arena, segments * (size_t)Kp, column);
    m->R = kda_take(arena, (size_t)Kp, column);
    m->given = kda_take(arena, 2 * KDA_CHUNK, column);
    m->z = kda_take(arena, KDA_CHUNK, column);
    m->to_state = kda_take(arena, 2 * KDA_CHUNK, row);
    m->to_R = kda_take(arena, KDA_CHUNK, row);
    m->across = kda_take(arena, 1, row);
    m->pairs = kda_take(arena, 2 * (size_t)KDA_CHUNK * KDA_CHUNK, sizeof(float));
    m->dq = kda_take(arena, KDA_CHUNK, row);
    m->dk = kda_take(arena, KDA_CHUNK, row);
    m->sums_q = kda_take(arena, summed, row);
    m->sums_k = kda_take(arena, summed, row);
    m->keys = kda_take(arena, PAIRS * LANES, sizeof(float));
    m->raw = kda_take(arena, KDA_CHUNK, row);
    m->da = kda_take(arena, KDA_CHUNK, row);
}

static void lay_out(const struct kda_backward *b, struct kda_arena *arena) {
    struct memory unused;
    lay_out_all(b, arena, &unused);
}

/* ---- States ------------------------------------------------------------------------------------ */

static inline struct kda_tile_io columns_of(const struct head *h, int64_t tile) {
    int64_t column = tile * KDA_TILE;
    return (struct kda_tile_io){.column = column, .columns = kda_min64(KDA_TILE, h->p->value_dim - column)};
}

static inline void load_matrix(const struct head *h, struct kda_state state, float *S) {
    for (int64_t tile = 0; tile < h->tiles; tile++) {
        const struct kda_tile_io io = columns_of(h, tile);
        load_tile(h->p, state, &io, S + tile * h->Kp * KDA_TILE);
    }
}

static inline void store_matrix(const struct head *h, struct kda_state state, const float *S) {
    for (int64_t tile = 0; tile < h->tiles; tile++) {
        const struct kda_tile_io io = columns_of(h, tile);
        store_tile(h->p, state, &io, S + tile * h->Kp * KDA_TILE);
    }
}

/* A row of v, dO or dv at the columns of a tile. */
static inline char *values_at(const struct head *h, const struct kda_tensor *t, int64_t token, int64_t tile) {
    return kda_row(t, h->chain.tokens.batch, h->chain.tokens.first + token, h->chain.head) +
           tile * KDA_TILE * (int64_t)kda_dtype_size(t->dtype);
}

/* to [KDA_CHUNK][KDA_TILE]: a chunk's rows of v or dO at the columns of a tile, zeros after them. */
static inline void load_values(const struct head *h, const struct kda_tensor *t, const struct kda_chunk *chunk,
                               int64_t tile, float *to) {
    int64_t columns = columns_of(h, tile).columns, count = t->data ? chunk->count : 0;
    for (int64_t i = 0; i < count; i++)
        load_row(to + i * KDA_TILE, values_at(h, t, chunk->first + i, tile), t->dtype, columns, KDA_TILE);
    memset(to + count * KDA_TILE, 0, (size_t)(KDA_CHUNK - count) * KDA_TILE * sizeof *to);
}

/* ---- There ------------------------------------------------------------------------------------- */

static inline void begin_step(const struct head *h, int64_t first, struct step *s) {
    const struct kda_prefill *p = h->p;
    struct kda_chunk *chunk = &s->chunk;
    int64_t Kp = h->Kp;
    chunk->first = first;
    chunk->count = kda_min64(KDA_CHUNK, h->chain.tokens.length - first);
    for (int64_t t = 0; t < chunk->count; t++) {
        load_key(p, &p->k, &h->chain, first + t, 1, Kp, s->rows.k + t * Kp);
        load_key(p, &p->q, &h->chain, first + t, p->scale, Kp, s->rows.q + t * Kp);
    }
    size_t missing = (size_t)((KDA_CHUNK - chunk->count) * Kp) * sizeof(float);
    memset(s->rows.k + chunk->count * Kp, 0, missing);
    memset(s->rows.q + chunk->count * Kp, 0, missing);
    load_decay(p, &h->chain, Kp, chunk, s->rows.decay);
    load_beta(p, &h->chain, chunk, chunk->beta);
    for (int t = 0; t < KDA_CHUNK; t++)
        s->rows.beta[t] = 1;
    store_operands(&s->rows, Kp, chunk);
    find_pairs(&s->rows, Kp, chunk);
}

/* e and u of one tile by forward substitution, in place of v in e; product: KT S. */
static inline void solve_there(const struct kda_chunk *chunk, const float *product, float *e, float *u) {
    for (int column = 0; column < KDA_TILE; column += LANES) {
        vf done[KDA_CHUNK];
        UNROLL for (int i = 0; i < KDA_CHUNK; i++) {
            int at = i * KDA_TILE + column;
            vf x = vf_sub(vf_load(e + at), vf_load(product + at));
            UNROLL for (int j = 0; j < i; j++) x = vf_fnma(vf_set1(chunk->L[i * KDA_CHUNK + j]), done[j], x);
            vf_store(e + at, x);
            done[i] = vf_mul(vf_set1(chunk->beta[i]), x);
            vf_store(u + at, done[i]);
        }
    }
}

static inline void correct(const struct head *h, struct step *s) {
    float product[KDA_CHUNK * KDA_TILE] ALIGNED;
    for (int64_t tile = 0; tile < h->tiles; tile++) {
        int64_t at = tile * KDA_CHUNK * KDA_TILE;
        const struct kda_tile S = {.S = s->S + tile * h->Kp * KDA_TILE};
        load_values(h, &h->p->v, &s->chunk, tile, s->e + at);
        multiply_state(s->chunk.queries_keys, &S, h->Kp, KDA_CHUNK, product);
        solve_there(&s->chunk, product, s->e + at, s->u + at);
    }
}

/* S: the state after the chunk, from the one before it; where prefill kept it, that. S may be s->S. */
static inline void leave_step(const struct head *h, const struct step *s, float *S) {
    const struct kda_state kept =
        kda_kept_state(h->b, h->chain.sequence, s->chunk.first + s->chunk.count, h->chain.head);
    if (kept.data) {
        load_matrix(h, kept, S);
        return;
    }
    if (S != s->S)
        memcpy(S, s->S, (size_t)h->state * sizeof *S);
    for (int64_t tile = 0; tile < h->tiles; tile++)
        carry_and_add(s->chunk.carry, s->chunk.keys_to_end, s->u + tile * KDA_CHUNK * KDA_TILE, KDA_CHUNK,
                      h->Kp, S + tile * h->Kp * KDA_TILE);
}

/* The state before a segment, to S: from memory, or from the state before it. */
static inline void find_state(const struct head *h, int64_t segment, float *S) {
    const struct kda_prefill *p = h->p;
    if (segment == 0)
        load_matrix(h, kda_state_at(p, &p->initial_state, h->chain.sequence, h->chain.head), S);
    else if (all_kept(p))
        load_matrix(h, kda_kept_state(h->b, h->chain.sequence, segment * SEGMENT, h->chain.head), S);
    else
        memcpy(S, h->m->kept + segment * h->state, (size_t)h->state * sizeof *S);
}

/* The states before all segments but the first. */
static inline void keep_states(const struct head *h) {
    struct step *s = &h->m->steps[0];
    int64_t length = h->chain.tokens.length;
    find_state(h, 0, s->S);
    for (int64_t first = 0; first + SEGMENT < length; first += SEGMENT) {
        for (int64_t i = 0; i < SEGMENT; i += KDA_CHUNK) {
            begin_step(h, first + i, s);
            correct(h, s);
            leave_step(h, s, s->S);
        }
        memcpy(h->m->kept + (first / SEGMENT + 1) * h->state, s->S, (size_t)h->state * sizeof *s->S);
    }
}

/* ---- Back: matrices ---------------------------------------------------------------------------- */

/* Rows of b at a time, for as many accumulators as a level has for products. */
enum { ROWS_OF_B = PRODUCT_ROWS * PRODUCT_VECTORS < 16 ? 2 : 4 };

/* out [a_rows][stride]: sums over all columns of V of a's rows times b's; rows in multiples of 4. */
static inline void multiply_rows(const float *a, int a_rows, const float *b, int64_t b_rows, int64_t tiles,
                                 float *out, int64_t stride) {
    for (int64_t j = 0; j < b_rows; j += 4)
        for (int i = 0; i < a_rows; i += 4) {
            vf all[16];
            UNROLL for (int y = 0; y < 4; y += ROWS_OF_B) {
                vf sum[4][ROWS_OF_B];
                UNROLL for (int n = 0; n < 4; n++) UNROLL for (int r = 0; r < ROWS_OF_B; r++) sum[n][r] =
                    vf_set1(0);
                for (int64_t tile = 0; tile < tiles; tile++) {
                    const float *from_a = a + (tile * a_rows + i) * KDA_TILE;
                    const float *from_b = b + (tile * b_rows + j + y) * KDA_TILE;
                    for (int v = 0; v < KDA_TILE; v += LANES) {
                        vf x[ROWS_OF_B];
                        UNROLL for (int r = 0; r < ROWS_OF_B; r++) x[r] = vf_load(from_b + r * KDA_TILE + v);
                        UNROLL for (int n = 0; n < 4; n++) {
                            vf row = vf_load(from_a + n * KDA_TILE + v);
                            UNROLL for (int r = 0; r < ROWS_OF_B; r++) sum[n][r] = vf_fma(row, x[r], sum[n][r]);
                        }
                    }
                }
                UNROLL for (int n = 0; n < 4; n++) UNROLL for (int r = 0; r < ROWS_OF_B; r++)
                    all[4 * n + y + r] = sum[n][r];
            }
            float sums[16];
            vf_sums(all, sums);
            for (int n = 0; n < 4; n++)
                memcpy(out + (i + n) * stride + j, sums + 4 * n, 4 * sizeof *sums);
        }
}

/* One row of each: the sum over all columns of V. */
static inline float multiply_row(const float *a, int a_rows, const float *b, int64_t b_rows, int64_t tiles) {
    vf sum = vf_set1(0);
    float lanes[LANES] ALIGNED, total = 0;
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int v = 0; v < KDA_TILE; v += LANES)
            sum = vf_fma(vf_load(a + tile * a_rows * KDA_TILE + v), vf_load(b + tile * b_rows * KDA_TILE + v),
                         sum);
    vf_store(lanes, sum);
    for (int i = 0; i < LANES; i++)
        total += lanes[i];
    return total;
}

/* z of one tile, the gradient of u with all later tokens of the chunk, and -dX = -beta z; product: KR R. */
static inline void solve_back(const struct kda_chunk *chunk, const float *product, float *given, float *z) {
    const float *d_out = given + KDA_CHUNK * KDA_TILE;
    for (int column = 0; column < KDA_TILE; column += LANES) {
        vf done[KDA_CHUNK];
        UNROLL for (int n = 0; n < KDA_CHUNK; n++) {
            int j = KDA_CHUNK - 1 - n;
            vf x = vf_load(product + j * KDA_TILE + column);
            UNROLL for (int i = j; i < KDA_CHUNK; i++) x =
                vf_fma(vf_set1(chunk->M[i * KDA_CHUNK + j]), vf_load(d_out + i * KDA_TILE + column), x);
            UNROLL for (int i = j + 1; i < KDA_CHUNK; i++) x =
                vf_fma(vf_set1(chunk->L[i * KDA_CHUNK + j]), done[i], x);
            vf_store(z + j * KDA_TILE + column, x);
            done[j] = vf_mul(vf_set1(-chunk->beta[j]), x);
            vf_store(given + j * KDA_TILE + column, done[j]);
        }
    }
}

static inline void store_dv(const struct head *h, const struct step *s, int64_t tile, const float *given) {
    const struct kda_tensor *dv = &h->b->dv;
    float row[KDA_TILE] ALIGNED;
    for (int64_t t = 0; dv->data && t < s->chunk.count; t++) {
        for (int v = 0; v < KDA_TILE; v += LANES)
            vf_store(row + v, vf_sub(vf_set1(0), vf_load(given + t * KDA_TILE + v)));
        store_row(values_at(h, dv, s->chunk.first + t, tile), dv->dtype, row, columns_of(h, tile).columns);
    }
}

/* R times what the chunk leaves of a state: 1 + carry where it is slow, as a product where little is left. */
static inline void decay_back(const struct head *h, const struct step *s) {
    for (int64_t c = 0; c < h->Kp; c++) {
        float left = 1, carry = s->chunk.carry[c];
        bool slow = carry > -0.5f;
        for (int t = 0; t < KDA_CHUNK; t++)
            left *= s->rows.decay[t * h->Kp + c];
        vf factor = vf_set1(slow ? carry : left);
        for (int64_t tile = 0; tile < h->tiles; tile++)
            for (int v = 0; v < KDA_TILE; v += LANES) {
                float *R = h->m->R + (tile * h->Kp + c) * KDA_TILE + v;
                vf x = vf_load(R);
                vf_store(R, slow ? vf_fma(factor, x, x) : vf_mul(factor, x));
            }
    }
}

/* All products with the state and its gradient, which becomes that before the chunk. */
static inline void multiply_back(const struct head *h, const struct step *s) {
    const struct memory *m = h->m;
    float product[KDA_CHUNK * KDA_TILE] ALIGNED;
    const float none[KDA_MAX_PADDED_K] = {0};
    for (int64_t tile = 0; tile < h->tiles; tile++) {
        float *given = m->given + tile * 2 * KDA_CHUNK * KDA_TILE;
        const struct kda_tile R = {.S = m->R + tile * h->Kp * KDA_TILE};
        load_values(h, &h->b->d_out, &s->chunk, tile, given + KDA_CHUNK * KDA_TILE);
        multiply_state(s->chunk.keys_to_end, &R, h->Kp, KDA_CHUNK, product);
        solve_back(&s->chunk, product, given, m->z + tile * KDA_CHUNK * KDA_TILE);
        store_dv(h, s, tile, given);
    }
    multiply_rows(m->given, 2 * KDA_CHUNK, s->S, h->Kp, h->tiles, m->to_state, h->Kp);
    multiply_rows(s->u, KDA_CHUNK, m->R, h->Kp, h->tiles, m->to_R, h->Kp);
    multiply_rows(m->given, 2 * KDA_CHUNK, s->u, KDA_CHUNK, h->tiles, m->pairs, KDA_CHUNK);
    for (int64_t c = 0; c < h->Kp; c++)
        m->across[c] = multiply_row(s->S + c * KDA_TILE, (int)h->Kp, m->R + c * KDA_TILE, h->Kp, h->tiles);
    decay_back(h, s);
    for (int64_t tile = 0; tile < h->tiles; tile++)
        carry_and_add(none, s->chunk.queries_keys, m->given + tile * 2 * KDA_CHUNK * KDA_TILE, 2 * KDA_CHUNK,
                      h->Kp, m->R + tile * h->Kp * KDA_TILE);
}

static inline void store_dbeta(const struct head *h, const struct step *s) {
    const struct kda_tensor *dbeta = &h->b->dbeta, *beta = &h->p->beta;
    for (int64_t t = 0; dbeta->data && t < s->chunk.count; t++) {
        int64_t batch = h->chain.tokens.batch, token = h->chain.tokens.first + s->chunk.first + t;
        float d = multiply_row(h->m->z + t * KDA_TILE, KDA_CHUNK, s->e + t * KDA_TILE, KDA_CHUNK, h->tiles);
        if (h->p->beta_mode != FLASH_KDA_BETA_GIVEN) {
            float raw = kda_load(kda_row(beta, batch, token, h->chain.head), beta->dtype, 0);
            d *= s->chunk.beta[t] / (1 + expf(raw)); /* step times sigmoid(-beta) */
        }
        kda_store(kda_row(dbeta, batch, token, h->chain.head), dbeta->dtype, 0, d);
    }
}

/* ---- Back: channels ---------------------------------------------------------------------------- */

/* Every number that passes a token is multiplied by its decay there: keys on their way to later tokens, which are
 * kept, and on the way back what meets them, from outputs, from later keys and from R. Both functions work LANES
 * channels from c on. */

/* What outputs and later keys take of the state and of earlier keys: dq, and dk as far as it comes from there.
 * start: decay from the start of the chunk to before each token. */
static inline void channels_there(const struct head *h, const struct step *s, int64_t c, vf *start) {
    const struct memory *m = h->m;
    const float *dL = m->pairs, *dM = m->pairs + KDA_CHUNK * KDA_CHUNK;
    float *here = m->keys; /* of the tokens before t, decayed up to before it */
    start[0] = vf_set1(1);
    for (int t = 0; t < KDA_CHUNK; t++) {
        int64_t at = t * h->Kp + c;
        float *next = here + t * LANES;
        vf key = vf_load(s->rows.k + at), d = vf_load(s->rows.decay + at), own = vf_set1(dM[t * KDA_CHUNK + t]);
        vf sum_q = vf_mul(start[t], vf_load(m->to_state + KDA_CHUNK * h->Kp + at));
        vf sum_k = vf_mul(start[t], vf_load(m->to_state + at));
        bool last = t + 1 == KDA_CHUNK;
        for (int j = 0; j < t; j++) {
            vf x = vf_load(here + j * LANES);
            sum_q = vf_fma(vf_set1(dM[t * KDA_CHUNK + j]), x, sum_q);
            sum_k = vf_fma(vf_set1(dL[t * KDA_CHUNK + j]), x, sum_k);
            if (!last)
                vf_store(next + j * LANES, vf_mul(d, x));
        }
        vf_store(m->dq + at, vf_fma(d, sum_q, vf_mul(own, key)));
        vf_store(m->dk + at, vf_fma(d, sum_k, vf_mul(own, vf_load(s->rows.q + at))));
        if (!last) {
            vf_store(next + t * LANES, key);
            start[t + 1] = vf_mul(start[t], d);
        }
        here = next;
    }
}

/* The rest of dk, and da: what comes back to each token, times what arrived there. */
static inline void channels_back(const struct head *h, const struct step *s, int64_t c, const vf *start) {
    const struct memory *m = h->m;
    const float *dL = m->pairs, *dM = m->pairs + KDA_CHUNK * KDA_CHUNK;
    vf back[KDA_CHUNK], back_state = vf_load(m->across + c);
    for (int j = 0; j < KDA_CHUNK; j++)
        back[j] = vf_load(m->to_R + j * h->Kp + c);
    for (int t = KDA_CHUNK - 1; t >= 0; t--) {
        int64_t at = t * h->Kp + c;
        const float *here = m->keys + t * (t - 1) / 2 * LANES;
        vf key = vf_load(s->rows.k + at), query = vf_load(s->rows.q + at), d = vf_load(s->rows.decay + at);
        vf_store(m->dk + at, vf_add(vf_load(m->dk + at), back[t]));
        back_state = vf_fma(query, vf_load(m->to_state + KDA_CHUNK * h->Kp + at),
                            vf_fma(key, vf_load(m->to_state + at), back_state));
        vf sum = vf_mul(start[t], back_state);
        for (int j = 0; j < t; j++) {
            vf x = vf_fma(query, vf_set1(dM[t * KDA_CHUNK + j]),
                          vf_fma(key, vf_set1(dL[t * KDA_CHUNK + j]), back[j]));
            sum = vf_fma(vf_load(here + j * LANES), x, sum);
            back[j] = vf_mul(d, x);
        }
        vf_store(m->da + at, vf_mul(d, sum));
        back_state = vf_mul(d, back_state);
    }
}

/* dg from da in place; adds to the sums of dt_bias and A_log. Where da is 0, all of this is. */
static inline void gate_back(const struct head *h, const struct step *s, flash_kda_gate gate,
                             const float *dt_bias, float A) {
    const vf lowest = vf_set1(-FLT_MAX), highest = vf_set1(FLT_MAX), zero = vf_set1(0);
    const vf lower_bound = vf_set1(h->p->lower_bound);
    int64_t K = h->p->key_dim, Kp = h->Kp;
    float lanes[LANES] ALIGNED;
    vf A_sum = zero;
    for (int64_t c = 0; c < Kp; c += LANES) {
        vf bias_sum = zero, bias = vf_load(dt_bias + c);
        for (int64_t t = 0; t < s->chunk.count; t++) {
            float *da = h->m->da + t * Kp + c;
            vf d = vf_load(da), z = vf_add(vf_load(h->m->raw + t * Kp + c), bias);
            if (gate == FLASH_KDA_GATE_SOFTPLUS) {
                vf a =
                    vf_max(lowest, vf_mul(vf_set1(-A), vf_softplus(z))); /* finite, so that times 0 it is 0 */
                A_sum = vf_fma(a, d, A_sum);
                d = vf_mul(vf_mul(vf_set1(-A), vf_sigmoid(z)), d);
            } else if (gate == FLASH_KDA_GATE_SIGMOID) {
                vf y = vf_max(lowest, vf_min(highest, vf_mul(vf_set1(A), z)));
                vf slope = vf_mul(vf_sigmoid(y), vf_sigmoid(vf_sub(zero, y)));
                vf dy = vf_mul(vf_mul(lower_bound, slope), d);
                A_sum = vf_fma(y, dy, A_sum);
                d = vf_mul(vf_set1(A), dy);
            }
            vf_store(da, d);
            bias_sum = vf_add(bias_sum, d);
        }
        vf_store(lanes, bias_sum);
        for (int64_t i = 0; i < LANES && c + i < K; i++)
            h->sums[c + i] += (double)lanes[i];
    }
    vf_store(lanes, A_sum);
    for (int i = 0; i < LANES; i++)
        h->sums[K] += (double)lanes[i];
}

static inline void store_gate(const struct head *h, const struct step *s) {
    const struct kda_prefill *p = h->p;
    const struct kda_tensor *dg = &h->b->dg;
    int64_t Kp = h->Kp, head = h->chain.head, batch = h->chain.tokens.batch;
    int64_t first = h->chain.tokens.first + s->chunk.first;
    float dt_bias[KDA_MAX_PADDED_K] ALIGNED = {0}, A = gate_factor(&p->base, head);
    for (int64_t t = 0; t < s->chunk.count; t++)
        load_row(h->m->raw + t * Kp, kda_row(&p->g, batch, first + t, head), p->g.dtype, p->key_dim, Kp);
    if (p->dt_bias.data)
        load_row(dt_bias, p->dt_bias.data + head * p->dt_bias.stride[0], p->dt_bias.dtype, p->key_dim, Kp);
    /* One loop a gate: the choice is constant inside. */
    if (p->gate == FLASH_KDA_GATE_SOFTPLUS)
        gate_back(h, s, FLASH_KDA_GATE_SOFTPLUS, dt_bias, A);
    else if (p->gate == FLASH_KDA_GATE_SIGMOID)
        gate_back(h, s, FLASH_KDA_GATE_SIGMOID, dt_bias, A);
    else
        gate_back(h, s, FLASH_KDA_GATE_NONE, dt_bias, A);
    for (int64_t t = 0; dg->data && t < s->chunk.count; t++)
        store_row(kda_row(dg, batch, first + t, head), dg->dtype, h->m->da + t * Kp, p->key_dim);
}

/* ---- Back: rows of q and k ------------------------------------------------------------------------ */

/* dy, the gradient of a row after the norm, becomes that of the row: r (dy - y (y . dy)), y = r x. Where dy is
 * along y little is left of it, so all of this is fp64. */
static inline void norm_back(const float *x, int64_t Kp, float *dy) {
    double squares[LANES] = {0}, along[LANES] = {0}, all_squares = 1e-6, all_along = 0;
    for (int64_t c = 0; c < Kp; c += LANES)
        for (int i = 0; i < LANES; i++) {
            squares[i] += (double)x[c + i] * (double)x[c + i];
            along[i] += (double)x[c + i] * (double)dy[c + i];
        }
    for (int i = 0; i < LANES; i++) {
        all_squares += squares[i];
        all_along += along[i];
    }
    double r = 1 / sqrt(all_squares), share = all_along / all_squares;
    for (int64_t c = 0; c < Kp; c++)
        dy[c] = (float)(r * ((double)dy[c] - (double)x[c] * share));
}

/* dy: of a normalised row times factor. */
static inline void store_key(const struct head *h, const struct kda_tensor *x, const struct kda_tensor *out,
                             int64_t token, float factor, float *dy) {
    const struct kda_prefill *p = h->p;
    int64_t head = h->chain.head / (p->value_heads / p->heads), batch = h->chain.tokens.batch;
    float row[KDA_MAX_PADDED_K] ALIGNED;
    if (!out->data)
        return;
    token += h->chain.tokens.first;
    if (p->qk_norm) {
        load_row(row, kda_row(x, batch, token, head), x->dtype, p->key_dim, h->Kp);
        norm_back(row, h->Kp, dy);
    }
    if (factor != 1)
        scale_row(dy, h->Kp, factor);
    store_row(kda_row(out, batch, token, head), out->dtype, dy, p->key_dim);
}

/* A chunk's rows, with those of the value heads before. */
static inline float *sum_rows(const struct head *h, const struct step *s, float *rows, float *sums) {
    int64_t count = s->chunk.count * h->Kp;
    if (h->first && h->last)
        return rows;
    sums += s->chunk.first * h->Kp;
    if (h->first)
        memcpy(sums, rows, (size_t)count * sizeof *rows);
    for (int64_t i = 0; !h->first && i < count; i += LANES)
        vf_store(sums + i, vf_add(vf_load(sums + i), vf_load(rows + i)));
    return sums;
}

static inline void store_keys(const struct head *h, const struct step *s) {
    const struct memory *m = h->m;
    float *dq = sum_rows(h, s, m->dq, m->sums_q), *dk = sum_rows(h, s, m->dk, m->sums_k);
    for (int64_t t = 0; h->last && t < s->chunk.count; t++) {
        store_key(h, &h->p->q, &h->b->dq, s->chunk.first + t, h->p->scale, dq + t * h->Kp);
        store_key(h, &h->p->k, &h->b->dk, s->chunk.first + t, 1, dk + t * h->Kp);
    }
}

/* ---- A head ------------------------------------------------------------------------------------ */

static inline void run_segment(const struct head *h, int64_t segment) {
    struct step *steps = h->m->steps;
    int64_t first = segment * SEGMENT, tokens = kda_min64(SEGMENT, h->chain.tokens.length - first);
    int64_t count = (tokens + KDA_CHUNK - 1) / KDA_CHUNK;
    find_state(h, segment, steps[0].S);
    for (int64_t i = 0; i < count; i++) {
        begin_step(h, first + i * KDA_CHUNK, &steps[i]);
        correct(h, &steps[i]);
        if (i + 1 < count)
            leave_step(h, &steps[i], steps[i + 1].S);
    }
    for (int64_t i = count - 1; i >= 0; i--) {
        multiply_back(h, &steps[i]);
        store_dbeta(h, &steps[i]);
        for (int64_t c = 0; c < h->Kp; c += LANES) {
            vf start[KDA_CHUNK];
            channels_there(h, &steps[i], c, start);
            channels_back(h, &steps[i], c, start);
        }
        store_gate(h, &steps[i]);
        store_keys(h, &steps[i]);
    }
}

static inline void run_head(const struct head *h) {
    const struct kda_tokens *x = &h->p->base;
    int64_t n = h->chain.sequence, head = h->chain.head,
            segments = (h->chain.tokens.length + SEGMENT - 1) / SEGMENT;
    memset(h->sums, 0, (size_t)(x->key_dim + 1) * sizeof *h->sums);
    if (!all_kept(h->p))
        keep_states(h);
    load_matrix(h, kda_state_in(x, &h->b->d_final_state, n, head), h->m->R);
    for (int64_t segment = segments - 1; segment >= 0; segment--)
        run_segment(h, segment);
    if (h->b->d_initial_state.data)
        store_matrix(h, kda_state_in(x, &h->b->d_initial_state, n, head), h->m->R);
}

static void run(const struct kda_backward *b, int64_t n, int64_t key_head, void *scratch, double *sums) {
    const struct kda_prefill *p = &b->forward;
    struct kda_arena arena = {scratch, 0};
    struct memory m;
    int64_t group = p->value_heads / p->heads;
    lay_out_all(b, &arena, &m);
    for (int64_t i = 0; i < group; i++) {
        struct head h = {
            .b = b, .p = p, .m = &m, .Kp = kda_padded_key_dim(p), .tiles = kda_tiles(p->value_dim)};
        h.chain = (struct kda_chain){
            .sequence = n, .head = key_head * group + i, .tokens = kda_tokens_of(&p->base, n)};
        h.state = h.Kp * h.tiles * KDA_TILE;
        h.first = i == 0;
        h.last = i == group - 1;
        h.sums = kda_sums_of(b, sums, n, h.chain.head);
        run_head(&h);
    }
}

/* The table of a level's backward.c. */
#define KDA_BACKWARD_KERNELS \
    { .lay_out = lay_out, .run = run }
