/* SPDX-License-Identifier: MIT */
/* Checks of what the arguments of prefill, decode and backward have in common. Each describes what it has checked. */
#ifndef KDA_API_CHECK_H
#define KDA_API_CHECK_H

#include "api/backend.h"
#include "api/problem.h"
#include "api/status.h"

#define INVALID(...) kda_fail(FLASH_KDA_ERROR_INVALID_ARGUMENT, __VA_ARGS__)

/* Runs a check and leaves the function with its status if it failed. */
#define TRY(check)                             \
    do {                                       \
        flash_kda_status try_status = (check); \
        if (try_status)                        \
            return try_status;                 \
    } while (0)

/* The arguments that become a struct kda_tokens. */
struct kda_token_args {
    const DLTensor *q, *k, *v, *g, *beta, *A_log, *dt_bias, *out, *cu_seqlens;
    bool needs_out; /* or it may be NULL */
    flash_kda_gate gate;
    double lower_bound;
    flash_kda_beta beta_mode;
    double scale;
    uint32_t flags, known_flags; /* the flash_kda_flags that are set, and those that the call takes */
    flash_kda_state_layout state_layout;
    flash_kda_backend backend;
    int32_t num_threads;
    void *stream;
};

/* Those of an operation's arguments, whose names are the same everywhere; further members may follow. */
#define KDA_TOKEN_ARGS(a, ...)                                  \
    ((struct kda_token_args){.q = (a)->q,                       \
                             .k = (a)->k,                       \
                             .v = (a)->v,                       \
                             .g = (a)->g,                       \
                             .beta = (a)->beta,                 \
                             .A_log = (a)->A_log,               \
                             .dt_bias = (a)->dt_bias,           \
                             .cu_seqlens = (a)->cu_seqlens,     \
                             .gate = (a)->gate,                 \
                             .lower_bound = (a)->lower_bound,   \
                             .beta_mode = (a)->beta_mode,       \
                             .scale = (a)->scale,               \
                             .flags = (a)->flags,               \
                             .state_layout = (a)->state_layout, \
                             .backend = (a)->backend,           \
                             .num_threads = (a)->num_threads,   \
                             .stream = (a)->stream,             \
                             __VA_ARGS__})

/* All of them, into *x, and the backend for their device. */
flash_kda_status kda_check_tokens(const struct kda_token_args *a, struct kda_tokens *x,
                                  const struct kda_backend **backend);

/* An argument of any float dtype that is read or written in rows. */
struct kda_tensor_spec kda_floats(const char *name, const char *form, int rank, const int64_t *shape,
                                  const DLDevice *device);

flash_kda_status kda_check_indices(const DLTensor *t, const char *name, const char *form, int rank,
                                   const int64_t *shape, const DLDevice *device, struct kda_tensor *out);

/* has_initial_state, where it is given. */
flash_kda_status kda_check_has_initial_state(const DLTensor *t, const struct kda_tokens *x,
                                             const DLDevice *device, struct kda_tensor *out);

/* padding_slot, if flags have it, which needs state_indices. */
flash_kda_status kda_check_padding_slot(uint32_t flags, int64_t padding_slot, const DLTensor *state_indices);

/* The values of cu_seqlens or checkpoint_cu_starts: from 0 to `end`, never falling. */
flash_kda_status kda_check_cumulative(const struct kda_tensor *t, int64_t end, const char *what);

/* A tensor of states: [outer, HV, V, K] or, with rank 5, [outer, rows, HV, V, K]; -1: any. */
flash_kda_status kda_check_state(const DLTensor *t, const char *name, const char *form, unsigned dtypes,
                                 int rank, int64_t outer, int64_t rows, const DLDevice *device, bool written,
                                 const struct kda_tokens *x, struct kda_tensor *out);

/* The form of a tensor of states in x's layout. */
const char *kda_state_form(const struct kda_tokens *x, const char *v_first, const char *k_first);

/* The arguments that become a struct kda_fused. */
struct kda_fused_args {
    struct {
        const DLTensor *weight, *bias, *state;
    } conv[KDA_CONVOLUTIONS];
    const DLTensor *norm_weight, *norm_gate;
    flash_kda_norm_activation norm_activation;
    double norm_eps;
    int64_t slots; /* of the convolutions' states; -1: any number, the same for all */
    bool needs_states, written;
};

/* Those of an operation's arguments, whose names are the same everywhere; further members may follow. */
#define KDA_FUSED_ARGS(a, ...)                                                                    \
    ((struct kda_fused_args){.conv = {{(a)->q_conv_weight, (a)->q_conv_bias, (a)->q_conv_state},  \
                                      {(a)->k_conv_weight, (a)->k_conv_bias, (a)->k_conv_state},  \
                                      {(a)->v_conv_weight, (a)->v_conv_bias, (a)->v_conv_state}}, \
                             .norm_weight = (a)->norm_weight,                                     \
                             .norm_gate = (a)->norm_gate,                                         \
                             .norm_activation = (a)->norm_activation,                             \
                             .norm_eps = (a)->norm_eps,                                           \
                             __VA_ARGS__})

/* All of them, into *out. */
flash_kda_status kda_check_fused(const struct kda_fused_args *a, const struct kda_tokens *x,
                                 const DLDevice *device, struct kda_fused *out);

/* The tensors of a struct kda_fused, those first that are written: the states of the convolutions. */
enum { KDA_FUSED_TENSORS = 11 };
void kda_list_fused(const struct kda_fused *f, const struct kda_tensor *list[KDA_FUSED_TENSORS]);

/* A written tensor overlaps no other; each may not be given. but: what the message says besides. */
flash_kda_status kda_check_overlap(const struct kda_tensor *written, const struct kda_tensor *other,
                                   const char *but);

/* The arguments of checkpoints every so many tokens; written: or they are read. */
struct kda_checkpoint_args {
    const DLTensor *rows, *cu_starts, *indices;
    bool written;
};

/* All of them, into *p, whose tokens and checkpoint_every are known. */
flash_kda_status kda_check_checkpoint_rows(const struct kda_checkpoint_args *a, const DLDevice *device,
                                           struct kda_prefill *p);

/* Bytes of which `needed` ones can be aligned to KDA_WORKSPACE_ALIGNMENT; 0 if none are needed. */
size_t kda_with_alignment(size_t needed);

/* The workspace has `needed` bytes and overlaps none of `count` tensors. *aligned: where it is to be used from. */
flash_kda_status kda_check_workspace(const struct kda_tensor *const *tensors, size_t count, void *workspace,
                                     size_t bytes, size_t needed, unsigned char **aligned);

#endif
