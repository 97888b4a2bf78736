/* SPDX-License-Identifier: MIT */
/* From a case of prefill to its tensors: shapes, index tensors, values, and which rows a run writes. */
#include "calls.h"
#include "prefill_case.h"

#include <math.h>
#include <stdlib.h>

struct prefill_case prefill_case_plain(void) {
    return (struct prefill_case){.sequences = 1,
                                 .lengths = {70},
                                 .H = 2,
                                 .group = 1,
                                 .K = 64,
                                 .V = 64,
                                 .gate = FLASH_KDA_GATE_SIGMOID,
                                 .A_log = true,
                                 .dt_bias = true,
                                 .qk_norm = true,
                                 .lower_bound = -5,
                                 .beta_mode = FLASH_KDA_BETA_SIGMOID,
                                 .threads = 2,
                                 .initial = STORAGE_FP32,
                                 .final = STORAGE_FP32,
                                 .every = 16,
                                 .q_type = TYPE_FP32,
                                 .k_type = TYPE_FP32,
                                 .v_type = TYPE_FP32,
                                 .g_type = TYPE_FP32,
                                 .beta_type = TYPE_FP32,
                                 .out_type = TYPE_FP32,
                                 .parameter_type = TYPE_FP32,
                                 .fp32_tolerance = TOLERANCE_FP32,
                                 .bf16_tolerance = BF16_ANY};
}

const char *const prefill_gate_names[3] = {"none", "softplus", "sigmoid"};

void prefill_case_set_gate(struct prefill_case *c, flash_kda_gate gate) {
    c->gate = gate;
    c->A_log = c->dt_bias = gate != FLASH_KDA_GATE_NONE;
}

/* ---- Sequences and slots ----------------------------------------------------------------------- */

static struct tensor_layout inputs_layout(const struct prefill_problem *p, int repeat_dim, bool loose_last) {
    return (struct tensor_layout){p->c.inputs, repeat_dim, loose_last};
}

static DLDataType index_type(const struct prefill_problem *p) {
    return p->c.wide_indices ? TYPE_INT64 : TYPE_INT32;
}

/* Index tensors repeat nothing. */
static struct tensor_layout index_layout(const struct prefill_problem *p) {
    enum spacing spacing = p->c.inputs == SPACING_COMPACT ? SPACING_COMPACT : SPACING_FUSED;
    return (struct tensor_layout){spacing, 0, true};
}

static void place_sequences(struct prefill_problem *p) {
    const struct prefill_case *c = &p->c;
    p->N = c->sequences;
    p->HV = c->H * c->group;
    if (c->packing == PACKING_DENSE) {
        p->B = p->N;
        p->T = c->lengths[0];
        return;
    }
    int64_t boundaries = p->N + 1;
    tensor_make(&p->cu_seqlens, c->packing == PACKING_INT32 ? TYPE_INT32 : TYPE_INT64, 1, &boundaries,
                index_layout(p));
    p->B = 1;
    for (int64_t n = 0; n < p->N; n++) {
        p->starts[n] = p->T;
        tensor_set(&p->cu_seqlens, n, (double)p->T);
        p->T += c->lengths[n];
    }
    tensor_set(&p->cu_seqlens, p->N, (double)p->T);
    p->args.cu_seqlens = &p->cu_seqlens.dl;
}

/* Numbers 0 .. count - 1 in random order. */
static int64_t *shuffled(int64_t count, struct random *r) {
    int64_t *order = must_allocate(count, sizeof *order);
    for (int64_t i = 0; i < count; i++) {
        int64_t j = random_below(r, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    return order;
}

void prefill_spare_padding(int64_t *order, int64_t slots) {
    for (int64_t i = 0; i < slots; i++)
        if (order[i] == PADDING_SLOT) {
            order[i] = order[slots - 1];
            order[slots - 1] = PADDING_SLOT;
        }
}

/* Returns all slots in random order; from number N on no sequence names them. */
static int64_t *assign_slots(struct prefill_problem *p, int64_t spare, struct random *r) {
    p->slots = p->c.pool ? p->N + spare : p->N;
    int64_t *order = shuffled(p->slots, r);
    if (p->c.pool && p->c.padding_slot)
        prefill_spare_padding(order, p->slots);
    int64_t padding = p->c.pool && p->N > 1 ? random_below(r, p->N) : -1;
    int64_t second = p->c.padding_slot && padding >= 0 && p->N > 2 ? (padding + 1) % p->N : -1;
    for (int64_t n = 0; n < p->N; n++)
        p->slot[n] = !p->c.pool ? n : n == padding || n == second ? -1 : order[n];
    if (p->c.pool) {
        tensor_make(&p->state_indices, index_type(p), 1, &p->N, index_layout(p));
        p->args.padding_slot = p->c.padding_slot ? PADDING_SLOT : 0;
        for (int64_t n = 0; n < p->N; n++)
            tensor_set(&p->state_indices, n,
                       (double)(p->slot[n] < 0 && p->c.padding_slot ? p->args.padding_slot : p->slot[n]));
        p->args.state_indices = &p->state_indices.dl;
    }
    return order;
}

static void choose_fresh(struct prefill_problem *p, struct random *r) {
    const DLDataType types[] = {[FLAGS_BOOL] = TYPE_BOOL, [FLAGS_INT8] = TYPE_INT8, [FLAGS_INT32] = TYPE_INT32};
    if (!p->c.flags || !p->c.initial)
        return;
    tensor_make(&p->has_initial_state, types[p->c.flags], 1, &p->N, index_layout(p));
    for (int64_t n = 0; n < p->N; n++) {
        p->fresh[n] = random_below(r, 2);
        tensor_set(&p->has_initial_state, n, !p->fresh[n]);
    }
    p->args.has_initial_state = &p->has_initial_state.dl;
}

/* ---- Written tensors --------------------------------------------------------------------------- */

static void describe_output(struct prefill_output *o, DLDataType type, int lead, const int64_t *lead_shape,
                            int inner, const int64_t *inner_shape) {
    *o = (struct prefill_output){.type = type, .ndim = lead + inner, .lead = lead, .rows = 1};
    for (int d = 0; d < lead; d++)
        o->rows *= o->shape[d] = lead_shape[d];
    for (int d = 0; d < inner; d++)
        o->shape[lead + d] = inner_shape[d];
    o->written = must_allocate(o->rows, sizeof *o->written);
}

static void state_shape(const struct prefill_problem *p, int64_t *shape) {
    bool v_first = p->c.layout == FLASH_KDA_STATE_V_FIRST;
    shape[0] = p->HV;
    shape[1] = v_first ? p->c.V : p->c.K;
    shape[2] = v_first ? p->c.K : p->c.V;
}

static DLDataType state_type(enum storage s) { return s == STORAGE_BF16 ? TYPE_BF16 : TYPE_FP32; }

static void describe_out_and_states(struct prefill_problem *p) {
    int64_t tokens[2] = {p->B, p->T}, row[2] = {p->HV, p->c.V}, inner[3];
    describe_output(&p->out, p->c.out_type, 2, tokens, 2, row);
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t t = 0; t < p->c.lengths[n] && p->slot[n] >= 0; t++)
            p->out.written[p->c.packing == PACKING_DENSE ? n * p->T + t : p->starts[n] + t] = true;
    if (!p->c.final)
        return;
    state_shape(p, inner);
    enum storage storage = p->c.final == STORAGE_IN_PLACE ? p->c.initial : p->c.final;
    describe_output(&p->final, state_type(storage), 1, &p->slots, 3, inner);
    for (int64_t n = 0; n < p->N; n++)
        if (p->slot[n] >= 0)
            p->final.written[p->slot[n]] = true;
}

static void make_initial_state(struct prefill_problem *p, struct random *r) {
    if (!p->c.initial)
        return;
    int64_t shape[4] = {p->slots};
    state_shape(p, shape + 1);
    enum spacing spacing = p->c.inputs == SPACING_COMPACT ? SPACING_COMPACT : SPACING_FUSED;
    tensor_make(&p->initial_state, state_type(p->c.initial), 4, shape,
                (struct tensor_layout){spacing, 0, false});
    int64_t matrix = p->HV * p->c.K * p->c.V;
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t i = 0; i < matrix && p->slot[n] >= 0 && !p->fresh[n]; i++)
            tensor_set(&p->initial_state, p->slot[n] * matrix + i, 0.5 * random_normal(r));
    p->args.initial_state = &p->initial_state.dl;
}

/* ---- Checkpoints ------------------------------------------------------------------------------- */

static void describe_checkpoints(struct prefill_problem *p, int lead, const int64_t *lead_shape) {
    int64_t inner[3];
    state_shape(p, inner);
    DLDataType type = p->c.checkpoints_bf16 ? TYPE_BF16 : TYPE_FP32;
    if (p->c.checkpoints == CHECKPOINTS_SHARED_POOL)
        type = p->final.type;
    describe_output(&p->checkpoints, type, lead, lead_shape, 3, inner);
    p->checkpoint_sequence = must_allocate(p->checkpoints.rows, sizeof *p->checkpoint_sequence);
    p->checkpoint_position = must_allocate(p->checkpoints.rows, sizeof *p->checkpoint_position);
}

static void keep(struct prefill_problem *p, int64_t row, int64_t n, int64_t position) {
    if (p->slot[n] < 0 || row < 0 || position == NO_POSITION)
        return;
    p->checkpoints.written[row] = true;
    p->checkpoint_sequence[row] = n;
    p->checkpoint_position[row] = position;
}

static int64_t rows_of(const struct prefill_problem *p, int64_t n) {
    int64_t rows = (p->c.lengths[n] + p->c.every - 1) / p->c.every;
    return p->c.checkpoints == CHECKPOINTS_FEWER && rows ? rows - 1 : rows;
}

static int64_t row_position(const struct prefill_problem *p, int64_t n, int64_t row) {
    int64_t position = (row + 1) * p->c.every;
    return position < p->c.lengths[n] ? position : p->c.lengths[n];
}

static void make_dense_checkpoints(struct prefill_problem *p) {
    int64_t rows = rows_of(p, 0), lead[2] = {p->B, rows};
    describe_checkpoints(p, 2, lead);
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t j = 0; j < rows; j++)
            keep(p, n * rows + j, n, row_position(p, n, j));
}

/* target [rows]: where each row goes, or NULL: row by row. */
static void make_packed_checkpoints(struct prefill_problem *p, int64_t slots, const int64_t *target) {
    int64_t boundaries = p->N + 1, row = 0;
    tensor_make(&p->checkpoint_cu_starts, index_type(p), 1, &boundaries, index_layout(p));
    describe_checkpoints(p, 1, &slots);
    tensor_set(&p->checkpoint_cu_starts, 0, 0);
    for (int64_t n = 0; n < p->N; n++) {
        int64_t rows = rows_of(p, n);
        for (int64_t j = 0; j < rows; j++, row++)
            keep(p, target ? target[row] : row, n, row_position(p, n, j));
        tensor_set(&p->checkpoint_cu_starts, n + 1, (double)row);
    }
    p->args.checkpoint_cu_starts = &p->checkpoint_cu_starts.dl;
}

static void make_indexed_checkpoints(struct prefill_problem *p, int64_t rows, int64_t slots,
                                     const int64_t *targets, struct random *r) {
    int64_t *target = must_allocate(rows, sizeof *target);
    int64_t skipped = rows > 1 ? random_below(r, rows) : -1;
    tensor_make(&p->checkpoint_indices, index_type(p), 1, &rows, index_layout(p));
    for (int64_t i = 0; i < rows; i++) {
        target[i] = i == skipped ? -1 : targets[i];
        tensor_set(&p->checkpoint_indices, i, (double)target[i]);
    }
    make_packed_checkpoints(p, slots, target);
    p->args.checkpoint_indices = &p->checkpoint_indices.dl;
    free(target);
}

static void make_offset_checkpoints(struct prefill_problem *p, struct random *r) {
    bool columns = p->c.checkpoints == CHECKPOINTS_OFFSETS_3;
    int64_t C = columns ? CHECKPOINT_COLUMNS : 1, lead[2] = {p->N, C};
    int dims = columns ? 2 : 1;
    tensor_make(&p->checkpoint_offsets, index_type(p), dims, lead, index_layout(p));
    describe_checkpoints(p, dims, lead);
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t j = 0; j < C; j++) {
            int64_t position = random_below(r, p->c.lengths[n] + 2) - 1;
            if (columns && j == 2)
                position = (int64_t)tensor_get(&p->checkpoint_offsets, n * C);
            tensor_set(&p->checkpoint_offsets, n * C + j, (double)position);
            keep(p, n * C + j, n, position);
        }
    p->args.checkpoint_offsets = &p->checkpoint_offsets.dl;
}

static int64_t all_rows(const struct prefill_problem *p) {
    int64_t rows = 0;
    for (int64_t n = 0; n < p->N; n++)
        rows += rows_of(p, n);
    return rows;
}

/* free_slots: slots of the pool that no sequence uses. */
static void make_checkpoints(struct prefill_problem *p, const int64_t *free_slots, struct random *r) {
    enum checkpoints kind = p->c.checkpoints;
    if (kind == CHECKPOINTS_NONE)
        return;
    if (kind == CHECKPOINTS_OFFSETS || kind == CHECKPOINTS_OFFSETS_3) {
        make_offset_checkpoints(p, r);
        return;
    }
    int64_t rows = all_rows(p);
    p->args.checkpoint_every = p->c.every;
    if (kind == CHECKPOINTS_INDEXED) {
        int64_t *order = shuffled(rows + 2, r);
        make_indexed_checkpoints(p, rows, rows + 2, order, r);
        free(order);
    } else if (kind == CHECKPOINTS_SHARED_POOL) {
        make_indexed_checkpoints(p, rows, p->slots, free_slots, r);
    } else if (p->c.packing == PACKING_DENSE) {
        make_dense_checkpoints(p);
    } else {
        make_packed_checkpoints(p, rows, NULL);
    }
}

/* ---- Values ------------------------------------------------------------------------------------ */

int64_t prefill_row(const struct prefill_problem *p, const struct tensor *t, int64_t n, int64_t token,
                    int64_t h) {
    int64_t place = p->c.packing == PACKING_DENSE ? n * p->T + token : p->starts[n] + token;
    return place * t->shape[2] + h;
}

/* What a padding sequence holds may be anything: NaN, unless its memory is also another sequence's. */
static void poison_row(struct tensor *t, int64_t row) {
    if (t->strides[0] == 0 || t->strides[1] == 0)
        return;
    int64_t count = t->dl.ndim > 3 ? t->shape[3] : 1;
    for (int64_t i = row * count; i < (row + 1) * count; i++)
        tensor_set(t, i, (double)NAN);
}

static void poison_padding(struct prefill_problem *p) {
    struct tensor *const all[] = {&p->q, &p->k, &p->v, &p->g, &p->beta};
    for (int64_t n = 0; n < p->N; n++)
        for (int64_t t = 0; t < p->c.lengths[n] && p->slot[n] < 0; t++)
            for (size_t i = 0; i < sizeof all / sizeof *all; i++)
                for (int64_t h = 0; h < all[i]->shape[2]; h++)
                    poison_row(all[i], prefill_row(p, all[i], n, t, h));
}

static void make_inputs(struct prefill_problem *p, struct random *r) {
    const struct prefill_case *c = &p->c;
    int64_t keys[4] = {p->B, p->T, c->H, c->K}, values[4] = {p->B, p->T, p->HV, c->V};
    int64_t gates[4] = {p->B, p->T, p->HV, c->K};
    tensor_make(&p->q, c->q_type, 4, keys, inputs_layout(p, 2, false));
    tensor_make(&p->k, c->k_type, 4, keys, inputs_layout(p, 2, false));
    tensor_make(&p->v, c->v_type, 4, values, inputs_layout(p, 0, false));
    tensor_make(&p->g, c->g_type, 4, gates, inputs_layout(p, 1, false));
    tensor_make(&p->beta, c->beta_type, 3, gates, inputs_layout(p, 1, true));
    if (c->A_log)
        tensor_make(&p->A_log, c->parameter_type, 1, gates + 2, index_layout(p));
    if (c->dt_bias)
        tensor_make(&p->dt_bias, c->parameter_type, 2, gates + 2, inputs_layout(p, 0, false));
    (c->fill ? c->fill : fill_ordinary)(p, r);
    poison_padding(p);
}

static void make_args(struct prefill_problem *p) {
    const struct prefill_case *c = &p->c;
    flash_kda_prefill_args *a = &p->args;
    a->struct_size = sizeof *a;
    a->q = &p->q.dl;
    a->k = &p->k.dl;
    a->v = &p->v.dl;
    a->g = &p->g.dl;
    a->beta = &p->beta.dl;
    a->A_log = c->A_log ? &p->A_log.dl : NULL;
    a->dt_bias = c->dt_bias ? &p->dt_bias.dl : NULL;
    a->gate = c->gate;
    a->lower_bound = c->lower_bound;
    a->beta_mode = c->beta_mode;
    a->scale = c->scale;
    a->flags = (c->qk_norm ? FLASH_KDA_QK_NORM : 0) | (c->batch_invariant ? FLASH_KDA_BATCH_INVARIANT : 0) |
               (c->pool && c->padding_slot ? FLASH_KDA_PADDING_SLOT : 0);
    a->state_layout = c->layout;
    a->num_threads = c->threads;
}

void prefill_problem_make(struct prefill_problem *p, const struct prefill_case *c, struct random *r) {
    *p = (struct prefill_problem){.c = *c};
    place_sequences(p);
    int64_t spare = 3 + (c->checkpoints == CHECKPOINTS_SHARED_POOL ? all_rows(p) : 0);
    int64_t *slots = assign_slots(p, spare, r);
    describe_out_and_states(p);
    choose_fresh(p, r);
    make_initial_state(p, r);
    make_checkpoints(p, slots + p->N, r);
    free(slots);
    make_inputs(p, r);
    make_args(p);
    prefill_fuse_inputs(p, r);
}

void prefill_problem_free(struct prefill_problem *p) {
    const struct arguments args = arguments_of_prefill(&p->args);
    arguments_free(&args);
    for (int i = 0; i < CONVOLUTIONS; i++) { /* those that are not among args, or were not yet */
        struct tensor *const all[] = {&p->conv[i].raw, &p->conv[i].weight, &p->conv[i].bias, &p->conv[i].state};
        for (size_t n = 0; n < sizeof all / sizeof *all; n++)
            tensor_free(all[n]);
    }
    tensor_free(&p->q);
    tensor_free(&p->k);
    tensor_free(&p->v);
    free(p->out.written);
    free(p->final.written);
    free(p->checkpoints.written);
    free(p->checkpoint_sequence);
    free(p->checkpoint_position);
}
