# SPDX-License-Identifier: MIT
"""Measures decode on a GPU beside fla's token recurrence, one after another on the same cases.

usage: decode_speed.py [--build DIR] [--quick] [--commit NAME] [-o FILE]

Runs `flashkda bench --backend cuda --decode`, then fla's fused_recurrent_kda_fwd (the package flash-linear-attention,
where it is installed) on states in a pool, in place, through torch; both by replay of a CUDA graph, at the clocks of the
same minutes. Cold is over as many copies of the tensors as overflow the L2 cache, as a layer of a model finds its states;
warm, where they fit in it, is call after call on one set of tensors ("seconds" and "warm_seconds" in the JSON).

Writes benchmarks/results/DEVICE/decode.json; with --quick, a few small cases, it writes nothing unless FILE is given. Exit
status 1 if a result of ours is wrong.
"""

import argparse
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile

import device

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_COPIES = 256
WARM_CALLS = 100


def bench(build, commit, quick):
    """Runs `flashkda bench --decode`, which prints its table; returns what it measured."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "bench.json"
        command = [build / "flashkda", "bench", "--backend", "cuda", "--decode", "-o", path]
        command += [*(["--commit", commit] if commit else []), *(["--quick"] if quick else [])]
        ended = subprocess.run(command)
        if not path.exists():  # it exists where results are wrong: they have no times
            sys.exit(f"{build}/flashkda bench ended with status {ended.returncode} and wrote no results")
        return json.loads(path.read_text())


# ---- fla ----------------------------------------------------------------------------------------

def load_fla():
    """The module that has what peers are measured by, and fla's function; None, with a printed line, without them."""
    try:
        import peers
        from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
    except (ImportError, OSError) as error:
        print(f"fla is NOT measured: {error}")
        return None, None
    return peers, fused_recurrent_kda_fwd


def prepare(peers, function, case, way, x):
    """A call on inputs x, and its pool of states. Each sequence has as many slots as it writes states."""
    torch, (B, T) = peers.torch, x.v.shape[:2]
    columns = T if way == "state each" else 1
    pool = x.state.repeat_interleave(columns, 0).contiguous()
    slots = torch.arange(B * columns, dtype=torch.int32, device="cuda").view(B, columns)
    out = torch.empty_like(x.v)
    # One slot a sequence and several tokens: fla writes the state once, where it is not told of slots.
    where = {"ssm_state_indices": slots if columns > 1 else slots[:, 0]} if columns == T else {}

    def call():
        function(x.q, x.k, x.v, x.g, x.beta, A_log=x.A_log, dt_bias=x.dt_bias.flatten(), initial_state=pool,
                 inplace_final_state=way != "state kept", output_final_state=False, state_v_first=True,
                 use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
                 lower_bound=x.lower_bound, out=out, **(where if way != "state kept" else {}))
        return out, pool
    return call


def measure(peers, function, result):
    """Errors and times of fla on a case of ours; no times where it is wrong."""
    case, way = result["case"], result["decode"]
    torch = peers.torch
    with torch.inference_mode():
        x = peers.make_inputs(case)
        answer = peers.exact(x)
        out, pool = prepare(peers, function, case, way, x)()
        heads, columns = answer[0].shape[1], len(pool) // case["batch"]
        errors = {"output_error": peers.error_ratio(out[0, :, :heads], answer[0]),
                  "state_error": None if way == "state kept" else peers.error_ratio(pool[columns - 1, :heads], answer[1])}
        if None in (errors["output_error"],) or max(e for e in errors.values() if e is not None) > peers.WRONG:
            return {"check": errors, "seconds": None, "warm_seconds": None}
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        count = min(MAX_COPIES, 1 + 2 * l2 // result["bytes"])
        calls = [prepare(peers, function, case, way, peers.make_inputs(case, n)) for n in range(count)]
        seconds = peers.replay(calls)
        warm = peers.replay(calls[:1] * WARM_CALLS) if "warm_seconds" in result else None
    del calls, x, pool, out
    torch.cuda.empty_cache()
    return {"check": errors, "seconds": seconds, "warm_seconds": warm}


# ---- The program --------------------------------------------------------------------------------

def median(measured, field):
    return measured[field]["median"] if measured and measured.get(field) else None


def beside(result, field):
    """Ours, fla's and their ratio, as three columns."""
    ours, theirs = median(result, field), median(result["fla"], field)
    line = f" {ours * 1e6:9.2f}" if ours else f" {'-' if result['check']['passed'] else 'wrong':>9}"
    return line + (f" {theirs * 1e6:9.2f} {theirs / ours:6.2f}" if ours and theirs else f" {'-':>9} {'-':>6}")


def print_beside(result, copy_rate):
    ours = median(result, "seconds")
    share = f"{result['bytes'] / ours / copy_rate / 1e7:6.0f}%" if ours else f"{'-':>7}"
    print(f"{result['name']:32} {share}{beside(result, 'seconds')}{beside(result, 'warm_seconds')}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build", help="where flashkda is (build)")
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--commit", help="what was built, where git cannot tell")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="the results")
    options = parser.parse_args()
    build = options.build.resolve()
    path = options.output or device.results(device.describe(build)) / "decode.json"
    measured = bench(build, device.commit(options.commit), options.quick)
    peers, function = load_fla()
    measured["peers"] = {"fla": importlib.metadata.version("flash-linear-attention") if function else None}
    measured["torch"] = peers.torch.__version__ if peers else None
    copy_rate = measured["machine"]["device"]["copy_gb_per_second"]
    print(f"\n{'us: case':32} {'of copy':>7} {'ours cold':>9} {'fla cold':>9} {'x':>6} {'ours warm':>9}"
          f" {'fla warm':>9} {'x':>6}")
    for result in measured["results"]:
        result["fla"] = measure(peers, function, result) if function else None
        print_beside(result, copy_rate)
    if not options.quick or options.output:
        path = options.output or path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured, indent=2) + "\n")
        print(f"wrote {path}")
    return any("seconds" not in result for result in measured["results"])


if __name__ == "__main__":
    sys.exit(main())
