# SPDX-License-Identifier: MIT
"""What calls cost beside other programs: two busy processes a processor, default threads against one thread.

usage: cpu_busy.py [--binary build/flashkda] [--rounds 7] [--commit NAME]      (through ./dev bench --busy)

Runs both in turn, round after round, and writes results/cpu/CPU-busy.json. Fails if the default takes more than twice
one thread's time. Python's standard library and a built program are enough.
"""

import argparse
import os
import subprocess
import sys

import cpu_cells
import device

NAMES = ["prefill data/small_softplus", "decode B4 H32 fp32", "decode B4 H32 bf16"]
BUSY = 2  # processes a processor
AT_MOST = 2  # times one thread's time


def start_busy():
    """Processes that end with this one (prctl 1 is PR_SET_PDEATHSIG)."""
    code = "import ctypes\nctypes.CDLL(None).prctl(1, 9)\nwhile True: pass"
    return [subprocess.Popen([sys.executable, "-c", code]) for _ in range(BUSY * len(os.sched_getaffinity(0)))]


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n")[2])
    parser.add_argument("--binary", default=str(cpu_cells.ROOT / "build" / "flashkda"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--commit")
    options = parser.parse_args()
    rounds = {(name, threads): [] for name in NAMES for threads in (1, None)}
    busy = start_busy()
    try:
        for _ in range(options.rounds):
            for threads in (1, None):
                for name, time in cpu_cells.measure(options.binary, NAMES, threads).items():
                    rounds[name, threads].append(time)
    finally:
        for process in busy:
            process.kill()
    cells, worst = [], 0
    for name in NAMES:
        one, default = (cpu_cells.summary(rounds[name, threads]) for threads in (1, None))
        ratio = round(default["middle_ms"] / one["middle_ms"], 3)
        worst = max(worst, ratio)
        print(f"{name:32s} one thread {one['middle_ms']:9.3f} ms, default {default['middle_ms']:9.3f} ms: {ratio:.2f} times")
        cells.append({"name": name, "one_thread": one, "default": default, "ratio": ratio})
    cpu_cells.record({"commit": device.commit(options.commit), "machine": cpu_cells.machine(options.binary),
                      "busy_processes": len(busy), "cells": cells}, "busy")
    sys.exit(worst > AT_MOST and f"the default takes {worst} times one thread's time; at most {AT_MOST} are allowed")


if __name__ == "__main__":
    main()
