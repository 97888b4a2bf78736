/* SPDX-License-Identifier: MIT */
/* The portable level: every problem, every GPU from sm_80 on. */
#include "cuda/level.h"
#include "cuda/sm80/backward_plan.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/plan.h"

static bool runs_on(const struct kda_cuda_device *device) {
    (void)device;
    return true;
}

static cudaError_t launch(const struct kda_prefill *p, const struct kda_plan *plan, int i, void *workspace) {
    const struct kda_launch *launch = &plan->launches[i];
    return (launch->kernel == KDA_KERNEL_PREPARE ? kda_sm80_prepare : kda_sm80_general)(p, plan, launch,
                                                                                        workspace);
}

static bool decode_takes(const struct kda_decode *d, const struct kda_decode_plan *plan) {
    (void)d;
    (void)plan;
    return true;
}

static void decode_plan(const struct kda_decode *d, struct kda_decode_plan *plan) {
    plan->kernel = kda_decode_is_fused(d) ? "decode_fused, with convolutions and norm" : "decode";
    plan->does = plan->aligned ? "states read 16 bytes at a time"
                               : "states read by elements (16 bytes at a time need their alignment)";
}

static cudaError_t decode(const struct kda_decode *d, const struct kda_decode_plan *plan) {
    return (kda_decode_is_fused(d) ? kda_sm80_decode_fused : kda_sm80_decode)(d, plan->aligned);
}

static cudaError_t backward_launch(const struct kda_backward *b, const struct kda_backward_plan *plan,
                                   const struct kda_backward_launch *launch, void *workspace) {
    static kda_sm80_backward_launcher *const launchers[] = {
        [KDA_SM80_BACKWARD_PREPARE] = kda_sm80_backward_prepare,
        [KDA_SM80_BACKWARD_STATES] = kda_sm80_backward_states,
        [KDA_SM80_BACKWARD_CHAINS] = kda_sm80_backward_chains,
        [KDA_SM80_BACKWARD_GRADIENTS] = kda_sm80_backward_gradients,
        [KDA_SM80_BACKWARD_SUMS] = kda_sm80_backward_sums,
    };
    return launchers[launch->kernel](b, plan, launch, workspace);
}

const struct kda_cuda_level kda_sm80_level = {.name = "sm80",
                                              .runs_on = runs_on,
                                              .takes = kda_sm80_takes,
                                              .plan = kda_sm80_plan,
                                              .launch = launch,
                                              .decode_takes = decode_takes,
                                              .decode_plan = decode_plan,
                                              .decode = decode,
                                              .backward_takes = kda_sm80_backward_takes,
                                              .backward_plan = kda_sm80_backward_plan,
                                              .backward_launch_at = kda_sm80_backward_launch_at,
                                              .backward_launch = backward_launch};
