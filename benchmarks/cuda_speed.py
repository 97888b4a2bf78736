# SPDX-License-Identifier: MIT
"""Measures the CUDA backend beside other implementations on the same GPU, one after another on the same cases.

usage: cuda_speed.py [--build DIR] [--flashkda FOLDER] [--quick] [--commit NAME] [-o FILE]

Runs `flashkda bench --backend cuda`, then fla's chunk_kda (the package flash-linear-attention, where it is installed),
FlashKDA (a FOLDER with its built package) and the Hopper kernel of nvidia-cudnn-frontend (where it is installed; it gets
g and beta in fp32) through torch. Writes benchmarks/results/DEVICE/speed.json and draws
speed.svg beside it; with --quick, a few short cases, it writes nothing unless FILE is given. A peer that is not here is
null in the JSON.
"""

import argparse
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile

import device

ROOT = pathlib.Path(__file__).resolve().parent.parent


def bench(build, commit, quick):
    """Runs `flashkda bench`, which prints its table, and returns what it measured."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "bench.json"
        command = [build / "flashkda", "bench", "--backend", "cuda", "-o", path]
        command += ["--commit", commit] if commit else []
        subprocess.run([*command, "--quick"] if quick else command, check=True)
        return json.loads(path.read_text())


def clocks():
    """What nvidia-smi says of clocks and power now; None where it is not here."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu"]
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    printed = subprocess.run(query, capture_output=True, text=True)
    return dict(zip(fields, printed.stdout.strip().split(", "))) if printed.returncode == 0 else None


def load_peers(flashkda):
    """The module that measures peers, and those that are here; None without torch."""
    try:
        import peers
    except ImportError as error:
        print(f"no peer is measured: {error}")
        return None, dict.fromkeys(["fla", "flashkda", "cudnn"])
    return peers, peers.load(flashkda)


def with_peers(measured, module, loaded):
    """Adds to every result what the peers do with its case, and prints it."""
    names = list(loaded)
    measured["peers"] = {name: peer.version if peer else None for name, peer in loaded.items()}
    measured["torch"] = module.torch.__version__ if module else None
    print(f"\n{'ms: case':40} {'ours':>9}" + "".join(f" {name:>9} {'x':>6} {'error':>8}" for name in names))
    for result in measured["results"]:
        peers = module.measure(loaded, result["case"]) if module else dict.fromkeys(names)
        result["peers"] = peers
        ours = result.get("seconds", {}).get("median")
        line = f"{result['name']:40} " + (f"{ours * 1e3:9.4f}" if ours else f"{'wrong':>9}")
        for name in names:
            peer = peers[name]
            theirs = peer and peer["seconds"] and peer["seconds"]["median"]
            error = peer and peer["check"]["output_error"]
            line += f" {theirs * 1e3:9.4f}" if theirs else f" {'wrong' if peer else '-':>9}"
            line += f" {theirs / ours:6.2f}" if theirs and ours else f" {'-':>6}"
            line += f" {error:8.1e}" if error is not None else f" {'-':>8}"
        print(line, flush=True)
    return measured


def print_means(measured):
    for name in measured["peers"]:
        for regime in ("strong", "slow"):
            ratios = [r["peers"][name]["seconds"]["median"] / r["seconds"]["median"] for r in measured["results"]
                      if r["case"]["regime"] == regime and r["peers"][name] and r["peers"][name]["seconds"]
                      and "seconds" in r]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                print(f"{mean:.2f} times the speed of {name}, geometric mean of {len(ratios)} cases, {regime} gates")


def draw(measured, path):
    try:
        import plot
    except ImportError as error:
        print(f"no figure is drawn: {error}")
        return
    plot.draw_cuda(measured, path)
    print(f"drew {path}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build", help="where flashkda is (build)")
    parser.add_argument("--flashkda", type=pathlib.Path, help="a folder with FlashKDA's package, built")
    parser.add_argument("--quick", action="store_true", help="a few short cases")
    parser.add_argument("--commit", help="what was built, where git cannot tell")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="the results")
    return parser.parse_args()


def main():
    options = arguments()
    build = options.build.resolve()
    path = options.output or device.results(device.describe(build)) / "speed.json"
    measured = bench(build, device.commit(options.commit), options.quick)
    measured["clocks_after_ours"] = clocks()
    measured = with_peers(measured, *load_peers(options.flashkda))
    measured["clocks_after_peers"] = clocks()
    print_means(measured)
    if options.quick and not options.output:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=2) + "\n")
    print(f"wrote {path}")
    draw(measured, path.with_suffix(".svg"))


if __name__ == "__main__":
    sys.exit(main())
