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
    CHUNKS = KDA_SEGMENT / KDA_CHUNK,
    PAIRS = KDA_CHUNK * (KDA_CHUNK - 1) / 2,
    TOKENS = 3 * KDA_CHUNK, /* side by side: what a chunk gives to R, then its u */
};

/* ---- Memory ------------------------------------------------------------------------------------ */

/* A chunk on its way there. Matrices with V columns are [tiles][rows][KDA_TILE]. */
struct step {
    struct kda_chunk chunk; /* L is not times beta */
    struct rows rows;       /* k, q and decay stay */
    float *S;               /* K rows: the state before the chunk */
    float *e, *u;           /* KDA_CHUNK rows: e = v - D^T k, u = beta e */
};

struct memory {
    struct step steps[CHUNKS];
    float *e;        /* of a segment; NULL where it is kept */
    float *S;        /* K rows: the first step's, where it is not kept */
    float *R;        /* K rows: gradient of the state after the chunk */
    float *given;    /* 2 KDA_CHUNK rows: -dX, then dO; what KT and QT give to R */
    float *z;        /* KDA_CHUNK rows: gradient of u */
    float *tokens;   /* [V][TOKENS]: given, then u */
    float *products; /* [Kp][TOKENS]: S given, R u */
    float *to_state; /* [2 KDA_CHUNK][Kp]: S (-dX), S dO */
    float *to_R;     /* [KDA_CHUNK][Kp], behind to_state: R u */
    float *across;   /* [Kp]: sum over columns of S R */
    float *pairs;    /* [2 KDA_CHUNK][KDA_CHUNK]: gradients of L, then of M */
    float *dq, *dk;  /* [KDA_CHUNK][Kp]; of the scaled q */
    float *keys;     /* [pairs of tokens][LANES]: what channels_back keeps */
    float *raw, *da; /* [KDA_CHUNK][Kp]: g, and the gradient of the log decay, then of g */
};

/* One value head of one sequence, and the columns that are worked. */
struct head {
    const struct kda_backward *b;
    const struct kda_prefill *p;
    const struct kda_backward_head *kept;
    struct memory m;
    struct kda_chain chain;
    int64_t Kp, tiles, state; /* floats of a state */
    int64_t first_tile, end_tile;
};

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
}

static inline void lay_out_all(const struct kda_backward *b, struct kda_arena *arena, struct memory *m) {
    const struct kda_prefill *p = &b->forward;
    int64_t Kp = kda_padded_key_dim(p), Vp = kda_tiles(p->value_dim) * KDA_TILE;
    size_t row = (size_t)Kp * sizeof(float), column = (size_t)Vp * sizeof(float);
    for (int i = 0; i < CHUNKS; i++)
        lay_out_step(Kp, Vp, arena, &m->steps[i]);
    float *to_here = kda_take(arena, KDA_CHUNK, row);
    for (int i = 0; i < CHUNKS; i++)
        m->steps[i].rows.to_here = to_here;
    m->e = kda_take(arena, kda_kept_all(p) ? KDA_SEGMENT : 0, column);
    m->S = m->steps[0].S;
    m->R = kda_take(arena, (size_t)Kp, column);
    m->given = kda_take(arena, 2 * KDA_CHUNK, column);
    m->z = kda_take(arena, KDA_CHUNK, column);
    m->tokens = kda_take(arena, TOKENS, column);
    m->products = kda_take(arena, TOKENS, row);
    m->to_state = kda_take(arena, TOKENS, row);
    m->to_R = m->to_state ? m->to_state + 2 * KDA_CHUNK * Kp : NULL;
    m->across = kda_take(arena, 1, row);
    m->pairs = kda_take(arena, 2 * (size_t)KDA_CHUNK * KDA_CHUNK, sizeof(float));
    m->dq = kda_take(arena, KDA_CHUNK, row);
    m->dk = kda_take(arena, KDA_CHUNK, row);
    m->keys = kda_take(arena, PAIRS * LANES, sizeof(float));
    m->raw = kda_take(arena, KDA_CHUNK, row);
    m->da = kda_take(arena, KDA_CHUNK, row);
}

static void lay_out(const struct kda_backward *b, struct kda_arena *arena) {
    struct memory unused;
    lay_out_all(b, arena, &unused);
}

static inline struct head head_of(const struct kda_backward *b, const struct kda_backward_head *kept,
                                  int64_t first_tile, int64_t end_tile, void *scratch) {
    const struct kda_prefill *p = &b->forward;
    struct kda_arena arena = {scratch, 0};
    struct head h = {.b = b,
                     .p = p,
                     .kept = kept,
                     .Kp = kda_padded_key_dim(p),
                     .tiles = kda_tiles(p->value_dim),
                     .state = kda_state_floats(p),
                     .first_tile = first_tile,
                     .end_tile = end_tile};
    h.chain = (struct kda_chain){
        .sequence = kept->sequence, .head = kept->head, .tokens = kda_tokens_of(&p->base, kept->sequence)};
    lay_out_all(b, &arena, &h.m);
    return h;
}

/* ---- States ------------------------------------------------------------------------------------ */

static inline struct kda_tile_io columns_of(const struct head *h, int64_t tile) {
    int64_t column = tile * KDA_TILE;
    return (struct kda_tile_io){.column = column, .columns = kda_min64(KDA_TILE, h->p->value_dim - column)};
}

static inline void load_matrix(const struct head *h, struct kda_state state, float *S) {
    for (int64_t tile = h->first_tile; tile < h->end_tile; tile++) {
        const struct kda_tile_io io = columns_of(h, tile);
        load_tile(h->p, state, &io, S + tile * h->Kp * KDA_TILE);
    }
}

static inline void store_matrix(const struct head *h, struct kda_state state, const float *S) {
    for (int64_t tile = h->first_tile; tile < h->end_tile; tile++) {
        const struct kda_tile_io io = columns_of(h, tile);
        store_tile(h->p, state, &io, S + tile * h->Kp * KDA_TILE);
    }
}

/* The columns of V that are worked. */
static inline int64_t first_column(const struct head *h) { return h->first_tile * KDA_TILE; }
static inline int64_t end_column(const struct head *h) {
    return kda_min64(h->end_tile * KDA_TILE, h->p->value_dim);
}

/* A row of v, dO or dv from a column on. */
static inline char *values_at(const struct head *h, const struct kda_tensor *t, int64_t token, int64_t column) {
    return kda_row(t, h->chain.tokens.batch, h->chain.tokens.first + token, h->chain.head) +
           column * (int64_t)kda_dtype_size(t->dtype);
}

enum { COLUMNS = 4 * KDA_TILE }; /* of a row in memory that are taken at a time */

/* Rows of v or dO of a chunk to a matrix of `stride` rows, zeros after them. */
static inline void load_values(const struct head *h, const struct kda_tensor *t, const struct kda_chunk *chunk,
                               int64_t stride, float *to) {
    float row[COLUMNS] ALIGNED = {0};
    for (int64_t i = 0; i < KDA_CHUNK; i++)
        for (int64_t column = first_column(h); column < end_column(h); column += COLUMNS) {
            int64_t columns = kda_min64(COLUMNS, end_column(h) - column);
            int64_t width = kda_tiles(columns) * KDA_TILE;
            if (t->data && i < chunk->count)
                load_row(row, values_at(h, t, chunk->first + i, column), t->dtype, columns, width);
            else
                memset(row, 0, sizeof row);
            for (int64_t v = 0; v < width; v += KDA_TILE)
                memcpy(to + ((column + v) * stride + i * KDA_TILE), row + v, KDA_TILE * sizeof *row);
        }
}

/* ---- There ------------------------------------------------------------------------------------- */

/* Asks for a chunk's rows of q, k and g, if it is one: the rows of one head lie apart, where the hardware
 * does not foresee them. Always inlined, or gcc drops a call that only prefetches. */
__attribute__((always_inline)) static inline void prefetch_chunk(const struct head *h, int64_t first) {
    if (first >= 0)
        prefetch_keys(h->p, &h->chain, first, KDA_CHUNK);
}

__attribute__((always_inline)) static inline void prefetch_values(const struct head *h,
                                                                  const struct kda_tensor *t, int64_t first) {
    for (int64_t token = first; t->data && first >= 0 && token < first + KDA_CHUNK && token < h->chain.end;
         token++)
        PREFETCH_ROW(*t, h->chain.tokens.batch, h->chain.tokens.first + token, h->chain.head, first_column(h),
                     end_column(h) - first_column(h));
}

/* queries: M and QT are wanted, too. */
static inline void begin_step(const struct head *h, int64_t first, bool queries, struct step *s) {
    const struct kda_prefill *p = h->p;
    struct kda_chunk *chunk = &s->chunk;
    int64_t Kp = h->Kp;
    chunk->first = first;
    chunk->count = kda_min64(KDA_CHUNK, h->chain.tokens.length - first);
    struct rows rows = s->rows;
    if (!queries)
        rows.q = rows.k; /* some numbers to take the place of them */
    for (int64_t t = 0; t < chunk->count; t++) {
        load_key(p, &p->k, &h->chain, first + t, 1, Kp, rows.k + t * Kp);
        if (queries)
            load_key(p, &p->q, &h->chain, first + t, p->scale, Kp, rows.q + t * Kp);
    }
    size_t missing = (size_t)((KDA_CHUNK - chunk->count) * Kp) * sizeof(float);
    memset(rows.k + chunk->count * Kp, 0, missing);
    memset(rows.q + chunk->count * Kp, 0, missing);
    load_decay(p, &h->chain, Kp, chunk, rows.decay);
    load_beta(p, &h->chain, chunk, chunk->beta);
    for (int t = 0; t < KDA_CHUNK; t++)
        rows.beta[t] = 1;
    store_operands(&rows, Kp, chunk);
    find_pairs(&rows, Kp, chunk);
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

static inline void correct(const struct head *h, const struct step *s) {
    float product[KDA_CHUNK * KDA_TILE] ALIGNED;
    load_values(h, &h->p->v, &s->chunk, KDA_CHUNK, s->e);
    for (int64_t tile = h->first_tile; tile < h->end_tile; tile++) {
        int64_t at = tile * KDA_CHUNK * KDA_TILE;
        const struct kda_tile S = {.S = s->S + tile * h->Kp * KDA_TILE};
        multiply_state(s->chunk.queries_keys, &S, h->Kp, KDA_CHUNK, product);
        solve_there(&s->chunk, product, s->e + at, s->u + at);
    }
}

/* u from e, as solve_there has it. */
static inline void correct_again(const struct head *h, const struct step *s) {
    for (int64_t row = 0; row < h->tiles * KDA_CHUNK; row++) {
        vf beta = vf_set1(s->chunk.beta[row % KDA_CHUNK]);
        for (int v = 0; v < KDA_TILE; v += LANES)
            vf_store(s->u + row * KDA_TILE + v, vf_mul(beta, vf_load(s->e + row * KDA_TILE + v)));
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
    for (int64_t tile = h->first_tile; tile < h->end_tile; tile++) {
        int64_t at = tile * h->Kp * KDA_TILE;
        carry_and_add(s->chunk.carry, NULL, s->chunk.keys_to_end, s->u + tile * KDA_CHUNK * KDA_TILE, KDA_CHUNK,
                      h->Kp, s->S + at, S + at);
    }
}

/* The state before a segment: in S from memory, or where the way there left it. */
static inline float *find_state(const struct head *h, int64_t segment, float *S) {
    const struct kda_prefill *p = h->p;
    if (segment && !kda_kept_all(p))
        return h->kept->S + segment * h->state;
    load_matrix(h,
                segment ? kda_kept_state(h->b, h->chain.sequence, segment * KDA_SEGMENT, h->chain.head)
                        : kda_state_at(p, &p->initial_state, h->chain.sequence, h->chain.head),
                S);
    return S;
}

static inline float *kept_e(const struct head *h, int64_t token) {
    return h->kept->e + token * h->tiles * KDA_TILE;
}

static void there(const struct kda_backward *b, const struct kda_backward_head *kept, int64_t first,
                  int64_t end, void *scratch) {
    const struct head h = head_of(b, kept, first, end, scratch);
    struct step step = h.m.steps[0];
    float *S = step.S;
    find_state(&h, 0, S);
    for (int64_t token = 0, next; token < h.chain.tokens.length; token = next) {
        next = token + KDA_CHUNK;
        step.e = kept_e(&h, token);
        prefetch_chunk(&h, next);
        prefetch_values(&h, &b->forward.v, next);
        begin_step(&h, token, false, &step);
        correct(&h, &step);
        float *left = next % KDA_SEGMENT ? S : kept->S + next / KDA_SEGMENT * h.state;
        if (next < h.chain.tokens.length)
            leave_step(&h, &step, left);
        step.S = left;
    }
}

/* ---- Back: matrices ---------------------------------------------------------------------------- */

/* to [columns][to_stride] = from [rows][from_stride] transposed; multiples of LANES. */
static inline void transpose(const float *from, int64_t from_stride, int64_t rows, int64_t columns, float *to,
                             int64_t to_stride) {
    for (int64_t row = 0; row < rows; row += LANES)
        for (int64_t column = 0; column < columns; column += LANES) {
            vf x[LANES];
            UNROLL for (int i = 0; i < LANES; i++) x[i] = vf_load(from + (row + i) * from_stride + column);
            vf_transpose(x);
            UNROLL for (int i = 0; i < LANES; i++) vf_store(to + (column + i) * to_stride + row, x[i]);
        }
}

/* out [a_rows][TOKENS or less, stride]: for `vectors` of tokens, sums over all columns of V of a,
 * [tiles][a_rows][KDA_TILE], times b, [V][TOKENS]; `rows` at a time. Always inlined, for these two are
 * constants. */
__attribute__((always_inline)) static inline void multiply_vectors(const float *a, int64_t a_rows,
                                                                   int64_t tiles, const float *b, float *out,
                                                                   int64_t stride, int rows, int vectors) {
    for (int64_t row = 0; row < a_rows; row += rows) {
        vf sum[16][2];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < vectors; j++) sum[r][j] = vf_set1(0);
        for (int64_t tile = 0; tile < tiles; tile++) {
            const float *from = a + (tile * a_rows + row) * KDA_TILE, *to = b + tile * KDA_TILE * TOKENS;
            for (int v = 0; v < KDA_TILE; v++) {
                vf x[2];
                UNROLL for (int j = 0; j < vectors; j++) x[j] = vf_load(to + v * TOKENS + j * LANES);
                UNROLL for (int r = 0; r < rows; r++) {
                    vf s = vf_set1(from[r * KDA_TILE + v]);
                    UNROLL for (int j = 0; j < vectors; j++) sum[r][j] = vf_fma(s, x[j], sum[r][j]);
                }
            }
        }
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < vectors; j++)
            vf_store(out + (row + r) * stride + j * LANES, sum[r][j]);
    }
}

/* The same for `count` tokens, KDA_CHUNK or twice that; a_rows in multiples of KDA_CHUNK. */
static inline void multiply_tokens(const float *a, int64_t a_rows, int64_t tiles, const float *b, int count,
                                   float *out, int64_t stride) {
    int first = 0, width = PRODUCT_VECTORS * LANES;
    for (; first + width <= count; first += width)
        multiply_vectors(a, a_rows, tiles, b + first, out + first, stride, PRODUCT_ROWS, PRODUCT_VECTORS);
    if (first < count) /* vectors are as wide as a chunk */
        multiply_vectors(a, a_rows, tiles, b + first, out + first, stride, PRODUCT_ROWS * PRODUCT_VECTORS, 1);
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

/* What a chunk gives to R. */
static inline void give_back(const struct head *h, const struct step *s) {
    float product[KDA_CHUNK * KDA_TILE] ALIGNED;
    load_values(h, &h->b->d_out, &s->chunk, 2 * KDA_CHUNK, h->m.given + KDA_CHUNK * KDA_TILE);
    for (int64_t tile = h->first_tile; tile < h->end_tile; tile++) {
        const struct kda_tile R = {.S = h->m.R + tile * h->Kp * KDA_TILE};
        multiply_state(s->chunk.keys_to_end, &R, h->Kp, KDA_CHUNK, product);
        solve_back(&s->chunk, product, h->m.given + tile * 2 * KDA_CHUNK * KDA_TILE,
                   h->m.z + tile * KDA_CHUNK * KDA_TILE);
    }
}

/* R: from that after the chunk to that before it. What the chunk leaves of it is 1 + carry where it is slow,
 * a product where little is left. */
static inline void carry_back(const struct head *h, const struct step *s) {
    float carries[KDA_MAX_PADDED_K], keeps[KDA_MAX_PADDED_K];
    for (int64_t c = 0; c < h->Kp; c += LANES) {
        float left[LANES] ALIGNED;
        vf product = vf_load(s->rows.decay + c);
        for (int t = 1; t < KDA_CHUNK; t++)
            product = vf_mul(product, vf_load(s->rows.decay + t * h->Kp + c));
        vf_store(left, product);
        for (int i = 0; i < LANES; i++) {
            bool slow = s->chunk.carry[c + i] > -0.5F;
            carries[c + i] = slow ? s->chunk.carry[c + i] : left[i];
            keeps[c + i] = slow ? 1 : 0;
        }
    }
    for (int64_t tile = h->first_tile; tile < h->end_tile; tile++) {
        float *R = h->m.R + tile * h->Kp * KDA_TILE;
        carry_and_add(carries, keeps, s->chunk.queries_keys, h->m.given + tile * 2 * KDA_CHUNK * KDA_TILE,
                      2 * KDA_CHUNK, h->Kp, R, R);
    }
}

/* R after the last token: from elsewhere, or d_final_state. */
static inline void load_last_R(const struct head *h) {
    int64_t n = h->chain.sequence, place = kda_awaited_by(&h->b->border, n);
    const struct kda_tensor *from = place >= 0 ? &h->b->border.states : &h->b->d_final_state;
    load_matrix(h, kda_state_in(&h->p->base, from, place >= 0 ? place : n, h->chain.head), h->m.R);
}

static inline void store_summary(const struct head *h) {
    int64_t place = kda_summary_of(&h->b->border, h->chain.sequence);
    if (place >= 0)
        store_matrix(h, kda_state_in(&h->p->base, &h->b->border.summaries, place, h->chain.head), h->m.R);
}

static inline void copy_R(const struct head *h, const float *from, float *to) {
    int64_t first = h->first_tile * h->Kp * KDA_TILE, end = h->end_tile * h->Kp * KDA_TILE;
    memcpy(to + first, from + first, (size_t)(end - first) * sizeof *to);
}

/* R through chunk i. */
static inline void go_back(const struct head *h, int64_t i, struct step *step) {
    prefetch_chunk(h, (i - 1) * KDA_CHUNK);
    prefetch_values(h, &h->b->d_out, (i - 1) * KDA_CHUNK);
    begin_step(h, i * KDA_CHUNK, true, step);
    give_back(h, step);
    carry_back(h, step);
}

static void back(const struct kda_backward *b, const struct kda_backward_head *kept, int64_t first, int64_t end,
                 void *scratch) {
    const struct head h = head_of(b, kept, first, end, scratch);
    struct step step = h.m.steps[0];
    int64_t length = h.chain.tokens.length, chunks = (length + KDA_CHUNK - 1) / KDA_CHUNK;
    load_last_R(&h);
    for (int64_t i = chunks - 1; i >= 0; i--) {
        if (i + 1 == chunks || (i + 1) % CHUNKS == 0)
            copy_R(&h, h.m.R, kept->R + i / CHUNKS * h.state);
        if (i == 0)
            break;
        go_back(&h, i, &step);
    }
}

static void summarise(const struct kda_backward *b, const struct kda_backward_head *kept, int64_t first,
                      int64_t end, void *scratch) {
    const struct head h = head_of(b, kept, first, end, scratch);
    struct step step = h.m.steps[0];
    const struct kda_state none = {.data = NULL};
    load_matrix(&h, none, h.m.R);
    for (int64_t i = (h.chain.tokens.length + KDA_CHUNK - 1) / KDA_CHUNK - 1; i >= 0; i--)
        go_back(&h, i, &step);
    store_summary(&h);
}

static inline void store_dv(const struct head *h, const struct step *s) {
    const struct kda_tensor *dv = &h->b->dv;
    float row[COLUMNS] ALIGNED;
    for (int64_t t = 0; dv->data && t < s->chunk.count; t++)
        for (int64_t column = 0; column < h->p->value_dim; column += COLUMNS) {
            int64_t columns = kda_min64(COLUMNS, h->p->value_dim - column);
            vf beta = vf_set1(s->chunk.beta[t]);
            for (int64_t v = 0; v < columns; v += KDA_TILE)
                UNROLL for (int j = 0; j < KDA_TILE; j += LANES) vf_store(
                    row + v + j, vf_mul(beta, vf_load(h->m.z + (column + v) * KDA_CHUNK + t * KDA_TILE + j)));
            store_row(values_at(h, dv, s->chunk.first + t, column), dv->dtype, row, columns);
        }
}

/* across [Kp]: sums over all columns of a state and its gradient. */
static inline void multiply_states(const struct head *h, const float *S, const float *R, float *across) {
    for (int64_t c = 0; c < h->Kp; c += 16) {
        vf sum[16];
        UNROLL for (int n = 0; n < 16; n++) {
            sum[n] = vf_set1(0);
            for (int64_t tile = 0; tile < h->tiles; tile++)
                UNROLL for (int v = 0; v < KDA_TILE; v += LANES) {
                    int64_t at = (tile * h->Kp + c + n) * KDA_TILE + v;
                    sum[n] = vf_fma(vf_load(S + at), vf_load(R + at), sum[n]);
                }
        }
        vf_sums(sum, across + c);
    }
}

/* The chunk's tokens side by side. */
static inline void turn_tokens(const struct head *h, const struct step *s) {
    for (int64_t tile = 0; tile < h->tiles; tile++) {
        float *to = h->m.tokens + tile * KDA_TILE * TOKENS;
        transpose(h->m.given + tile * 2 * KDA_CHUNK * KDA_TILE, KDA_TILE, 2 * KDA_CHUNK, KDA_TILE, to, TOKENS);
        transpose(s->u + tile * KDA_CHUNK * KDA_TILE, KDA_TILE, KDA_CHUNK, KDA_TILE, to + 2 * KDA_CHUNK,
                  TOKENS);
    }
}

/* Asks for the rows that the chunk's gradients will be written to. */
__attribute__((always_inline)) static inline void prefetch_outputs(const struct head *h, const struct step *s) {
    const struct kda_tensor *const keys[] = {&h->b->dq, &h->b->dk}, *const values[] = {&h->b->dg, &h->b->dv};
    int64_t batch = h->chain.tokens.batch, head = h->chain.head, group = h->p->value_heads / h->p->heads;
    for (int64_t t = 0; t < s->chunk.count; t++) {
        int64_t token = h->chain.tokens.first + s->chunk.first + t;
        for (int i = 0; i < 2; i++) {
            if (keys[i]->data && h->kept->last)
                PREFETCH_ROW(*keys[i], batch, token, head / group, 0, h->p->key_dim);
            if (values[i]->data)
                PREFETCH_ROW(*values[i], batch, token, head, 0, i ? h->p->value_dim : h->p->key_dim);
        }
    }
}

/* All products with the state and its gradient, which becomes that before the chunk. */
static inline void multiply_back(const struct head *h, const struct step *s) {
    const struct memory *m = &h->m;
    give_back(h, s);
    store_dv(h, s);
    turn_tokens(h, s);
    multiply_tokens(s->S, h->Kp, h->tiles, m->tokens, 2 * KDA_CHUNK, m->products, TOKENS);
    multiply_tokens(m->R, h->Kp, h->tiles, m->tokens + 2 * KDA_CHUNK, KDA_CHUNK, m->products + 2 * KDA_CHUNK,
                    TOKENS);
    multiply_tokens(m->given, 2 * KDA_CHUNK, h->tiles, m->tokens + 2 * KDA_CHUNK, KDA_CHUNK, m->pairs,
                    KDA_CHUNK);
    transpose(m->products, TOKENS, h->Kp, TOKENS, m->to_state, h->Kp);
    multiply_states(h, s->S, m->R, m->across);
    carry_back(h, s);
}

static inline void store_dbeta(const struct head *h, const struct step *s) {
    const struct kda_tensor *dbeta = &h->b->dbeta, *beta = &h->p->beta;
    for (int64_t t = 0; dbeta->data && t < s->chunk.count; t++) {
        int64_t batch = h->chain.tokens.batch, token = h->chain.tokens.first + s->chunk.first + t;
        float d = multiply_row(h->m.z + t * KDA_TILE, KDA_CHUNK, s->e + t * KDA_TILE, KDA_CHUNK, h->tiles);
        if (h->p->beta_mode != FLASH_KDA_BETA_GIVEN) {
            float raw = kda_load(kda_row(beta, batch, token, h->chain.head), beta->dtype, 0);
            d *= s->chunk.beta[t] / (1 + expf(raw)); /* step times sigmoid(-beta) */
        }
        kda_store(kda_row(dbeta, batch, token, h->chain.head), dbeta->dtype, 0, d);
    }
}

/* ---- Back: channels ---------------------------------------------------------------------------- */

/* Every number that passes a token is multiplied by its decay there: keys on their way to later tokens,
 * which are kept, and on the way back what meets them, from outputs, from later keys and from R. Both
 * functions work LANES channels from c on. */

/* What outputs and later keys take of the state and of earlier keys: dq, and dk as far as it comes from there.
 * start: decay from the start of the chunk to before each token. */
static inline void channels_there(const struct head *h, const struct step *s, int64_t c, vf *start) {
    const struct memory *m = &h->m;
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
    const struct memory *m = &h->m;
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
                             const float *dt_bias, float A, double *sums) {
    const vf lowest = vf_set1(-FLT_MAX), highest = vf_set1(FLT_MAX), zero = vf_set1(0);
    const vf lower_bound = vf_set1(h->p->lower_bound);
    int64_t K = h->p->key_dim, Kp = h->Kp;
    float lanes[LANES] ALIGNED;
    vf A_sum = zero;
    for (int64_t c = 0; c < Kp; c += LANES) {
        vf bias_sum = zero, bias = vf_load(dt_bias + c);
        for (int64_t t = 0; t < s->chunk.count; t++) {
            float *da = h->m.da + t * Kp + c;
            vf d = vf_load(da), z = vf_add(vf_load(h->m.raw + t * Kp + c), bias);
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
            sums[c + i] += (double)lanes[i];
    }
    vf_store(lanes, A_sum);
    for (int i = 0; i < LANES; i++)
        sums[K] += (double)lanes[i];
}

static inline void store_gate(const struct head *h, const struct step *s, double *sums) {
    const struct kda_prefill *p = h->p;
    const struct kda_tensor *dg = &h->b->dg;
    int64_t Kp = h->Kp, head = h->chain.head, batch = h->chain.tokens.batch;
    int64_t first = h->chain.tokens.first + s->chunk.first;
    float dt_bias[KDA_MAX_PADDED_K] ALIGNED = {0}, A = gate_factor(&p->base, head);
    for (int64_t t = 0; t < s->chunk.count; t++)
        load_row(h->m.raw + t * Kp, kda_row(&p->g, batch, first + t, head), p->g.dtype, p->key_dim, Kp);
    if (p->dt_bias.data)
        load_row(dt_bias, p->dt_bias.data + head * p->dt_bias.stride[0], p->dt_bias.dtype, p->key_dim, Kp);
    /* One loop a gate: the choice is constant inside. */
    if (p->gate == FLASH_KDA_GATE_SOFTPLUS)
        gate_back(h, s, FLASH_KDA_GATE_SOFTPLUS, dt_bias, A, sums);
    else if (p->gate == FLASH_KDA_GATE_SIGMOID)
        gate_back(h, s, FLASH_KDA_GATE_SIGMOID, dt_bias, A, sums);
    else
        gate_back(h, s, FLASH_KDA_GATE_NONE, dt_bias, A, sums);
    for (int64_t t = 0; dg->data && t < s->chunk.count; t++)
        store_row(kda_row(dg, batch, first + t, head), dg->dtype, h->m.da + t * Kp, p->key_dim);
}

/* ---- Back: rows of q and k ------------------------------------------------------------------------ */

/* The sum of products of two rows, as exact as in fp64: what each product and each sum loses by rounding is
 * summed beside it. */
static inline double sum_of_products(const float *a, const float *b, int64_t Kp) {
    vf sum = vf_set1(0), lost = vf_set1(0);
    float lanes[LANES] ALIGNED, rest[LANES] ALIGNED;
    double total = 0;
    for (int64_t c = 0; c < Kp; c += LANES) {
        vf x = vf_load(a + c), y = vf_load(b + c), product = vf_mul(x, y), next = vf_add(sum, product);
        vf added = vf_sub(next, sum);
        vf lost_sum = vf_add(vf_sub(sum, vf_sub(next, added)), vf_sub(product, added));
        lost = vf_add(lost, vf_add(lost_sum, vf_lost(x, y, product)));
        sum = next;
    }
    vf_store(lanes, sum);
    vf_store(rest, lost);
    for (int i = 0; i < LANES; i++)
        total += (double)lanes[i] + (double)rest[i];
    return total;
}

/* dy, the gradient of a row after the norm, becomes that of the row: r (dy - y (y . dy)), y = r x. Where dy
 * is along y little is left of it, so y . dy is more exact than fp32. A row whose square could leave fp32 is
 * made smaller. */
static inline void norm_back(float *x, int64_t Kp, float *dy) {
    double scale = 1, squares = sum_of_products(x, x, Kp);
    if (!(squares < 0x1p100)) {
        scale = 0x1p-96;
        scale_row(x, Kp, (float)scale);
        squares = sum_of_products(x, x, Kp);
    }
    squares += 1e-6 * scale * scale;
    double share = sum_of_products(x, dy, Kp) / squares;
    float high = (float)share, low = (float)(share - (double)high);
    vf r = vf_set1((float)(scale / sqrt(squares)));
    for (int64_t c = 0; c < Kp; c += LANES) {
        vf row = vf_load(x + c), along = vf_mul(row, vf_set1(high));
        vf rest = vf_fma(row, vf_set1(low), vf_lost(row, vf_set1(high), along));
        vf_store(dy + c, vf_mul(r, vf_sub(vf_sub(vf_load(dy + c), along), rest)));
    }
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

/* A chunk's rows, with those of the value heads before; at: where its rows are in the sums. */
static inline float *sum_rows(const struct head *h, const struct step *s, int64_t at, float *rows,
                              float *sums) {
    int64_t count = s->chunk.count * h->Kp;
    if (!sums)
        return rows;
    sums += at * h->Kp;
    if (h->kept->first)
        memcpy(sums, rows, (size_t)count * sizeof *rows);
    for (int64_t i = 0; !h->kept->first && i < count; i += LANES)
        vf_store(sums + i, vf_add(vf_load(sums + i), vf_load(rows + i)));
    return sums;
}

static inline void store_keys(const struct head *h, const struct step *s, int64_t first) {
    float *dq = sum_rows(h, s, s->chunk.first - first, h->m.dq, h->kept->sums_q);
    float *dk = sum_rows(h, s, s->chunk.first - first, h->m.dk, h->kept->sums_k);
    for (int64_t t = 0; h->kept->last && t < s->chunk.count; t++) {
        store_key(h, &h->p->q, &h->b->dq, s->chunk.first + t, h->p->scale, dq + t * h->Kp);
        store_key(h, &h->p->k, &h->b->dk, s->chunk.first + t, 1, dk + t * h->Kp);
    }
}

/* ---- Segments ---------------------------------------------------------------------------------- */

/* The chunks of a segment on their way there; returns how many. */
static inline int64_t go_there(const struct head *h, int64_t segment, struct step *steps) {
    int64_t first = segment * KDA_SEGMENT, tokens = kda_min64(KDA_SEGMENT, h->chain.tokens.length - first);
    int64_t count = (tokens + KDA_CHUNK - 1) / KDA_CHUNK;
    steps[0].S = find_state(h, segment, h->m.S);
    for (int64_t i = 0; i < count; i++) {
        struct step *s = &steps[i];
        s->e = h->kept->e ? kept_e(h, first + i * KDA_CHUNK) : h->m.e + i * KDA_CHUNK * h->tiles * KDA_TILE;
        if (i + 1 < count)
            prefetch_chunk(h, first + (i + 1) * KDA_CHUNK);
        begin_step(h, first + i * KDA_CHUNK, true, s);
        if (h->kept->e)
            correct_again(h, s);
        else
            correct(h, s);
        if (i + 1 < count)
            leave_step(h, s, steps[i + 1].S);
    }
    return count;
}

static void gradients(const struct kda_backward *b, const struct kda_backward_head *kept, int64_t first,
                      int64_t end, void *scratch) {
    struct head h = head_of(b, kept, 0, kda_tiles(b->forward.value_dim), scratch);
    if (kept->R && first < end)
        copy_R(&h, kept->R + (end - 1) * h.state, h.m.R);
    else
        load_last_R(&h);
    for (int64_t segment = end - 1; segment >= first; segment--) {
        double *sums = kept->sums + segment * kept->sums_stride;
        memset(sums, 0, (size_t)(h.p->key_dim + 1) * sizeof *sums);
        for (int64_t i = go_there(&h, segment, h.m.steps) - 1; i >= 0; i--) {
            const struct step *s = &h.m.steps[i];
            prefetch_values(&h, &b->d_out, s->chunk.first - KDA_CHUNK);
            prefetch_chunk(&h, i ? s->chunk.first - KDA_CHUNK : s->chunk.first - KDA_SEGMENT);
            prefetch_outputs(&h, s);
            multiply_back(&h, s);
            store_dbeta(&h, s);
            for (int64_t c = 0; c < h.Kp; c += LANES) {
                vf start[KDA_CHUNK];
                channels_there(&h, s, c, start);
                channels_back(&h, s, c, start);
            }
            store_gate(&h, s, sums);
            store_keys(&h, s, first * KDA_SEGMENT);
        }
    }
    if (first == 0 && b->d_initial_state.data)
        store_matrix(&h, kda_state_in(&h.p->base, &b->d_initial_state, kept->sequence, kept->head), h.m.R);
    if (first == 0)
        store_summary(&h);
}

/* The table of a level's backward.c. */
#define KDA_BACKWARD_KERNELS \
    { .lay_out = lay_out, .there = there, .back = back, .summarise = summarise, .gradients = gradients }
