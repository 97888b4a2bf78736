/* SPDX-License-Identifier: MIT */
/* GPU time by replay of CUDA graphs: no launch from the host is in it. */
#include "replay.h"

#include "copy.h"
#include "device.h"
#include "device_error.h"

#include <math.h>
#include <stdio.h>

enum { COPY_BYTES = 1 << 30, COPY_REPEATS = 5 };

/* Seconds: to let the clocks rise, and of one measurement, long beside the half microsecond of an event. */
static const double warm_up = 0.1, measurement = 0.02;

/* A graph under measurement. */
struct replay {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    cudaEvent_t begin, end;
    char *error;
    size_t error_size;
};

static bool failed(const struct replay *replay, cudaError_t status, const char *what) {
    return device_failed(status, what, replay->error, replay->error_size);
}

static bool replay_open(struct replay *replay, char *error, size_t error_size) {
    *replay = (struct replay){.error_size = error_size};
    replay->error = error;
    return !failed(replay, cudaStreamCreateWithFlags(&replay->stream, cudaStreamNonBlocking),
                   "making a stream") &&
           !failed(replay, cudaEventCreate(&replay->begin), "making an event") &&
           !failed(replay, cudaEventCreate(&replay->end), "making an event");
}

static void replay_close(struct replay *replay) {
    if (replay->executable) {
        cudaGraphExecDestroy(replay->executable);
    }
    if (replay->graph) {
        cudaGraphDestroy(replay->graph);
    }
    if (replay->begin) {
        cudaEventDestroy(replay->begin);
    }
    if (replay->end) {
        cudaEventDestroy(replay->end);
    }
    if (replay->stream) {
        cudaStreamDestroy(replay->stream);
    }
}

static bool begin_capture(struct replay *replay) {
    return !failed(replay, cudaStreamBeginCapture(replay->stream, cudaStreamCaptureModeThreadLocal),
                   "beginning a capture");
}

/* Ends the capture even where what was captured went wrong. */
static bool end_capture(struct replay *replay, bool good) {
    cudaError_t status = cudaStreamEndCapture(replay->stream, &replay->graph);
    return good && !failed(replay, status, "ending a capture") &&
           !failed(replay, cudaGraphInstantiate(&replay->executable, replay->graph, 0), "making a graph");
}

/* GPU seconds of so many replays. */
static bool measure(struct replay *replay, int replays, double *seconds) {
    float milliseconds = 0;
    if (failed(replay, cudaEventRecord(replay->begin, replay->stream), "recording an event")) {
        return false;
    }
    for (int i = 0; i < replays; i++) {
        if (failed(replay, cudaGraphLaunch(replay->executable, replay->stream), "launching a graph")) {
            return false;
        }
    }
    if (failed(replay, cudaEventRecord(replay->end, replay->stream), "recording an event") ||
        failed(replay, cudaEventSynchronize(replay->end), "running a graph") ||
        failed(replay, cudaEventElapsedTime(&milliseconds, replay->begin, replay->end), "reading a time")) {
        return false;
    }
    *seconds = milliseconds * 1e-3;
    return true;
}

/* Warms up and fills seconds[repeats] with the time of one replay. */
static bool measure_repeatedly(struct replay *replay, double *seconds, int repeats) {
    double took = 0, sum = 0;
    int replays = 1;
    while (sum < warm_up) {
        if (!measure(replay, replays, &took)) {
            return false;
        }
        sum += took;
        replays = (int)fmin(10000, 1 + measurement * replays / fmax(took, 1e-6));
    }
    for (int i = 0; i < repeats; i++) {
        if (!measure(replay, replays, &took)) {
            return false;
        }
        seconds[i] = took / replays;
    }
    return true;
}

static bool capture_calls(struct replay *replay, replay_launch *launch, const void *calls, int count) {
    bool good = begin_capture(replay);
    if (!good) {
        return false;
    }
    for (int i = 0; i < count && good; i++) {
        good = launch(calls, i, replay->stream, replay->error, replay->error_size);
    }
    return end_capture(replay, good);
}

bool replay_calls(replay_launch *launch, const void *calls, int count, double *seconds, int repeats,
                  char *error, size_t error_size) {
    struct replay replay;
    bool good = replay_open(&replay, error, error_size) && capture_calls(&replay, launch, calls, count) &&
                measure_repeatedly(&replay, seconds, repeats);
    for (int i = 0; good && i < repeats; i++) {
        seconds[i] /= count;
    }
    replay_close(&replay);
    return good;
}

static bool capture_copy(struct replay *replay, void *to, const void *from) {
    return begin_capture(replay) &&
           end_capture(replay,
                       !failed(replay, copy_on_device(to, from, COPY_BYTES, replay->stream), "copying"));
}

bool replay_copy(double *bytes_per_second, char *error, size_t error_size) {
    struct replay replay;
    double seconds[COPY_REPEATS], best = HUGE_VAL;
    void *from = device_allocate(COPY_BYTES, error, error_size);
    void *to = device_allocate(COPY_BYTES, error, error_size);
    bool good = from && to;
    if (good) {
        good = replay_open(&replay, error, error_size) && capture_copy(&replay, to, from) &&
               measure_repeatedly(&replay, seconds, COPY_REPEATS);
        replay_close(&replay);
    }
    for (int i = 0; good && i < COPY_REPEATS; i++) {
        best = fmin(best, seconds[i]);
    }
    *bytes_per_second = 2.0 * COPY_BYTES / best;
    device_free(to);
    device_free(from);
    return good;
}
