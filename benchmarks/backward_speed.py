# SPDX-License-Identifier: MIT
"""Measures the CUDA backend's backward, as models are trained: bf16, from states that prefill kept every 128 tokens.

usage: backward_speed.py [--build DIR] [--commit NAME] [--quick] [-o FILE]

Runs `flashkda bench --backend cuda --backward` case by case, on a GPU with a level of its own again on the portable
level. Writes benchmarks/results/DEVICE/backward.json after every case ("complete" is false until the end), so that what
is cut off is not lost; with --quick one short case, and nothing is written unless FILE is given. Exit status 1 if a
result is wrong: it has no time then. Python's standard library is enough.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import device

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEPT = ["--checkpoint-every", "128"]
SIGMOID = ["--gate", "sigmoid", *KEPT]
LONG = ["--tokens", "8192"]
CASES = [[*LONG, "--heads", heads, *SIGMOID] for heads in ("32", "96", "64", "16", "8", "24")]
CASES += [["--tokens", "2048", "--heads", "12", *SIGMOID], ["--batch", "8", "--tokens", "2048", "--heads", "16", *SIGMOID],
          ["--batch", "32", "--tokens", "256", "--heads", "32", *SIGMOID]]
CASES += [[*LONG, "--heads", heads, *SIGMOID, "--regime", "strong"] for heads in ("32", "96", "8")]
CASES += [[*LONG, "--heads", "32", "--gate", "softplus", *KEPT]]
PORTABLE = [[*LONG, "--heads", heads, *SIGMOID] for heads in ("32", "96", "16", "8")]
PORTABLE += [[*LONG, "--heads", "32", "--gate", "sigmoid"]]
QUICK = [["--tokens", "1024", "--heads", "8", *SIGMOID]]


def measure(build, level, options):
    """Prints the case's time; returns all that `flashkda bench` says in JSON."""
    command = [build / "flashkda", "bench", "--backend", "cuda", "--backward", "--json", *options]
    environment = os.environ | ({"FLASH_KDA_CUDA": level} if level else {})
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if not ended.stdout:
        sys.exit(f"{' '.join(map(str, command))} ended with status {ended.returncode} and said nothing")
    printed = json.loads(ended.stdout)
    result = printed["results"][0]
    time = f"{result['seconds']['median'] * 1e3:9.4f} ms" if "seconds" in result else "WRONG, not timed"
    print(f"{result['name']:40} {result['level']:6} {time}, error {result['check']['output_error']:.1e}", flush=True)
    return printed


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n")[2].removeprefix("usage: "))
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--commit")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("-o", dest="path", type=pathlib.Path)
    options = parser.parse_args()
    gpu = device.describe(options.build)
    path = options.path or (None if options.quick else device.results(gpu) / "backward.json")
    wanted = [(None, case) for case in (QUICK if options.quick else CASES)]
    if gpu["compute_capability"].startswith("9."):
        wanted += [("sm80", case) for case in (QUICK if options.quick else PORTABLE)]
    results = []
    for level, case in wanted:
        printed = measure(options.build, level, case)
        results += printed["results"]
        measured = printed | {"commit": device.commit(options.commit), "results": results,
                              "complete": len(results) == len(wanted)}
        if path:
            path.write_text(json.dumps(measured, indent=2) + "\n")
    sys.exit(0 if all(r["check"]["passed"] for r in results) else 1)


if __name__ == "__main__":
    main()
