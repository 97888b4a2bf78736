/* SPDX-License-Identifier: MIT */
/* A call of any operation: in host memory as its tensors lie, or on CUDA copies of them. Every copy and the
 * workspace lie between guards, at the alignment that the tensors have here. Tensors that share memory here share
 * it there. */
#ifndef BENCH_CALL_H
#define BENCH_CALL_H

#include "arguments.h"
#include "failure.h"

enum memory { MEMORY_HOST, MEMORY_DEVICE, MEMORY_MANAGED };

/* Device memory for the CUDA backend, host memory for the others. */
enum memory memory_of(flash_kda_backend backend);

/* What a workspace is filled with: bytes, or nothing. FILL_ALWAYS is written although memory is bare, for calls
 * whose indices lead to parts of the workspace that nothing wrote: what they compute means nothing, but the read is
 * no error. */
enum { FILL_NONE = -1, FILL_ALWAYS = 0, FILL_NAN = 0xff };

/* From now on there are no guards on a device and no workspace is filled: compute-sanitizer then sees every access
 * after the end of a tensor, and every read of what was not written. */
void call_bare(void);

/* Memory between guards. */
struct block {
    char *data;
    size_t bytes, before, after; /* bytes of the guards */
    enum memory memory;
};

/* One tensor on both sides, from its first byte to after its last. */
struct copy {
    const char *name;
    DLTensor dl; /* on the device */
    char *host;
    size_t bytes;
    struct block block; /* data NULL: the memory is an earlier tensor's */
};

/* Holds what args points to: not to be copied or moved. */
struct call {
    struct arguments args; /* whose tensors lie where it runs */
    enum memory memory;
    struct copy copies[MAX_ARGUMENTS]; /* none in host memory */
    int count, written;                /* the first `written` are */
    struct block workspace;
    size_t workspace_bytes;
    void *stream;
};

/* On failure returns false, with failure(); what there is to free is freed by call_free() all the same. */
bool call_make(struct call *c, const struct arguments *args, enum memory memory, int fill);
void call_free(struct call *c);

/* Launches it, on a CUDA stream or, NULL, on its own. */
bool call_launch(struct call *c, void *stream);
bool call_wait(struct call *c);

/* Copies what was written back to where it came from. */
bool call_fetch(struct call *c);

/* Gives every tensor on the device the contents of another call's, of the same shapes and strides, and writes back
 * to those from now on. */
bool call_change(struct call *c, const struct arguments *changed);

/* Bytes of all tensors of a call, each once. */
int64_t arguments_bytes(const struct arguments *args);

/* Ends a check: waits, looks whether guards and inputs are as they were, fetches, frees. `ran`: nothing has failed
 * so far. Returns NULL or what went wrong. */
const char *call_finish(struct call *c, bool ran);

/* One call from beginning to end, likewise. */
const char *call_run(const struct arguments *args, enum memory memory, int fill);

#endif
