/* SPDX-License-Identifier: MIT */
/* GPU time by replay of CUDA graphs: no launch from the host is in it. */
#include "replay.h"

#include "copy.h"
#include "device.h"
#include "device_cuda.h"

#include <math.h>

enum { COPY_BYTES = 1 << 30, COPY_REPEATS = 5 };

/* Seconds: to let the clocks rise, and of one measurement, long beside the half microsecond of an event. */
static const double warm_up = 0.1, measurement = 0.02;

/* A graph under measurement. */
struct replay {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    cudaEvent_t begin, end;
};

static bool replay_open(struct replay *replay) {
    *replay = (struct replay){.stream = device_stream()};
    return replay->stream && cuda_good(cudaEventCreate(&replay->begin), "making an event") &&
           cuda_good(cudaEventCreate(&replay->end), "making an event");
}

static void replay_close(struct replay *replay) {
    if (replay->executable)
        cudaGraphExecDestroy(replay->executable);
    if (replay->graph)
        cudaGraphDestroy(replay->graph);
    if (replay->begin)
        cudaEventDestroy(replay->begin);
    if (replay->end)
        cudaEventDestroy(replay->end);
    if (replay->stream)
        cudaStreamDestroy(replay->stream);
}

static bool begin_capture(struct replay *replay) {
    return cuda_good(cudaStreamBeginCapture(replay->stream, cudaStreamCaptureModeThreadLocal),
                     "beginning a capture");
}

/* Ends the capture even where what was captured went wrong. */
static bool end_capture(struct replay *replay, bool good) {
    cudaError_t status = cudaStreamEndCapture(replay->stream, &replay->graph);
    return good && cuda_good(status, "ending a capture") &&
           cuda_good(cudaGraphInstantiate(&replay->executable, replay->graph, 0), "making a graph");
}

/* GPU seconds of so many replays. */
static bool measure(struct replay *replay, int replays, double *seconds) {
    float milliseconds = 0;
    if (!cuda_good(cudaEventRecord(replay->begin, replay->stream), "recording an event"))
        return false;
    for (int i = 0; i < replays; i++)
        if (!cuda_good(cudaGraphLaunch(replay->executable, replay->stream), "launching a graph"))
            return false;
    if (!cuda_good(cudaEventRecord(replay->end, replay->stream), "recording an event") ||
        !cuda_good(cudaEventSynchronize(replay->end), "running a graph") ||
        !cuda_good(cudaEventElapsedTime(&milliseconds, replay->begin, replay->end), "reading a time"))
        return false;
    *seconds = milliseconds * 1e-3;
    return true;
}

/* Warms up and fills seconds[repeats] with the time of one replay. */
static bool measure_repeatedly(struct replay *replay, double *seconds, int repeats) {
    double took = 0, sum = 0;
    int replays = 1;
    while (sum < warm_up) {
        if (!measure(replay, replays, &took))
            return false;
        sum += took;
        replays = (int)fmin(10000, 1 + measurement * replays / fmax(took, 1e-6));
    }
    for (int i = 0; i < repeats; i++) {
        if (!measure(replay, replays, &took))
            return false;
        seconds[i] = took / replays;
    }
    return true;
}

static bool capture_calls(struct replay *replay, struct call *const calls[], int count) {
    if (!begin_capture(replay))
        return false;
    bool good = true;
    for (int i = 0; i < count && good; i++)
        good = call_launch(calls[i], replay->stream);
    return end_capture(replay, good);
}

bool replay_is_possible(void) { return true; }

bool replay_calls(struct call *const calls[], int count, double *seconds, int repeats) {
    struct replay replay;
    bool good = replay_open(&replay) && capture_calls(&replay, calls, count) &&
                measure_repeatedly(&replay, seconds, repeats);
    for (int i = 0; good && i < repeats; i++)
        seconds[i] /= count;
    replay_close(&replay);
    return good;
}

const char *replay_changed(const struct arguments *captured, const struct arguments *changed, int fill) {
    struct call c;
    struct call *const calls[] = {&c};
    struct replay replay = {0};
    bool ran = call_make(&c, captured, MEMORY_DEVICE, fill) && replay_open(&replay) &&
               capture_calls(&replay, calls, 1) && call_change(&c, changed) &&
               cuda_good(cudaGraphLaunch(replay.executable, replay.stream), "replaying a graph") &&
               device_wait(replay.stream);
    replay_close(&replay);
    return call_finish(&c, ran);
}

static bool capture_copy(struct replay *replay, void *to, const void *from) {
    return begin_capture(replay) &&
           end_capture(replay, cuda_good(copy_on_device(to, from, COPY_BYTES, replay->stream), "copying"));
}

bool replay_copy(double *bytes_per_second) {
    struct replay replay;
    double seconds[COPY_REPEATS], best = HUGE_VAL;
    void *from = device_allocate(COPY_BYTES, false);
    void *to = device_allocate(COPY_BYTES, false);
    bool good = from && to;
    if (good) {
        good = replay_open(&replay) && capture_copy(&replay, to, from) &&
               measure_repeatedly(&replay, seconds, COPY_REPEATS);
        replay_close(&replay);
    }
    for (int i = 0; good && i < COPY_REPEATS; i++)
        best = fmin(best, seconds[i]);
    *bytes_per_second = 2.0 * COPY_BYTES / best;
    device_free(to);
    device_free(from);
    return good;
}
