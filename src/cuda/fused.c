/* SPDX-License-Identifier: MIT */
#include "cuda/fused.h"

#include "api/workspace.h"

/* Elements of [B, T, heads, dim] in the workspace. */
static struct kda_tensor take_tensor(const struct kda_tensor *like, enum kda_dtype dtype,
                                     struct kda_arena *arena) {
    struct kda_tensor t = {.name = like->name, .dtype = dtype, .rank = 4};
    int64_t stride = (int64_t)kda_dtype_size(dtype);
    for (int i = 3; i >= 0; i--) {
        t.shape[i] = like->shape[i];
        t.stride[i] = stride;
        stride *= like->shape[i];
    }
    t.data = kda_take(arena, (size_t)stride, 1);
    return t;
}

/* Fewer tokens make more CTAs: the fewest that are worth it, or enough to fill the GPU. */
static int choose_tokens(const struct kda_prefill *p, int multiprocessors) {
    enum { CHANNELS = 4096 /* that a multiprocessor works side by side, at 8 a thread */ };
    double channels = (double)(2 * p->heads * p->key_dim + p->value_heads * p->value_dim);
    double all = channels * (double)(p->batches * p->tokens);
    int tokens = KDA_CONV_TOKENS;
    while (tokens > KDA_LEAST_CONV_TOKENS && all / tokens < 2.0 * CHANNELS * multiprocessors)
        tokens /= 2;
    return tokens;
}

void kda_cuda_plan_fused(const struct kda_prefill *p, const struct kda_cuda_device *device, void *workspace,
                         struct kda_cuda_fused *fused) {
    static char anywhere[KDA_WORKSPACE_ALIGNMENT] __attribute__((aligned(KDA_WORKSPACE_ALIGNMENT)));
    const struct kda_fused *f = p->fused;
    *fused = (struct kda_cuda_fused){.inner = *p};
    if (!f)
        return;
    struct kda_arena arena = {workspace ? workspace : anywhere, 0};
    struct kda_prefill *inner = &fused->inner;
    struct kda_tensor *const inputs[KDA_CONVOLUTIONS] = {&inner->q, &inner->k, &inner->v};
    inner->fused = NULL;
    for (int i = 0; i < KDA_CONVOLUTIONS; i++) {
        if (kda_convolution_of(f, i)->weight.data)
            *inputs[i] = take_tensor(inputs[i], inputs[i]->dtype, &arena);
        fused->finishes |= kda_convolution_of(f, i)->state.data != NULL;
    }
    if (kda_has_convolution(f) && p->tokens)
        fused->conv_tokens = choose_tokens(p, device->multiprocessors);
    /* fp16 could not hold every output before the norm. */
    if (f->norm_weight.data && p->out.dtype == KDA_F16)
        inner->out = take_tensor(&p->out, KDA_F32, &arena);
    fused->finishes |= f->norm_weight.data && p->tokens;
    fused->overlaps = device->major >= 9 && kda_cuda_can_overlap(p->device);
    fused->bytes = arena.used;
}
