/* SPDX-License-Identifier: MIT */
/* How the portable level plans a backward, and what lies in its workspace. Plain host code: no device is needed. */
#ifndef KDA_CUDA_SM80_BACKWARD_PLAN_H
#define KDA_CUDA_SM80_BACKWARD_PLAN_H

#include "cuda/backward_plan.h"
#include "cuda/sm80/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Slab by slab. Those that find states again go from the first slab to the last, the others back. Where launches overlap,
 * gradients of a slab are found beside the chains of the next one: these are few CTAs that run long. Only chains, states
 * and the last gradients wait for what runs before them. So memory is there for the operands of three slabs, those of
 * chains, of gradients and of the kernel that prepares, and for the states of two. */
enum kda_sm80_backward_kernel {
    KDA_SM80_BACKWARD_PREPARE, /* operands of all chunks */
    KDA_SM80_BACKWARD_STATES,  /* takes states through; keeps those before segments */
    KDA_SM80_BACKWARD_CHAINS, /* takes gradients of states back, and each segment's state through it, keeping all */
    KDA_SM80_BACKWARD_GRADIENTS, /* of every chunk */
    KDA_SM80_BACKWARD_SUMS       /* of dA_log and d_dt_bias */
};

/* Bytes of the operands of one chunk of one value head, whose K is padded to KP (backward.cuh). */
#define KDA_SM80_BACKWARD_OPERANDS(KP)                                                      \
    (3 * KDA_CUDA_CHUNK * (KP)*2 + KDA_CUDA_CHUNK * KDA_CUDA_CHUNK * (4 + 4 + 2) + (KP)*4 + \
     5 * KDA_CUDA_CHUNK * 4)

/* The parts of the workspace, each aligned. */
struct kda_sm80_backward_memory {
    void *operands, *e, *Z, *S, *R, *kept, *carried_S, *carried_R, *sums;
};

/* Gives the parts their places; returns the bytes of all. */
size_t kda_sm80_backward_lay_out(const struct kda_backward *b, const struct kda_backward_plan *plan,
                                 void *workspace, struct kda_sm80_backward_memory *memory);

/* Slabs that there is memory for, by turns: of operands, and of states and rows. */
int64_t kda_sm80_slabs_of_operands(const struct kda_backward_plan *plan);
int64_t kda_sm80_slabs_of_states(const struct kda_backward_plan *plan);

/* Chunks, of all value heads, that a slab has room for. */
int64_t kda_sm80_chunks_of_slab(const struct kda_backward *b, const struct kda_backward_plan *plan);

/* K as kernels pad it, and tiles of V. */
int kda_sm80_padded_key_dim(const struct kda_backward *b);
int64_t kda_sm80_tiles(const struct kda_backward *b);

/* At most so many sequences have segments in a slab, times value heads. In the grid of KDA_SM80_BACKWARD_CHAINS the CTAs
 * of these chains stand before those of segments. */
int64_t kda_sm80_chains_in_slab(const struct kda_backward *b, const struct kda_backward_plan *plan,
                                int64_t slab);

bool kda_sm80_backward_takes(const struct kda_backward *b);
void kda_sm80_backward_plan(const struct kda_backward *b, struct kda_backward_plan *plan);
struct kda_backward_launch kda_sm80_backward_launch_at(const struct kda_backward *b,
                                                       const struct kda_backward_plan *plan, int i);

#ifdef __cplusplus
}
#endif

#endif
