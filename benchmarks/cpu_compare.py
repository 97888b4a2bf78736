# SPDX-License-Identifier: MIT
"""Two builds of the program beside each other, run in turn: what changes on the machine meets both.

usage: cpu_compare.py BEFORE AFTER [--rounds 9] [--commits BEFORE AFTER] [--threads N] [--full]

BEFORE and AFTER are programs, as build/flashkda. Compares the short tables of prefill and decode and one long head, or
with --full the long tables, by the best and the middle of the rounds' medians; writes results/cpu/CPU-compare.json.
Python's standard library is enough.
"""

import argparse
import json
import subprocess

import cpu_cells

SHORT = [["--quick"], ["--tokens=16384", "--heads=1"], ["--quick", "--decode"]]
FULL = [[], ["--decode"]]


def medians(binary, arguments, threads):
    command = [binary, "bench", "--json", *arguments, *([f"--threads={threads}"] if threads else [])]
    printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {f"{'decode ' if '--decode' in arguments else ''}{r['name']}, out {r['case']['out_dtype']},"
            f" {r['threads']} threads": r["seconds"]["median"] * 1e3 for r in printed["results"]}


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n")[2])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commits", nargs=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    times = {"before": {}, "after": {}}
    for number in range(options.rounds):
        for arguments in FULL if options.full else SHORT:
            sides = ("before", "after") if number % 2 == 0 else ("after", "before")
            for side in sides:
                for name, time in medians(getattr(options, side), arguments, options.threads).items():
                    times[side].setdefault(name, []).append(time)
    cells = []
    for name in times["after"]:
        before, after = (cpu_cells.summary(times[side][name]) for side in ("before", "after"))
        ratio = round(after["best_ms"] / before["best_ms"], 3)
        middle = round(after["middle_ms"] / before["middle_ms"], 3)
        print(f"{name:60s} {before['best_ms']:10.4f} -> {after['best_ms']:10.4f} ms, {ratio:.3f}; middle {middle:.3f}")
        cells.append({"name": name, "before": before, "after": after, "ratio_of_best": ratio, "ratio_of_middle": middle})
    cpu_cells.record({"commits": options.commits, "machine": cpu_cells.machine(options.after), "cells": cells}, "compare")


if __name__ == "__main__":
    main()
