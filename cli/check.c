/* SPDX-License-Identifier: MIT */
#include "check.h"

#include "generate.h"
#include "level.h"
#include "tolerance.h"

#include <string.h>

static double larger(double a, double b) { return a > b ? a : b; }

/* The largest of what each may be off by. */
static struct tolerance gradient_tolerance(const struct trial *trial, const struct trial *oracle,
                                           bool collinear) {
    struct tolerance tolerance = {0};
    if (level_rounds_gradients(level_of(trial->call.args.backward.backend))) {
        const struct bf16_gradients bf16 = collinear ? BF16_GRADIENTS_COLLINEAR : BF16_GRADIENTS_ANY;
        for (int i = 0; i < 5; i++)
            tolerance.output = larger(tolerance.output, TOLERANCE_BF16_MARGIN * bf16.of[i]);
        tolerance.A_log = TOLERANCE_BF16_MARGIN * bf16.of[5];
        tolerance.dt_bias = TOLERANCE_BF16_MARGIN * bf16.of[6];
        tolerance.state = larger(tolerance.output, TOLERANCE_BF16_MARGIN * bf16.of[7]);
        return tolerance;
    }
    tolerance.state = collinear ? TOLERANCE_FP32_COLLINEAR : TOLERANCE_FP32;
    tolerance.output = rounding_error(&oracle->out, trial->out.dl.dtype);
    for (int i = 0; i < TRIAL_TOKEN_GRADIENTS; i++)
        tolerance.output =
            larger(tolerance.output, rounding_error(&oracle->gradients[i], trial->gradients[i].dl.dtype));
    tolerance.output += tolerance.state;
    tolerance.dt_bias = tolerance.state;
    tolerance.A_log = TOLERANCE_DA_LOG * tolerance.state / TOLERANCE_FP32;
    if (tensor_present(&trial->checkpoints)) { /* in bf16: of a gradient both factors may come from them */
        tolerance.output += 2 * ROUNDING_BF16_RMS;
        tolerance.dt_bias += 2 * ROUNDING_BF16_RMS;
        tolerance.A_log += 2 * ROUNDING_BF16_RMS;
    }
    return tolerance;
}

/* Before anything is rounded to its dtype; bf16 products are measured with their output rounded. */
struct tolerance trial_tolerance(const struct trial *trial, const struct trial *oracle) {
    const flash_kda_prefill_args *args = &trial->call.args.prefill;
    bool collinear = strcmp(trial->c->regime, regime_names[REGIME_NEAR_COLLINEAR]) == 0;
    struct tolerance tolerance = {0};
    if (trial->call.args.kind == KIND_BACKWARD)
        return gradient_tolerance(trial, oracle, collinear);
    if (!trial->by_token && trial->call.args.kind != KIND_DECODE &&
        level_rounds(level_of(args->backend), args)) {
        const struct bf16_tolerance bf16 = collinear ? BF16_COLLINEAR : trial->c->fused ? BF16_FUSED : BF16_ANY;
        tolerance.output = TOLERANCE_BF16_MARGIN * bf16.out;
        tolerance.state = TOLERANCE_BF16_MARGIN * bf16.state;
    } else {
        tolerance.state = collinear ? TOLERANCE_FP32_COLLINEAR : TOLERANCE_FP32;
        tolerance.output = tolerance.state + rounding_error(&oracle->out, trial->out.dl.dtype);
    }
    tolerance.checkpoints = tolerance.state;
    tolerance.state += rounding_error(&oracle->state, trial->state.dl.dtype);
    if (tensor_present(&oracle->checkpoints))
        tolerance.checkpoints += rounding_error(&oracle->checkpoints, trial->checkpoints.dl.dtype);
    return tolerance;
}

struct comparison compare(const struct tensor *value, const struct tensor *reference, double tolerance) {
    double ratio = tensor_error(value, reference, false);
    return (struct comparison){ratio, tolerance, ratio <= tolerance};
}
