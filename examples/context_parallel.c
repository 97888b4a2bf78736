/* SPDX-License-Identifier: MIT */
/*
 * One sequence on several GPUs: each has a range of its tokens. Begin, ncclAllGather of the summaries, fold, finish; then
 * all ranges beside one call of the whole sequence on the first GPU. usage: context_parallel [GPUS] (2)
 *
 * One process drives all GPUs here, to be short. With a process for each the calls are the same.
 */
#include <cuda_runtime_api.h>
#include <flash_kda.h>
#include <math.h>
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 1024, HEADS = 2, K = 128, V = 128, MAX_GPUS = 8 }; /* TOKENS of each GPU */
enum { ROW = HEADS * K, SUMMARY = HEADS * (V + K) * K };

static void check(int failed, const char *what) {
    if (failed) {
        fprintf(stderr, "%s: error %d. %s\n", what, failed, flash_kda_last_error());
        exit(1);
    }
}

/* Device memory with the contents of `from`, or zeros. */
static void *device_memory(size_t bytes, const void *from) {
    void *memory = NULL;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    check(from ? cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice) : cudaMemset(memory, 0, bytes),
          "copy");
    return memory;
}

static DLTensor tensor(int gpu, void *data, uint8_t code, int rank, int64_t *shape) {
    return (DLTensor){data, {kDLCUDA, gpu}, rank, {code, 32, 1}, shape, NULL, 0};
}

/* A range of the tokens, and the call that a GPU makes for it. */
struct part {
    int64_t keys[4], steps[3], one[1], summaries[4], state[4];
    DLTensor q, k, v, g, beta, out, row, none, summary, incoming;
    flash_kda_prefill_args args;
    void *workspace, *gathered;
    size_t bytes;
};

/* x: q, k, v, g of all tokens, then beta. comes_in, goes_on: across the range's borders. */
static void make_part(struct part *p, int gpu, float *const x[5], int64_t first, int64_t tokens, int comes_in,
                      int goes_on, int gpus) {
    const int32_t row = 0, none = -1;
    *p = (struct part){.keys = {1, tokens, HEADS, K},
                       .steps = {1, tokens, HEADS},
                       .one = {1},
                       .args = FLASH_KDA_PREFILL_ARGS_INIT,
                       .summaries = {1, HEADS, V + K, K},
                       .state = {1, HEADS, V, K}};
    check(cudaSetDevice(gpu), "cudaSetDevice");
    DLTensor *const keys[] = {&p->q, &p->k, &p->v, &p->g, &p->out};
    size_t bytes = (size_t)tokens * ROW * sizeof(float);
    for (int i = 0; i < 5; i++)
        *keys[i] = tensor(gpu, device_memory(bytes, i < 4 ? x[i] + first * ROW : NULL), kDLFloat, 4, p->keys);
    p->beta = tensor(gpu, device_memory(bytes / K, x[4] + first * HEADS), kDLFloat, 3, p->steps);
    p->row = tensor(gpu, device_memory(sizeof row, &row), kDLInt, 1, p->one);
    p->none = tensor(gpu, device_memory(sizeof none, &none), kDLInt, 1, p->one);
    p->gathered = device_memory((size_t)gpus * SUMMARY * sizeof(float), NULL);
    p->summary =
        tensor(gpu, (float *)p->gathered + gpu * SUMMARY, kDLFloat, 4, p->summaries); /* where it will lie */
    p->incoming =
        tensor(gpu, device_memory((size_t)HEADS * V * K * sizeof(float), NULL), kDLFloat, 4, p->state);
    flash_kda_prefill_args *a = &p->args;
    a->q = &p->q, a->k = &p->k, a->v = &p->v, a->g = &p->g, a->beta = &p->beta, a->out = &p->out;
    a->gate = FLASH_KDA_GATE_SOFTPLUS, a->beta_mode = FLASH_KDA_BETA_SIGMOID, a->flags = FLASH_KDA_QK_NORM;
    if (gpus > 1) {
        a->phase = FLASH_KDA_PHASE_BEGIN, a->summaries = &p->summary, a->incoming = &p->incoming;
        a->incoming_rows = comes_in ? &p->row : &p->none, a->outgoing_rows = goes_on ? &p->row : &p->none;
    }
    check(flash_kda_prefill_workspace_size(a, &p->bytes), "workspace size");
    p->workspace = device_memory(p->bytes, NULL);
}

/* The state before a GPU's tokens: from zero through the summaries of those before it. */
static void fold(struct part *p, int gpu, int gpus) {
    int32_t before[MAX_GPUS] = {0};
    for (int i = 0; i < gpu; i++)
        before[i] = i;
    int64_t links[2] = {1, gpu}, bias_shape[4] = {gpus, HEADS, V, K}, strides[4] = {SUMMARY, (V + K) * K, K, 1};
    DLTensor chain = tensor(gpu, device_memory(sizeof before, before), kDLInt, 2, links);
    DLTensor bias = tensor(gpu, p->gathered, kDLFloat, 4, bias_shape),
             transitions = bias; /* K = V: of the same shape */
    bias.strides = transitions.strides = strides;
    transitions.byte_offset = (uint64_t)V * K * sizeof(float);
    flash_kda_fold_args a = FLASH_KDA_FOLD_ARGS_INIT;
    a.bias = &bias, a.transitions = &transitions, a.chains = &chain, a.states = &p->incoming;
    check(flash_kda_fold(&a), "fold");
}

int main(int argc, char **argv) {
    int gpus = argc > 1 ? atoi(argv[1]) : 2, devices[MAX_GPUS], found = 0;
    check(cudaGetDeviceCount(&found) || gpus < 2 || gpus > found || gpus > MAX_GPUS,
          "there are not so many GPUs");
    size_t all = (size_t)gpus * TOKENS * ROW;
    float *x[5], *apart = malloc(all * sizeof *apart), *whole = malloc(all * sizeof *whole);
    for (uint32_t i = 0, seed = 1; i < 5; i++) {
        x[i] = malloc(all * sizeof **x);
        for (size_t n = 0; n < all;
             n++, seed = seed * 1664525u + 1013904223u) /* g: slow decay, so that the past counts */
            x[i][n] = (float)(seed >> 8) * 0x1p-23f - 1.0f - (i == 3 ? 6.0f : 0.0f);
    }
    ncclComm_t ranks[MAX_GPUS];
    static struct part parts[MAX_GPUS], one;
    for (int i = 0; i < gpus; i++)
        devices[i] = i;
    check(ncclCommInitAll(ranks, gpus, devices), "ncclCommInitAll");
    for (int i = 0; i < gpus; i++) {
        make_part(&parts[i], i, x, (int64_t)i * TOKENS, TOKENS, i > 0, i + 1 < gpus, gpus);
        check(flash_kda_prefill(&parts[i].args, parts[i].workspace, parts[i].bytes), "begin");
    }
    check(ncclGroupStart(), "ncclGroupStart");
    for (int i = 0; i < gpus; i++) {
        check(cudaSetDevice(i), "cudaSetDevice");
        check(ncclAllGather(parts[i].summary.data, parts[i].gathered, SUMMARY, ncclFloat, ranks[i], NULL),
              "ncclAllGather");
    }
    check(ncclGroupEnd(), "ncclGroupEnd");
    for (int i = 0; i < gpus; i++) {
        check(cudaSetDevice(i), "cudaSetDevice");
        fold(&parts[i], i, gpus);
        parts[i].args.phase = FLASH_KDA_PHASE_FINISH;
        check(flash_kda_prefill(&parts[i].args, parts[i].workspace, parts[i].bytes), "finish");
        check(cudaMemcpy(apart + (size_t)i * TOKENS * ROW, parts[i].out.data, TOKENS * ROW * sizeof(float),
                         cudaMemcpyDeviceToHost),
              "cudaMemcpy");
    }
    make_part(&one, 0, x, 0, (int64_t)gpus * TOKENS, 0, 0, 1);
    check(flash_kda_prefill(&one.args, one.workspace, one.bytes), "the whole sequence");
    check(cudaMemcpy(whole, one.out.data, all * sizeof *whole, cudaMemcpyDeviceToHost), "cudaMemcpy");
    double error = 0, size = 0;
    for (size_t i = 0; i < all; i++) {
        error += pow((double)apart[i] - (double)whole[i], 2);
        size += pow((double)whole[i], 2);
    }
    printf("%d GPUs, %d tokens each: error ratio to one GPU %.1e\n", gpus, TOKENS, sqrt(error / size));
    return sqrt(error / size) < 1e-2 ? 0 : 1;
}
