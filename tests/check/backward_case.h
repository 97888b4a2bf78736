/* SPDX-License-Identifier: MIT */
/* A case of backward: a case of prefill, and which gradients are given and asked for (backward_case), the tensors
 * that ask it (backward_problem), and those that a run writes (backward_results). */
#ifndef CHECK_BACKWARD_CASE_H
#define CHECK_BACKWARD_CASE_H

#include "prefill_case.h"

enum gradient { DQ, DK, DV, DG, DBETA, DA_LOG, D_DT_BIAS, D_INITIAL_STATE, GRADIENTS };
extern const char *const gradient_names[GRADIENTS];

struct backward_case {
    /* Its dtypes and spacing of out are those of d_out; pools, final states and other checkpoints than all or all
     * but the last are not for it. */
    struct prefill_case forward;
    bool d_out;
    enum storage d_final, d_initial; /* STORAGE_IN_PLACE: d_initial_state is d_final_state */
    unsigned without;                /* bits of enum gradient: not asked for */
    DLDataType types[D_INITIAL_STATE];
    double size;                /* of the gradients that are given */
    struct bf16_gradients bf16; /* tolerances where products are in bf16 */
};

/* A small plain case to change from, with everything given and asked for, all fp32. */
struct backward_case backward_case_plain(void);

struct backward_problem {
    struct backward_case c;
    struct prefill_problem p;
    struct tensor d_out, d_final_state, checkpoints;
    struct prefill_output outputs[GRADIENTS]; /* ndim 0: there is no such gradient */
    flash_kda_backward_args args;             /* everything but the written tensors */
};

/* NULL, or what went wrong in the prefill that keeps states. */
const char *backward_problem_make(struct backward_problem *b, const struct backward_case *c, struct random *r);
void backward_problem_free(struct backward_problem *b);

/* Is the gradient there, and asked for? */
bool backward_asks(const struct backward_problem *b, int gradient);

struct backward_results {
    struct tensor tensors[GRADIENTS];
};

/* Poisoned tensors of the case's dtypes and spacing; d_initial_state in place starts as d_final_state. */
void backward_results_make(struct backward_results *r, const struct backward_problem *b);
/* Compact fp32 tensors of all gradients that there are, nothing in place: for the expected values. */
void backward_results_make_exact(struct backward_results *r, const struct backward_problem *b);
void backward_results_free(struct backward_results *r);

/* The arguments of a run on a backend that writes these results. */
flash_kda_backward_args backward_bind(const struct backward_problem *b, struct backward_results *r,
                                      flash_kda_backend backend);

/* Calls backward with a workspace of exactly the size asked for, unaligned, guarded and filled with `fill`. NULL or
 * what went wrong. */
const char *backward_run(const struct backward_problem *b, struct backward_results *r,
                         flash_kda_backend backend, int fill);

/* Seconds of the fastest of several runs. */
double backward_time(const struct backward_problem *b, struct backward_results *r, flash_kda_backend backend);

/* The expected gradients, one derivative after the other, for small problems; see backward_formula.c. */
void formula_backward(const struct backward_problem *b, struct backward_results *exact);
/* Whether that is bearable. */
bool formula_backward_feasible(const struct backward_problem *b);

#endif
