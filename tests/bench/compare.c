/* SPDX-License-Identifier: MIT */
#include "compare.h"

#include "tolerance.h"

#include <math.h>

void error_add(struct error *e, double x, double ref, double forgiven) {
    if (isfinite(ref) && isfinite(x)) {
        double difference = fmax(0, fabs(x - ref) - forgiven);
        e->differences += difference * difference;
        e->squares += ref * ref;
        e->count++;
    } else if (isfinite(ref)) {
        e->spread++;
    } else if (isfinite(x)) {
        e->lost++;
    } else {
        e->wild++;
    }
}

void error_add_row(struct error *e, const struct tensor *x, int64_t row, const struct tensor *ref,
                   int64_t ref_row, int64_t count, bool forgive_rounding) {
    bool forgive = forgive_rounding && x->dl.dtype.bits == 16;
    for (int64_t i = 0; i < count; i++) {
        double expected = tensor_get(ref, ref_row * count + i);
        error_add(e, tensor_get(x, row * count + i), expected,
                  forgive && isfinite(expected) ? type_half_ulp(x->dl.dtype, expected) : 0);
    }
}

double error_ratio(const struct error *e, double smallest) {
    if (!e->count)
        return 0;
    double count = (double)e->count;
    return sqrt(e->differences / count) / fmax(sqrt(e->squares / count), smallest);
}

double error_of_all(const struct error *e) {
    if (e->lost || e->wild)
        return (double)NAN;
    return e->spread ? (double)INFINITY : error_ratio(e, TOLERANCE_SMALLEST_REFERENCE);
}

double tensor_error(const struct tensor *x, const struct tensor *ref, bool forgive_rounding) {
    struct error e = {0};
    if (tensor_count(x) != tensor_count(ref))
        return (double)NAN; /* a part was compared with the whole */
    error_add_row(&e, x, 0, ref, 0, tensor_count(ref), forgive_rounding);
    return error_of_all(&e);
}

/* What an element adds to dA_log, from z = g + dt_bias and its dg: a da is softplus(z) / sigmoid(z) dg, or z dg. */
static double term_of_A_log(flash_kda_gate gate, double z, double dg) {
    if (dg == 0)
        return 0;
    if (gate == FLASH_KDA_GATE_SIGMOID)
        return z * dg;
    return (z > 30 ? z : log1p(exp(z))) * (1 + exp(-z)) * dg;
}

double A_log_error(const struct tensor *x, const struct tensor *ref, flash_kda_gate gate,
                   const struct tensor *g, const struct tensor *dt_bias, const struct tensor *dg) {
    int64_t heads = dg->shape[2], K = dg->shape[3], rows = dg->shape[0] * dg->shape[1] * heads;
    double worst = 0;
    for (int64_t h = 0; h < heads; h++) {
        double squares = 0, expected = tensor_get(ref, h), difference = fabs(tensor_get(x, h) - expected);
        for (int64_t row = h; row < rows; row += heads)
            for (int64_t i = 0; i < K; i++) {
                double bias = tensor_present(dt_bias) ? tensor_get(dt_bias, h * K + i) : 0;
                double t = term_of_A_log(gate, tensor_get(g, row * K + i) + bias, tensor_get(dg, row * K + i));
                squares += t * t;
            }
        difference =
            fmax(0, difference - type_half_ulp(x->dl.dtype, expected) - type_half_ulp(ref->dl.dtype, expected));
        double error = difference / fmax(sqrt(squares), TOLERANCE_SMALLEST_REFERENCE);
        if (!(error <= worst)) /* NaN too */
            worst = error;
    }
    return worst;
}

double rounding_error(const struct tensor *exact, DLDataType type) {
    struct error e = {0};
    for (int64_t i = 0, count = tensor_count(exact); i < count; i++) {
        double value = tensor_get(exact, i);
        error_add(&e, type_round(type, value), value, 0);
    }
    return error_of_all(&e);
}

int64_t count_non_finite(const struct tensor *t) {
    int64_t found = 0;
    for (int64_t i = 0, count = tensor_count(t); i < count; i++)
        found += !isfinite(tensor_get(t, i));
    return found;
}
