/* SPDX-License-Identifier: MIT */
/* Runs ggml's gated_delta_net by its scheduler, which should give it to the backend at GGML_BACKEND_PATH, and by ggml's CPU
 * backend alone, and compares both.
 *
 * usage: GGML_BACKEND_PATH=libflashkda-ggml.so ggml_check FOLDER     (where ggml's own backends are) */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

enum { INPUTS = 6 };

static float uniform(float low, float high) { return low + (high - low) * (float)rand() / (float)RAND_MAX; }

/* The op on these backends, the first of which the scheduler prefers. Its result is new memory; name: who computed it. */
static float *run(ggml_backend_t *backends, int count, const int64_t (*ne)[4], float **data, const char **name,
                  size_t *elements) {
    struct ggml_init_params params = {.mem_size = 1 << 20, .no_alloc = true};
    struct ggml_context *context = ggml_init(params);
    struct ggml_tensor *t[INPUTS];
    for (int i = 0; i < INPUTS; i++) {
        t[i] = ggml_new_tensor_4d(context, GGML_TYPE_F32, ne[i][0], ne[i][1], ne[i][2], ne[i][3]);
        ggml_set_input(t[i]);
    }
    /* The op between two others, as a model has it. */
    struct ggml_tensor *op =
        ggml_gated_delta_net(context, t[0], t[1], ggml_scale(context, t[2], 2.0F), t[3], t[4], t[5], 1);
    struct ggml_tensor *result = ggml_scale(context, op, 0.5F);
    ggml_set_output(result);
    struct ggml_cgraph *graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, result);
    ggml_backend_sched_t sched =
        ggml_backend_sched_new(backends, NULL, count, GGML_DEFAULT_GRAPH_SIZE, false, true);
    ggml_backend_sched_alloc_graph(sched, graph);
    for (int i = 0; i < INPUTS; i++)
        ggml_backend_tensor_set(t[i], data[i], 0, ggml_nbytes(t[i]));
    if (ggml_backend_sched_graph_compute(sched, graph) != GGML_STATUS_SUCCESS)
        exit(1);
    *name = ggml_backend_name(ggml_backend_sched_get_tensor_backend(sched, op));
    *elements = (size_t)ggml_nelements(result);
    float *values = malloc(ggml_nbytes(result));
    ggml_backend_tensor_get(result, values, 0, ggml_nbytes(result));
    ggml_backend_sched_free(sched);
    ggml_free(context);
    return values;
}

int main(int argc, char **argv) {
    static const int64_t cases[][5] = {
        /* dim, heads, tokens, sequences, query heads; the last one stays with ggml */
        {64, 3, 1, 4, 3},
        {128, 2, 16, 1, 2},
        {128, 4, 300, 2, 4},
        {64, 4, 40, 1, 2}};
    if (argc != 2)
        return 2;
    ggml_backend_load_all_from_path(argv[1]);
    ggml_backend_dev_t device = ggml_backend_dev_by_name("flashkda");
    if (!device) {
        fprintf(stderr, "ggml did not load the backend at GGML_BACKEND_PATH\n");
        return 1;
    }
    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, NULL);
    ggml_backend_t both[] = {ggml_backend_dev_init(device, NULL), cpu};
    int failed = 0, total = sizeof cases / sizeof *cases;
    for (int c = 0; c < total; c++) {
        int64_t dim = cases[c][0], heads = cases[c][1], tokens = cases[c][2], n = cases[c][3],
                query = cases[c][4];
        const int64_t ne[INPUTS][4] = {{dim, query, tokens, n}, {dim, query, tokens, n},
                                       {dim, heads, tokens, n}, {dim, heads, tokens, n},
                                       {1, heads, tokens, n},   {dim, dim, heads, n}};
        const float low[] = {-0.2F, -0.1F, -1, -0.3F, 0, -1}, high[] = {0.2F, 0.1F, 1, 0, 1, 1};
        float *data[INPUTS];
        for (int i = 0; i < INPUTS; i++) {
            size_t count = (size_t)(ne[i][0] * ne[i][1] * ne[i][2] * ne[i][3]);
            data[i] = malloc(count * sizeof(float));
            for (size_t j = 0; j < count; j++)
                data[i][j] = uniform(low[i], high[i]);
        }
        const char *by, *alone;
        size_t elements;
        float *ours = run(both, 2, ne, data, &by, &elements),
              *theirs = run(&cpu, 1, ne, data, &alone, &elements);
        double error = 0, size = 0;
        for (size_t j = 0; j < elements; j++) {
            error += pow((double)ours[j] - theirs[j], 2);
            size += pow(theirs[j], 2);
        }
        int wanted = query == heads;
        int ok = strcmp(by, wanted ? "flashkda" : alone) == 0 && sqrt(error / size) < 2e-5;
        printf(
            "%lld channels, %lld heads of %lld, %lld tokens, %lld sequences: by %s, error ratio to %s %.1e%s\n",
            (long long)dim, (long long)query, (long long)heads, (long long)tokens, (long long)n, by, alone,
            sqrt(error / size), ok ? "" : ": FAILED");
        failed += !ok;
        free(ours);
        free(theirs);
        for (int i = 0; i < INPUTS; i++)
            free(data[i]);
    }
    printf("%d passed, %d failed\n", total - failed, failed);
    return failed != 0;
}
