/* SPDX-License-Identifier: MIT */
/*
 * The plans of many problems beside those written down in golden.txt, and whether each plan's name forces that plan.
 *
 * usage: golden_test GOLDEN [--write]      --write: writes the table anew, to be looked at as a difference
 */
#include "cuda/sm80/plan.h"
#include "cuda/sm90/plan.h"

#include <stdio.h>
#include <string.h>

#include "flash_kda.h"

enum { PROCESSORS = 132, LINE = 512 };

/* One problem; what is 0 or NULL is as usual: one sequence, K = V = 128, the sigmoid gate, bf16, beta by sigmoid. */
struct problem {
    const char *what;
    int64_t sequences, tokens, heads, dim;
    flash_kda_gate gate;
    bool packed, invariant, given_beta, unnormalised, fp32_out;
    int64_t every; /* checkpoints */
};

static const struct problem problems[] = {
    {"H96", 1, 8192, 96, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H64", 1, 8192, 64, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H32", 1, 8192, 32, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H24", 1, 8192, 24, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H16", 1, 8192, 16, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H8", 1, 8192, 8, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H4 long", 1, 32768, 4, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H8 long", 1, 65536, 8, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H1 long", 1, 131072, 1, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H32 a million tokens", 1, 1048576, 32, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H12 short", 1, 2048, 12, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H16 short", 1, 2048, 16, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H8 short", 1, 4096, 8, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H10 short", 1, 3072, 10, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H4 shorter", 1, 1024, 4, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H2, 64 tokens", 1, 64, 2, .gate = FLASH_KDA_GATE_SIGMOID},
    {"one token", 1, 1, 8, .gate = FLASH_KDA_GATE_SIGMOID},
    {"no token", 1, 0, 8, .gate = FLASH_KDA_GATE_SIGMOID},
    {"dense B4 H12", 4, 2048, 12, .gate = FLASH_KDA_GATE_SIGMOID},
    {"dense B8 H16", 8, 2048, 16, .gate = FLASH_KDA_GATE_SIGMOID},
    {"dense B8 H96", 8, 1024, 96, .gate = FLASH_KDA_GATE_SIGMOID},
    {"dense B32 H32", 32, 256, 32, .gate = FLASH_KDA_GATE_SIGMOID},
    {"dense B64 H32", 64, 64, 32, .gate = FLASH_KDA_GATE_SIGMOID},
    {"packed N6 H32", 6, 8192, 32, .gate = FLASH_KDA_GATE_SIGMOID, .packed = true},
    {"packed N6 H64", 6, 8192, 64, .gate = FLASH_KDA_GATE_SIGMOID, .packed = true},
    {"packed N6 H96", 6, 8192, 96, .gate = FLASH_KDA_GATE_SIGMOID, .packed = true},
    {"packed N2 H4", 2, 16384, 4, .gate = FLASH_KDA_GATE_SIGMOID, .packed = true},
    {"packed N6 H32, invariant", 6, 8192, 32, .gate = FLASH_KDA_GATE_SIGMOID, .packed = true,
     .invariant = true},
    {"H8, invariant", 1, 8192, 8, .gate = FLASH_KDA_GATE_SIGMOID, .invariant = true},
    {"H32, softplus", 1, 8192, 32, .gate = FLASH_KDA_GATE_SOFTPLUS},
    {"H8, softplus", 1, 8192, 8, .gate = FLASH_KDA_GATE_SOFTPLUS},
    {"H32, gate none", 1, 8192, 32, .gate = FLASH_KDA_GATE_NONE},
    {"H4, gate none", 1, 8192, 4, .gate = FLASH_KDA_GATE_NONE},
    {"H32, beta given", 1, 8192, 32, .gate = FLASH_KDA_GATE_SIGMOID, .given_beta = true},
    {"H8, beta given", 1, 8192, 8, .gate = FLASH_KDA_GATE_SIGMOID, .given_beta = true},
    {"H8, not normalised", 1, 8192, 8, .gate = FLASH_KDA_GATE_SIGMOID, .unnormalised = true},
    {"H8, fp32 outputs", 1, 8192, 8, .gate = FLASH_KDA_GATE_SIGMOID, .fp32_out = true},
    {"H32, states every 64", 1, 8192, 32, .gate = FLASH_KDA_GATE_SIGMOID, .every = 64},
    {"H8, states every 64", 1, 8192, 8, .gate = FLASH_KDA_GATE_SIGMOID, .every = 64},
    {"H8, states every 48", 1, 8192, 8, .gate = FLASH_KDA_GATE_SIGMOID, .every = 48},
    {"H96, K = V = 64", 1, 8192, 96, 64, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H32, K = V = 64", 1, 8192, 32, 64, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H8, K = V = 64", 1, 8192, 8, 64, .gate = FLASH_KDA_GATE_SIGMOID},
    {"B64 H32, K = V = 64", 64, 64, 32, 64, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H8, K = V = 64, softplus", 1, 8192, 8, 64, .gate = FLASH_KDA_GATE_SOFTPLUS},
    {"H8, K = V = 256", 1, 8192, 8, 256, .gate = FLASH_KDA_GATE_SIGMOID},
    {"H8, K = V = 48", 1, 8192, 8, 48, .gate = FLASH_KDA_GATE_SIGMOID},
};

/* Each problem is planned as is fastest, and by the portable level, and those of one sequence by every schedule. */
static const char *const overrides[] = {
    "", "sm80", "sm90/general/5", "sm90/persistent", "sm90/cluster/1", "sm90/cluster/3", "sm90/stream_k"};

static char memory[1 << 8] __attribute__((aligned(64))); /* stands for what is on the device */

static struct kda_tensor tensor(enum kda_dtype dtype, int64_t a, int64_t b, int64_t c, int64_t d) {
    struct kda_tensor t = {.data = memory, .dtype = dtype, .rank = 4, .shape = {a, b, c, d}};
    int64_t bytes = (int64_t)kda_dtype_size(dtype);
    for (int i = 3; i >= 0; bytes *= t.shape[i--])
        t.stride[i] = bytes;
    return t;
}

static struct kda_prefill prefill_of(const struct problem *o) {
    int64_t dim = o->dim ? o->dim : 128, batches = o->packed ? 1 : o->sequences;
    struct kda_tensor row = tensor(KDA_BF16, batches, o->tokens, o->heads, dim);
    struct kda_prefill p = {.batches = batches,
                            .tokens = o->tokens,
                            .sequences = o->sequences,
                            .heads = o->heads,
                            .value_heads = o->heads,
                            .key_dim = dim,
                            .value_dim = dim,
                            .q = row,
                            .k = row,
                            .v = row,
                            .g = row,
                            .out = o->fp32_out ? tensor(KDA_F32, batches, o->tokens, o->heads, dim) : row,
                            .gate = o->gate,
                            .beta_mode = o->given_beta ? FLASH_KDA_BETA_GIVEN : FLASH_KDA_BETA_SIGMOID,
                            .qk_norm = !o->unnormalised,
                            .batch_invariant = o->invariant,
                            .checkpoint_every = o->every};
    if (o->packed)
        p.cu_seqlens = tensor(KDA_I32, 1, 1, 1, o->sequences + 1);
    if (o->every) {
        p.checkpoints = tensor(KDA_F32, o->sequences, o->tokens / o->every, o->heads, dim * dim);
        p.checkpoints.rank = 5;
    }
    return p;
}

static struct kda_plan plan_of(const struct kda_prefill *p, const char *value) {
    struct kda_override asked;
    if (kda_read_override(&asked, value)) {
        fprintf(stderr, "%s\n", flash_kda_last_error());
        return (struct kda_plan){.level = "none"};
    }
    bool sm90 = kda_sm90_takes(p) && !(asked.level && !strcmp(asked.level, "sm80"));
    struct kda_plan plan = kda_plan_begin(p, sm90 ? "sm90" : "sm80");
    (sm90 ? kda_sm90_plan : kda_sm80_plan)(p, PROCESSORS, &asked, &plan);
    return plan;
}

/* Returns how many are wrong. */
static int add_line(const struct problem *o, const char *value, char *line) {
    char name[64], kernels[256], forced_name[64], forced_kernels[256];
    struct kda_prefill p = prefill_of(o);
    struct kda_plan plan = plan_of(&p, value);
    kda_plan_name(&plan, name, sizeof name);
    kda_plan_kernels(&plan, kernels, sizeof kernels);
    snprintf(line, LINE, "%-26s %3lld x %-7lld H %-3lld %-16s -> %-26s %11zu bytes: %s\n", o->what,
             (long long)o->sequences, (long long)o->tokens, (long long)o->heads, *value ? value : "-", name,
             plan.workspace, kernels);
    struct kda_plan forced = plan_of(&p, name);
    kda_plan_name(&forced, forced_name, sizeof forced_name);
    kda_plan_kernels(&forced, forced_kernels, sizeof forced_kernels);
    if (!strcmp(name, forced_name) && !strcmp(kernels, forced_kernels) && plan.workspace == forced.workspace)
        return 0;
    fprintf(stderr, "%s: FLASH_KDA_CUDA=%s gives %s: %s\n", o->what, name, forced_name, forced_kernels);
    return 1;
}

enum { PROBLEMS = sizeof problems / sizeof *problems, OVERRIDES = sizeof overrides / sizeof *overrides };
static char lines[PROBLEMS * OVERRIDES][LINE];

static int compare(const char *path, int count) {
    FILE *file = fopen(path, "r");
    char expected[LINE];
    int wrong = 0, i = 0;
    if (!file) {
        perror(path);
        return 1;
    }
    for (; fgets(expected, sizeof expected, file); i++)
        if (i >= count || strcmp(expected, lines[i]) != 0) {
            fprintf(stderr, "expected %sfound    %s", expected, i < count ? lines[i] : "nothing\n");
            wrong++;
        }
    fclose(file);
    if (i < count)
        fprintf(stderr, "%d plans are not in %s\n", count - i, path);
    return wrong + (i < count ? count - i : 0);
}

int main(int argc, char **argv) {
    int count = 0, wrong = 0;
    for (int i = 0; i < PROBLEMS; i++)
        for (int n = 0; n < OVERRIDES; n++)
            if (n < 2 || problems[i].sequences == 1)
                wrong += add_line(&problems[i], overrides[n], lines[count++]);
    if (argc == 3 && !strcmp(argv[2], "--write")) {
        FILE *file = fopen(argv[1], "w");
        for (int i = 0; file && i < count; i++)
            fputs(lines[i], file);
        return !file || fclose(file) || wrong;
    }
    wrong += argc == 2 ? compare(argv[1], count) : 1;
    printf("%d passed, %d failed\n", count - wrong, wrong);
    return wrong > 0;
}
