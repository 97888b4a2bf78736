# SPDX-License-Identifier: MIT
"""Measures the CUDA backend beside other implementations on the same GPU, one after another on the same cases.

usage: cuda_speed.py [--build DIR] [--flashkda FOLDER] [--quick] [--commit NAME] [-o FILE]

Runs `flashkda bench --backend cuda`, after its table on the inputs in data/ repeated to the size of its cases and
to a million tokens; on a GPU with a level of its own all that again on the portable level; then on the table's cases
fla's chunk_kda (the package flash-linear-attention, where it is installed), FlashKDA (a FOLDER with its built
package) and the Hopper kernel of nvidia-cudnn-frontend (where it is installed; it gets g and beta in fp32) through
torch. Says last where the portable level is slower than it should be. Writes benchmarks/results/DEVICE/speed.json,
after every case so that what is cut off is not lost ("complete" is false until the end), and draws speed.svg beside
it; with --quick, a few short cases, it writes nothing unless FILE is given. A peer that is not here, or not yet, is
null in the JSON. Exit status 1 if a result of ours is wrong.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import device
import fla_compile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PORTABLE = "sm80"  # the level for every GPU
CAPTURED = sorted((ROOT / "data").glob("*.safetensors"))  # repeated to the size of a case of the table
CAPTURED_SIZE = ["--tokens", "8192", "--heads", "32", "--initial-state"]
GROWTH = ["8192", "1048576"]  # tokens of a sequence of 8 heads: time is to grow no faster
MANY_CHAINS = 32  # sequences times value heads; with so many the portable level is to be as fast as fla


# ---- Ours ---------------------------------------------------------------------------------------

def bench_case(build, commit, level, *options):
    """Runs `flashkda bench`, which prints its table, on the best level or the one named; returns what it measured."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "bench.json"
        command = [build / "flashkda", "bench", "--backend", "cuda", "-o", path]
        command += ["--commit", commit] if commit else []
        environment = os.environ | ({"FLASH_KDA_CUDA": level} if level else {})
        ended = subprocess.run([*command, *options], env=environment)
        if not path.exists():  # it exists where results are wrong: they have no times
            sys.exit(f"{build}/flashkda bench ended with status {ended.returncode} and wrote no results")
        return json.loads(path.read_text())


def bench(build, commit, quick, level=None):
    """The table, and after it the captured inputs, the first ones also for a million tokens; with quick a few short
    cases."""
    measured = bench_case(build, commit, level, *(["--quick"] if quick else []))
    sizes = [(path, CAPTURED_SIZE) for path in CAPTURED]
    sizes += [(CAPTURED[0], ["--tokens", tokens, "--heads", "8", "--initial-state"]) for tokens in GROWTH]
    for path, size in [] if quick else sizes:
        measured["results"] += bench_case(build, commit, level, "--captured", path, *size)["results"]
    return measured


def with_portable(measured, *options):
    """Adds to every result what the portable level does with its case; None where it is the level of this GPU."""
    results = measured["results"]
    portable = [None] * len(results)
    if any(result["level"] != PORTABLE for result in results):
        print(f"\nthe same on the portable level, {PORTABLE}", flush=True)
        again = bench(*options, PORTABLE)["results"]
        portable = [{key: r[key] for key in ("level", "check", "seconds") if key in r} for r in again]
    for result, other in zip(results, portable, strict=True):
        result["portable"] = other
    return measured


def wrong(measured):
    """Are there results of ours outside tolerance?"""
    return any("seconds" not in r or (r["portable"] and "seconds" not in r["portable"]) for r in measured["results"])


def clocks():
    """What nvidia-smi says of clocks and power now; None where it is not here."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu"]
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    printed = subprocess.run(query, capture_output=True, text=True)
    return dict(zip(fields, printed.stdout.strip().split(", "))) if printed.returncode == 0 else None


# ---- Beside peers -------------------------------------------------------------------------------

def load_peers(flashkda):
    """The module that measures peers, and those that are here; None without torch."""
    try:
        import peers
    except ImportError as error:
        print(f"no peer is measured: {error}")
        return None, dict.fromkeys(["fla", "flashkda", "cudnn"])
    return peers, peers.load(flashkda)


def others(result):
    """What a result of ours is printed beside: the portable level and the peers, None what did not run."""
    return {"portable": result["portable"], **result["peers"]}


def median(measured):
    """Seconds of one of ours or of a peer; None where it did not run or was wrong."""
    return measured["seconds"]["median"] if measured and measured.get("seconds") else None


def for_peers(result):
    """Is it a case whose inputs peers make for themselves? They are not given the captured ones."""
    return result["case"]["regime"] != "captured"


def compile_fla(measured, fla):
    cases = [result["case"] for result in measured["results"] if for_peers(result)]
    fla_compile.compile_for([case for case in cases if fla.takes(case)])


def print_beside(result):
    ours = median(result)
    line = f"{result['name']:40} " + (f"{ours * 1e3:9.4f}" if ours else f"{'wrong':>9}")
    for other in others(result).values():
        theirs, error = median(other), other and other["check"]["output_error"]
        line += f" {theirs * 1e3:9.4f}" if theirs else f" {'wrong' if other else '-':>9}"
        line += f" {theirs / ours:6.2f}" if theirs and ours else f" {'-':>6}"
        line += f" {error:8.1e}" if error is not None else f" {'-':>8}"
    print(line, flush=True)


def with_peers(measured, module, loaded, write):
    """Adds to every result what the peers do with its case, prints it, and writes what there is so far."""
    measured["peers"] = {name: peer.version if peer else None for name, peer in loaded.items()}
    measured["torch"] = module.torch.__version__ if module else None
    for result in measured["results"]:
        result["peers"] = dict.fromkeys(loaded)
    write(measured, complete=False)
    if loaded["fla"]:
        compile_fla(measured, loaded["fla"])
    names = ["portable", *loaded]
    print(f"\n{'ms: case':40} {'ours':>9}" + "".join(f" {name:>9} {'x':>6} {'error':>8}" for name in names))
    for result in measured["results"]:
        if module and for_peers(result):
            result["peers"] = module.measure(loaded, result["case"])
        print_beside(result)
        write(measured, complete=False)
    return measured


def print_means(measured):
    for name in others(measured["results"][0]):
        for regime in ("strong", "slow"):
            times = [(median(others(r)[name]), median(r)) for r in measured["results"] if r["case"]["regime"] == regime]
            ratios = [theirs / ours for theirs, ours in times if theirs and ours]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                print(f"{mean:.2f} times the speed of {name}, geometric mean of {len(ratios)} cases, {regime} gates")


# ---- What the portable level is to reach --------------------------------------------------------

def in_goal(case, many):
    """Is it one of the cases with many chains, or else with few, that the goal is about?"""
    sequences = len(case["lengths"].split(",")) if case["lengths"] else case["batch"]
    return (case["regime"] in ("strong", "slow") and case["key_dim"] == case["value_dim"] == 128
            and case["state_dtype"] == "fp32" and (sequences * case["value_heads"] >= MANY_CHAINS) == many)


def against(results, peer, many):
    """The portable level beside a peer: how many cases have both, and the speed on those where ours is slower."""
    speeds = []
    for result in results:
        ours, theirs = median(result["portable"] or result), median(result["peers"][peer])
        if in_goal(result["case"], many) and ours and theirs:
            speeds.append({"name": result["name"], "speed": theirs / ours})
    slower = [case for case in speeds if case["speed"] < 1]
    return {"peer": peer, "cases": len(speeds), "slower": slower, "reached": not slower if speeds else None}


def portable_goal(results):
    """With many chains the portable level is to be as fast as fla, with fewer as FlashKDA."""
    return {f"{MANY_CHAINS} chains or more": against(results, "fla", True),
            f"fewer than {MANY_CHAINS} chains": against(results, "flashkda", False)}


def print_goal(goal):
    for chains, found in goal.items():
        peer, cases, slower = found["peer"], found["cases"], found["slower"]
        if not cases:
            print(f"No case with {chains} has times of both the portable level and {peer}.")
        elif not slower:
            print(f"The portable level is at least as fast as {peer} on all {cases} cases with {chains}.")
        else:
            print(f"The portable level is slower than {peer} on {len(slower)} of {cases} cases with {chains}:")
        for case in slower:
            print(f"  {case['name']}: {case['speed']:.3f} times its speed")


# ---- The program --------------------------------------------------------------------------------

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
    kept = options.output or not options.quick

    def write(measured, complete):
        if not kept:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured | {"complete": complete}, indent=2) + "\n")

    bench_options = build, device.commit(options.commit), options.quick
    measured = with_portable(bench(*bench_options), *bench_options)
    measured["clocks_after_ours"] = clocks()
    measured = with_peers(measured, *load_peers(options.flashkda), write)
    measured["clocks_after_peers"] = clocks()
    print_means(measured)
    measured["portable_goal"] = portable_goal(measured["results"])
    print_goal(measured["portable_goal"])
    write(measured, complete=True)
    if kept:
        print(f"wrote {path}")
        draw(measured, path.with_suffix(".svg"))
    return wrong(measured)


if __name__ == "__main__":
    sys.exit(main())
