/* SPDX-License-Identifier: MIT */
/* What the host code links with and is not emulated: kernels of decode, Hopper's of prefill, graphs, clusters. Hopper's level
 * takes no prefill and no decode here; prefill then goes to level sm80. */
#include "cluster_copy.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm90/kernels.h"
#include "failure.h"
#include "replay.h"

/* ---- Kernels ----------------------------------------------------------------------------------- */

/* The linker's option --wrap puts this in place of kda_sm90_takes, and says how it is called. */
/* NOLINTBEGIN(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp) */
bool __wrap_kda_sm90_takes(const struct kda_prefill *p);
bool __wrap_kda_sm90_takes(const struct kda_prefill *p) {
    (void)p;
    return false;
}
/* NOLINTEND(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp) */

bool kda_sm90_decode_takes(const struct kda_decode *d, int processors) {
    (void)d, (void)processors;
    return false;
}

#define ABSENT(kernel)                                                                          \
    cudaError_t kernel(const struct kda_prefill *p, const struct kda_plan *plan,                \
                       const struct kda_launch *launch, const struct kda_sm90_memory *memory) { \
        (void)p, (void)plan, (void)launch, (void)memory;                                        \
        return cudaErrorNotSupported;                                                           \
    }
ABSENT(kda_sm90_general)
ABSENT(kda_sm90_general_local)
ABSENT(kda_sm90_general_scan)
ABSENT(kda_sm90_general_resume)
ABSENT(kda_sm90_probe)
ABSENT(kda_sm90_ranges)
ABSENT(kda_sm90_fixup)
ABSENT(kda_sm90_persistent)
ABSENT(kda_sm90_cluster)
ABSENT(kda_sm90_cluster_local)
ABSENT(kda_sm90_cluster_scan)
ABSENT(kda_sm90_add_history)
ABSENT(kda_sm90_take_incoming)
ABSENT(kda_sm90_cluster_summaries)
ABSENT(kda_sm90_cluster_again)

cudaError_t kda_sm90_decode(const struct kda_decode *d, int processors) {
    (void)d, (void)processors;
    return cudaErrorNotSupported;
}
/* As if the kernels had been compiled for Hopper. */
cudaError_t kda_sm80_ptx_version(int *version) {
    *version = 90;
    return cudaSuccess;
}

cudaError_t kda_sm80_decode(const struct kda_decode *d, bool aligned) {
    (void)d, (void)aligned;
    return cudaErrorNotSupported;
}
cudaError_t kda_sm80_decode_fused(const struct kda_decode *d, bool aligned) {
    (void)d, (void)aligned;
    return cudaErrorNotSupported;
}

/* ---- Of the check program ---------------------------------------------------------------------- */

bool replay_is_possible(void) { return false; }
/* NOLINTNEXTLINE(readability-non-const-parameter): as replay.h declares it */
bool replay_calls(struct call *const calls[], int count, double *seconds, int repeats) {
    (void)calls, (void)count, (void)seconds, (void)repeats;
    return failed("graphs are not emulated");
}
const char *replay_changed(const struct arguments *captured, const struct arguments *changed, int fill) {
    (void)captured, (void)changed, (void)fill;
    return "graphs are not emulated";
}

bool cluster_copy_can_run(void) { return false; }
double cluster_copy_overwritten(bool waits) {
    (void)waits;
    return -1;
}
