# SPDX-License-Identifier: MIT
"""What a state loses while a sequence is decoded, by the dtype that it is stored in.

usage: state_drift.py [--quick] [--commit NAME]

Takes sequences through decode on the CPU, one token a call and 16, with the state in fp32, fp16 and bf16, and compares the last
one with the fp64 oracle's: sequences whose gates do not change and that are seldom written to or only read, and the captured
inputs in data/, again and again. Needs libflashkda with its extra "plot". Writes benchmarks/results/cpu/state-drift.json and
the table in docs/decode.md; with --quick, a sixteenth of the tokens, nothing.
"""

import argparse
import json
import pathlib

import libflashkda
import ml_dtypes
import numpy as np
from libflashkda import _problem_file

import device

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "decode.md", ROOT / "benchmarks" / "results" / "cpu" / "state-drift.json"
BEGIN, END = "<!-- written by benchmarks/state_drift.py -->\n", "<!-- end -->\n"
K, V = 128, 32
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
CALLS = (1, 16)  # tokens
SELDOM = 1 / (1 + np.exp(9.0))  # beta
CONSTANT = [("none", g, SELDOM) for g in (-1e-3, -1e-4, -1e-5, -1e-6, -1e-7)]
CONSTANT += [("none", g, 0) for g in (-1e-4, -1e-5, -1e-6, -1e-7)]  # at -1e-3 fp32 holds nothing at the end
CONSTANT += [("softplus", g, SELDOM) for g in (-9.0, -11.0)]


def constant(tokens, gate, g, beta):
    """One head, whose gates are all g and whose steps are all beta."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, tokens, 1, dim), dtype="f") for dim in (K, K, V))
    inputs = (q, k, v, np.full((1, tokens, 1, K), g, "f"), np.full((1, tokens, 1), beta, "f"))
    return inputs, random.standard_normal((1, 1, V, K), dtype="f"), {"gate": gate, "qk_norm": True}


def captured(tokens, path):
    """All heads of a captured sequence, which begins again when it ends."""
    problem = _problem_file.read(path)
    repeats = -(-tokens // problem.inputs[0].shape[1])
    inputs = tuple(np.concatenate([x] * repeats, axis=1)[:, :tokens] for x in problem.inputs)
    heads, width = inputs[2].shape[2:]
    return inputs, np.zeros((1, heads, width, inputs[0].shape[3]), "f"), problem.options


def errors(inputs, start, options):
    """Error ratios of the last state, by dtype and tokens a call."""
    tokens, found = inputs[0].shape[1], {}
    out = np.empty_like(inputs[2], dtype="f")
    _, exact = libflashkda.prefill(*inputs, initial_state=start, output_final_state=True, out=out, backend="reference",
                                   **options)
    for name, dtype in DTYPES.items():
        for count in CALLS:
            state = start.astype(dtype)
            for at in range(0, tokens, count):
                libflashkda.decode(*(x[:, at:at + count] for x in inputs), state, output=False, **options)
            difference = state.astype("d") - exact
            found[f"{name}, {count}"] = float(f"{np.sqrt(np.mean(difference**2) / np.mean(exact.astype('d')**2)):.2g}")
    return found


def rows(share):
    """Measures one row after another: what it is, its tokens, its errors."""
    for gate, g, beta in CONSTANT:
        what = f"log decay {g:g}" if gate == "none" else f"softplus gate at {g:g}"
        print(f"{what}, beta {beta:.1e}", flush=True)
        tokens = 131072 // share
        yield {"what": f"{what}, {'seldom written' if beta else 'only read'}", "tokens": tokens,
               "errors": errors(*constant(tokens, gate, g, beta))}
    for path in sorted((ROOT / "data").glob("*.safetensors")):
        print(path.name, flush=True)
        tokens = 32768 // share
        yield {"what": f"captured, {path.stem.removeprefix('small_')} gate", "tokens": tokens,
               "errors": errors(*captured(tokens, path))}


def table(measured):
    columns = [f"{name}, {count}" for name in DTYPES for count in CALLS]
    heads = [f"{name}, {count} a call" for name in DTYPES for count in CALLS]
    lines = [f"| gates | tokens | {' | '.join(heads)} |", "|---" * (2 + len(columns)) + "|"]
    lines += [f"| {row['what']} | {row['tokens']:,} | " + " | ".join(f"{row['errors'][c]:.1e}" for c in columns) + " |"
              for row in measured]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n")[2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--commit")
    options = parser.parse_args()
    measured = list(rows(16 if options.quick else 1))
    print(table(measured))
    if options.quick:
        return
    RESULTS.write_text(json.dumps({"commit": device.commit(options.commit), "level": libflashkda._C.cpu_level(),
                                   "rows": measured}, indent=2) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table(measured) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
