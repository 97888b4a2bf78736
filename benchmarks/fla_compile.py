# SPDX-License-Identifier: MIT
"""Compiles fla's kernels for cases of the benchmark, one process for each kind of them, as many at a time as there are
processors: fla by itself compiles one kernel after another. What they compile lies in Triton's cache; none tunes.

usage: fla_compile.py CASES

CASES is a JSON list of cases of one kind; cuda_speed.py starts this for every kind by compile_for().
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import time

KIND = ("heads", "value_heads", "key_dim", "value_dim", "dtype", "gate")


def kinds(cases):
    """The cases by what most kernels are compiled anew for; of those alike in the rest too, one. The rest is what takes
    few kernels: an initial state, checkpoints, and the number of rows, which fla's norm depends on. That is why cases
    keep their size."""
    found = {}
    for case in cases:
        name = " ".join(str(case[key]) for key in KIND) + (" packed" if case["lengths"] else "")
        rest = (case["initial_state"], case["checkpoint_every"] > 0, case["batch"] * case["tokens"])
        found.setdefault(name, {}).setdefault(rest, case)
    return {name: list(members.values()) for name, members in found.items()}


def start(cases):
    """Runs this file on cases of one kind; what it printed if it failed, else None."""
    environment = os.environ | {"FLA_CACHE_RESULTS": "0"}  # these two keep tuned choices
    environment.pop("TRITON_CACHE_AUTOTUNING", None)
    ended = subprocess.run([sys.executable, __file__, json.dumps(cases)], env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return (ended.stdout.strip() or f"status {ended.returncode}") if ended.returncode else None


def compile_for(cases):
    """Compiles what fla runs for the cases. Where that fails it says so: fla then compiles when it is called."""
    wanted, begin = kinds(cases), time.monotonic()
    print(f"\ncompiling fla for {len(wanted)} kinds of cases: {' '.join(KIND)}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        names = {pool.submit(start, members): name for name, members in wanted.items()}
        for ended in concurrent.futures.as_completed(names):
            error = ended.result()
            state = f"NOT compiled: {error}" if error else "compiled"
            print(f"{time.monotonic() - begin:6.1f} s {names[ended]}: {state}", flush=True)


def run_once(kernel_call, quantiles):
    """In place of Triton's benchmark of a configuration: compiles it and takes all for equally fast."""
    kernel_call()
    return [0.0] * len(quantiles)


def main():
    import peers
    import torch
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = staticmethod(run_once)
    fla = peers.Fla()
    with torch.inference_mode():
        for case in json.loads(sys.argv[1]):
            fla.prepare(peers.make_inputs(case), case)()
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
