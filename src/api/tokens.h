/* SPDX-License-Identifier: MIT */
/* What prefill, decode and backward have in common after all checks: tokens with their gates and steps, how they
 * are cut into sequences, and where a head's state lies. */
#ifndef KDA_API_TOKENS_H
#define KDA_API_TOKENS_H

#include "api/tensor.h"

enum { KDA_MAX_KEY_DIM = 256, KDA_MAX_THREADS = 1024 };

/* Members in a macro, so that struct kda_prefill has them as its own and as a struct kda_tokens. */
#define KDA_TOKENS_MEMBERS                                                                              \
    int64_t batches, tokens, sequences;                                  /* B, T, N */                  \
    int64_t heads, value_heads, key_dim, value_dim;                      /* H, HV, K, V */              \
    struct kda_tensor q, k, v, g, beta, A_log, dt_bias, out, cu_seqlens; /* out: if the call has one */ \
    flash_kda_gate gate;                                                                                \
    flash_kda_beta beta_mode;                                                                           \
    flash_kda_state_layout state_layout;                                                                \
    flash_kda_backend backend;                                                                          \
    float lower_bound, scale;                                                                           \
    bool qk_norm, batch_invariant;                                                                      \
    bool on_host; /* the host can read the index tensors */                                             \
    int device;   /* DLPack's device id */                                                              \
    int num_threads;                                                                                    \
    void *stream;

struct kda_tokens {
    KDA_TOKENS_MEMBERS
};

/* Where the tokens of a sequence are. */
struct kda_sequence {
    int64_t batch, first, length;
    int64_t slot;   /* of its state; -1: padding, not to be touched */
    bool from_zero; /* its state is not read */
};

/* Address of row (b, t, h) of a tensor [B, T, heads, dim], or of element (b, t, h) of beta. */
KDA_INLINE char *kda_row(const struct kda_tensor *t, int64_t batch, int64_t token, int64_t head) {
    return t->data + batch * t->stride[0] + token * t->stride[1] + head * t->stride[2];
}

/* One head's state matrix in memory. */
struct kda_state {
    char *data; /* NULL: none */
    enum kda_dtype dtype;
    int64_t stride; /* bytes between rows */
    bool v_first;   /* rows are [V][K], else [K][V] */
};

KDA_INLINE int64_t kda_min64(int64_t a, int64_t b) { return a < b ? a : b; }

KDA_INLINE int64_t kda_clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : kda_min64(x, high);
}

/* Does has_initial_state say that sequence n starts from zero? */
KDA_INLINE bool kda_starts_from_zero(const struct kda_tensor *has_initial_state, int64_t n) {
    return has_initial_state->data && !kda_flag(has_initial_state, n);
}

/* Where the tokens of sequence n are; its slot is n. Indices in device memory are not checked before a call: here
 * they are kept within the tensors. */
KDA_INLINE struct kda_sequence kda_tokens_of(const struct kda_tokens *x, int64_t n) {
    struct kda_sequence s = {n, 0, x->tokens, n, false};
    if (x->cu_seqlens.data) {
        int64_t end = kda_clamp(kda_index(&x->cu_seqlens, n + 1, 0), 0, x->tokens);
        s.batch = 0;
        s.first = kda_clamp(kda_index(&x->cu_seqlens, n, 0), 0, end);
        s.length = end - s.first;
    }
    return s;
}

/* A head's state in slot `slot` of a tensor of states; data is NULL if t was not given. */
KDA_INLINE struct kda_state kda_state_in(const struct kda_tokens *x, const struct kda_tensor *t, int64_t slot,
                                         int64_t head) {
    struct kda_state s = {NULL, KDA_F32, 0, false};
    if (t->data) {
        int outer = t->rank - 3;
        s.data = t->data + slot * t->stride[0] + head * t->stride[outer];
        s.dtype = t->dtype;
        s.stride = t->stride[outer + 1];
        s.v_first = x->state_layout == FLASH_KDA_STATE_V_FIRST;
    }
    return s;
}

#endif
