# SPDX-License-Identifier: MIT
"""What a call from Python costs the processor, beyond the launch of one empty kernel: the package's three interfaces on
tensors so small that the GPU is never what is waited for.

usage: call_cost.py [--build DIR] [--commit NAME] [-o FILE]

Times batches of calls that are only enqueued, the GPU idle before each. Writes benchmarks/results/DEVICE/call.json, or
FILE. Exit status 1 if fwd() costs more than it may. Needs torch and the installed package.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import device
import libflashkda
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
CALLS, BATCHES = 100, 51  # few enough calls to fit the launch queue
MAY_COST = 10.0  # microseconds of fwd() beyond a launch


def microseconds(call):
    """Host time of one call: quartiles over batches."""
    times = []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
    q1, median, q3 = statistics.quantiles(times, n=4)
    return {"min": min(times), "q1": q1, "median": median, "q3": q3, "max": max(times), "batches": BATCHES,
            "calls": CALLS}


def calls():
    """Names to functions without arguments: one token, one head."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(1, 1, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    beta = torch.randn(1, 1, 1, device="cuda", dtype=torch.bfloat16)
    a_log, bias = torch.zeros(1, device="cuda"), torch.zeros(1, 128, device="cuda")
    state, out = torch.zeros(1, 1, 128, 128, device="cuda"), torch.empty_like(v)
    element = torch.zeros(1, device="cuda")
    return {
        "launch": element.zero_,
        "fwd": lambda: libflashkda.fwd(q, k, v, g, beta, 1.0, out, a_log, bias, -5.0, state, state, None),
        "prefill": lambda: libflashkda.prefill(q, k, v, g, beta, A_log=a_log, dt_bias=bias, gate="sigmoid",
                                               lower_bound=-5.0, initial_state=state, output_final_state=True),
        "chunk_kda": lambda: libflashkda.chunk_kda(q, k, v, g, beta, A_log=a_log, dt_bias=bias.flatten(),
                                                   initial_state=state, output_final_state=True, safe_gate=True,
                                                   lower_bound=-5.0, use_gate_in_kernel=True,
                                                   use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build", help="where flashkda is (build)")
    parser.add_argument("--commit", help="what was built, where git cannot tell")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="the results")
    options = parser.parse_args()
    gpu = device.describe(options.build.resolve())
    with torch.inference_mode():
        measured = {name: microseconds(call) for name, call in calls().items()}
    launch = measured["launch"]["median"]
    for name, times in measured.items():
        print(f"{name:10} {times['median']:6.2f} us a call, {times['median'] - launch:6.2f} beyond a launch")
    cost = measured["fwd"]["median"] - launch
    path = options.output or device.results(gpu) / "call.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "version": libflashkda.__version__, "commit": device.commit(options.commit), "device": gpu,
        "python": sys.version.split()[0], "torch": torch.__version__, "microseconds": measured,
        "fwd_beyond_a_launch": cost, "may_cost": MAY_COST}, indent=2) + "\n")
    print(f"wrote {path}")
    if cost > MAY_COST:
        sys.exit(f"fwd() costs {cost:.2f} us beyond a launch; it may cost {MAY_COST:g}")


if __name__ == "__main__":
    main()
