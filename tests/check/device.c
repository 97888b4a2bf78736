/* SPDX-License-Identifier: MIT */
/* The CUDA backend on tensors of host memory: copies there, a call, copies back. */
#include "device.h"

#include "decode_case.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TENSORS = 24, GUARD = 512, GUARD_BYTE = 0xff };

static bool bare;

void device_bare(void) { bare = true; }

/* ---- Memory between guards --------------------------------------------------------------------- */

struct block {
    char *data; /* after the guard */
    size_t bytes;
};

static size_t guard_bytes(void) { return bare ? 0 : GUARD; }

static bool block_make(struct block *b, size_t bytes, enum device_memory memory) {
    void *all = NULL;
    size_t guard = guard_bytes(), size = bytes + 2 * guard;
    cudaError_t error = memory == DEVICE_MANAGED ? cudaMallocManaged(&all, size, cudaMemAttachGlobal)
                                                 : cudaMalloc(&all, size ? size : 1);
    *b = (struct block){all ? (char *)all + guard : NULL, bytes};
    return !error && !cudaMemset(all, GUARD_BYTE, guard) &&
           !cudaMemset((char *)all + guard + bytes, GUARD_BYTE, guard);
}

static void block_free(struct block *b) {
    if (b->data)
        cudaFree(b->data - guard_bytes());
    b->data = NULL;
}

static bool guard_intact(const char *device) {
    unsigned char guard[GUARD];
    if (cudaMemcpy(guard, device, guard_bytes(), cudaMemcpyDeviceToHost))
        return false;
    for (size_t i = 0; i < guard_bytes(); i++)
        if (guard[i] != GUARD_BYTE)
            return false;
    return true;
}

static bool block_intact(const struct block *b) {
    return guard_intact(b->data - guard_bytes()) && guard_intact(b->data + b->bytes);
}

/* ---- Tensors ----------------------------------------------------------------------------------- */

/* One tensor's bytes, from its first to after its last element, on both sides. */
struct copy {
    const char *name;
    DLTensor dl; /* on the device */
    char *host;
    size_t bytes;
    struct block block; /* data NULL: the memory is an earlier tensor's */
};

static size_t extent(const DLTensor *t) {
    int64_t elements = 1, compact = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] == 0)
            return 0;
        elements += (t->shape[i] - 1) * (t->strides ? t->strides[i] : compact);
        compact *= t->shape[i];
    }
    return (size_t)elements * t->dtype.bits / 8;
}

static char *first_byte(const DLTensor *t) { return (char *)t->data + t->byte_offset; }

/* The arguments of either operation. */
struct arguments {
    bool decodes;
    flash_kda_prefill_args prefill;
    flash_kda_decode_args decode;
};

/* A tensor of the arguments; those that are written come first. */
struct member {
    const char *name;
    const DLTensor **tensor;
    bool written;
};

/* A call whose tensors are on the device. */
struct call {
    struct arguments args;
    struct copy copies[TENSORS];
    int count, written; /* the first `written` are */
    struct block workspace;
    size_t workspace_bytes;
    cudaStream_t stream;
    char text[700]; /* what went wrong */
};

static bool fail(struct call *c, const char *what) {
    snprintf(c->text, sizeof c->text, "%s; CUDA says %s", what, cudaGetErrorName(cudaGetLastError()));
    return false;
}

static bool good(struct call *c, cudaError_t error, const char *what) { return !error || fail(c, what); }

static bool upload(struct call *c, const struct copy *copy) {
    return good(c, cudaMemcpy(first_byte(&copy->dl), copy->host, copy->bytes, cudaMemcpyHostToDevice),
                "copying to the device");
}

/* Memory of its own, unless an earlier tensor has these bytes; with the same offset, hence alignment, as here. */
static bool place(struct call *c, struct copy *copy, enum device_memory memory) {
    copy->host = first_byte(&copy->dl);
    copy->bytes = extent(&copy->dl);
    copy->dl.device = (DLDevice){memory == DEVICE_MANAGED ? kDLCUDAManaged : kDLCUDA, 0};
    for (const struct copy *other = c->copies; other < copy; other++)
        if (other->host == copy->host && other->bytes == copy->bytes) {
            copy->dl.data = other->dl.data;
            copy->dl.byte_offset = other->dl.byte_offset;
            return true;
        }
    if (!block_make(&copy->block, copy->dl.byte_offset + copy->bytes, memory))
        return fail(c, "no memory for a tensor");
    copy->dl.data = copy->block.data;
    return upload(c, copy);
}

static int prefill_members(flash_kda_prefill_args *a, struct member *list) {
    const struct member all[] = {{"out", &a->out, true},
                                 {"final_state", &a->final_state, true},
                                 {"checkpoints", &a->checkpoints, true},
                                 {"q", &a->q, false},
                                 {"k", &a->k, false},
                                 {"v", &a->v, false},
                                 {"g", &a->g, false},
                                 {"beta", &a->beta, false},
                                 {"A_log", &a->A_log, false},
                                 {"dt_bias", &a->dt_bias, false},
                                 {"cu_seqlens", &a->cu_seqlens, false},
                                 {"initial_state", &a->initial_state, false},
                                 {"state_indices", &a->state_indices, false},
                                 {"checkpoint_cu_starts", &a->checkpoint_cu_starts, false},
                                 {"checkpoint_indices", &a->checkpoint_indices, false},
                                 {"checkpoint_offsets", &a->checkpoint_offsets, false}};
    memcpy(list, all, sizeof all);
    return sizeof all / sizeof *all;
}

static int decode_members(flash_kda_decode_args *a, struct member *list) {
    bool writes = !(a->flags & FLASH_KDA_KEEP_STATE);
    const struct member all[] = {{"out", &a->out, true},
                                 {"state", &a->state, writes},
                                 {"q_conv_state", &a->q_conv_state, writes},
                                 {"k_conv_state", &a->k_conv_state, writes},
                                 {"v_conv_state", &a->v_conv_state, writes},
                                 {"q", &a->q, false},
                                 {"k", &a->k, false},
                                 {"v", &a->v, false},
                                 {"g", &a->g, false},
                                 {"beta", &a->beta, false},
                                 {"A_log", &a->A_log, false},
                                 {"dt_bias", &a->dt_bias, false},
                                 {"cu_seqlens", &a->cu_seqlens, false},
                                 {"accepted", &a->accepted, false},
                                 {"state_indices", &a->state_indices, false},
                                 {"num_accepted_tokens", &a->num_accepted_tokens, false},
                                 {"q_conv_weight", &a->q_conv_weight, false},
                                 {"q_conv_bias", &a->q_conv_bias, false},
                                 {"k_conv_weight", &a->k_conv_weight, false},
                                 {"k_conv_bias", &a->k_conv_bias, false},
                                 {"v_conv_weight", &a->v_conv_weight, false},
                                 {"v_conv_bias", &a->v_conv_bias, false},
                                 {"norm_weight", &a->norm_weight, false},
                                 {"norm_gate", &a->norm_gate, false}};
    memcpy(list, all, sizeof all);
    return sizeof all / sizeof *all;
}

/* Returns how many there are, at most TENSORS. */
static int members(struct arguments *a, struct member *list) {
    return a->decodes ? decode_members(&a->decode, list) : prefill_members(&a->prefill, list);
}

static bool place_tensors(struct call *c, enum device_memory memory) {
    struct member list[TENSORS];
    int n = members(&c->args, list);
    for (int i = 0; i < n; i++)
        if (*list[i].tensor) {
            struct copy *copy = &c->copies[c->count++];
            copy->name = list[i].name;
            copy->dl = **list[i].tensor;
            if (!place(c, copy, memory))
                return false;
            *list[i].tensor = &copy->dl;
            c->written += list[i].written;
        }
    return true;
}

/* At an odd address: any alignment will do, says the header. */
static bool make_workspace(struct call *c, int fill) {
    if (c->args.decodes)
        return true;
    if (flash_kda_prefill_workspace_size(&c->args.prefill, &c->workspace_bytes))
        return fail(c, flash_kda_last_error());
    if (!block_make(&c->workspace, c->workspace_bytes + 1, DEVICE_MEMORY))
        return fail(c, "no memory for the workspace");
    if (bare && fill != DEVICE_FILL_ALWAYS)
        return true;
    return good(c, cudaMemset(c->workspace.data, fill, c->workspace.bytes), "filling the workspace");
}

static bool call_make(struct call *c, const struct arguments *args, int fill, enum device_memory memory) {
    *c = (struct call){.args = *args};
    if (!good(c, cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), "making a stream"))
        return false;
    c->args.prefill.stream = c->args.decode.stream = c->stream;
    return place_tensors(c, memory) && make_workspace(c, fill) &&
           good(c, cudaDeviceSynchronize(), "preparing a call");
}

static void call_free(struct call *c) {
    for (int i = 0; i < c->count; i++)
        block_free(&c->copies[i].block);
    block_free(&c->workspace);
    if (c->stream)
        cudaStreamDestroy(c->stream);
}

/* ---- Running ----------------------------------------------------------------------------------- */

static bool launch(struct call *c) {
    flash_kda_status status =
        c->args.decodes ? flash_kda_decode(&c->args.decode)
                        : flash_kda_prefill(&c->args.prefill, c->workspace.data + 1, c->workspace_bytes);
    if (!status)
        return true;
    char text[600];
    snprintf(text, sizeof text, "%s: %s", flash_kda_status_name(status), flash_kda_last_error());
    return fail(c, text);
}

static bool wait(struct call *c) {
    return good(c, cudaStreamSynchronize(c->stream), "running a call") &&
           good(c, cudaDeviceSynchronize(), "running a call");
}

/* An input holds what it held: its own bytes, or those of a written tensor it shares memory with. */
static bool input_unchanged(struct call *c, const struct copy *copy) {
    char *now = malloc(copy->bytes + 1);
    bool same = now && copy->block.data &&
                !cudaMemcpy(now, first_byte(&copy->dl), copy->bytes, cudaMemcpyDeviceToHost) &&
                memcmp(now, copy->host, copy->bytes) == 0;
    free(now);
    char text[100];
    snprintf(text, sizeof text, "changed %s", copy->name);
    return same || !copy->block.data || fail(c, text);
}

static bool nothing_else_written(struct call *c) {
    for (int i = 0; i < c->count; i++) {
        const struct copy *copy = &c->copies[i];
        char text[100];
        snprintf(text, sizeof text, "wrote before or after %s", copy->name);
        if (copy->block.data && !block_intact(&copy->block))
            return fail(c, text);
        if (i >= c->written && !input_unchanged(c, copy))
            return false;
    }
    return c->args.decodes || block_intact(&c->workspace) || fail(c, "wrote outside its workspace");
}

static bool fetch(struct call *c) {
    for (int i = 0; i < c->written; i++) {
        struct copy *copy = &c->copies[i];
        if (!good(c, cudaMemcpy(copy->host, first_byte(&copy->dl), copy->bytes, cudaMemcpyDeviceToHost),
                  "copying a result back"))
            return false;
    }
    return true;
}

static const char *finish(struct call *c, bool ran) {
    static char text[sizeof c->text];
    if (ran && nothing_else_written(c))
        fetch(c);
    snprintf(text, sizeof text, "%s", c->text);
    call_free(c);
    return *text ? text : NULL;
}

static struct arguments prefill_arguments(const flash_kda_prefill_args *args) {
    return (struct arguments){.decodes = false, .prefill = *args};
}

static struct arguments decode_arguments(const flash_kda_decode_args *args) {
    return (struct arguments){.decodes = true, .decode = *args};
}

static const char *run(struct arguments args, int fill, enum device_memory memory) {
    struct call c;
    bool ran = call_make(&c, &args, fill, memory) && launch(&c) && wait(&c);
    return finish(&c, ran);
}

const char *device_prefill(const flash_kda_prefill_args *args, int fill, enum device_memory memory) {
    return run(prefill_arguments(args), fill, memory);
}

const char *device_prefill_described(const flash_kda_prefill_args *args, char *text, size_t size,
                                     int32_t *word) {
    enum { ALIGNMENT = 64 /* of what the library uses */, FILL = 0xff };
    struct arguments arguments = prefill_arguments(args);
    struct call c;
    bool ran = call_make(&c, &arguments, FILL, DEVICE_MEMORY) && launch(&c) && wait(&c);
    if (ran && flash_kda_prefill_describe(&c.args.prefill, text, size))
        ran = fail(&c, flash_kda_last_error());
    *word = -1;
    if (ran && c.workspace_bytes > ALIGNMENT) {
        const char *first = (char *)c.workspace.data + 1;
        first += -(uintptr_t)first % ALIGNMENT;
        ran = good(&c, cudaMemcpy(word, first, sizeof *word, cudaMemcpyDeviceToHost),
                   "copying from the workspace");
    }
    return finish(&c, ran);
}

const char *device_decode(const flash_kda_decode_args *args, enum device_memory memory) {
    return run(decode_arguments(args), 0, memory);
}

const char *device_decode_in_steps(const flash_kda_decode_args *args, int64_t count) {
    struct arguments arguments = decode_arguments(args);
    struct call c;
    bool ran = call_make(&c, &arguments, 0, DEVICE_MEMORY);
    if (ran && decode_in_steps(&c.args.decode, count))
        ran = fail(&c, flash_kda_last_error());
    return finish(&c, ran && wait(&c));
}

/* ---- Graphs ------------------------------------------------------------------------------------ */

static bool capture(struct call *c, cudaGraphExec_t *graph_exec) {
    cudaGraph_t graph = NULL;
    if (!good(c, cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeGlobal), "beginning a capture"))
        return false;
    bool launched = launch(c);
    bool captured = good(c, cudaStreamEndCapture(c->stream, &graph), "ending a capture") && launched &&
                    good(c, cudaGraphInstantiate(graph_exec, graph, 0), "making a graph");
    if (graph)
        cudaGraphDestroy(graph);
    return captured;
}

/* The contents of another call's tensors, of the same shapes and strides. */
static bool change_contents(struct call *c, struct arguments *changed) {
    struct member list[TENSORS];
    int count = members(changed, list), n = 0;
    for (int i = 0; i < count; i++)
        if (*list[i].tensor) {
            struct copy *copy = &c->copies[n++];
            if (n > c->count || strcmp(copy->name, list[i].name) != 0 || copy->bytes != extent(*list[i].tensor))
                return fail(c, "the check itself is wrong: the two calls differ in more than contents");
            copy->host = first_byte(*list[i].tensor);
            if (!upload(c, copy))
                return false;
        }
    return good(c, cudaDeviceSynchronize(), "changing contents");
}

static const char *run_replayed(struct arguments captured, struct arguments changed, int fill) {
    struct call c;
    cudaGraphExec_t graph = NULL;
    bool ran = call_make(&c, &captured, fill, DEVICE_MEMORY) && capture(&c, &graph) &&
               change_contents(&c, &changed) &&
               good(&c, cudaGraphLaunch(graph, c.stream), "replaying a graph") && wait(&c);
    if (graph)
        cudaGraphExecDestroy(graph);
    return finish(&c, ran);
}

const char *device_prefill_replayed(const flash_kda_prefill_args *captured,
                                    const flash_kda_prefill_args *changed, int fill) {
    return run_replayed(prefill_arguments(captured), prefill_arguments(changed), fill);
}

const char *device_decode_replayed(const flash_kda_decode_args *captured,
                                   const flash_kda_decode_args *changed) {
    return run_replayed(decode_arguments(captured), decode_arguments(changed), 0);
}

/* ---- Time -------------------------------------------------------------------------------------- */

static bool time_runs(struct call *c, cudaEvent_t begin, cudaEvent_t end, double *seconds) {
    enum { RUNS = 10 };
    *seconds = 1e30;
    for (int i = 0; i < RUNS; i++) {
        float milliseconds = 0;
        if (!good(c, cudaEventRecord(begin, c->stream), "timing") || !launch(c) ||
            !good(c, cudaEventRecord(end, c->stream), "timing") || !wait(c) ||
            !good(c, cudaEventElapsedTime(&milliseconds, begin, end), "timing"))
            return false;
        *seconds = milliseconds * 1e-3 < *seconds ? milliseconds * 1e-3 : *seconds;
    }
    return true;
}

static const char *run_time(struct arguments args, double *seconds) {
    struct call c;
    cudaEvent_t begin = NULL, end = NULL;
    if (call_make(&c, &args, 0, DEVICE_MEMORY) && good(&c, cudaEventCreate(&begin), "timing") &&
        good(&c, cudaEventCreate(&end), "timing"))
        time_runs(&c, begin, end, seconds);
    if (begin)
        cudaEventDestroy(begin);
    if (end)
        cudaEventDestroy(end);
    return finish(&c, false);
}

const char *device_prefill_time(const flash_kda_prefill_args *args, double *seconds) {
    return run_time(prefill_arguments(args), seconds);
}

const char *device_decode_time(const flash_kda_decode_args *args, double *seconds) {
    return run_time(decode_arguments(args), seconds);
}
