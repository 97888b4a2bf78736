# SPDX-License-Identifier: MIT
"""Measures the CPU backend beside numpy's fp32 matmul, which tells how fast this machine is.

usage: cpu_speed.py [ARGUMENT...]      (through ./dev bench)

Without arguments: the whole table of `flashkda bench` on every level; writes results/cpu/CPU.json and draws
results/cpu/speed.svg; then that of decode, beside the rate of a copy, and writes results/cpu/CPU-decode.json; then
that of backward on every level, and writes results/cpu/CPU-backward.json. With arguments, which go to `flashkda
bench`: prints, and writes nothing.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy

import cpu_cells
import device
import plot

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZE = 2048  # of the square matrices
REPEATS = 15


def matmul_gflops():
    """The rates of REPEATS fp32 matmuls with all cores, after a warm-up."""
    a = numpy.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=numpy.float32)
    b = a.T.copy()
    rates = []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        a @ b
        rates.append(2 * SIZE**3 / (time.perf_counter() - start) * 1e-9)
    return rates[2:]


def bench(arguments):
    """Runs `flashkda bench`, which prints its table, and returns what it measured."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "bench.json"
        command = [ROOT / "build" / "flashkda", "bench", "--commit", device.commit(), "-o", path, *arguments]
        subprocess.run(command, check=True)
        return json.loads(path.read_text())


def with_matmul(measured, before, after):
    """Adds R, the median rate of the matmuls before and after, and every result's ratio to it."""
    rate = float(numpy.median(before + after))
    measured["matmul"] = {
        "what": f"numpy {numpy.__version__}, fp32, {SIZE}^3, all cores, median of {2 * REPEATS}",
        "gflops": round(rate, 2),
        "gflops_before": round(float(numpy.median(before)), 2),
        "gflops_after": round(float(numpy.median(after)), 2),
    }
    for result in measured["results"]:
        result["ratio_to_matmul"] = round(result["gflops"] / rate, 4)
    return measured


def print_ratios(measured):
    matmul = measured["matmul"]
    print(f"\nR, {matmul['what']}: {matmul['gflops']} GFLOP/s"
          f" ({matmul['gflops_before']} before, {matmul['gflops_after']} after)")
    for result in measured["results"]:
        print(f"{result['ratio_to_matmul']:6.2f} R  {result['name']}, out {result['case']['out_dtype']},"
              f" {result['level']}, {result['threads']} threads")


def main():
    arguments = sys.argv[1:]
    before = matmul_gflops()
    measured = bench(arguments or ["--level", "all"])
    measured = with_matmul(measured, before, matmul_gflops())
    print_ratios(measured)
    if arguments:
        return
    cpu_cells.record(measured)
    plot.draw(measured, cpu_cells.RESULTS / "speed.svg")
    print(f"drew {(cpu_cells.RESULTS / 'speed.svg').relative_to(ROOT)}")
    cpu_cells.record(bench(["--decode"]), "decode")
    cpu_cells.record(bench(["--backward", "--level", "all"]), "backward")


if __name__ == "__main__":
    main()
