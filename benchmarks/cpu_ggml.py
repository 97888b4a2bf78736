# SPDX-License-Identifier: MIT
"""The CPU backend beside ggml's op of KDA, which llama.cpp runs: the same numbers on as many threads, in turn.

usage: cpu_ggml.py GGML [--threads N] [--rounds 9] [--program FILE] [--commit NAME] [--quick]

GGML is the folder of a build of ggml with shared libraries, for this processor. Needs this repository's Python package,
ml_dtypes, and the program (build/flashkda), which says what machine this is. ggml's op, gated_delta_net, takes fp32 and
leaves the norm, the gate and the sigmoid to other ops, so both get unit q and k, log decays and steps. Ours runs on the
same fp32 numbers, and on q, k, v and an output in bf16. Every result is compared with the oracle before it is timed.
Writes results/cpu/CPU-ggml.json; with --quick, a few short cells, nothing.
"""

import argparse
import ctypes
import os
import pathlib
import sys
import time

import libflashkda
import ml_dtypes
import numpy

import cpu_cells
import device

DIM = 128
PREFILL = {"T4096-H8": (1, 4096, 8), "T4096-H32": (1, 4096, 32), "T512-H32": (1, 512, 32), "T65536-H1": (1, 65536, 1)}
DECODE = {"decode B1-H32": (1, 1, 32), "decode B16-H32": (16, 1, 32)}  # sequences, tokens, heads
QUICK = {"T256-H4": (1, 256, 4), "decode B2-H4": (2, 1, 4)}
WRONG = {"ggml": 1e-5, "fp32": 1e-5, "bf16": 6e-3}  # error ratios of the output and of the state
AT_LEAST, REST = 0.1, 0.05  # seconds that a side runs in a round, and that its threads have to fall asleep after it
F32 = 0  # enum ggml_type


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """One call of ggml_gated_delta_net on the CPU, as a graph of its own."""

    def __init__(self, folder, threads):
        libraries = [next(iter(sorted(folder.rglob(f"libggml-{name}.so"))), None) for name in ("base", "cpu")]
        if None in libraries:
            sys.exit(f"no libggml-base.so and libggml-cpu.so in {folder}; build ggml with -D BUILD_SHARED_LIBS=ON")
        self.base, self.cpu = (ctypes.CDLL(library, ctypes.RTLD_GLOBAL) for library in libraries)
        for function in ("ggml_init", "ggml_new_tensor_4d", "ggml_get_data", "ggml_gated_delta_net", "ggml_new_graph"):
            getattr(self.base, function).restype = ctypes.c_void_p
        self.base.ggml_tensor_overhead.restype = self.base.ggml_graph_overhead.restype = ctypes.c_size_t
        self.base.ggml_version.restype = self.base.ggml_commit.restype = ctypes.c_char_p
        self.cpu.ggml_backend_cpu_init.restype = ctypes.c_void_p
        self.backend = ctypes.c_void_p(self.cpu.ggml_backend_cpu_init())
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.context = None

    def version(self):
        return {"version": self.base.ggml_version().decode(), "commit": self.base.ggml_commit().decode()}

    def view(self, tensor, shape):
        floats = ctypes.cast(self.base.ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float))
        return numpy.ctypeslib.as_array(floats, shape)

    def load(self, inputs):
        """Makes the op of these arrays, whose last dimension ggml calls its first."""
        self.free()
        results = inputs["v"].nbytes + inputs["state"].nbytes
        room = sum(x.nbytes for x in inputs.values()) + results + self.base.ggml_graph_overhead()
        room += 16 * self.base.ggml_tensor_overhead()
        self.context = ctypes.c_void_p(self.base.ggml_init(InitParams(room, None, False)))
        tensors = []
        for array in inputs.values():
            sizes = [ctypes.c_int64(n) for n in reversed(array.shape)]
            tensor = ctypes.c_void_p(self.base.ggml_new_tensor_4d(self.context, F32, *sizes))
            self.view(tensor, array.shape)[:] = array
            tensors.append(tensor)
        self.result = ctypes.c_void_p(self.base.ggml_gated_delta_net(self.context, *tensors, ctypes.c_int64(1)))
        self.graph = ctypes.c_void_p(self.base.ggml_new_graph(self.context))
        self.base.ggml_build_forward_expand(self.graph, self.result)

    def run(self):
        if self.base.ggml_backend_graph_compute(self.backend, self.graph):
            sys.exit("ggml_backend_graph_compute failed")

    def results(self, out, state):
        """The output and the final state, which stand one after the other."""
        both = self.view(self.result, (out.size + state.size,))
        return both[:out.size].reshape(out.shape), both[out.size:].reshape(state.shape)

    def free(self):
        if self.context:
            self.base.ggml_free(self.context)
        self.context = None


def make(B, T, H):
    """Unit q and k, log decays as trained heads have them, steps from 0 to 1: in the order of ggml's arguments."""
    random = numpy.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape, "float32")

    q, k = (x / numpy.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(B, T, H, DIM), normal(B, T, H, DIM)))
    rate = numpy.exp(random.random((H, 1), "float32"))
    return {"q": q, "k": k, "v": normal(B, T, H, DIM), "g": -rate * numpy.log1p(numpy.exp(normal(B, T, H, DIM) - 7)),
            "beta": 1 / (1 + numpy.exp(-normal(B, T, H, 1))), "state": normal(B, H, DIM, DIM)}


def ours(inputs, dtype, **options):
    """A call of the library, and where it leaves its output and its state."""
    q, k, v = (inputs[name].astype(dtype) for name in "qkv")
    g, beta = inputs["g"], inputs["beta"][..., 0]
    out, state = numpy.empty_like(v), numpy.empty_like(inputs["state"])
    if v.shape[1] > 1:
        return out, state, lambda: libflashkda.prefill(
            q, k, v, g, beta, initial_state=inputs["state"], out=out, final_state=state, **options)
    state[:] = inputs["state"]
    return out, state, lambda: libflashkda.decode(q, k, v, g, beta, state, out=out, **options)


def error(result, right):
    difference = numpy.asarray(result, "float64") - right
    ratio = numpy.sqrt((difference**2).mean() / (numpy.asarray(right, "float64")**2).mean())
    return float(f"{ratio:.3g}")


def seconds(call):
    """The fastest of the calls that fit into AT_LEAST seconds."""
    best, begin = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begin < AT_LEAST:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    time.sleep(REST)
    return best


def measure(ggml, name, shape, threads, rounds):
    inputs = make(*shape)
    exact_out, exact_state, oracle = ours(inputs, numpy.float32, backend="reference")
    oracle()
    ggml.load(inputs)
    calls, results = {"ggml": ggml.run}, {}
    for dtype in ("fp32", "bf16"):
        out, state, calls[dtype] = ours(inputs, {"fp32": numpy.float32, "bf16": ml_dtypes.bfloat16}[dtype],
                                        num_threads=threads)
        results[dtype] = out, state
    for call in calls.values():
        call()
    results["ggml"] = ggml.results(exact_out, exact_state)
    errors = {side: {"output_error": error(out, exact_out), "state_error": error(state, exact_state)}
              for side, (out, state) in results.items()}
    for side, of in errors.items():
        if not max(of.values()) < WRONG[side]:
            sys.exit(f"{name}: {side} is wrong, errors {of}, at most {WRONG[side]}")
    times = {side: [] for side in calls}
    for number in range(rounds):
        for side in list(calls) if number % 2 == 0 else reversed(calls):
            times[side].append(seconds(calls[side]) * 1e3)
    times = {side: cpu_cells.summary(rounds_ms) for side, rounds_ms in times.items()}
    print(f"{name:16s}" + ", ".join(f" {side} {t['best_ms']:.3f} ms" for side, t in times.items())
          + f"; as fast as ggml: fp32 {times['ggml']['best_ms'] / times['fp32']['best_ms']:.1f},"
            f" bf16 {times['ggml']['best_ms'] / times['bf16']['best_ms']:.1f} times", flush=True)
    batch, tokens, heads = shape
    return {"name": name, "batch": batch, "tokens": tokens, "heads": heads, "head_dim": DIM, "errors": errors,
            **{f"{side}_ms" if side == "ggml" else f"ours_{side}_ms": t for side, t in times.items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ggml", type=pathlib.Path, help="a folder with ggml's libraries, built")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both (as many as processors)")
    parser.add_argument("--rounds", type=int, default=9, help="in which each side is timed once (9)")
    parser.add_argument("--program", type=pathlib.Path, default=cpu_cells.ROOT / "build" / "flashkda")
    parser.add_argument("--commit", help="what was built, where git cannot tell")
    parser.add_argument("--quick", action="store_true", help="a few short cells")
    options = parser.parse_args()
    ggml = Ggml(options.ggml, options.threads)
    cells = [measure(ggml, name, shape, options.threads, options.rounds)
             for name, shape in (QUICK if options.quick else PREFILL | DECODE).items()]
    ggml.free()
    if not options.quick:
        cpu_cells.record({"version": libflashkda.__version__, "commit": device.commit(options.commit),
                          "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                          "machine": cpu_cells.machine(options.program) | {"threads": options.threads},
                          "ggml": ggml.version(), "cells": cells}, "ggml")


if __name__ == "__main__":
    main()
