/* SPDX-License-Identifier: MIT */
/* NaN in one element of one token: what depends on it is NaN, as in the recurrence; all else has the bits that it has without,
 * in segments of a sequence, too. */
#include "prefill_compare.h"
#include "prefill_families.h"

#include <math.h>
#include <stdio.h>

enum { WORKSPACE_FILL = 0xff };

/* Which input is given a NaN, and in which token. */
struct place {
    const char *name;
    struct tensor *tensor;
    int64_t token;
};

static bool same_bits(double a, double b) { return a == b && signbit(a) == signbit(b); }

/* x must be NaN where `expected` is, and as `clean` elsewhere. */
static const char *differs(const struct tensor *x, const struct tensor *expected, const struct tensor *clean) {
    for (int64_t i = 0; i < tensor_count(x); i++) {
        double value = tensor_get(x, i);
        if (isnan(tensor_get(expected, i)) ? !isnan(value) : !same_bits(value, tensor_get(clean, i)))
            return isnan(value) ? "NaN where the recurrence has none" : "other bits than without a NaN";
    }
    return NULL;
}

static const char *compare(struct prefill_problem *p, const struct prefill_results *expected,
                           const struct place *place, int64_t element) {
    struct prefill_results clean, poisoned;
    double value = tensor_get(place->tensor, element);
    prefill_results_make(&clean, p);
    prefill_results_make(&poisoned, p);
    const char *wrong = prefill_run(p, &poisoned, p->args.backend, WORKSPACE_FILL);
    tensor_set(place->tensor, element, 0.125);
    wrong = wrong ? wrong : prefill_run(p, &clean, p->args.backend, WORKSPACE_FILL);
    tensor_set(place->tensor, element, value);
    wrong = wrong ? wrong : differs(&poisoned.out, &expected->out, &clean.out);
    wrong = wrong ? wrong : differs(&poisoned.final, &expected->final, &clean.final);
    prefill_results_free(&clean);
    prefill_results_free(&poisoned);
    return wrong;
}

static void one_place(struct check *check, struct prefill_problem *p, const struct place *place) {
    char name[200];
    int64_t row = place->tensor->dl.ndim > 3 ? place->tensor->shape[3] : 1;
    int64_t element = prefill_row(p, place->tensor, 0, place->token, 0) * row;
    snprintf(name, sizeof name, "%s, in %s of token %lld", p->c.name, place->name, (long long)place->token);
    if (!check_wanted(check, name))
        return;
    struct prefill_results expected;
    prefill_results_make_exact(&expected, p);
    double before = tensor_get(place->tensor, element);
    tensor_set(place->tensor, element, (double)NAN);
    const char *failed = prefill_run(p, &expected, FLASH_KDA_BACKEND_REFERENCE, WORKSPACE_FILL);
    for (int i = 0; i < check->level_count; i++) {
        check_select_level(check->levels[i]);
        p->args.backend = prefill_backend(check->levels[i]);
        const char *wrong = failed ? failed : compare(p, &expected, place, element);
        check_report(check, !wrong, check->levels[i], name, wrong ? wrong : "NaN where it must be");
    }
    tensor_set(place->tensor, element, before);
    prefill_results_free(&expected);
}

static void all_places(struct check *check, const struct prefill_case *c) {
    struct random r = random_named(check->seed, c->name);
    struct prefill_problem p;
    prefill_problem_make(&p, c, &r);
    const struct place places[] = {{"q", &p.q, 700}, {"k", &p.k, 700},    {"k", &p.k, 1500},
                                   {"v", &p.v, 700}, {"g", &p.g, 700},    {"beta", &p.beta, 700},
                                   {"v", &p.v, 3},   {"k", &p.k, p.T - 1}};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        one_place(check, &p, &places[i]);
    prefill_problem_free(&p);
}

void prefill_nan(struct check *check) {
    if (prefill_backend(check->levels[0]) == FLASH_KDA_BACKEND_REFERENCE)
        return;
    for (int gate = 0; gate < 2; gate++) {
        struct prefill_case c = prefill_case_plain();
        prefill_case_set_gate(&c, (flash_kda_gate)gate);
        c.H = 2;
        c.K = 128;
        c.V = 32;
        c.lengths[0] = 2100;
        c.threads = 16;
        c.fill = fill_remembering;
        c.out_type = TYPE_FP32;
        snprintf(c.name, sizeof c.name, "NaN, gate %s", prefill_gate_names[gate]);
        all_places(check, &c);
    }
}
