/* SPDX-License-Identifier: MIT */
/* Runs a prefill problem through the public API and keeps its results. */
#include "check.h"
#include "device.h"
#include "prefill_case.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void make_output(struct tensor *t, const struct prefill_output *o, DLDataType type,
                        enum spacing spacing) {
    if (o->ndim)
        tensor_make(t, type, o->ndim, o->shape, (struct tensor_layout){spacing, 0, false});
}

void prefill_results_make(struct prefill_results *r, const struct prefill_problem *p) {
    enum spacing states = p->c.outputs == SPACING_COMPACT ? SPACING_COMPACT : SPACING_FUSED;
    *r = (struct prefill_results){.in_place = p->c.final == STORAGE_IN_PLACE,
                                  .shared_pool = p->c.checkpoints == CHECKPOINTS_SHARED_POOL};
    make_output(&r->out, &p->out, p->out.type, p->c.outputs);
    if (r->in_place)
        tensor_clone(&r->final, &p->initial_state);
    else
        make_output(&r->final, &p->final, p->final.type, states);
    if (!r->shared_pool)
        make_output(&r->checkpoints, &p->checkpoints, p->checkpoints.type, states);
}

void prefill_results_make_exact(struct prefill_results *r, const struct prefill_problem *p) {
    *r = (struct prefill_results){.in_place = false};
    make_output(&r->out, &p->out, TYPE_FP32, SPACING_COMPACT);
    make_output(&r->final, &p->final, TYPE_FP32, SPACING_COMPACT);
    make_output(&r->checkpoints, &p->checkpoints, TYPE_FP32, SPACING_COMPACT);
}

void prefill_results_free(struct prefill_results *r) {
    tensor_free(&r->out);
    tensor_free(&r->final);
    tensor_free(&r->checkpoints);
}

const struct tensor *prefill_checkpoints(const struct prefill_results *r) {
    return r->shared_pool ? &r->final : &r->checkpoints;
}

enum { WORKSPACE_GUARD = 64, GUARD_BYTE = 0xee };

struct workspace {
    unsigned char *block, *data; /* data is NULL if bytes is 0 */
    size_t bytes;
};

static void workspace_make(struct workspace *w, size_t bytes, int fill) {
    w->bytes = bytes;
    w->block = malloc(bytes + 2 * WORKSPACE_GUARD + 1);
    if (!w->block) {
        fprintf(stderr, "out of memory: a workspace of %zu bytes\n", bytes);
        exit(2);
    }
    memset(w->block, GUARD_BYTE, bytes + 2 * WORKSPACE_GUARD + 1);
    /* Any alignment will do, says the header. */
    w->data = bytes ? w->block + WORKSPACE_GUARD + 1 : NULL;
    if (bytes)
        memset(w->data, fill, bytes);
}

static bool workspace_guards_intact(const struct workspace *w) {
    for (size_t i = 0; i < 2 * WORKSPACE_GUARD + 1; i++) {
        size_t place = i <= WORKSPACE_GUARD ? i : i + w->bytes;
        if (w->block[place] != GUARD_BYTE)
            return false;
    }
    return true;
}

static const char *failed(const char *call) {
    static char text[700];
    snprintf(text, sizeof text, "%s: %s", call, flash_kda_last_error());
    return text;
}

const char *prefill_call(const flash_kda_prefill_args *args, int fill) {
#ifdef CHECK_CUDA
    if (args->backend == FLASH_KDA_BACKEND_CUDA)
        return device_prefill(args, fill, DEVICE_MEMORY);
#endif
    struct workspace workspace;
    size_t bytes;
    if (flash_kda_prefill_workspace_size(args, &bytes))
        return failed("workspace_size");
    workspace_make(&workspace, bytes, fill);
    flash_kda_status status = flash_kda_prefill(args, workspace.data, bytes);
    bool intact = workspace_guards_intact(&workspace);
    free(workspace.block);
    if (status)
        return failed("prefill");
    return intact ? NULL : "wrote outside its workspace";
}

flash_kda_prefill_args prefill_bind(const struct prefill_problem *p, struct prefill_results *r,
                                    flash_kda_backend backend) {
    flash_kda_prefill_args args = p->args;
    args.backend = backend;
    args.out = &r->out.dl;
    args.final_state = p->final.ndim ? &r->final.dl : NULL;
    args.checkpoints = p->checkpoints.ndim ? &prefill_checkpoints(r)->dl : NULL;
    if (r->in_place)
        args.initial_state = &r->final.dl;
    return args;
}

const char *prefill_run(const struct prefill_problem *p, struct prefill_results *r, flash_kda_backend backend,
                        int fill) {
    flash_kda_prefill_args args = prefill_bind(p, r, backend);
    return prefill_call(&args, fill);
}

double prefill_time(const struct prefill_problem *p, struct prefill_results *r, flash_kda_backend backend) {
    enum { MIN_RUNS = 5 };
    flash_kda_prefill_args args = prefill_bind(p, r, backend);
#ifdef CHECK_CUDA
    if (backend == FLASH_KDA_BACKEND_CUDA) {
        double seconds = 0;
        return device_prefill_time(&args, &seconds) ? (double)NAN : seconds;
    }
#endif
    struct workspace workspace;
    size_t bytes = 0;
    flash_kda_prefill_workspace_size(&args, &bytes);
    workspace_make(&workspace, bytes, 0);
    double begin = check_seconds(), best = HUGE_VAL;
    for (int i = 0; i < MIN_RUNS || check_seconds() - begin < 0.2; i++) {
        double start = check_seconds();
        flash_kda_prefill(&args, workspace.data, bytes);
        best = fmin(best, check_seconds() - start);
    }
    free(workspace.block);
    return best;
}
