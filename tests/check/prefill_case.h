/* SPDX-License-Identifier: MIT */
/* A case of prefill: what is asked for (prefill_case), the tensors that ask it (prefill_problem), and the
 * tensors that a run writes (prefill_results). */
#ifndef CHECK_PREFILL_CASE_H
#define CHECK_PREFILL_CASE_H

#include "call.h"
#include "fused.h"
#include "random.h"
#include "tensor.h"
#include "tolerance.h"

enum { MAX_SEQUENCES = 8, NO_POSITION = -1, PADDING_SLOT = 1 };

enum packing { PACKING_DENSE, PACKING_INT32, PACKING_INT64 };
enum storage { STORAGE_NONE, STORAGE_FP32, STORAGE_BF16, STORAGE_IN_PLACE /* final state only */ };
enum checkpoints {
    CHECKPOINTS_NONE,
    CHECKPOINTS_EVERY,       /* all rows */
    CHECKPOINTS_FEWER,       /* every n tokens, but rows for the first of them only */
    CHECKPOINTS_OFFSETS,     /* one offset a sequence */
    CHECKPOINTS_OFFSETS_3,   /* three, some of them -1, two of them equal */
    CHECKPOINTS_INDEXED,     /* packed only: every n tokens, through shuffled indices with a -1 */
    CHECKPOINTS_SHARED_POOL, /* packed and in place with a pool only: indexed, into the state pool itself */
};
enum { CHECKPOINT_COLUMNS = 3 };
enum flags { FLAGS_NONE, FLAGS_BOOL, FLAGS_INT8, FLAGS_INT32 }; /* the dtype of has_initial_state */

struct prefill_problem;
struct prefill_results;

struct prefill_case {
    char name[160];
    int sequences;
    int64_t lengths[MAX_SEQUENCES]; /* dense: the same for all */
    enum packing packing;
    int64_t H, group, K, V; /* HV = H * group */

    flash_kda_gate gate;
    bool A_log, dt_bias, qk_norm, batch_invariant;
    double lower_bound, scale;
    flash_kda_beta beta_mode;
    int threads;

    enum storage initial, final;
    flash_kda_state_layout layout;
    bool pool; /* states addressed by shuffled slots; with several sequences one is padding (-1) */
    bool
        padding_slot; /* with a pool: padding names PADDING_SLOT instead, and of three sequences two are padding */
    enum flags flags; /* has_initial_state, where there is an initial state: about half of it NaN */
    enum checkpoints checkpoints;
    int64_t every;
    bool checkpoints_bf16, wide_indices; /* wide: int64 index tensors, but for cu_seqlens */

    DLDataType q_type, k_type, v_type, g_type, beta_type, out_type, parameter_type;
    enum spacing inputs, outputs;

    struct fused_options fused;
    bool conv_states; /* whether convolutions have states */

    /* Sets the values of q, k, v, g, beta and, where given, A_log and dt_bias; NULL: fill_ordinary. */
    void (*fill)(struct prefill_problem *p, struct random *r);
    double parameter; /* of fill */
    double fp32_tolerance;
    struct bf16_tolerance bf16_tolerance;
};

/* A small plain case to change from: dense, sigmoid gate, everything fp32. */
struct prefill_case prefill_case_plain(void);

extern const char *const prefill_gate_names[3]; /* by flash_kda_gate */

/* With A_log and dt_bias, where the gate takes them. */
void prefill_case_set_gate(struct prefill_case *c, flash_kda_gate gate);

/* One written tensor: its logical shape, the number of leading dims that count rows, and which rows a run
 * writes. ndim 0: not asked for. */
struct prefill_output {
    DLDataType type;
    int ndim, lead;
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t rows;
    bool *written; /* [rows] */
};

struct prefill_problem {
    struct prefill_case c;
    int64_t B, T, N, HV, slots;
    int64_t slot[MAX_SEQUENCES];   /* of each sequence; -1: padding */
    bool fresh[MAX_SEQUENCES];     /* it starts from zero */
    int64_t starts[MAX_SEQUENCES]; /* packed: its first token */
    struct tensor q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state, state_indices, has_initial_state;
    struct tensor checkpoint_cu_starts, checkpoint_indices, checkpoint_offsets;
    struct fused_convolution conv[CONVOLUTIONS]; /* of q, k, v; absent where the case has none */
    struct tensor norm_weight, norm_gate;
    struct prefill_output out, final, checkpoints;
    int64_t *checkpoint_sequence, *checkpoint_position; /* [checkpoints.rows]: what a written row holds */
    flash_kda_prefill_args args;                        /* everything but the written tensors */
};

/* Shapes, index tensors and random inputs of a case; the stream r decides all of it. */
void prefill_problem_make(struct prefill_problem *p, const struct prefill_case *c, struct random *r);
void prefill_problem_free(struct prefill_problem *p);

/* Of a fused case: before the oracle runs, q, k and v become what the convolutions make of them; afterwards its outputs
 * become what the norm makes of them, and args those of the fused call. */
void prefill_fuse_inputs(struct prefill_problem *p, struct random *r);
void prefill_fuse_outputs(struct prefill_problem *p, struct prefill_results *exact, struct random *r);
/* NULL, or that states of convolutions are not what they should be after a run. */
const char *prefill_conv_states_differ(const struct prefill_problem *p, const struct prefill_results *r);

/* Makes PADDING_SLOT the last of shuffled slots, which no sequence has. */
void prefill_spare_padding(int64_t *order, int64_t slots);

/* Row of q, k, v, g or beta in tensor_get()'s count of (token t of sequence n, head h). */
int64_t prefill_row(const struct prefill_problem *p, const struct tensor *t, int64_t n, int64_t token,
                    int64_t h);

/* Ordinary values in the ranges of real ones: unit keys, gates from nearly none to strong. */
void fill_ordinary(struct prefill_problem *p, struct random *r);
/* Slow decay and small steps: the state after thousands of tokens still shows the one before them. What must be
 * carried right is only seen where it is not forgotten. */
void fill_remembering(struct prefill_problem *p, struct random *r);
/* Every key equal, beta near 1, slow decay, v of period 16: the reproducer of docs/maths.md. */
void fill_collinear(struct prefill_problem *p, struct random *r);
/* Every channel decays to nothing within 32 tokens: the lower half of them in the second 16, the upper half in the first. But
 * where that changes a key moves half of what there is to channels that are slow from then on, so that no past is forgotten. */
void fill_moving(struct prefill_problem *p, struct random *r);
void fill_normal(struct tensor *t, struct random *r, double mean, double deviation);
void fill_uniform(struct tensor *t, struct random *r, double low, double high);

struct prefill_results {
    struct tensor out, final, checkpoints, conv_state[CONVOLUTIONS];
    bool in_place, shared_pool; /* final starts as the initial state; final is also the checkpoints */
};

/* Poisoned tensors of the case's dtypes and spacing; a state updated in place starts as the initial state. */
void prefill_results_make(struct prefill_results *r, const struct prefill_problem *p);
/* Compact fp32 tensors, nothing in place: for the expected values. */
void prefill_results_make_exact(struct prefill_results *r, const struct prefill_problem *p);
void prefill_results_free(struct prefill_results *r);

/* The arguments of a run that writes to r. */
flash_kda_prefill_args prefill_bind(const struct prefill_problem *p, struct prefill_results *r,
                                    flash_kda_backend backend);

/* Calls prefill with a workspace of exactly the size asked for, unaligned, guarded and filled with `fill`.
 * Returns NULL or what went wrong. */
const char *prefill_call(const flash_kda_prefill_args *args, int fill);

const char *prefill_run(const struct prefill_problem *p, struct prefill_results *r, flash_kda_backend backend,
                        int fill);

/* Do two runs have the same bits? */
bool prefill_same(const struct prefill_results *a, const struct prefill_results *b);

/* The tensor that holds the checkpoints of a run: checkpoints, or the pool they share. */
const struct tensor *prefill_checkpoints(const struct prefill_results *r);

/* The expected results by the closed formula over whole sequences, for short ones; see formula.c. */
void formula_prefill(const struct prefill_problem *p, struct prefill_results *exact);
/* Whether the formula's cost, quadratic in the sequence length, is bearable. */
bool formula_feasible(const struct prefill_problem *p);

#endif
