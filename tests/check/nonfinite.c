/* SPDX-License-Identifier: MIT */
/* One NaN or infinity in one tensor: what the recurrence makes of it is what every level must make of it. Where that is not
 * finite no number may stand; where it is, the number must be right. */
#include "arguments.h"
#include "compare.h"
#include "decode_case.h"
#include "decode_families.h"
#include "prefill_compare.h"
#include "prefill_families.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Tokens of a chunk on CUDA: its products reach back to the chunk's first token. */
enum { CUDA_CHUNK = 32 };

/* ---- Comparing --------------------------------------------------------------------------------- */

/* Is this element's row in front of the bad one in its chunk? */
struct excuse {
    bool given;
    int64_t first, count; /* rows of out: tokens of the batch, end to end */
};

/* Rows `written` of x, NULL: all, against those of ref. */
static void add_tensor(struct error *e, const struct tensor *x, const struct tensor *ref, int64_t rows,
                       const bool *written, bool forgive, struct excuse excuse) {
    int64_t count = rows ? tensor_count(ref) / rows : 0;
    for (int64_t row = 0; row < rows; row++) {
        int64_t spread = e->spread;
        if (!written || written[row])
            error_add_row(e, x, row, ref, row, count, forgive);
        if (excuse.given && row >= excuse.first && row < excuse.first + excuse.count)
            e->spread = spread;
    }
}

static void report(struct check *check, const char *level, const char *name, const char *wrong,
                   const struct error *d, double allowed) {
    char text[160];
    double ratio = error_ratio(d, TOLERANCE_SMALLEST_REFERENCE);
    snprintf(text, sizeof text, "%lld not finite that should be, %lld finite that should not, the others %.1e",
             (long long)d->spread, (long long)d->lost, ratio);
    check_report(check, !wrong && !d->lost && !d->spread && ratio <= allowed, level, name,
                 wrong ? wrong : text);
}

/* ---- What is put where ------------------------------------------------------------------------- */

/* A gate that is infinite is a hard reset, a trap of its own. */
struct bad {
    const char *name;
    double value;
};
static const struct bad nan_or_inf[] = {{"NaN", NAN}, {"inf", INFINITY}};

static bool by_token(const char *name) { return strlen(name) == 1 || !strcmp(name, "beta"); }

/* ---- Prefill ----------------------------------------------------------------------------------- */

static void prefill_level(struct check *check, const struct prefill_problem *p,
                          const struct prefill_results *exact, int64_t token, const char *level) {
    struct prefill_results r;
    struct error d = {0};
    bool cuda = level_backend(level) == FLASH_KDA_BACKEND_CUDA;
    bool exact_arithmetic = !cuda && strcmp(level, "avx512bf16") != 0;
    int64_t in_chunk = token < 0 ? 0 : token % p->T % CUDA_CHUNK;
    struct excuse excuse = {cuda && token >= 0, token - in_chunk, in_chunk};
    level_select(level);
    prefill_results_make(&r, p);
    const char *wrong = prefill_run(p, &r, level_backend(level), FILL_NAN);
    add_tensor(&d, &r.out, &exact->out, p->out.rows, p->out.written, exact_arithmetic, excuse);
    add_tensor(&d, &r.final, &exact->final, p->final.rows, p->final.written, exact_arithmetic,
               (struct excuse){0});
    double bf16 = TOLERANCE_BF16_MARGIN * fmax(p->c.bf16_tolerance.out, p->c.bf16_tolerance.state);
    report(check, level, p->c.name, wrong, &d, exact_arithmetic ? TOLERANCE_FP32 : bf16);
    prefill_results_free(&r);
}

static void prefill_one(struct check *check, struct prefill_case c, const char *what, const struct bad *bad) {
    struct prefill_problem p;
    struct prefill_results exact;
    snprintf(c.name, sizeof c.name, "%s in %s, gate %s, %s, T = %lld, H = %lld", bad->name, what,
             prefill_gate_names[c.gate], c.out_type.bits == 32 ? "fp32" : "bf16", (long long)c.lengths[0],
             (long long)c.H);
    if (!check_wanted(check, c.name))
        return;
    struct random r = random_named(check->seed, c.name);
    prefill_problem_make(&p, &c, &r);
    struct tensor *tensor = prefill_tensor(&p.args, what);
    int64_t count = tensor_count(tensor), at = random_below(&r, count);
    int64_t token = by_token(what) ? at / (count / (p.B * p.T)) : -1;
    tensor_set(tensor, at, bad->value);
    prefill_results_make_exact(&exact, &p);
    const char *wrong = prefill_run(&p, &exact, FLASH_KDA_BACKEND_REFERENCE, FILL_NAN);
    if (wrong)
        check_report(check, false, "reference", c.name, wrong);
    for (int i = 0; i < check->level_count && !wrong; i++)
        prefill_level(check, &p, &exact, token, check->levels[i]);
    prefill_results_free(&exact);
    prefill_problem_free(&p);
}

/* Where a level is tested against itself there is nothing to compare. */
static bool only_reference(const struct check *check) {
    return level_backend(check->levels[0]) == FLASH_KDA_BACKEND_REFERENCE;
}

static void prefill_all(struct check *check, struct prefill_case c) {
    static const char *const inputs[] = {"q", "k", "v", "beta", "initial_state"};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        for (int n = 0; n < 2; n++)
            if (strcmp(inputs[i], "beta") != 0 || c.beta_mode == FLASH_KDA_BETA_GIVEN || n == 0)
                prefill_one(check, c, inputs[i], &nan_or_inf[n]);
    prefill_one(check, c, "g", &nan_or_inf[0]);
    if (c.gate == FLASH_KDA_GATE_NONE) {
        prefill_one(check, c, "g", &nan_or_inf[1]);
        return;
    }
    prefill_one(check, c, "A_log", &nan_or_inf[0]);
    prefill_one(check, c, "dt_bias", &nan_or_inf[0]);
}

/* Short sequences, and some that are split into segments where there are threads or multiprocessors enough. */
void prefill_nonfinite(struct check *check) {
    static const struct {
        bool bf16, cut;
        int64_t T, H, K, V;
    } shapes[] = {{false, false, 150, 2, 40, 40},
                  {true, false, 150, 2, 128, 128},
                  {false, true, 2100, 1, 128, 32},
                  {true, true, 700, 1, 128, 128}};
    enum { SHAPES = sizeof shapes / sizeof *shapes };
    if (only_reference(check))
        return;
    for (int gate = 0; gate < 3; gate++)
        for (int i = 0; i < (check->quick ? 1 : SHAPES); i++) {
            struct prefill_case c = prefill_case_plain();
            prefill_case_set_gate(&c, (flash_kda_gate)gate);
            c.sequences = 2;
            c.lengths[0] = c.lengths[1] = shapes[i].T;
            c.H = shapes[i].H;
            c.group = 2;
            c.K = shapes[i].K;
            c.V = shapes[i].V;
            c.qk_norm = true;
            c.threads = shapes[i].cut ? 16 : 2;
            c.beta_mode = shapes[i].cut ? FLASH_KDA_BETA_SIGMOID : FLASH_KDA_BETA_GIVEN;
            c.fill = shapes[i].cut ? fill_remembering : fill_ordinary;
            if (shapes[i].bf16)
                c.q_type = c.k_type = c.v_type = c.g_type = c.beta_type = c.out_type = TYPE_BF16;
            prefill_all(check, c);
        }
}

/* ---- Decode ------------------------------------------------------------------------------------ */

/* The states are not among the arguments of a problem: each run has its own. */
static struct tensor *tensor_named(struct decode_problem *d, const char *name) {
    return !strcmp(name, "state")          ? &d->state
           : !strcmp(name, "v_conv_state") ? &d->conv[2].state
                                           : decode_tensor(&d->args, name);
}

static void decode_level(struct check *check, const struct decode_problem *d,
                         const struct decode_results *exact, const char *level) {
    struct decode_results r;
    struct error all = {0};
    level_select(level);
    decode_results_make(&r, d);
    const flash_kda_decode_args args = decode_bind(d, &r, level_backend(level));
    const char *wrong = decode_call(&args);
    add_tensor(&all, &r.out, &exact->out, d->p.B * d->p.T, d->out_written, false, (struct excuse){0});
    add_tensor(&all, &r.state, &exact->state, d->slots, d->state_written, false, (struct excuse){0});
    report(check, level, d->c.tokens.name, wrong, &all, TOLERANCE_FP32);
    decode_results_free(&r);
}

static void decode_one(struct check *check, struct decode_case c, const char *what, const struct bad *bad) {
    struct decode_problem d;
    struct decode_results exact;
    struct prefill_case *tokens = &c.tokens;
    snprintf(tokens->name, sizeof tokens->name, "decode, %s in %s, gate %s, %s%s", bad->name, what,
             prefill_gate_names[tokens->gate], tokens->layout ? "K first" : "V first",
             c.fused.norm ? ", fused" : "");
    if (!check_wanted(check, tokens->name))
        return;
    struct random r = random_named(check->seed, tokens->name);
    const char *wrong = decode_problem_make(&d, &c, false, &r);
    struct tensor *tensor = tensor_named(&d, what);
    int64_t at = random_below(&r, tensor_count(tensor));
    tensor_set(tensor, at, bad->value);
    decode_results_make(&exact, &d);
    const flash_kda_decode_args args = decode_bind(&d, &exact, FLASH_KDA_BACKEND_REFERENCE);
    if (!wrong)
        wrong = decode_call(&args);
    if (wrong)
        check_report(check, false, "reference", tokens->name, wrong);
    for (int i = 0; i < check->level_count && !wrong; i++)
        decode_level(check, &d, &exact, check->levels[i]);
    decode_results_free(&exact);
    decode_problem_free(&d);
}

void decode_nonfinite(struct check *check) {
    static const char *const plain[] = {"q", "k", "v", "beta", "state"};
    static const char *const fused[] = {
        "q", "k", "v", "q_conv_weight", "k_conv_bias", "v_conv_state", "norm_weight", "norm_gate"};
    if (only_reference(check))
        return;
    for (int gate = 0; gate < 3; gate++)
        for (int layout = 0; layout < 2; layout++) {
            struct decode_case c = decode_case_plain();
            prefill_case_set_gate(&c.tokens, (flash_kda_gate)gate);
            c.tokens.group = 2;
            c.tokens.K = 40;
            c.tokens.V = 72;
            c.tokens.qk_norm = true;
            c.tokens.layout = (flash_kda_state_layout)layout;
            for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
                for (int n = 0; n < 2; n++)
                    decode_one(check, c, plain[i], &nan_or_inf[n]);
            decode_one(check, c, "g", &nan_or_inf[0]);
            if (gate != FLASH_KDA_GATE_NONE) {
                decode_one(check, c, "A_log", &nan_or_inf[0]);
                decode_one(check, c, "dt_bias", &nan_or_inf[0]);
            }
            c.fused.conv[0] = c.fused.conv[1] = c.fused.conv[2] = c.fused.conv_bias = c.fused.norm =
                c.fused.norm_gate = true;
            c.fused.conv_type = TYPE_FP32;
            for (size_t i = 0; i < sizeof fused / sizeof *fused; i++)
                decode_one(check, c, fused[i], &nan_or_inf[0]);
        }
}
