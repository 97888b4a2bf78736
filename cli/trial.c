/* SPDX-License-Identifier: MIT */
#include "trial.h"

#include "random.h"
#include "timing.h"

#include <stdio.h>
#include <string.h>

const char *const decode_way_names[] = {"in place", "state kept", "state each", NULL};

/* Frees and reports; always false. */
static bool give_up(struct trial *trial) {
    trial_free(trial);
    return false;
}

static bool no_memory(struct trial *trial) {
    trial_free(trial);
    return failed("out of memory for the output and the states");
}

/* ---- Prefill ----------------------------------------------------------------------------------- */

static bool allocate(struct trial *trial, const struct kda_case *c, DLDataType out_type, bool exact) {
    int64_t out[TENSOR_MAX_DIMS], state[TENSOR_MAX_DIMS];
    case_out_shape(c, out);
    case_state_shape(c, state);
    const int64_t checkpoints[] = {c->batch, case_checkpoint_rows(c), state[1], state[2], state[3]};
    return tensor_alloc(&trial->out, out_type, 4, out) &&
           tensor_alloc(&trial->state, c->bf16_state && !exact ? TYPE_BF16 : TYPE_FP32, 4, state) &&
           (!c->checkpoint_every ||
            tensor_alloc(&trial->checkpoints, exact ? TYPE_FP32 : TYPE_BF16, 5, checkpoints));
}

/* Each row has a generator of its own, so that a part of a case has the values of the whole. */
static void fill_rows(struct tensor *t, double mean, double deviation) {
    int dims = t->dl.ndim;
    int64_t width = t->shape[dims - 1], heads = dims > 2 ? t->shape[2] : 1,
            tokens = dims > 2 ? t->shape[1] : INT64_MAX;
    for (int64_t row = 0, i = 0; i < tensor_count(t); row++) {
        int64_t token = row / heads % tokens, batch = row / heads / tokens;
        struct random r = {(uint64_t)(batch << 48 ^ token << 16 ^ row % heads)};
        for (int64_t j = 0; j < width; j++)
            tensor_set(t, i++, mean + deviation * random_normal(&r));
    }
}

static bool make_fused(struct trial *trial, const struct kda_case *c, flash_kda_prefill_args *args) {
    const int64_t keys[] = {c->heads * c->key_dim, 4}, values[] = {c->value_heads * c->value_dim, 4};
    int64_t gate[TENSOR_MAX_DIMS];
    case_out_shape(c, gate);
    for (int i = 0; i < 3; i++)
        if (!tensor_alloc(&trial->conv_weight[i], c->q.dl.dtype, 2, i < 2 ? keys : values))
            return false;
    if (!tensor_alloc(&trial->norm_weight, TYPE_FP32, 1, &c->value_dim) ||
        !tensor_alloc(&trial->norm_gate, c->v.dl.dtype, 4, gate))
        return false;
    for (int i = 0; i < 3; i++)
        fill_rows(&trial->conv_weight[i], 0, 0.5);
    fill_rows(&trial->norm_weight, 1, 0.3);
    fill_rows(&trial->norm_gate, 0, 1);
    args->q_conv_weight = &trial->conv_weight[0].dl;
    args->k_conv_weight = &trial->conv_weight[1].dl;
    args->v_conv_weight = &trial->conv_weight[2].dl;
    args->norm_weight = &trial->norm_weight.dl;
    args->norm_gate = &trial->norm_gate.dl;
    args->norm_eps = 1e-5;
    return true;
}

bool trial_prefill(struct trial *trial, const struct kda_case *c, DLDataType out_type,
                   flash_kda_backend backend, int32_t threads) {
    *trial = (struct trial){.c = c};
    if (!allocate(trial, c, out_type, backend == FLASH_KDA_BACKEND_REFERENCE))
        return no_memory(trial);
    flash_kda_prefill_args args = case_args(c);
    args.out = &trial->out.dl;
    args.final_state = &trial->state.dl;
    args.checkpoints = c->checkpoint_every ? &trial->checkpoints.dl : NULL;
    if (c->fused && !make_fused(trial, c, &args))
        return no_memory(trial);
    args.backend = backend;
    args.num_threads = threads;
    const struct arguments all = arguments_of_prefill(&args);
    return call_make(&trial->call, &all, memory_of(backend), FILL_NONE) || give_up(trial);
}

/* ---- Decode ------------------------------------------------------------------------------------ */

static bool allocate_pool(struct trial *trial, const struct kda_case *c, int64_t columns) {
    const int64_t indices[] = {c->batch, columns};
    int64_t out[TENSOR_MAX_DIMS], state[TENSOR_MAX_DIMS];
    case_out_shape(c, out);
    case_state_shape(c, state);
    state[0] *= columns;
    return tensor_alloc(&trial->out, c->v.dl.dtype, 4, out) &&
           tensor_alloc(&trial->state, c->initial_state.dl.dtype, 4, state) &&
           tensor_alloc(&trial->state_indices, TYPE_INT32, trial->way == DECODE_STATE_EACH ? 2 : 1, indices);
}

/* Each sequence's state is in the first of its slots. */
static void fill_pool(struct trial *trial, const struct kda_case *c, int64_t columns) {
    size_t bytes = tensor_bytes(&c->initial_state) / (size_t)c->batch;
    for (int64_t n = 0; n < c->batch; n++)
        memcpy((char *)trial->state.dl.data + (size_t)(n * columns) * bytes,
               (const char *)c->initial_state.dl.data + (size_t)n * bytes, bytes);
    for (int64_t i = 0; i < c->batch * columns; i++)
        ((int32_t *)trial->state_indices.dl.data)[i] = (int32_t)i;
}

bool trial_decode(struct trial *trial, const struct kda_case *c, enum decode_way way, flash_kda_backend backend,
                  int32_t threads) {
    int64_t columns = way == DECODE_STATE_EACH ? c->tokens : 1;
    *trial = (struct trial){.c = c, .way = way};
    if (!allocate_pool(trial, c, columns))
        return no_memory(trial);
    fill_pool(trial, c, columns);
    const flash_kda_prefill_args prefill = case_args(c);
    flash_kda_decode_args args = decode_of_prefill(&prefill);
    args.out = &trial->out.dl;
    args.state = &trial->state.dl;
    args.state_indices = &trial->state_indices.dl;
    args.flags |= way == DECODE_STATE_KEPT ? FLASH_KDA_KEEP_STATE : 0;
    args.backend = backend;
    args.num_threads = threads;
    const struct arguments all = arguments_of_decode(&args);
    return call_make(&trial->call, &all, memory_of(backend), FILL_NONE) || give_up(trial);
}

/* ---- Backward ---------------------------------------------------------------------------------- */

static bool allocate_gradients(struct trial *trial, const struct kda_case *c, DLDataType type) {
    int64_t out[TENSOR_MAX_DIMS], state[TENSOR_MAX_DIMS];
    case_out_shape(c, out);
    case_state_shape(c, state);
    const int64_t like_q[] = {c->batch, c->tokens, c->heads, c->key_dim};
    const int64_t like_g[] = {c->batch, c->tokens, c->value_heads, c->key_dim};
    return tensor_alloc(&trial->out, type, 4, out) && tensor_alloc(&trial->d_out, c->v.dl.dtype, 4, out) &&
           tensor_alloc(&trial->state, TYPE_FP32, 4, state) &&
           tensor_alloc(&trial->gradients[TRIAL_DQ], type, 4, like_q) &&
           tensor_alloc(&trial->gradients[TRIAL_DK], type, 4, like_q) &&
           tensor_alloc(&trial->gradients[TRIAL_DG], type, 4, like_g) &&
           tensor_alloc(&trial->gradients[TRIAL_DBETA], type, 3, like_g);
}

/* The states that prefill keeps, in host memory. */
static bool keep_states(struct trial *trial, const struct kda_case *c, flash_kda_backend backend,
                        int32_t threads) {
    struct trial prefill;
    double seconds;
    if (!trial_prefill(&prefill, c, c->v.dl.dtype, backend, threads))
        return false;
    const struct tensor *kept = &prefill.checkpoints;
    bool good = trial_run(&prefill, &seconds) &&
                (tensor_alloc(&trial->checkpoints, kept->dl.dtype, kept->dl.ndim, kept->shape) ||
                 failed("out of memory for kept states"));
    if (good)
        memcpy(trial->checkpoints.dl.data, kept->dl.data, tensor_bytes(kept));
    trial_free(&prefill);
    return good;
}

bool trial_backward(struct trial *trial, const struct kda_case *c, flash_kda_backend backend, int32_t threads) {
    bool exact = backend == FLASH_KDA_BACKEND_REFERENCE;
    *trial = (struct trial){.c = c};
    if (!allocate_gradients(trial, c, exact ? TYPE_FP32 : c->q.dl.dtype))
        return no_memory(trial);
    fill_rows(&trial->d_out, 0, 1);
    const flash_kda_prefill_args prefill = case_args(c);
    flash_kda_backward_args args = backward_of_prefill(&prefill);
    if (c->checkpoint_every && !exact) {
        if (!keep_states(trial, c, backend, threads))
            return give_up(trial);
        args.checkpoints = &trial->checkpoints.dl;
        args.checkpoint_every = c->checkpoint_every;
    }
    args.d_out = &trial->d_out.dl;
    args.dv = &trial->out.dl;
    args.d_initial_state = &trial->state.dl;
    args.dq = &trial->gradients[TRIAL_DQ].dl;
    args.dk = &trial->gradients[TRIAL_DK].dl;
    args.dg = &trial->gradients[TRIAL_DG].dl;
    args.dbeta = &trial->gradients[TRIAL_DBETA].dl;
    args.backend = backend;
    args.num_threads = threads;
    const struct arguments all = arguments_of_backward(&args);
    return call_make(&trial->call, &all, memory_of(backend), FILL_NONE) || give_up(trial);
}

/* ---- Prefill's tokens through decode ----------------------------------------------------------- */

enum { STATE_VIEW = TOKEN_ARGUMENTS, VIEWS };

/* One token of sequence n, of all sequences if they are dense. */
static flash_kda_decode_args token_args(const struct trial *trial, int64_t n, int64_t token,
                                        struct tensor views[VIEWS]) {
    flash_kda_decode_args args = decode_of_prefill(&trial->call.args.prefill);
    args.cu_seqlens = NULL;
    decode_narrow(&args, views, 1, token, 1);
    if (tensor_present(&trial->c->cu_seqlens)) {
        tensor_view(&views[STATE_VIEW], args.state);
        tensor_narrow(&views[STATE_VIEW], 0, n, 1);
        args.state = &views[STATE_VIEW].dl;
    }
    return args;
}

static flash_kda_status feed_sequence(const struct trial *trial, int64_t n, int64_t begin, int64_t end) {
    flash_kda_status status = FLASH_KDA_OK;
    for (int64_t token = begin; token < end && !status; token++) {
        struct tensor views[VIEWS];
        const flash_kda_decode_args args = token_args(trial, n, token, views);
        status = flash_kda_decode(&args);
    }
    return status;
}

/* Sequences without tokens pass their states through prefill. */
static flash_kda_status reset_states(const struct trial *trial) {
    struct tensor views[TOKEN_ARGUMENTS];
    const struct call *call = &trial->call;
    flash_kda_prefill_args args = call->args.prefill;
    prefill_narrow(&args, views, 0, 0, trial->c->sequences);
    prefill_narrow(&args, views, 1, 0, 0);
    args.cu_seqlens = NULL;
    args.checkpoints = NULL;
    args.checkpoint_every = 0;
    return flash_kda_prefill(&args, call->workspace.data, call->workspace_bytes);
}

/* Dense sequences go side by side, packed ones one after the other. */
static flash_kda_status feed(const struct trial *trial) {
    const struct tensor *cu_seqlens = &trial->c->cu_seqlens;
    flash_kda_status status = reset_states(trial);
    if (!status && !tensor_present(cu_seqlens))
        return feed_sequence(trial, 0, 0, trial->c->tokens);
    for (int64_t n = 0; n < trial->c->sequences && !status; n++)
        status =
            feed_sequence(trial, n, (int64_t)tensor_get(cu_seqlens, n), (int64_t)tensor_get(cu_seqlens, n + 1));
    return status;
}

/* ---- Either ------------------------------------------------------------------------------------ */

bool trial_run(struct trial *trial, double *seconds) {
    double start = timing_now();
    bool ran = trial->by_token ? !feed(trial) || failed("%s", flash_kda_last_error())
                               : call_launch(&trial->call, NULL);
    ran = ran && call_wait(&trial->call);
    *seconds = timing_now() - start;
    return ran && call_fetch(&trial->call);
}

bool trial_describe(const struct trial *trial, char *text, size_t size) {
    const struct arguments *a = &trial->call.args;
    struct tensor views[VIEWS];
    flash_kda_status status = FLASH_KDA_OK;
    if (trial->by_token) {
        char token[200];
        const flash_kda_decode_args args = token_args(trial, 0, 0, views);
        status = flash_kda_decode_describe(&args, token, sizeof token);
        snprintf(text, size, "%s; decode, token by token", status ? "" : token);
    } else {
        status = a->kind == KIND_DECODE     ? flash_kda_decode_describe(&a->decode, text, size)
                 : a->kind == KIND_BACKWARD ? flash_kda_backward_describe(&a->backward, text, size)
                                            : flash_kda_prefill_describe(&a->prefill, text, size);
    }
    return !status || failed("%s", flash_kda_last_error());
}

/* The library says it only in its line: "cuda: level sm80, ...". */
bool trial_level(const struct trial *trial, char level[16]) {
    char text[256];
    return trial_describe(trial, text, sizeof text) &&
           (sscanf(text, "%*[^:]: level %15[^,]", level) == 1 || failed("'%s' names no level", text));
}

void trial_last_states(const struct trial *trial, struct tensor *states) {
    int64_t columns = trial->way == DECODE_STATE_EACH ? trial->c->tokens : 1;
    tensor_view(states, &trial->state.dl);
    tensor_narrow(states, 0, columns - 1, trial->state.shape[0] / columns);
    states->strides[0] *= columns;
    states->compact = states->compact && columns == 1;
}

int64_t trial_bytes(const struct trial *trial) {
    int64_t bytes = arguments_bytes(&trial->call.args);
    if (trial->call.args.kind != KIND_DECODE)
        return bytes;
    /* Read once, and written to every slot or to none. */
    int64_t slots = (int64_t)tensor_bytes(&trial->state),
            indices = (int64_t)tensor_bytes(&trial->state_indices);
    int64_t columns = trial->state.shape[0] / trial->c->batch;
    return bytes - indices + (trial->way == DECODE_STATE_KEPT ? 0 : slots / columns);
}

void trial_free(struct trial *trial) {
    call_free(&trial->call);
    tensor_free(&trial->out);
    tensor_free(&trial->state);
    tensor_free(&trial->checkpoints);
    tensor_free(&trial->state_indices);
    tensor_free(&trial->d_out);
    tensor_free(&trial->norm_weight);
    tensor_free(&trial->norm_gate);
    for (int i = 0; i < 3; i++)
        tensor_free(&trial->conv_weight[i]);
    for (int i = 0; i < TRIAL_GRADIENTS; i++)
        tensor_free(&trial->gradients[i]);
}
