/* SPDX-License-Identifier: MIT */
/* A state in fp32 through very many tokens whose gates do not change: an error of one sign at every token would add up. */
#include "call.h"
#include "decode_case.h"
#include "decode_families.h"
#include "prefill_compare.h"

#include <stdio.h>

enum { TOKENS = 131072, LAST = 1024 /* whose outputs are compared */ };

/* What is written is rare and small, so that the state in the end still shows the one in the beginning. */
static void fill_constant(struct prefill_problem *p, struct random *r) {
    fill_ordinary(p, r);
    tensor_fill(&p->g, p->c.parameter);
    tensor_fill(&p->beta, -9);
    if (p->c.A_log) {
        tensor_fill(&p->A_log, 0);
        tensor_fill(&p->dt_bias, 0);
    }
}

/* Calls decode for the first `count` tokens of its dense tensors, then for the next ones, until all are done. */
static flash_kda_status decode_in_steps(const flash_kda_decode_args *whole, int64_t count) {
    flash_kda_status status = FLASH_KDA_OK;
    for (int64_t t = 0, T = whole->q->shape[1]; t + count <= T && !status; t += count) {
        flash_kda_decode_args args = *whole;
        struct tensor views[TOKEN_ARGUMENTS];
        decode_narrow(&args, views, 1, t, count);
        status = flash_kda_decode(&args);
    }
    return status;
}

/* Takes the state through all tokens, `count` a call. */
static const char *decode_all(const struct prefill_problem *p, struct prefill_results *r, int64_t count,
                              flash_kda_backend backend) {
    const flash_kda_prefill_args prefill = prefill_bind(p, r, backend);
    const flash_kda_decode_args args = decode_of_prefill(&prefill);
    const struct arguments all = arguments_of_decode(&args);
    struct call c;
    bool ran = call_make(&c, &all, memory_of(backend), FILL_NONE);
    if (ran && decode_in_steps(&c.args.decode, count))
        ran = failed("%s", flash_kda_last_error());
    return call_finish(&c, ran);
}

static void run_calls(struct check *check, const struct prefill_problem *p, const struct prefill_results *exact,
                      int64_t count, const char *level) {
    struct prefill_results r;
    char name[200], text[100];
    prefill_results_make(&r, p);
    snprintf(name, sizeof name, "%s, %lld a call", p->c.name, (long long)count);
    const char *wrong = decode_all(p, &r, count, level_backend(level));
    double out = prefill_error(&r.out, &exact->out, &p->out, true);
    double state = prefill_error(&r.final, &exact->final, &p->final, false);
    snprintf(text, sizeof text, "out of the last %d tokens %.1e, state %.1e, at most %.1e", LAST, out, state,
             TOLERANCE_FP32);
    check_report(check, !wrong && out <= TOLERANCE_FP32 && state <= TOLERANCE_FP32, level, name,
                 wrong ? wrong : text);
    prefill_results_free(&r);
}

static void run_level(struct check *check, struct prefill_problem *p, const struct prefill_results *exact,
                      const char *level, const void *context) {
    (void)context;
    for (int64_t t = 0; t < p->T - LAST; t++)
        p->out.written[t] = false;
    run_calls(check, p, exact, 1, level);
    run_calls(check, p, exact, FLASH_KDA_MAX_DECODE_TOKENS, level);
}

static void drift(struct check *check, flash_kda_gate gate, double parameter, flash_kda_state_layout layout) {
    struct prefill_case c = prefill_case_plain();
    prefill_case_set_gate(&c, gate);
    c.H = 1;
    c.K = 128;
    c.V = 32;
    if (check_tests_cuda(
            check)) { /* what Hopper has a kernel for; elsewhere its oracle would take most of the time */
        c.V = 128;
        c.q_type = c.k_type = c.v_type = c.g_type = c.beta_type = c.out_type = TYPE_BF16;
    }
    c.lengths[0] = check->quick ? TOKENS / 8 : TOKENS;
    c.qk_norm = true;
    c.beta_mode = FLASH_KDA_BETA_SIGMOID;
    c.layout = layout;
    c.final = STORAGE_IN_PLACE;
    c.fill = fill_constant;
    c.parameter = parameter;
    snprintf(c.name, sizeof c.name, "%lld tokens with gate %s, g = %g, %s", (long long)c.lengths[0],
             prefill_gate_names[gate], parameter, layout == FLASH_KDA_STATE_V_FIRST ? "V first" : "K first");
    prefill_examine(check, &c, run_level, NULL);
}

void decode_drift(struct check *check) {
    static const double decays[] = {-1e-3, -1e-4, -1e-5}, gates[] = {-9, -11};
    for (size_t i = 0; i < sizeof decays / sizeof *decays; i++)
        drift(check, FLASH_KDA_GATE_NONE, decays[i], FLASH_KDA_STATE_V_FIRST);
    for (size_t i = 0; i < sizeof gates / sizeof *gates; i++)
        drift(check, FLASH_KDA_GATE_SOFTPLUS, gates[i], FLASH_KDA_STATE_K_FIRST);
}
