/* SPDX-License-Identifier: MIT */
/* Prefill on a GPU: tensors and workspace in device memory, one call on a stream, and the same on the CPU beside it. */
#include <cuda_runtime_api.h>
#include <flash_kda.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* K and V are the head dims of keys and values. */
enum { TOKENS = 256, HEADS = 2, K = 128, V = 128 };
enum { KEYS = TOKENS * HEADS * K, VALUES = TOKENS * HEADS * V, STEPS = TOKENS * HEADS };

/* What the tensor cores' bf16 operands may cost. */
static const double tolerance = 1e-2;

static void check_cuda(cudaError_t error, const char *what) {
    if (error == cudaSuccess)
        return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}

static void check(flash_kda_status status) {
    if (status == FLASH_KDA_OK)
        return;
    fprintf(stderr, "%s\n", flash_kda_last_error());
    exit(1);
}

/* Something to compute on: noise instead of a model's activations. */
static void fill(float *x, size_t n, float offset, float amplitude, uint32_t seed) {
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = offset + amplitude * ((float)(seed >> 8) * 0x1p-23f - 1.0f);
    }
}

/* A compact tensor of fp32 in host memory; dims must outlive it. */
static DLTensor host_tensor(float *data, int rank, int64_t *dims) {
    return (DLTensor){
        .data = data,
        .device = {.device_type = kDLCPU},
        .ndim = rank,
        .dtype = {.code = kDLFloat, .bits = 32, .lanes = 1},
        .shape = dims,
    };
}

/* The same tensor on device 0, with the contents that it has once the stream has come so far. */
static DLTensor device_tensor(const DLTensor *host, size_t elements, cudaStream_t stream) {
    DLTensor tensor = *host;
    tensor.device = (DLDevice){.device_type = kDLCUDA, .device_id = 0};
    check_cuda(cudaMalloc(&tensor.data, elements * sizeof(float)), "cudaMalloc");
    check_cuda(
        cudaMemcpyAsync(tensor.data, host->data, elements * sizeof(float), cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
    return tensor;
}

static void run_on_cpu(const flash_kda_prefill_args *args) {
    size_t bytes = 0;
    check(flash_kda_prefill_workspace_size(args, &bytes));
    void *workspace = malloc(bytes);
    check(flash_kda_prefill(args, workspace, workspace ? bytes : 0));
    free(workspace);
}

/* Copies the inputs, runs, and copies out back; only the last line waits. */
static void run_on_cuda(flash_kda_prefill_args args, float *out) {
    cudaStream_t stream;
    check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
    DLTensor q = device_tensor(args.q, KEYS, stream), k = device_tensor(args.k, KEYS, stream);
    DLTensor v = device_tensor(args.v, VALUES, stream), g = device_tensor(args.g, KEYS, stream);
    DLTensor beta = device_tensor(args.beta, STEPS, stream), o = device_tensor(args.out, VALUES, stream);
    args.q = &q;
    args.k = &k;
    args.v = &v;
    args.g = &g;
    args.beta = &beta;
    args.out = &o;
    args.stream = stream;

    char plan[256];
    check(flash_kda_prefill_describe(&args, plan, sizeof plan));
    printf("libflashkda %s: %s\n", flash_kda_version(), plan);

    size_t bytes = 0;
    void *workspace = NULL;
    check(flash_kda_prefill_workspace_size(&args, &bytes));
    check_cuda(cudaMalloc(&workspace, bytes), "cudaMalloc");
    check(flash_kda_prefill(&args, workspace, bytes)); /* returns before the GPU has begun */
    check_cuda(cudaMemcpyAsync(out, o.data, VALUES * sizeof *out, cudaMemcpyDeviceToHost, stream),
               "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");

    void *memory[] = {q.data, k.data, v.data, g.data, beta.data, o.data, workspace};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        check_cuda(cudaFree(memory[i]), "cudaFree");
    check_cuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

/* RMS(x - reference) / RMS(reference) */
static double error_ratio(const float *x, const float *reference, size_t n) {
    double error = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        error += pow((double)x[i] - (double)reference[i], 2);
        size += pow((double)reference[i], 2);
    }
    return sqrt(error / size);
}

int main(void) {
    if (!flash_kda_backend_available(FLASH_KDA_BACKEND_CUDA)) {
        fprintf(stderr, "there is no GPU that this build of libflashkda runs on\n");
        return 1;
    }
    static float q_data[KEYS], k_data[KEYS], v_data[VALUES], g_data[KEYS], beta_data[STEPS];
    static float on_cpu[VALUES], on_cuda[VALUES];
    fill(q_data, KEYS, 0.0f, 1.0f, 1);
    fill(k_data, KEYS, 0.0f, 1.0f, 2);
    fill(v_data, VALUES, 0.0f, 1.0f, 3);
    fill(g_data, KEYS, -3.0f, 1.0f, 4);    /* raw gate: softplus makes it a log decay */
    fill(beta_data, STEPS, 0.0f, 2.0f, 5); /* raw step: sigmoid makes it 0 to 1 */

    int64_t key_dims[] = {1, TOKENS, HEADS, K}, value_dims[] = {1, TOKENS, HEADS, V}; /* [B, T, H, dim] */
    DLTensor q = host_tensor(q_data, 4, key_dims), k = host_tensor(k_data, 4, key_dims);
    DLTensor v = host_tensor(v_data, 4, value_dims), out = host_tensor(on_cpu, 4, value_dims);
    DLTensor g = host_tensor(g_data, 4, key_dims), beta = host_tensor(beta_data, 3, key_dims);
    flash_kda_prefill_args args = FLASH_KDA_PREFILL_ARGS_INIT;
    args.q = &q;
    args.k = &k;
    args.v = &v;
    args.g = &g;
    args.beta = &beta;
    args.out = &out;
    args.gate = FLASH_KDA_GATE_SOFTPLUS;
    args.beta_mode = FLASH_KDA_BETA_SIGMOID;
    args.flags = FLASH_KDA_QK_NORM;

    run_on_cuda(args, on_cuda);
    run_on_cpu(&args);
    for (int t = 0; t < TOKENS; t += TOKENS / 4)
        printf("o[%3d, 0, 0..2] = % .6f % .6f % .6f\n", t, (double)on_cuda[t * HEADS * V],
               (double)on_cuda[t * HEADS * V + 1], (double)on_cuda[t * HEADS * V + 2]);
    double error = error_ratio(on_cuda, on_cpu, VALUES);
    printf("error ratio to the CPU %.1e, at most %.0e\n", error, tolerance);
    return error <= tolerance ? 0 : 1; /* not a number fails too */
}
