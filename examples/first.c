/* SPDX-License-Identifier: MIT */
/* One call on the CPU: a sequence of 1,024 tokens and 8 heads. */
#include <flash_kda.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 1024, HEADS = 8, K = 128, V = 128 };

/* Compact fp32 [1, TOKENS, HEADS, dim] of random numbers from low to low + 1. */
static DLTensor tensor(int64_t *shape, int rank, float low) {
    int64_t count = 1;
    for (int i = 0; i < rank; i++)
        count *= shape[i];
    float *data = malloc((size_t)count * sizeof *data);
    for (int64_t i = 0; i < count; i++)
        data[i] = low + (float)rand() / (float)RAND_MAX;
    return (DLTensor){
        .data = data, .device = {kDLCPU, 0}, .ndim = rank, .dtype = {kDLFloat, 32, 1}, .shape = shape};
}

int main(void) {
    int64_t keys[] = {1, TOKENS, HEADS, K}, values[] = {1, TOKENS, HEADS, V}, steps[] = {1, TOKENS, HEADS};
    DLTensor q = tensor(keys, 4, -0.5F), k = tensor(keys, 4, -0.5F), v = tensor(values, 4, -0.5F);
    DLTensor g = tensor(keys, 4, -1.0F), beta = tensor(steps, 3, 0), out = tensor(values, 4, 0);

    flash_kda_prefill_args args = FLASH_KDA_PREFILL_ARGS_INIT;
    args.q = &q, args.k = &k, args.v = &v, args.out = &out;
    args.g = &g;       /* log decays, from -1 to 0: args.gate is FLASH_KDA_GATE_NONE */
    args.beta = &beta; /* steps, from 0 to 1 */
    args.flags = FLASH_KDA_QK_NORM;

    size_t bytes;
    if (flash_kda_prefill_workspace_size(&args, &bytes) || flash_kda_prefill(&args, malloc(bytes), bytes)) {
        fprintf(stderr, "%s\n", flash_kda_last_error());
        return 1;
    }
    printf("the last token's first output is %f\n", ((float *)out.data)[(TOKENS - 1) * HEADS * V]);
    return 0;
}
