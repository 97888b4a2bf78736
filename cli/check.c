/* SPDX-License-Identifier: MIT */
/* What is right: the error ratio, and how large it may be. */
#include "check.h"

#include "generate.h"

#include <math.h>
#include <string.h>

/* fp32 arithmetic, before the output is rounded: measured errors are some 1e-7; nearly equal keys amplify them.
 * bf16 products: 1.15 times what rounding every operand of every large product to bf16 costs in an emulation,
 * the largest of all ordinary inputs (slow gates for the output, constant gates for the state), output
 * rounded to bf16 included; and the same for nearly equal keys. */
static const struct {
    struct tolerance ordinary, near_collinear;
} fp32_arithmetic = {{.output = 1e-5, .state = 1e-5}, {.output = 1e-3, .state = 1e-3}},
  bf16_products = {{.output = 1.15 * 5.1e-3, .state = 1.15 * 5.1e-3},
                   {.output = 1.15 * 1.5e-2, .state = 1.15 * 2.4e-2}};

/* The rule of flash_kda.h. */
static bool uses_bf16_products(const struct prefill_call *call) {
    const flash_kda_prefill_args *args = &call->args;
    if (call->by_token) {
        return false;
    }
    if (args->backend == FLASH_KDA_BACKEND_CUDA) {
        return true;
    }
    const DLTensor *tensors[] = {args->q, args->k, args->v, args->out};
    for (size_t i = 0; i < sizeof tensors / sizeof tensors[0]; i++) {
        if (!dtype_equal(tensors[i]->dtype, dtype_bf16)) {
            return false;
        }
    }
    const char *level = flash_kda_cpu_level();
    return args->backend != FLASH_KDA_BACKEND_REFERENCE && level && strcmp(level, "avx512bf16") == 0;
}

static double root_ratio(double difference, double size) {
    double ratio = difference == 0 ? 0 : sqrt(difference / size);
    return isfinite(ratio) ? ratio : INFINITY;
}

double rounding_error(const struct tensor *exact, DLDataType dtype) {
    double difference = 0, size = 0;
    for (int64_t i = 0, count = tensor_count(exact); i < count; i++) {
        double value = tensor_get(exact, i), d = dtype_round(dtype, value) - value;
        difference += d * d;
        size += value * value;
    }
    return root_ratio(difference, size);
}

struct tolerance call_tolerance(const struct prefill_call *call, const struct prefill_call *oracle,
                                const char *regime) {
    bool near_collinear = strcmp(regime, regime_names[REGIME_NEAR_COLLINEAR]) == 0;
    struct tolerance tolerance;
    if (uses_bf16_products(call)) {
        tolerance = near_collinear ? bf16_products.near_collinear : bf16_products.ordinary;
    } else {
        tolerance = near_collinear ? fp32_arithmetic.near_collinear : fp32_arithmetic.ordinary;
        tolerance.output += rounding_error(&oracle->out, call->out.dl.dtype);
    }
    tolerance.checkpoints = tolerance.state;
    tolerance.state += rounding_error(&oracle->state, call->state.dl.dtype);
    if (tensor_present(&oracle->checkpoints)) {
        tolerance.checkpoints += rounding_error(&oracle->checkpoints, call->checkpoints.dl.dtype);
    }
    return tolerance;
}

struct comparison compare(const struct tensor *value, const struct tensor *reference, double tolerance) {
    double difference = 0, size = 0;
    for (int64_t i = 0, count = tensor_count(reference); i < count; i++) {
        double expected = tensor_get(reference, i), d = tensor_get(value, i) - expected;
        difference += d * d;
        size += expected * expected;
    }
    double ratio = root_ratio(difference, size);
    return (struct comparison){ratio, tolerance, isfinite(ratio) && ratio <= tolerance};
}

int64_t count_non_finite(const struct tensor *tensor) {
    int64_t found = 0;
    for (int64_t i = 0, count = tensor_count(tensor); i < count; i++) {
        found += !isfinite(tensor_get(tensor, i));
    }
    return found;
}
