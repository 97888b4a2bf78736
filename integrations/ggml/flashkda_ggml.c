/* SPDX-License-Identifier: MIT */
/* A backend of ggml outside of its tree, for one operation: GGML_OP_GATED_DELTA_NET with a decay a channel, which is Kimi
 * Delta Attention. ggml loads it by GGML_BACKEND_PATH. Its tensors stay in the CPU's buffers, as those of ggml's BLAS
 * backend do, and what it does not take stays with ggml's CPU backend. */
#include <flash_kda.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#define NAME "flashkda"

struct context {
    int threads;
    void *workspace;
    size_t size;
};

/* ---- The operation ------------------------------------------------------------------------------------------------- */

struct tensor {
    DLTensor dl;
    int64_t shape[4], strides[4];
};

/* A tensor of ggml whose dimensions, from the innermost on, are channel, head, token, sequence: [N, T, H, channels], or
 * without channels [N, T, H]. */
static const DLTensor *lend(struct tensor *to, const struct ggml_tensor *from, int ndim) {
    to->dl = (DLTensor){.data = from->data,
                        .device = {kDLCPU, 0},
                        .ndim = ndim,
                        .dtype = {kDLFloat, 32, 1},
                        .shape = to->shape,
                        .strides = to->strides};
    for (int i = 0; i < ndim; i++) {
        to->shape[i] = from->ne[3 - i];
        to->strides[i] = (int64_t)(from->nb[3 - i] / sizeof(float));
    }
    return &to->dl;
}

/* Compact [n0, n1, n2, n3]. */
static const DLTensor *compact(struct tensor *to, float *data, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    *to = (struct tensor){
        .dl = {.data = data, .device = {kDLCPU, 0}, .ndim = 4, .dtype = {kDLFloat, 32, 1}, .shape = to->shape},
        .shape = {n0, n1, n2, n3}};
    return &to->dl;
}

static flash_kda_status run(struct context *context, struct ggml_tensor *node) {
    const struct ggml_tensor *v = node->src[2], *before = node->src[5];
    int64_t dim = v->ne[0], heads = v->ne[1], tokens = v->ne[2], sequences = v->ne[3];
    float *out = node->data, *after = out + dim * heads * tokens * sequences;
    struct tensor of[8];
    const DLTensor *tensors[5];
    for (int i = 0; i < 5; i++)
        tensors[i] = lend(&of[i], node->src[i], i < 4 ? 4 : 3);
    const DLTensor *result = compact(&of[5], out, sequences, tokens, heads, dim);
    const DLTensor *state = compact(&of[6], after, sequences, heads, dim, dim);
    if (tokens <= FLASH_KDA_MAX_DECODE_TOKENS) {
        memcpy(after, before->data, ggml_nbytes(before));
        flash_kda_decode_args args = FLASH_KDA_DECODE_ARGS_INIT;
        args.q = tensors[0], args.k = tensors[1], args.v = tensors[2], args.g = tensors[3],
        args.beta = tensors[4];
        args.out = result, args.state = state, args.num_threads = context->threads;
        return flash_kda_decode(&args);
    }
    flash_kda_prefill_args args = FLASH_KDA_PREFILL_ARGS_INIT;
    args.q = tensors[0], args.k = tensors[1], args.v = tensors[2], args.g = tensors[3], args.beta = tensors[4];
    args.out = result, args.final_state = state, args.num_threads = context->threads;
    args.initial_state = compact(&of[7], before->data, sequences, heads, dim, dim);
    size_t size;
    flash_kda_status status = flash_kda_prefill_workspace_size(&args, &size);
    if (status)
        return status;
    if (size > context->size) {
        void *larger = realloc(context->workspace, size);
        if (!larger)
            return FLASH_KDA_ERROR_OUT_OF_MEMORY;
        context->workspace = larger, context->size = size;
    }
    return flash_kda_prefill(&args, context->workspace, size);
}

/* ---- The backend --------------------------------------------------------------------------------------------------- */

static const char *backend_name(ggml_backend_t backend) {
    (void)backend;
    return NAME;
}

static void backend_free(ggml_backend_t backend) {
    struct context *context = backend->context;
    free(context->workspace);
    free(context);
    free(backend);
}

static enum ggml_status backend_graph_compute(ggml_backend_t backend, struct ggml_cgraph *graph) {
    for (int i = 0; i < graph->n_nodes; i++) {
        if (graph->nodes[i]->op != GGML_OP_GATED_DELTA_NET) /* views, which are nothing to do */
            continue;
        flash_kda_status status = run(backend->context, graph->nodes[i]);
        if (status) {
            GGML_LOG_ERROR(NAME ": %s\n", flash_kda_last_error());
            return status == FLASH_KDA_ERROR_OUT_OF_MEMORY ? GGML_STATUS_ALLOC_FAILED : GGML_STATUS_FAILED;
        }
    }
    return GGML_STATUS_SUCCESS;
}

static void backend_set_n_threads(ggml_backend_t backend, int threads) {
    ((struct context *)backend->context)->threads = threads;
}

/* ---- Its one device ------------------------------------------------------------------------------------------------ */

static const char *device_name(ggml_backend_dev_t device) {
    (void)device;
    return NAME;
}

static const char *device_description(ggml_backend_dev_t device) {
    (void)device;
    return "Kimi Delta Attention on a CPU by libflashkda";
}

static void device_memory(ggml_backend_dev_t device, size_t *available, size_t *total) {
    (void)device;
    *available = *total = 0; /* none of its own */
}

static enum ggml_backend_dev_type device_type(ggml_backend_dev_t device) {
    (void)device;
    return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

static void device_props(ggml_backend_dev_t device, struct ggml_backend_dev_props *props) {
    *props = (struct ggml_backend_dev_props){
        .name = NAME, .description = device_description(device), .type = device_type(device)};
    props->caps.buffer_from_host_ptr = true;
}

static ggml_backend_t device_init(ggml_backend_dev_t device, const char *params) {
    (void)params;
    static ggml_guid guid = {0x66, 0x6c, 0x61, 0x73, 0x68, 0x6b, 0x64, 0x61,
                             0x9d, 0x52, 0x41, 0xe7, 0x0b, 0x3c, 0x88, 0x15};
    struct context *context = calloc(1, sizeof *context);
    ggml_backend_t backend = calloc(1, sizeof *backend);
    if (!context || !backend) {
        free(context);
        free(backend);
        return NULL;
    }
    backend->guid = &guid;
    backend->iface = (struct ggml_backend_i){
        .get_name = backend_name, .free = backend_free, .graph_compute = backend_graph_compute};
    backend->device = device;
    backend->context = context;
    return backend;
}

static ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t device) {
    (void)device;
    return ggml_backend_cpu_buffer_type();
}

static ggml_backend_buffer_t device_buffer(ggml_backend_dev_t device, void *data, size_t size, size_t largest) {
    (void)device, (void)largest;
    return ggml_backend_cpu_buffer_from_ptr(data, size);
}

static bool device_supports_op(ggml_backend_dev_t device, const struct ggml_tensor *op) {
    (void)device;
    switch (op->op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
        return true;
    case GGML_OP_GATED_DELTA_NET: {
        const struct ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *g = op->src[3];
        /* A decay a channel, the last state alone. Fewer query heads than value heads are repeated in turn by ggml, and
         * each several times by libflashkda. */
        return g->ne[0] == v->ne[0] && v->ne[0] > 1 && v->ne[0] <= 256 && ggml_get_op_params_i32(op, 0) == 1 &&
               ggml_are_same_shape(q, v) && ggml_are_same_shape(k, v) && v->ne[2] > 0 && v->ne[3] > 0;
    }
    default:
        return false;
    }
}

static bool device_supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    (void)device;
    return ggml_backend_buft_is_host(type);
}

/* ---- What ggml looks for ------------------------------------------------------------------------------------------- */

static const char *registered_name(ggml_backend_reg_t reg) {
    (void)reg;
    return NAME;
}

static size_t device_count(ggml_backend_reg_t reg) {
    (void)reg;
    return 1;
}

static ggml_backend_dev_t the_device(ggml_backend_reg_t reg, size_t index) {
    (void)index;
    static struct ggml_backend_device device = {.iface = {.get_name = device_name,
                                                          .get_description = device_description,
                                                          .get_memory = device_memory,
                                                          .get_type = device_type,
                                                          .get_props = device_props,
                                                          .init_backend = device_init,
                                                          .get_buffer_type = device_buffer_type,
                                                          .buffer_from_host_ptr = device_buffer,
                                                          .supports_op = device_supports_op,
                                                          .supports_buft = device_supports_buft}};
    device.reg = reg;
    return &device;
}

static void *proc_address(ggml_backend_reg_t reg, const char *name) {
    (void)reg;
    return strcmp(name, "ggml_backend_set_n_threads") ? NULL : (void *)backend_set_n_threads;
}

GGML_BACKEND_API ggml_backend_reg_t ggml_backend_init(void);

ggml_backend_reg_t ggml_backend_init(void) {
    static struct ggml_backend_reg reg = {.api_version = GGML_BACKEND_API_VERSION,
                                          .iface = {.get_name = registered_name,
                                                    .get_device_count = device_count,
                                                    .get_device = the_device,
                                                    .get_proc_address = proc_address}};
    return &reg;
}
