/* SPDX-License-Identifier: MIT */
/* Decode right after a call on the same stream that writes its state_indices. A kernel may read its index while the work
 * before it still runs, to fetch a state early, but must not go on with what it read. The call before is a decode, too. It
 * takes a while over tokens of zeros, and its last output lies where the index does, which becomes 0. */
#include "decode_families.h"
#include "prefill_compare.h"
#include "tensor.h"

#include <cuda_runtime_api.h>
#include <flash_kda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DIM = 128, SLOTS = 3, HINT = 2, ZEROS = FLASH_KDA_MAX_DECODE_TOKENS, PARTS = 2 /* bf16 of an index */ };

/* Memory on the device, and the tensors in it. */
struct follow {
    int64_t heads;
    DLDataType state_type;
    size_t state_bytes;
    char *memory, *tokens, *index, *zeros, *out, *state;
    void *state_before, *state_after[2];
};

static int64_t count_tokens(const struct follow *f) { return f->heads * DIM; }

static bool follow_make(struct follow *f, int64_t heads, DLDataType state_type, struct random *r) {
    *f = (struct follow){.heads = heads, .state_type = state_type};
    size_t tokens = (size_t)count_tokens(f) * 2, outs = (size_t)ZEROS * PARTS * 2, zeros = 1024;
    f->state_bytes = (size_t)(SLOTS * heads * DIM * DIM) * state_type.bits / 8;
    uint16_t *host = malloc(tokens);
    f->state_before = malloc(f->state_bytes);
    f->state_after[0] = malloc(f->state_bytes), f->state_after[1] = malloc(f->state_bytes);
    if (!host || !f->state_before || !f->state_after[0] || !f->state_after[1] ||
        cudaMalloc((void **)&f->memory, f->state_bytes + 2 * tokens + outs + zeros)) {
        free(host);
        return false;
    }
    f->state = f->memory, f->tokens = f->state + f->state_bytes, f->out = f->tokens + tokens;
    f->zeros = f->out + tokens, f->index = f->zeros + zeros;
    /* bf16 from 0.5 to 1, of which two are a number of fp32. */
    for (size_t i = 0; i < tokens / 2; i++)
        host[i] = (uint16_t)(0x3f00 + random_below(r, 0x80));
    for (size_t i = 0; i < f->state_bytes / 2; i++)
        ((uint16_t *)f->state_before)[i] = (uint16_t)(0x3f00 + random_below(r, 0x80));
    bool good = !cudaMemcpy(f->tokens, host, tokens, cudaMemcpyHostToDevice) && !cudaMemset(f->zeros, 0, zeros);
    free(host);
    return good;
}

static void follow_free(struct follow *f) {
    cudaFree(f->memory);
    free(f->state_before);
    free(f->state_after[0]);
    free(f->state_after[1]);
}

static DLTensor tensor_at(void *data, DLDataType type, int ndim, int64_t *shape) {
    return (DLTensor){.data = data, .device = {kDLCUDA, 0}, .ndim = ndim, .dtype = type, .shape = shape};
}

/* Leaves zeros where its outputs lie, the last of them in the index. */
static flash_kda_status write_index(struct follow *f, cudaStream_t stream) {
    int64_t one[] = {1, ZEROS, 1, 1}, parts[] = {1, ZEROS, 1, PARTS}, state_shape[] = {1, 1, PARTS, 1};
    DLTensor keys = tensor_at(f->zeros, TYPE_FP32, 4, one), values = tensor_at(f->zeros, TYPE_FP32, 4, parts),
             beta = tensor_at(f->zeros, TYPE_FP32, 3, one), out = tensor_at(f->index, TYPE_BF16, 4, parts),
             state = tensor_at(f->zeros + 512, TYPE_FP32, 4, state_shape);
    flash_kda_decode_args args = FLASH_KDA_DECODE_ARGS_INIT;
    args.q = args.k = args.g = &keys, args.v = &values, args.beta = &beta, args.out = &out, args.state = &state;
    args.gate = FLASH_KDA_GATE_NONE, args.beta_mode = FLASH_KDA_BETA_GIVEN, args.stream = stream;
    return flash_kda_decode(&args);
}

static flash_kda_status decode(struct follow *f, cudaStream_t stream) {
    int64_t rows[] = {1, 1, f->heads, DIM}, state_shape[] = {SLOTS, f->heads, DIM, DIM}, one = 1;
    DLTensor tokens = tensor_at(f->tokens, TYPE_BF16, 4, rows), beta = tensor_at(f->tokens, TYPE_BF16, 3, rows),
             out = tensor_at(f->out, TYPE_BF16, 4, rows),
             state = tensor_at(f->state, f->state_type, 4, state_shape),
             index = tensor_at(f->index + (ZEROS - 1) * PARTS * 2, TYPE_INT32, 1, &one);
    flash_kda_decode_args args = FLASH_KDA_DECODE_ARGS_INIT;
    args.q = args.k = args.v = args.g = &tokens, args.beta = &beta, args.out = &out, args.state = &state;
    args.state_indices = &index, args.flags = FLASH_KDA_QK_NORM, args.stream = stream;
    args.gate = FLASH_KDA_GATE_SIGMOID, args.lower_bound = -5, args.beta_mode = FLASH_KDA_BETA_SIGMOID;
    return flash_kda_decode(&args);
}

/* The states after a call with index 0, which is written right before it or has always been there. */
static const char *states_after(struct follow *f, bool late, void *after) {
    static const int32_t always[1] = {0}, before[1] = {HINT};
    cudaStream_t stream = NULL;
    bool ran = !cudaMemcpy(f->state, f->state_before, f->state_bytes, cudaMemcpyHostToDevice) &&
               !cudaMemcpy(f->index + (ZEROS - 1) * PARTS * 2, late ? before : always, sizeof(int32_t),
                           cudaMemcpyHostToDevice) &&
               !cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) &&
               (!late || !write_index(f, stream)) && !decode(f, stream) && !cudaStreamSynchronize(stream) &&
               !cudaMemcpy(after, f->state, f->state_bytes, cudaMemcpyDeviceToHost);
    if (stream)
        cudaStreamDestroy(stream);
    return ran ? NULL : flash_kda_last_error();
}

static const char *follow_compare(struct follow *f) {
    enum { ROUNDS = 10 };
    const char *wrong = states_after(f, false, f->state_after[0]);
    for (int i = 0; !wrong && i < ROUNDS; i++) {
        wrong = states_after(f, true, f->state_after[1]);
        if (!wrong && memcmp(f->state_after[0], f->state_after[1], f->state_bytes) != 0)
            wrong = "other states than with the index there from the beginning";
    }
    if (!wrong && memcmp(f->state_after[0], f->state_before, f->state_bytes) == 0)
        wrong = "the check itself is wrong: no state changed";
    return wrong;
}

void decode_after(struct check *check) {
    static const int64_t heads[] = {4, 70, 140}; /* from half a state to a multiprocessor to several states */
    const DLDataType types[] = {TYPE_FP32, TYPE_BF16};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++)
        for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
            char name[96];
            struct follow f;
            snprintf(name, sizeof name, "decode, right after what writes its index, H %lld, %s",
                     (long long)heads[i], type_name(types[t]));
            if (!check_wanted(check, name))
                continue;
            struct random r = random_named(check->seed, name);
            const char *wrong = follow_make(&f, heads[i], types[t], &r) ? follow_compare(&f) : "no memory";
            check_report(check, !wrong, "cuda", name, wrong ? wrong : "the same bits as after nothing");
            follow_free(&f);
        }
}
