# SPDX-License-Identifier: MIT
"""Draws an input file, or what a benchmark measured.

usage: python -m libflashkda.plot INPUT.safetensors [-o OUT.png]    each head's decay and state over tokens
       python -m libflashkda.plot BENCH.json [-o OUT.png]           speed, as bars

INPUT is a problem of the program flashkda (docs/file-format.md); BENCH is what flashkda bench, benchmarks/cpu_speed.py
or benchmarks/cuda_speed.py wrote. Needs matplotlib, and for INPUT numpy, safetensors and ml_dtypes.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from . import _problem_file
from ._prefill import prefill

Figure = Any  #: a matplotlib.figure.Figure
Array = Any  #: a numpy.ndarray

POINTS = 512  # on a line, about: a long sequence is run in slices


# ---- An input: how its heads forget, and what they hold -------------------------------------------


def log_decay(g: Array, gate: str, lower_bound: float = 0.0, A_log: Array | None = None,
              dt_bias: Array | None = None, **_: Any) -> Array:
    """In nats a token, fp32 [.., HV, K], from g and the options of prefill()."""
    import numpy

    g = g.astype("float32")
    if gate == "none":
        return g
    if dt_bias is not None:
        g = g + dt_bias.astype("float32")
    rate = 1 if A_log is None else numpy.exp(A_log.astype("float32"))[:, None]
    if gate == "softplus":
        return -rate * numpy.logaddexp(0, g)
    return lower_bound * (1 + numpy.tanh(rate * g / 2)) / 2


def sequences(problem: _problem_file.Problem) -> list[tuple[int, int, int]]:
    """(row of the batch, first token, token after the last) of each sequence."""
    B, T = problem.inputs[0].shape[:2]
    if problem.cu_seqlens is None:
        return [(b, 0, T) for b in range(B)]
    ends = problem.cu_seqlens.tolist()
    return [(0, *span) for span in zip(ends, ends[1:])]


def trace(problem: _problem_file.Problem, n: int, step: int) -> Iterator[tuple[int, Array, Array]]:
    """Sequence n, run in slices of step tokens that hand on the state. For each slice: the token after it, every
    head's decay (the mean over channels and tokens) and the Frobenius norm of its state afterwards."""
    import numpy

    b, start, end = sequences(problem)[n]
    state = None if problem.initial_state is None else problem.initial_state[n:n + 1].astype("float32")
    for first in range(start, end, step):
        last = min(first + step, end)
        q, k, v, g, beta = (x[b:b + 1, first:last] for x in problem.inputs)
        out = numpy.empty(v.shape, "float32")  # fp32 arithmetic
        _, state = prefill(q, k, v, g, beta, **problem.options, initial_state=state, output_final_state=True, out=out)
        decay = numpy.exp(log_decay(g, **problem.options)).mean((0, 1, 3))
        yield last, decay, numpy.linalg.norm(state[0].astype("float64"), axis=(1, 2))


def draw_lines(axes: Any, tokens: list[int], heads: Array, colours: Array) -> None:
    """heads: [points, HV]"""
    for head, colour in enumerate(colours):
        axes.plot(tokens, heads[:, head], color=colour, linewidth=1, marker="." if len(tokens) == 1 else None,
                  label=f"head {head}")


def draw_problem(problem: _problem_file.Problem, title: str) -> Figure:
    import numpy
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    q, _, v = problem.inputs[:3]
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    spans = sequences(problem)
    step = max(1, math.ceil(B * T / POINTS))
    figure = Figure(figsize=(10, 6), layout="constrained")
    decay_axes, norm_axes = figure.subplots(2, sharex=True)
    colours = colormaps["viridis"](numpy.linspace(0, 0.9, HV))
    for n, (b, start, _) in enumerate(spans):
        points = list(trace(problem, n, step))
        if not points:
            continue
        tokens = [b * T + token for token, _, _ in points]
        draw_lines(decay_axes, tokens, numpy.array([decay for _, decay, _ in points]), colours)
        draw_lines(norm_axes, tokens, numpy.array([norm for _, _, norm in points]), colours)
        if len(spans) > 1:
            for axes in (decay_axes, norm_axes):
                axes.axvline(b * T + start, color="grey", linewidth=0.5, linestyle="--")
    decay_axes.ticklabel_format(axis="y", useOffset=False)  # 0.999, not 1 - 1e-3
    decay_axes.set_ylabel("decay, mean over channels" + (f"\nand {step} tokens" if step > 1 else ""))
    norm_axes.set_ylim(bottom=0)
    norm_axes.set_ylabel("norm of the state")
    norm_axes.set_xlabel("token" + (f", {len(spans)} sequences one after another" if len(spans) > 1 else ""))
    handles, labels = norm_axes.get_legend_handles_labels()
    figure.legend(handles[:HV], labels[:HV], loc="outside right upper", ncols=math.ceil(HV / 32), frameon=False)
    figure.suptitle(f"{title}: gate {problem.options['gate']}, B {B}, T {T}, H {H}, HV {HV}, K {K}, V {V}", fontsize=10)
    return figure


# ---- A benchmark: GFLOP/s of every case -----------------------------------------------------------


def rates(result: dict[str, Any]) -> dict[str, float | None]:
    """GFLOP/s by level and by peer; None where the result was wrong, and so not timed."""
    found = {f"level {result['level']}": result.get("gflops")}
    for name, peer in result.get("peers", {}).items():
        if peer:
            seconds = (peer["seconds"] or {}).get("median")
            work = result["gflops"] * result["seconds"]["median"] if "seconds" in result else None
            found[name] = work / seconds if work and seconds else None
    return found


def row_name(result: dict[str, Any]) -> str:
    threads = result.get("threads")
    return (f"{result['name']}, {result['case']['out_dtype']} output"
            + (f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""))


def draw_benchmark(measured: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    rows: dict[str, dict[str, float | None]] = {}
    for result in measured["results"]:
        rows.setdefault(row_name(result), {}).update(rates(result))
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    bars = sum(map(len, rows.values()))
    figure = Figure(figsize=(11, 1.5 + 0.14 * bars + 0.1 * len(rows)), layout="constrained")
    axes = figure.subplots()
    place = 0.0
    ticks = []
    for row in rows.values():
        ticks.append(place + (len(row) - 1) / 2)
        for name, rate in row.items():
            axes.barh(place, rate or 0, 0.9, color=f"C{names.index(name)}")
            axes.annotate("wrong, not timed" if rate is None else f"{rate:.0f}", (rate or 0, place), (3, 0),
                          textcoords="offset points", va="center", fontsize=6)
            place += 1
        place += 0.7
    axes.set_yticks(ticks, list(rows), fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.set_xlabel("GFLOP/s (8 K V to a token of a head)")
    machine = measured["machine"]
    device = machine.get("device")
    axes.set_title(f"{device['name'] if device else machine['cpu']}; commit {measured.get('commit')}, "
                   f"{measured['date'][:10]}", fontsize=10)
    handles = [axes.barh(0, 0, color=f"C{i}") for i in range(len(names))]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


# ---- The command ----------------------------------------------------------------------------------


def draw(path: pathlib.Path) -> Figure:
    if path.suffix != ".json":
        return draw_problem(_problem_file.read(str(path)), path.name)
    measured = json.loads(path.read_text())
    if not isinstance(measured, dict) or not {"results", "machine"} <= measured.keys():
        raise ValueError("holds no benchmark; expected what flashkda bench writes")
    return draw_benchmark(measured)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m libflashkda.plot", description=__doc__.splitlines()[0])
    parser.add_argument("input", metavar="INPUT", type=pathlib.Path, help="a problem (.safetensors) or a benchmark (.json)")
    parser.add_argument("-o", "--output", metavar="OUT", type=pathlib.Path,
                        help="the picture (the name of INPUT with .png, in the current folder)")
    options = parser.parse_args()
    output = options.output or pathlib.Path(options.input.with_suffix(".png").name)
    try:
        draw(options.input).savefig(output, dpi=150)
    except ImportError as error:
        sys.exit(f"libflashkda.plot needs {error.name}, which is not installed; see [plot] in docs/python.md")
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        sys.exit(f"{options.input}: {error}")
    print(f"drew {output}")


if __name__ == "__main__":
    main()
