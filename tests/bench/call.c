/* SPDX-License-Identifier: MIT */
#include "call.h"

#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 512, GUARD_BYTE = 0xff };

static bool bare;

void call_bare(void) { bare = true; }

enum memory memory_of(flash_kda_backend backend) {
    return backend == FLASH_KDA_BACKEND_CUDA ? MEMORY_DEVICE : MEMORY_HOST;
}

/* ---- Memory between guards --------------------------------------------------------------------- */

static bool fill_bytes(enum memory memory, void *to, int byte, size_t bytes) {
    if (memory != MEMORY_HOST)
        return device_fill(to, byte, bytes);
    memset(to, byte, bytes);
    return true;
}

/* shift: bytes of another alignment than the allocation's. */
static bool block_make(struct block *b, size_t bytes, size_t shift, enum memory memory) {
    size_t guard = bare && memory != MEMORY_HOST ? 0 : GUARD, size = bytes + shift + 2 * guard;
    char *all = memory == MEMORY_HOST ? malloc(size) : device_allocate(size, memory == MEMORY_MANAGED);
    if (!all) {
        if (memory == MEMORY_HOST)
            failed("out of memory for %zu bytes", size);
        return false;
    }
    *b = (struct block){all + shift + guard, bytes, shift + guard, guard, memory};
    return fill_bytes(memory, all, GUARD_BYTE, b->before) &&
           fill_bytes(memory, b->data + bytes, GUARD_BYTE, guard);
}

static void block_free(struct block *b) {
    if (b->data && b->memory == MEMORY_HOST)
        free(b->data - b->before);
    else if (b->data)
        device_free(b->data - b->before);
    b->data = NULL;
}

static bool guard_intact(enum memory memory, const char *place, size_t bytes) {
    unsigned char guard[2 * GUARD];
    if (memory == MEMORY_HOST)
        memcpy(guard, place, bytes);
    else if (!device_copy(guard, place, bytes))
        return false;
    for (size_t i = 0; i < bytes; i++)
        if (guard[i] != GUARD_BYTE)
            return false;
    return true;
}

static bool block_intact(const struct block *b) {
    return !b->data || (guard_intact(b->memory, b->data - b->before, b->before) &&
                        guard_intact(b->memory, b->data + b->bytes, b->after));
}

/* ---- Tensors ----------------------------------------------------------------------------------- */

static char *first_byte(const DLTensor *t) { return (char *)t->data + t->byte_offset; }

static bool upload(const struct copy *copy) {
    return device_copy(first_byte(&copy->dl), copy->host, copy->bytes);
}

/* Memory of its own, unless an earlier tensor has these bytes; with the same offset, hence alignment, as here. */
static bool place(struct call *c, struct copy *copy) {
    copy->host = first_byte(&copy->dl);
    copy->bytes = tensor_extent(&copy->dl);
    copy->dl.device = (DLDevice){c->memory == MEMORY_MANAGED ? kDLCUDAManaged : kDLCUDA, 0};
    for (const struct copy *other = c->copies; other < copy; other++)
        if (other->host == copy->host && other->bytes == copy->bytes) {
            copy->dl.data = other->dl.data;
            copy->dl.byte_offset = other->dl.byte_offset;
            return true;
        }
    if (!block_make(&copy->block, copy->dl.byte_offset + copy->bytes, 0, c->memory))
        return false;
    copy->dl.data = copy->block.data;
    return upload(copy);
}

static bool place_tensors(struct call *c) {
    struct argument list[MAX_ARGUMENTS];
    int n = arguments_list(&c->args, list);
    for (int i = 0; i < n; i++)
        if (*list[i].tensor) {
            struct copy *copy = &c->copies[c->count++];
            copy->name = list[i].name;
            copy->dl = **list[i].tensor;
            if (!place(c, copy))
                return false;
            *list[i].tensor = &copy->dl;
            c->written += list[i].written;
        }
    return true;
}

/* At an odd address: any alignment will do, says the header. */
static bool make_workspace(struct call *c, int fill) {
    if (c->args.kind == KIND_DECODE || c->args.kind == KIND_FOLD)
        return true;
    if (c->args.kind == KIND_BACKWARD
            ? flash_kda_backward_workspace_size(&c->args.backward, &c->workspace_bytes)
            : flash_kda_prefill_workspace_size(&c->args.prefill, &c->workspace_bytes))
        return failed("%s", flash_kda_last_error());
    enum memory memory = c->memory == MEMORY_HOST ? MEMORY_HOST : MEMORY_DEVICE;
    bool filled = fill == FILL_ALWAYS || (fill != FILL_NONE && !(bare && memory == MEMORY_DEVICE));
    return block_make(&c->workspace, c->workspace_bytes, 1, memory) &&
           (!filled || fill_bytes(memory, c->workspace.data, fill, c->workspace_bytes));
}

bool call_make(struct call *c, const struct arguments *args, enum memory memory, int fill) {
    *c = (struct call){.args = *args, .memory = memory};
    if (memory == MEMORY_HOST)
        return make_workspace(c, fill);
    c->stream = device_stream();
    c->args.prefill.stream = c->args.decode.stream = c->args.backward.stream = c->args.fold.stream = c->stream;
    return c->stream && place_tensors(c) && make_workspace(c, fill) && device_wait(NULL);
}

void call_free(struct call *c) {
    for (int i = 0; i < c->count; i++)
        block_free(&c->copies[i].block);
    block_free(&c->workspace);
    if (c->stream)
        device_stream_free(c->stream);
    c->count = 0;
    c->stream = NULL;
}

int64_t arguments_bytes(const struct arguments *args) {
    struct arguments all = *args;
    struct argument list[MAX_ARGUMENTS];
    int64_t sum = 0;
    for (int i = arguments_list(&all, list) - 1; i >= 0; i--) {
        const DLTensor *t = *list[i].tensor;
        int64_t bytes = t ? (int64_t)type_size(t->dtype) : 0;
        for (int d = 0; t && d < t->ndim; d++)
            bytes *= t->shape[d];
        sum += bytes;
    }
    return sum;
}

/* ---- Running ----------------------------------------------------------------------------------- */

bool call_launch(struct call *c, void *stream) {
    struct arguments *a = &c->args;
    void *workspace = c->workspace_bytes ? c->workspace.data : NULL;
    a->prefill.stream = a->decode.stream = a->backward.stream = a->fold.stream = stream ? stream : c->stream;
    flash_kda_status status = a->kind == KIND_DECODE ? flash_kda_decode(&a->decode)
                              : a->kind == KIND_FOLD ? flash_kda_fold(&a->fold)
                              : a->kind == KIND_BACKWARD
                                  ? flash_kda_backward(&a->backward, workspace, c->workspace_bytes)
                                  : flash_kda_prefill(&a->prefill, workspace, c->workspace_bytes);
    return !status || failed("%s", flash_kda_last_error());
}

bool call_wait(struct call *c) {
    return c->memory == MEMORY_HOST || (device_wait(c->stream) && device_wait(NULL));
}

bool call_fetch(struct call *c) {
    for (int i = 0; i < c->written; i++)
        if (!device_copy(c->copies[i].host, first_byte(&c->copies[i].dl), c->copies[i].bytes))
            return false;
    return true;
}

bool call_change(struct call *c, const struct arguments *changed) {
    struct arguments other = *changed;
    struct argument list[MAX_ARGUMENTS];
    int count = arguments_list(&other, list), n = 0;
    for (int i = 0; i < count; i++)
        if (*list[i].tensor) {
            struct copy *copy = &c->copies[n++];
            if (n > c->count || strcmp(copy->name, list[i].name) != 0 ||
                copy->bytes != tensor_extent(*list[i].tensor))
                return failed("the check itself is wrong: the two calls differ in more than contents");
            copy->host = first_byte(*list[i].tensor);
            if (!upload(copy))
                return false;
        }
    return device_wait(NULL);
}

/* ---- Checking ---------------------------------------------------------------------------------- */

/* An input holds what it held: its own bytes, or those of a written tensor it shares memory with. */
static bool input_unchanged(const struct copy *copy) {
    if (!copy->block.data)
        return true;
    char *now = must_allocate((int64_t)copy->bytes, 1);
    bool read = device_copy(now, first_byte(&copy->dl), copy->bytes);
    bool same = read && memcmp(now, copy->host, copy->bytes) == 0;
    free(now);
    return same || !read || failed("changed %s", copy->name);
}

static bool nothing_else_written(struct call *c) {
    for (int i = 0; i < c->count; i++) {
        if (!block_intact(&c->copies[i].block))
            return failed("wrote before or after %s", c->copies[i].name);
        if (i >= c->written && !input_unchanged(&c->copies[i]))
            return false;
    }
    return block_intact(&c->workspace) || failed("wrote outside its workspace");
}

const char *call_finish(struct call *c, bool ran) {
    ran = ran && call_wait(c) && nothing_else_written(c) && call_fetch(c);
    call_free(c);
    return ran ? NULL : failure();
}

const char *call_run(const struct arguments *args, enum memory memory, int fill) {
    struct call c = {.count = 0};
    return call_finish(&c, call_make(&c, args, memory, fill) && call_launch(&c, NULL));
}
