# SPDX-License-Identifier: MIT
"""Measures the CUDA backend's backward, as models are trained: bf16, from states that prefill kept every 128 tokens.

usage: backward_speed.py [--build DIR] [--commit NAME] [--quick] [-o FILE]

Runs `flashkda bench --backend cuda --backward` case by case, on a GPU with a level of its own again on the portable
level. Where torch and the package are installed, "training" then has what forward and backward together take through
torch's autograd, beside fla if that is here: seconds, and the most memory at a time beyond inputs and dO. Writes
benchmarks/results/DEVICE/backward.json after every case ("complete" is false until the end), so that what is cut off
is not lost; with --quick one short case, and nothing is written unless FILE is given. Exit status 1 if a result is
wrong: it has no time then. For all but "training" Python's standard library is enough.
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
TRAINED = [{"batch": 1, "tokens": 8192, "lengths": None, "heads": heads, "value_heads": heads, "key_dim": 128,
            "value_dim": 128, "dtype": "bf16", "gate": "sigmoid", "lower_bound": -5.0, "regime": "slow",
            "initial_state": False, "state_dtype": "fp32"} for heads in (32, 96, 64, 16, 8)]


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


def trainers():
    """Names to forwards, as backward_accuracy.py has them; none where torch or the package are not here."""
    try:
        import backward_accuracy
        import peers
    except ImportError as error:
        print(f"training is NOT measured: {error}")
        return {}
    return {"ours": backward_accuracy.ours} | ({"fla": backward_accuracy.fla} if peers.load_one("fla", peers.Fla) else {})


def train(case, forwards):
    """What forward and backward of one problem take by each."""
    import backward_accuracy
    import peers
    import torch

    x, measured = peers.make_inputs(case), {"case": case}
    d_out = torch.randn_like(x.v)
    for name, forward in forwards.items():
        inputs = backward_accuracy.leaves(x)

        def call():
            out, _ = forward(x, inputs)
            torch.autograd.grad(out, [t for t in inputs if t is not None], d_out)

        call()  # compiles and tunes
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        measured[name] = {"peak_bytes": torch.cuda.max_memory_allocated() - before, "seconds": peers.replay([call])}
        print(f"training, H{case['heads']:<3} {name:6} {measured[name]['seconds']['median'] * 1e3:9.4f} ms, "
              f"{measured[name]['peak_bytes'] / (1 << 30):.2f} GiB", flush=True)
    torch.cuda.empty_cache()
    return measured


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
    results, training, measured = [], [], {}
    trained, forwards = [] if options.quick else TRAINED, {} if options.quick else trainers()

    def keep():
        measured.update(commit=device.commit(options.commit), results=results, training=training,
                        complete=len(results) == len(wanted) and len(training) == len(trained))
        if path:
            path.write_text(json.dumps(measured, indent=2) + "\n")

    for level, case in wanted:
        measured |= measure(options.build, level, case)
        results += measured["results"]
        keep()
    for case in trained if forwards else []:
        training.append(train(case, forwards))
        keep()
    sys.exit(0 if all(r["check"]["passed"] for r in results) else 1)


if __name__ == "__main__":
    main()
