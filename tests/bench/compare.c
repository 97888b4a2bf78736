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
