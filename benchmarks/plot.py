# SPDX-License-Identifier: MIT
"""Draws figures of speed from what cpu_speed.py, cuda_speed.py or model_speed.py measured.

usage: plot.py MEASURED.json FIGURE.svg
       plot.py --overview FIGURE.svg        the README's few bars, whose cells overview.py names
"""

import json
import pathlib
import sys

import matplotlib
from matplotlib import pyplot
from matplotlib.patches import Patch

import overview

# The same JSON gives the same bytes.
matplotlib.rcParams.update({"svg.hashsalt": "flashkda", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False})
COLOURS = {"fp32": "#4878a8", "bf16": "#e08a3c"}
LEVEL_CASE = {"tokens": 4096, "heads": 8, "key_dim": 128, "gate": "softplus", "regime": "slow"}


def find(results, **wanted):
    """Results whose fields, or whose case's fields, are as wanted."""
    return [r for r in results if all({**r["case"], **r}[key] == value for key, value in wanted.items())]


def draw_matmul(axes, measured):
    rate = measured["matmul"]["gflops"]
    axes.axvline(rate, color="black", linewidth=1, linestyle="--")
    axes.text(rate, 1.01, "numpy fp32 matmul", transform=axes.get_xaxis_transform(), ha="center", va="bottom")


def draw_bars(axes, labels, bars):
    """Bars, two to a label at most, each a (place of its label, result)."""
    for place, result in bars:
        dtype = result["case"]["out_dtype"]
        y = place + (0.2 if dtype == "bf16" else -0.2)
        axes.barh(y, result["gflops"], 0.38, color=COLOURS[dtype])
        axes.annotate(f"{result['gflops']:.0f}", (result["gflops"], y), (3, 0), textcoords="offset points",
                      va="center", fontsize=8)
    axes.margins(x=0.1)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("GFLOP/s (8 K V to a token of a head)")


def draw_levels(axes, measured):
    results = find(measured["results"], threads=measured["machine"]["threads"], **LEVEL_CASE)
    levels = list(dict.fromkeys(r["level"] for r in results))
    draw_bars(axes, levels, [(levels.index(r["level"]), r) for r in results])
    draw_matmul(axes, measured)
    axes.set_title("every level: T 4096, H 8, slow softplus gate\n", fontsize=10)


def draw_cases(axes, measured):
    best = measured["results"][-1]["level"]
    results = find(measured["results"], level=best)
    names = [f"{r['name']}, {r['threads']} thread" + ("s" if r["threads"] > 1 else "") for r in results]
    labels = list(dict.fromkeys(names))
    draw_bars(axes, labels, [(labels.index(name), r) for name, r in zip(names, results)])
    draw_matmul(axes, measured)
    axes.set_title(f"every case: level {best}\n", fontsize=10)


def draw(measured, path):
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), width_ratios=[1, 1.3], layout="constrained")
    draw_levels(left, measured)
    draw_cases(right, measured)
    machine = measured["machine"]
    figure.suptitle(f"Prefill on {machine['cpu']}, {machine['threads']} threads: bf16 inputs, K = V = 128 unless said,"
                    f" gate and norm included; commit {measured['commit']}, {measured['date'][:10]}", fontsize=10)
    figure.legend([Patch(color=colour) for colour in COLOURS.values()], [f"{dtype} output" for dtype in COLOURS],
                  loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.savefig(path, metadata={"Date": None})


# ---- CUDA ---------------------------------------------------------------------------------------

# Drawn in this order: the portable level lies under what it is compared with.
MARKS = {"portable": ("o", "#e3bf97"), "ours": ("o", "#e08a3c"), "fla": ("s", "#4878a8"), "flashkda": ("^", "#6a9f58"),
         "cudnn": ("D", "#8a6bb0")}
LABELS = {"ours": "libflashkda", "portable": "its portable level", "fla": "fla chunk_kda", "flashkda": "FlashKDA",
          "cudnn": "cuDNN frontend, g and beta in fp32"}


def medians(result, measured):
    """Milliseconds by implementation; and the least that moving the tensors takes at the rate of a copy."""
    copy = measured["machine"]["device"]["copy_gb_per_second"] * 1e9
    times = {"floor": result["bytes"] / copy * 1e3}
    timed = {"ours": result, "portable": result.get("portable"), **result["peers"]}
    return times | {name: r["seconds"]["median"] * 1e3 for name, r in timed.items() if r and r.get("seconds")}


def draw_regime(axes, measured, regime):
    results = find(measured["results"], regime=regime)
    for place, result in enumerate(results):
        times = medians(result, measured)
        axes.plot(times["floor"], place, marker="|", color="black", markersize=9)
        for name, (mark, colour) in MARKS.items():
            if name in times:
                axes.plot(times[name], place, marker=mark, color=colour, linestyle="none", markersize=6)
    axes.set_xscale("log")
    axes.grid(axis="both", linewidth=0.3)
    axes.set_yticks(range(len(results)), [r["name"].removesuffix(f"-{regime}") for r in results])
    axes.invert_yaxis()
    axes.set_xlabel("ms, further left is faster")
    axes.set_title(f"{regime} gates", fontsize=10)


def draw_cuda(measured, path):
    regimes = [regime for regime in ("strong", "slow") if find(measured["results"], regime=regime)]
    figure, panels = pyplot.subplots(1, len(regimes), figsize=(13, 8), layout="constrained", squeeze=False)
    for axes, regime in zip(panels[0], regimes):
        draw_regime(axes, measured, regime)
    device, peers = measured["machine"]["device"], measured["peers"]
    drawn = {"ours": True, "portable": any(r.get("portable") for r in measured["results"]), **peers}
    here = [name for name in LABELS if drawn.get(name)]
    marks = [pyplot.Line2D([], [], marker=MARKS[n][0], color=MARKS[n][1], linestyle="none") for n in here]
    marks.append(pyplot.Line2D([], [], marker="|", color="black", linestyle="none"))
    labels = [LABELS[n] + (f" {peers[n]}" if peers.get(n) else "") for n in here] + ["a copy of all tensors' bytes"]
    figure.legend(marks, labels, loc="outside lower center", ncols=len(marks), frameon=False)
    figure.suptitle(f"Prefill on {device['name']}, GPU time by graph replay: bf16, K = V = 128 unless said, gate and"
                    f" norm included; commit {measured['commit']}, {measured['date'][:10]}", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


# ---- The README's ---------------------------------------------------------------------------------

LONGEST = 12  # times ours; longer bars end there, their numbers say how long they are
OVERVIEW = {"ours": MARKS["ours"][1], "fp32": MARKS["portable"][1], "flashkda": MARKS["flashkda"][1],
            "fla": MARKS["fla"][1], "cudnn": MARKS["cudnn"][1], "ggml": "#8c8c8c"}


def draw_times(axes, groups, title):
    """Bars of times, in those of ours, with milliseconds beside them. groups: labels to times by implementation."""
    for place, times in enumerate(groups.values()):
        height = 0.8 / len(times)
        for i, (name, time) in enumerate(times.items()):
            longer, y = time / times["ours"], place + (i - (len(times) - 1) / 2) * height
            axes.barh(y, min(longer, LONGEST), height * 0.92, color=OVERVIEW[name])
            text = f"{time:.{3 if time < 0.1 else 2 if time < 10 else 0}f} ms" + (f", {longer:.1f} times as long" if name != "ours" else "")
            axes.annotate(text, (min(longer, LONGEST), y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xlim(0, LONGEST * 1.45)
    axes.set_xticks([])
    axes.spines.bottom.set_visible(False)
    axes.set_title(title, fontsize=10)


def draw_overview(measured, cpu, path):
    figure, rows = pyplot.subplots(2, 2, figsize=(13, 7), layout="constrained", height_ratios=[12, 9])
    for axes, regime in zip(rows[0], overview.REGIMES):
        cells = {label: medians(find(measured["results"], name=f"{shape}-{regime}")[0], measured)
                 for shape, label in overview.SHAPES.items()}
        draw_times(axes, {label: {name: times[name] for name in OVERVIEW if name in times}
                          for label, times in cells.items()},
                   f"prefill on {measured['machine']['device']['name']}, {regime} gates: {overview.REGIMES[regime]}")
    machine = cpu["machine"]
    for axes, cells, what in zip(rows[1], overview.CPU_CELLS, ("prefill", "decode of one token")):
        draw_times(axes, {label: overview.cpu_times(cpu, name) for name, label in cells.items()},
                   f"{what} on {machine['cpu']}, {machine['threads']} threads")
    labels = LABELS | {"fp32": "libflashkda in fp32", "ggml": "ggml's op in fp32, as llama.cpp runs it"}
    figure.legend([Patch(color=colour) for colour in OVERVIEW.values()], [labels[name] for name in OVERVIEW],
                  loc="outside lower center", ncols=len(OVERVIEW), frameon=False)
    figure.suptitle("Shorter is faster", fontsize=11)
    figure.savefig(path, metadata={"Date": None, "Source": f"commit {measured['commit']}, commit {cpu['commit']}"})


# ---- A whole model --------------------------------------------------------------------------------

MODELS = {"kimi_linear": "Kimi Linear: MLA in {full_attention_layers} of {layers} layers", "mla": "MLA in all layers"}
MODEL_COLOURS = {"kimi_linear": "#e08a3c", "mla": "#4878a8"}
PART_COLOURS = {"attention": "#4878a8", "kda": "#e08a3c", "experts": "#6a9f58", "rest": "#b0b0b0"}


def tokens_label(tokens):
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K"


def draw_cache(axes, results):
    for name, result in results.items():
        lengths = [int(tokens) for tokens in result["cache_bytes"]]
        axes.plot(lengths, [size / 1e9 for size in result["cache_bytes"].values()], marker="o", markersize=4,
                  color=MODEL_COLOURS[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, map(tokens_label, lengths))
    axes.grid(linewidth=0.3)
    axes.set_xlabel("tokens of a sequence")
    axes.set_title("GB of a sequence's cache", fontsize=10)


def draw_steps(axes, results, largest):
    """Steps of decode, by parts, at the largest batches or at one sequence; a group a length."""
    rows = []
    for tokens in dict.fromkeys(m["tokens"] for m in results["mla"]["decode"]):
        for name, result in results.items():
            rows.append((name, (max if largest else min)((m for m in result["decode"] if m["tokens"] == tokens),
                                                         key=lambda m: m["batch"])))
    for place, (name, measured) in enumerate(rows):
        left, step = 0, measured["seconds"]["median"] * 1e3
        for part, colour in PART_COLOURS.items():
            width = measured["split"].get(part, 0) * 1e3
            axes.barh(place, width, 0.7, left=left, color=colour)
            left += width
        axes.annotate(f"{step:.1f} ms, {measured['tokens_per_second']:,.0f} tokens/s", (step, place), (3, 0),
                      textcoords="offset points", va="center", fontsize=8)
    names = {"kimi_linear": "Kimi Linear", "mla": "MLA alone"}
    axes.set_yticks(range(len(rows)), [f"{tokens_label(m['tokens'])}, batch {m['batch']}\n{names[name]}"
                                       for name, m in rows])
    axes.invert_yaxis()
    axes.margins(x=0.5)
    axes.set_xlabel("ms of a step")
    axes.set_title("decode, the largest batch that fits" if largest else "decode, one sequence", fontsize=10)


def draw_model(measured, path):
    results = measured["results"]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    draw_cache(left, results)
    draw_steps(middle, results, largest=False)
    draw_steps(right, results, largest=True)
    models = [(Patch(color=MODEL_COLOURS[n]), label.format(**results[n])) for n, label in MODELS.items()]
    parts = [(Patch(color=colour), {"kda": "KDA", "attention": "MLA"}.get(n, n)) for n, colour in PART_COLOURS.items()]
    left.legend(*zip(*models), frameon=False, fontsize=8)
    figure.legend(*zip(*parts), loc="outside lower center", ncols=len(parts), frameon=False)
    first = {n: r["first_token"] for n, r in results.items()}
    figure.suptitle(f"{measured['model']}, on {(measured['device'] or {'name': 'the CPU'})['name']}; first token of "
                    f"{first['mla']['tokens']:,} after {first['kimi_linear']['seconds']:.2f} s, with MLA alone "
                    f"{first['mla']['seconds']:.2f} s; commit {measured['commit']}", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def drawing(measured):
    """What draws these measurements."""
    if "results" in measured and "mla" in measured["results"]:
        return draw_model
    return draw_cuda if measured["machine"].get("device") else draw


if __name__ == "__main__":
    if sys.argv[1] == "--overview":
        draw_overview(overview.read("h200/speed.json"), overview.read(overview.CPU), sys.argv[2])
    else:
        what = json.loads(pathlib.Path(sys.argv[1]).read_text())
        drawing(what)(what, sys.argv[2])
