# SPDX-License-Identifier: MIT
"""Two builds of the program beside each other, run in turn: what changes on the machine meets both.

usage: compare.py BEFORE AFTER [--cuda] [--rounds 9] [--commits BEFORE AFTER] [--threads N] [--full]

BEFORE and AFTER are programs, as build/flashkda. Compares, on the CPU or a GPU, the short tables of prefill and decode
and one long head, or with --full the long tables, by the best and the middle of the rounds' medians. Writes
results/cpu/CPU-compare.json or results/GPU/compare.json, anew as each round ends. Python's standard library is enough.
"""

import argparse
import json
import pathlib
import subprocess

import cpu_cells
import device

SHORT = [["--quick"], ["--tokens=16384", "--heads=1"], ["--quick", "--decode"]]
FULL = [[], ["--decode"]]


def medians(binary, arguments, where):
    command = [binary, "bench", "--json", *arguments, *where]
    printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {f"{'decode ' if '--decode' in arguments else ''}{r['name']}, out {r['case']['out_dtype']}, "
            + (f"{r['threads']} threads" if r["threads"] else r["level"]): r["seconds"]["median"] * 1e3
            for r in printed["results"]}


def cells_of(times):
    cells = []
    for name in times["after"]:
        before, after = (cpu_cells.summary(times[side][name]) for side in ("before", "after"))
        cells.append({"name": name, "before": before, "after": after,
                      "ratio_of_best": round(after["best_ms"] / before["best_ms"], 3),
                      "ratio_of_middle": round(after["middle_ms"] / before["middle_ms"], 3)})
    return cells


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n")[2])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commits", nargs=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    where = ["--backend=cuda"] if options.cuda else [f"--threads={options.threads}"] if options.threads else []
    if options.cuda:
        gpu = device.describe(pathlib.Path(options.after).parent)
        machine, path = gpu, device.results(gpu) / "compare.json"
    else:
        machine = cpu_cells.machine(options.after)
        path = cpu_cells.path(machine, "compare")
    times = {"before": {}, "after": {}}
    for number in range(options.rounds):
        for arguments in FULL if options.full else SHORT:
            sides = ("before", "after") if number % 2 == 0 else ("after", "before")
            for side in sides:
                for name, time in medians(getattr(options, side), arguments, where).items():
                    times[side].setdefault(name, []).append(time)
        cells = cells_of(times)
        cpu_cells.write({"commits": options.commits, "cells": cells, "machine": machine}, path)
        print(f"round {number + 1} of {options.rounds}", flush=True)
    for cell in cells:
        print(f"{cell['name']:60s} {cell['before']['best_ms']:10.4f} -> {cell['after']['best_ms']:10.4f} ms,"
              f" {cell['ratio_of_best']:.3f}; middle {cell['ratio_of_middle']:.3f}")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
