/* SPDX-License-Identifier: MIT */
/* Hopper's level: its own instructions run on compute capability 9.0 alone. */
#include "cuda/level.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm90/backward/plan.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tensor_maps.h"

static bool runs_on(const struct kda_cuda_device *device) {
    return device->major == 9 && kda_sm90_can_make_maps();
}

static kda_sm90_launcher *const launchers[KDA_KERNELS] = {
    [KDA_KERNEL_GENERAL] = kda_sm90_general,
    [KDA_KERNEL_GENERAL_LOCAL] = kda_sm90_general_local,
    [KDA_KERNEL_GENERAL_SCAN] = kda_sm90_general_scan,
    [KDA_KERNEL_GENERAL_RESUME] = kda_sm90_general_resume,
    [KDA_KERNEL_PROBE] = kda_sm90_probe,
    [KDA_KERNEL_RANGES] = kda_sm90_ranges,
    [KDA_KERNEL_FIXUP] = kda_sm90_fixup,
    [KDA_KERNEL_PERSISTENT] = kda_sm90_persistent,
    [KDA_KERNEL_CLUSTER] = kda_sm90_cluster,
    [KDA_KERNEL_CLUSTER_LOCAL] = kda_sm90_cluster_local,
    [KDA_KERNEL_CLUSTER_SCAN] = kda_sm90_cluster_scan,
    [KDA_KERNEL_ADD_HISTORY] = kda_sm90_add_history,
    [KDA_KERNEL_TAKE_INCOMING] = kda_sm90_take_incoming,
    [KDA_KERNEL_CLUSTER_SUMMARIES] = kda_sm90_cluster_summaries,
    [KDA_KERNEL_CLUSTER_AGAIN] = kda_sm90_cluster_again,
};

static cudaError_t launch(const struct kda_prefill *p, const struct kda_plan *plan, int i, void *workspace) {
    const struct kda_launch *launch = &plan->launches[i];
    struct kda_sm90_memory memory;
    kda_sm90_lay_out(p, plan, workspace, &memory);
    if (launch->kernel == KDA_KERNEL_PREPARE)
        return kda_sm80_prepare(p, plan, launch, memory.operands);
    return launchers[launch->kernel](p, plan, launch, &memory);
}

static bool decode_takes(const struct kda_decode *d, const struct kda_decode_plan *plan) {
    return !kda_decode_is_fused(d) && plan->aligned && kda_sm90_decode_takes(d, plan->multiprocessors);
}

static void decode_plan(const struct kda_decode *d, struct kda_decode_plan *plan) {
    (void)d;
    plan->kernel = "decode of Hopper's level";
    plan->does = "states read by the copy engine";
}

static cudaError_t decode(const struct kda_decode *d, const struct kda_decode_plan *plan) {
    return kda_sm90_decode(d, plan->multiprocessors);
}

static cudaError_t backward_launch(const struct kda_backward *b, const struct kda_backward_plan *plan,
                                   const struct kda_backward_launch *launch, void *workspace) {
    static kda_sm90_backward_launcher *const kernels[] = {
        [KDA_SM90_BACKWARD_PREPARE] = kda_sm90_backward_prepare,
        [KDA_SM90_BACKWARD_ADJOINT] = kda_sm90_backward_adjoint,
        [KDA_SM90_BACKWARD_GRADIENTS] = kda_sm90_backward_gradients,
        [KDA_SM90_BACKWARD_SUMS] = kda_sm90_backward_sums,
        [KDA_SM90_BACKWARD_HEADS] = kda_sm90_backward_heads};
    const struct kda_launch one = {.grid = {launch->grid[0], launch->grid[1]},
                                   .overlaps = launch->kernel != KDA_SM90_BACKWARD_PREPARE};
    struct kda_sm90_backward_memory memory;
    kda_sm90_backward_lay_out(b, plan, workspace, &memory);
    return kernels[launch->kernel](b, plan, &one, &memory);
}

const struct kda_cuda_level kda_sm90_level = {.name = "sm90",
                                              .runs_on = runs_on,
                                              .takes = kda_sm90_takes,
                                              .plan = kda_sm90_plan,
                                              .launch = launch,
                                              .decode_takes = decode_takes,
                                              .decode_plan = decode_plan,
                                              .decode = decode,
                                              .backward_takes = kda_sm90_backward_takes,
                                              .backward_plan = kda_sm90_backward_plan,
                                              .backward_launch_at = kda_sm90_backward_launch_at,
                                              .backward_launch = backward_launch};
