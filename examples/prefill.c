/* SPDX-License-Identifier: MIT */
/* The shortest useful program: one sequence through prefill, in two parts that share a state. */
#include <flash_kda.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* K and V are the head dims of keys and values. */
enum { TOKENS = 64, HEADS = 2, K = 128, V = 128 };

/* A tensor of fp32 in host memory. With strides of NULL it is compact; dims must outlive it. */
static DLTensor host_tensor(float *data, int rank, int64_t *dims) {
    return (DLTensor){
        .data = data,
        .device = {.device_type = kDLCPU},
        .ndim = rank,
        .dtype = {.code = kDLFloat, .bits = 32, .lanes = 1},
        .shape = dims,
    };
}

/* Something to compute on: waves instead of a model's activations. */
static void fill(float *x, size_t n, float offset, float amplitude, float step) {
    for (size_t i = 0; i < n; i++)
        x[i] = offset + amplitude * sinf(step * (float)i);
}

static void stop(const char *what) {
    fprintf(stderr, "%s: %s\n", what, flash_kda_last_error());
    exit(1);
}

/* The library allocates nothing that a call needs to keep: ask how much it wants, and bring it. */
static void prefill(const flash_kda_prefill_args *args) {
    size_t bytes = 0;
    if (flash_kda_prefill_workspace_size(args, &bytes) != FLASH_KDA_OK)
        stop("workspace size");
    void *workspace = malloc(bytes);
    if (bytes > 0 && !workspace) {
        fprintf(stderr, "no memory for a workspace of %zu bytes\n", bytes);
        exit(1);
    }
    if (flash_kda_prefill(args, workspace, bytes) != FLASH_KDA_OK)
        stop("prefill");
    free(workspace);
}

int main(void) {
    static float q_data[TOKENS * HEADS * K], k_data[TOKENS * HEADS * K], v_data[TOKENS * HEADS * V];
    static float g_data[TOKENS * HEADS * K], beta_data[TOKENS * HEADS], out_data[TOKENS * HEADS * V];
    static float A_log_data[HEADS], state_data[HEADS * V * K]; /* the state starts at zero */
    fill(q_data, TOKENS * HEADS * K, 0.0f, 1.0f, 0.7f);
    fill(k_data, TOKENS * HEADS * K, 0.0f, 1.0f, 1.3f);
    fill(v_data, TOKENS * HEADS * V, 0.0f, 1.0f, 0.4f);
    fill(g_data, TOKENS * HEADS * K, -3.0f, 1.0f, 0.9f); /* raw gate: softplus makes it a log decay */
    fill(beta_data, TOKENS * HEADS, 0.0f, 2.0f, 1.1f);   /* raw step: sigmoid makes it 0 to 1 */

    /* [B, T, H, dim], with the two halves of the sequence described by their own dims and data. */
    int64_t qkg_dims[] = {1, TOKENS / 2, HEADS, K}, v_dims[] = {1, TOKENS / 2, HEADS, V};
    int64_t beta_dims[] = {1, TOKENS / 2, HEADS}, A_log_dims[] = {HEADS}, state_dims[] = {1, HEADS, V, K};
    DLTensor q = host_tensor(q_data, 4, qkg_dims), k = host_tensor(k_data, 4, qkg_dims);
    DLTensor v = host_tensor(v_data, 4, v_dims), out = host_tensor(out_data, 4, v_dims);
    DLTensor g = host_tensor(g_data, 4, qkg_dims), beta = host_tensor(beta_data, 3, beta_dims);
    DLTensor A_log = host_tensor(A_log_data, 1, A_log_dims), state = host_tensor(state_data, 4, state_dims);

    flash_kda_prefill_args args = FLASH_KDA_PREFILL_ARGS_INIT;
    args.q = &q;
    args.k = &k;
    args.v = &v;
    args.g = &g;
    args.beta = &beta;
    args.A_log = &A_log;
    args.out = &out;
    args.gate = FLASH_KDA_GATE_SOFTPLUS;
    args.beta_mode = FLASH_KDA_BETA_SIGMOID;
    args.flags = FLASH_KDA_QK_NORM;
    args.initial_state = &state; /* the same tensor: updated in place */
    args.final_state = &state;

    char plan[256];
    if (flash_kda_prefill_describe(&args, plan, sizeof plan) != FLASH_KDA_OK)
        stop("describe");
    printf("libflashkda %s: %s\n", flash_kda_version(), plan);

    prefill(&args); /* tokens 0 .. 31 */
    q.byte_offset = k.byte_offset = g.byte_offset = sizeof q_data / 2;
    v.byte_offset = out.byte_offset = sizeof v_data / 2;
    beta.byte_offset = sizeof beta_data / 2;
    prefill(&args); /* tokens 32 .. 63, from the state that the first half left */

    for (int t = 0; t < TOKENS; t += TOKENS / 4)
        printf("o[%2d, 0, 0..2] = % .6f % .6f % .6f\n", t, (double)out_data[t * HEADS * V],
               (double)out_data[t * HEADS * V + 1], (double)out_data[t * HEADS * V + 2]);
    return 0;
}
