/* SPDX-License-Identifier: MIT */
#include "cuda/plan.h"

#include <assert.h>
#include <stdio.h>

struct kda_plan kda_plan_begin(const struct kda_prefill *p, const char *level) {
    return (struct kda_plan){
        .level = level, .segments = 1, .chunks = kda_first_chunk(p, p->tokens, p->sequences)};
}

void kda_add_launch(struct kda_plan *plan, struct kda_launch launch) {
    assert(plan->count < KDA_MAX_LAUNCHES);
    plan->launches[plan->count++] = launch;
}

const char *kda_kernel_name(enum kda_kernel kernel) {
    static const char *const names[KDA_KERNELS] = {
        [KDA_KERNEL_PREPARE] = "prepare",
        [KDA_KERNEL_GENERAL] = "general",
        [KDA_KERNEL_GENERAL_LOCAL] = "general_local",
        [KDA_KERNEL_GENERAL_SCAN] = "general_scan",
        [KDA_KERNEL_GENERAL_RESUME] = "general_resume",
        [KDA_KERNEL_PROBE] = "probe",
        [KDA_KERNEL_RANGES] = "ranges",
        [KDA_KERNEL_FIXUP] = "fixup",
        [KDA_KERNEL_PERSISTENT] = "persistent",
        [KDA_KERNEL_CLUSTER] = "cluster",
        [KDA_KERNEL_CLUSTER_LOCAL] = "cluster_local",
        [KDA_KERNEL_CLUSTER_SCAN] = "cluster_scan",
        [KDA_KERNEL_ADD_HISTORY] = "add_history",
        [KDA_KERNEL_TAKE_INCOMING] = "take_incoming",
        [KDA_KERNEL_CLUSTER_SUMMARIES] = "cluster_summaries",
        [KDA_KERNEL_CLUSTER_AGAIN] = "cluster_again",
    };
    return names[kernel];
}

void kda_plan_kernels(const struct kda_plan *plan, char *text, size_t size) {
    size_t used = 0;
    *text = '\0';
    for (const struct kda_launch *l = plan->launches; l < plan->launches + plan->count && used < size; l++) {
        used += (size_t)snprintf(text + used, size - used, "%s%s %u", used ? ", " : "",
                                 kda_kernel_name(l->kernel), l->grid[0]);
        if (l->grid[1] > 1 && used < size)
            used += (size_t)snprintf(text + used, size - used, "x%u", l->grid[1]);
    }
}
