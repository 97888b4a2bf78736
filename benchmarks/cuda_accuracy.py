# SPDX-License-Identifier: MIT
"""Compares the CUDA backend and other implementations on the same GPU with the recurrence in fp64, on the inputs of the
accuracy table (docs/maths.md): captured ones, random ones in both gate regimes, uniform ones, nearly equal keys.

usage: cuda_accuracy.py [--build DIR] [--flashkda FOLDER] [--commit NAME] [-o FILE] [INPUT.safetensors ...]

The inputs are those in data/, INPUTs and the random ones; fla, FlashKDA and the kernel of nvidia-cudnn-frontend are
compared where they are installed and take the input. Writes benchmarks/results/DEVICE/accuracy.json, or FILE, as it
goes. Exit status 1 if a result of ours is further off than it may be. Needs torch, safetensors and the installed package.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
import types

import device
import libflashkda
import peers
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
PORTABLE = "sm80"  # the level for every GPU
MARGIN = 1.15  # of the columns below, which are of an emulation that rounds every operand to bf16
CAPTURED = {"sigmoid": (4.0e-3, 2.5e-3), "softplus": (4.6e-3, 3.3e-3)}  # output, state
TOKENS, HEADS, DIM, LOWER_BOUND = 4096, 2, 128, -5.0


# ---- Inputs -------------------------------------------------------------------------------------

def problem(q, k, v, g, beta, A_log, dt_bias, lower_bound):
    """One sequence of tensors [T, H, ..] as peers.py has it, on the GPU, q to beta in bf16."""
    q, k, v, g, beta = (t[None].bfloat16().cuda().contiguous() for t in (q, k, v, g, beta))
    return types.SimpleNamespace(
        q=q, k=k, v=v, g=g, beta=beta, A_log=A_log.float().cuda(), dt_bias=dt_bias.float().cuda().view(v.shape[2], -1),
        state=None, sequences=1, cu_seqlens=None, first_length=q.shape[1], lower_bound=lower_bound)


def captured(path):
    """The problem of a file, and what it may err."""
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        gate = file.metadata()["gate"]
        tensors = [file.get_tensor(name) for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")]
    tensors = [t[0] if t.ndim > rank else t for t, rank in zip(tensors, (3, 3, 3, 3, 2, 1, 2), strict=True)]
    return problem(*tensors, LOWER_BOUND if gate == "sigmoid" else None), CAPTURED[gate]


def made(tokens=TOKENS):
    """Names to problems and what they may err."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, mean=0.0):
        return torch.randn(shape, generator=generator) + mean

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    rows, step = (tokens, HEADS, DIM), (tokens, HEADS)
    A_log, bias, none = uniform(HEADS), uniform(HEADS, DIM), torch.zeros(HEADS, DIM)
    yield "strong random gates", problem(*(normal(*rows) for _ in range(4)), normal(*step), A_log, bias,
                                         LOWER_BOUND), (4.1e-3, 2.4e-3)
    yield "slow random gates", problem(*(normal(*rows) for _ in range(3)), normal(*rows, mean=-7.0), normal(*step),
                                       A_log, none, LOWER_BOUND), (5.1e-3, 4.2e-3)
    for g, columns in ((-8.0, (4.0e-3, 5.1e-3)), (-4.0, (3.2e-3, 3.8e-3)), (0.0, (3.5e-3, 3.2e-3))):
        yield f"uniform inputs, g = {g:g}", problem(*(uniform(*rows) for _ in range(3)), torch.full(rows, g),
                                                    normal(*step), A_log, bias, LOWER_BOUND), columns
    one = torch.ones(tokens, 1, DIM)
    yield "near-collinear keys", problem(one, one, normal(16, 1, DIM).repeat(tokens // 16, 1, 1), one * -12,
                                         torch.full((tokens, 1), 8.0), torch.zeros(1), torch.zeros(1, DIM),
                                         LOWER_BOUND), (1.5e-2, 2.4e-2)


def inputs(paths):
    for path in [*sorted((ROOT / "data").glob("*.safetensors")), *paths]:
        yield f"captured, {path.stem}", *captured(path)
    yield from made()


# ---- Implementations ----------------------------------------------------------------------------

@contextlib.contextmanager
def on_level(level):
    """Has calls run on a level; the best, if None."""
    before = os.environ.pop("FLASH_KDA_CUDA", None)
    os.environ.update({"FLASH_KDA_CUDA": level} if level else {})
    try:
        yield
    finally:
        os.environ.pop("FLASH_KDA_CUDA", None)
        os.environ.update({"FLASH_KDA_CUDA": before} if before else {})


def options_of(x):
    """What prefill() is told of a problem."""
    return {"qk_norm": True, "beta_mode": "sigmoid", "gate": "softplus" if x.lower_bound is None else "sigmoid",
            "lower_bound": x.lower_bound}


def ours(x, level):
    """A call of prefill() on a level."""
    def call():
        with on_level(level):
            return libflashkda.prefill(x.q, x.k, x.v, x.g, x.beta, A_log=x.A_log, dt_bias=x.dt_bias,
                                       output_final_state=True, **options_of(x))
    return call


def case_of(x):
    """What peers.py asks of a case."""
    return {"state_dtype": "fp32", "dtype": "bf16", "gate": "softplus" if x.lower_bound is None else "sigmoid",
            "heads": x.q.shape[2], "value_heads": x.v.shape[2], "key_dim": x.q.shape[3], "value_dim": x.v.shape[3],
            "checkpoint_every": 0}


def compare(x, loaded, levels):
    """Names to errors; None where an implementation is not here or does not take it."""
    answer, case = peers.exact(x, heads=x.v.shape[2]), case_of(x)
    calls = {name: ours(x, level) for name, level in levels.items()}
    calls |= {name: peer.prepare(x, case) if peer and peer.takes(case) else None for name, peer in loaded.items()}
    return {name: peers.check(call, x, answer) if call else None for name, call in calls.items()}


def within(errors, columns):
    return all(error is not None and error <= MARGIN * column
               for error, column in zip((errors["output_error"], errors["state_error"]), columns, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="*", type=pathlib.Path, help="more captured inputs")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build", help="where flashkda is (build)")
    parser.add_argument("--flashkda", type=pathlib.Path, help="a folder with FlashKDA's package, built")
    parser.add_argument("--commit", help="what was built, where git cannot tell")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="the results")
    options = parser.parse_args()
    gpu, loaded = device.describe(options.build.resolve()), peers.load(options.flashkda)
    levels = {"ours": None} | ({"portable": PORTABLE} if gpu["compute_capability"].startswith("9.") else {})
    names, rows, good = [*levels, *loaded], [], True
    print(f"{'output / state':28} {'at most':>17}" + "".join(f" {name:>17}" for name in names))
    path = options.output or device.results(gpu) / "accuracy.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"version": libflashkda.__version__, "commit": device.commit(options.commit), "device": gpu,
             "torch": torch.__version__,
             "peers": {name: peer.version if peer else None for name, peer in loaded.items()}, "complete": False}
    with torch.inference_mode():
        for name, x, columns in inputs(options.inputs):
            errors = compare(x, loaded, levels)
            fits = all(within(errors[level], columns) for level in levels)
            good = good and fits
            rows.append({"input": name, "tokens": x.q.shape[1], "heads": x.v.shape[2], "within": fits,
                         "at_most": [MARGIN * column for column in columns], "errors": errors})
            cells = [tuple(MARGIN * column for column in columns)]
            cells += [e and (e["output_error"], e["state_error"]) for e in errors.values()]
            print(f"{name:28}" + "".join(f" {show(cell):>17}" for cell in cells) + ("" if fits else "  TOO FAR"),
                  flush=True)
            path.write_text(json.dumps({**about, "errors": rows}, indent=2) + "\n")
        path.write_text(json.dumps({**about, "complete": True, "errors": rows}, indent=2) + "\n")
    print(f"wrote {path}")
    sys.exit(not good)


def show(cell):
    return " / ".join("wrong" if error is None else f"{error:.1e}" for error in cell) if cell else "-"


if __name__ == "__main__":
    main()
