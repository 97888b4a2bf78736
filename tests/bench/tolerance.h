/* SPDX-License-Identifier: MIT */
/* How far a result may be from the oracle. Everything here is an error ratio, RMS(x - ref) / RMS(ref). */
#ifndef BENCH_TOLERANCE_H
#define BENCH_TOLERANCE_H

/* fp32 arithmetic. Half a unit in the last place, which rounding to nearest may cost, is taken off every difference
 * of a bf16 or fp16 result. So those results are held to this too, and one that is truncated fails. */
#define TOLERANCE_FP32 1e-5

/* The oracle against the closed formula: both are fp64, what is left is that the expected values are kept in
 * fp32 (2^-24 at worst) and the bits that terms of both signs cancel. */
#define TOLERANCE_ORACLE 2e-7

/* The same after a convolution, whose outputs reach the formula in fp32. */
#define TOLERANCE_ORACLE_CONVOLVED 1e-6

/* The same from states that prefill kept in fp32. */
#define TOLERANCE_ORACLE_KEPT 1e-6

/* dA_log, a sum of terms of both signs: the largest |error| / sqrt(sum of squared terms). */
#define TOLERANCE_DA_LOG 1e-3

/* fp32 arithmetic where keys nearly coincide: each token's correction is a small difference of large terms, which
 * magnifies fp32's 6e-8 by the condition of I + L. */
#define TOLERANCE_FP32_COLLINEAR 1e-3

/* Results may flush numbers below the smallest normal fp32 one, 2^-126, to zero: a reference counts as at least
 * so large that this stays within TOLERANCE_FP32. */
#define TOLERANCE_SMALLEST_REFERENCE (0x1p-126 / TOLERANCE_FP32)

/* bf16 products: what rounding every operand of them to bf16 costs, by emulation, on the inputs of the
 * accuracy table (docs/maths.md), output rounded to bf16 / fp32 state; 1.15 times that is allowed.
 * With few samples (of an output: tokens of a head; of a state: channels of a head) an error ratio is no
 * average any more, since all values of a sample share the rounding of its operands, each 2^-8 at worst: the
 * allowance grows by `few` over the square root of their number. The table's own rows have no such excuse. */
#define TOLERANCE_BF16_MARGIN 1.15
struct bf16_tolerance {
    double out, state, few;
};
#define BF16_STRONG \
    (struct bf16_tolerance) { 4.1e-3, 2.4e-3, 0 }
#define BF16_SLOW \
    (struct bf16_tolerance) { 5.1e-3, 4.2e-3, 0 }
#define BF16_UNIFORM_8 \
    (struct bf16_tolerance) { 4.0e-3, 5.1e-3, 0 }
#define BF16_UNIFORM_4 \
    (struct bf16_tolerance) { 3.2e-3, 3.8e-3, 0 }
#define BF16_UNIFORM_0 \
    (struct bf16_tolerance) { 3.5e-3, 3.2e-3, 0 }
#define BF16_COLLINEAR \
    (struct bf16_tolerance) { 1.5e-2, 2.4e-2, 0 }

/* The trap of correlated keys with beta 1, output by the same emulation of what the CUDA levels round: every operand
 * to bf16, but the inverse and X to tf32 and U to two terms (tf32 for the output in the persistent kernel). CPU levels
 * round less and are held to BF16_ANY. */
#define BF16_CORRELATED \
    (struct bf16_tolerance) { 6.8e-3, 5.1e-3, 0 }

/* Any other input: the worst of the table's ordinary rows. */
#define BF16_ANY \
    (struct bf16_tolerance) { 5.1e-3, 5.1e-3, 4 }

/* The same fused: where q, k and v are rounded to bf16 between the convolutions and the recurrence, and outputs between it
 * and the norm, each adds ROUNDING_BF16_RMS, in squares: four of them to an output, two to a state. */
#define BF16_FUSED \
    (struct bf16_tolerance) { 6.1e-3, 5.6e-3, 4 }

/* Gradients by bf16 products, by an emulation that rounds every operand of every product of backward to bf16, states
 * and their gradients every 128 tokens: dq, dk, dv, dg, dbeta, dA_log, d_dt_bias, d_initial_state, as the check program
 * orders them. dA_log by the measure of TOLERANCE_DA_LOG, which says nothing where keys are equal: its sum is 0 then.
 * Margin and `few` as above, samples being tokens of a head. */
struct bf16_gradients {
    double of[8], few;
};
/* d_initial_state hangs on a sequence's first tokens alone, and so on their luck: 1.1 times the best peer's. */
#define BF16_GRADIENTS_STRONG \
    (struct bf16_gradients) { {2.4e-3, 2.4e-3, 2.5e-3, 4.0e-3, 3.7e-3, 5e-2, 3.8e-3, 2.3e-3}, 0 }
#define BF16_GRADIENTS_SLOW \
    (struct bf16_gradients) { {4.5e-3, 5.4e-3, 4.6e-3, 5.4e-3, 5.8e-3, 5e-2, 5.4e-3, 3.0e-3}, 0 }
#define BF16_GRADIENTS_COLLINEAR \
    (struct bf16_gradients) { {1.8e-2, 5.0e-3, 1.8e-2, 1.5e-2, 1.9e-2, 1, 3.7e-2, 3.0e-3}, 0 }

/* Any other input: the worst of the ordinary ones. */
#define BF16_GRADIENTS_ANY \
    (struct bf16_gradients) { {4.5e-3, 5.4e-3, 4.6e-3, 5.4e-3, 5.8e-3, 5e-2, 5.4e-3, 5.1e-3}, 4 }

/* Keys of less than 16 channels have much in common: twice that. */
#define BF16_GRADIENTS_FEW_CHANNELS \
    (struct bf16_gradients) { {9.0e-3, 1.1e-2, 9.2e-3, 1.1e-2, 1.2e-2, 5e-2, 1.1e-2, 1.1e-2}, 4 }

/* K = 1: keys are collinear, and behind the norm nothing is left of dq and dk but what fp32 rounds. */
#define BF16_GRADIENTS_ONE_CHANNEL \
    (struct bf16_gradients) { {1e-1, 1e-1, 1.8e-2, 1.5e-2, 1.9e-2, 5e-2, 3.7e-2, 5.4e-3}, 4 }

/* A state stored in bf16: RMS of rounding, 2^-8 / sqrt(3) averaged over a binade's mantissas. */
#define ROUNDING_BF16_RMS 1.65e-3

/* The serving loop with a state in bf16, whose oracle never rounds it, after dozens of calls; or with a prefill that takes
 * bf16 products. What is lost or mixed up between slots is off by 1. */
#define TOLERANCE_SOAK_BF16 3e-2

#endif
