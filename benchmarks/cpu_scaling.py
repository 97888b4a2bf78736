# SPDX-License-Identifier: MIT
"""How the CPU backend's time falls with more threads. Python's standard library and a built program are enough.

usage: cpu_scaling.py [--binary build/flashkda] [--threads 1,2,4,8,16] [--rounds 5] [--commit NAME] [--only TEXT]

Runs every cell on every number of threads, round after round, so that what changes on the machine meets all of them; and
as many programs of one thread side by side, which share nothing: what cores, clock and memory have to give. Writes
results/cpu/CPU-scaling.json, anew as each round ends. With --only, cells whose name holds TEXT, and nothing is written.
"""

import argparse
import os

import cpu_cells
import device

NAMES = ["prefill T4096 H8", "prefill T65536 H1", "decode B16 H32 fp32", "decode B4 H32 bf16"]


def counts(text):
    if text:
        return [int(count) for count in text.split(",")]
    processors = len(os.sched_getaffinity(0))
    return [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= processors]


def cells_of(names, threads, rounds, apart):
    cells = []
    for name in names:
        single = min(rounds[name, threads[0]])
        for count in threads:
            result = cpu_cells.summary(rounds[name, count])
            result["times_as_fast"] = round(single / result["best_ms"], 2)
            result["times_as_fast_apart"] = round(single / min(apart[name, count]), 2)
            cells.append({"name": name, "threads": count, **result})
    return cells


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n")[2])
    parser.add_argument("--binary", default=str(cpu_cells.ROOT / "build" / "flashkda"))
    parser.add_argument("--threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    threads = counts(options.threads)
    names = [name for name in NAMES if options.only in name]
    rounds = {(name, count): [] for name in names for count in threads}
    apart = {key: [] for key in rounds}
    machine = cpu_cells.machine(options.binary)
    for number in range(options.rounds):
        for count in threads:
            for name, time in cpu_cells.measure(options.binary, names, count).items():
                rounds[name, count].append(time)
            for name, time in cpu_cells.measure(options.binary, names, 1, copies=count).items():
                apart[name, count].append(time / count)
        cells = cells_of(names, threads, rounds, apart)
        if not options.only:
            cpu_cells.write({"commit": device.commit(options.commit), "machine": machine, "cells": cells},
                            cpu_cells.path(machine, "scaling"))
        print(f"round {number + 1} of {options.rounds}", flush=True)
    for cell in cells:
        print(f"{cell['name']:22s} {cell['threads']:3d} threads {cell['best_ms']:10.3f} ms best,"
              f" {cell['middle_ms']:10.3f} middle, {cell['times_as_fast']:6.2f} times as fast,"
              f" {cell['times_as_fast_apart']:6.2f} apart")


if __name__ == "__main__":
    main()
