# SPDX-License-Identifier: MIT
"""A model of one prefill over W ranks: milliseconds and efficiency, to 64 ranks and 16M tokens.

usage: parallel_model.py [--results DIR] [FIGURE.svg]

The time of one GPU is fitted to speed.json's slow gates in DIR (benchmarks/results/h200). What summaries cost and how long
messages take is from parallel.json there, once parallel_speed.py has written it; else it is ASSUMED below, and the table
says so. Prints the table; draws FIGURE if one is named, which needs matplotlib.
"""

import argparse
import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADS = (8, 32, 64, 96)
RANKS = (1, 2, 4, 8, 16, 32, 64)
PER_NODE = 8
#: Begin and finish beside the whole call; microseconds of a collective and of a hop, in a node and between nodes; bytes a
#: second of a GPU, likewise; microseconds of a fold and of each of its steps.
ASSUMED = {"halves": {8: 1.05, 32: 1.05, 64: 1.55, 96: 1.8}, "collective": (12, 30), "hop": (10, 20), "rate": (450e9, 50e9),
           "fold": (5, 1.5)}


def fit_one(results):
    """Milliseconds of one GPU for each number of heads, (fixed, a token): a straight line through the slow cases of one
    sequence, or, from one case, the same start as with 32 heads."""
    points = {heads: [] for heads in HEADS}
    for r in results:
        case = r["case"]
        plain = (case["batch"] == 1 and not case["lengths"] and case["gate"] == "sigmoid" and case["key_dim"] == 128
                 and case["checkpoint_every"] == 0 and case.get("value_heads", case["heads"]) == case["heads"])
        if plain and "seconds" in r and (case["regime"] == "slow" or case["tokens"] > 2**18) and case["heads"] in points:
            points[case["heads"]].append((case["tokens"], r["seconds"]["median"] * 1e3))
    fits = {}
    for heads, times in points.items():
        times = [(t, min(ms for n, ms in times if n == t)) for t in sorted({t for t, _ in times})]
        if len(times) < 2:
            tokens, ms = times[0]
            fits[heads] = (0.02, (ms - 0.02) / tokens)
            continue
        (t0, m0), (t1, m1) = times[0], times[-1]
        slope = (m1 - m0) / (t1 - t0)
        fits[heads] = (m0 - slope * t0, slope)
    return fits


def read_measured(path):
    """What parallel_speed.py found, in the form of ASSUMED; and which of it is measured."""
    model, known = dict(ASSUMED), []
    if not path.exists():
        return model, known
    measured = json.loads(path.read_text())
    ratios = {r["heads"]: (r["begin_ms"] + r["finish_ms"]) / r["whole_ms"] for r in measured.get("halves", [])}
    if ratios:
        model["halves"] = {heads: ratios.get(heads, ASSUMED["halves"][heads]) for heads in HEADS}
        known.append("halves")
    messages = sorted((m["bytes"], m["allgather_us"]) for m in measured.get("messages", []))
    if len(messages) > 1:
        (b0, t0), (b1, t1) = messages[0], messages[-1]
        rate = (b1 - b0) / (t1 - t0) * 1e6
        model["rate"] = (rate, ASSUMED["rate"][1])
        model["collective"] = (max(t0 - b0 / rate * 1e6, 1), ASSUMED["collective"][1])
        known += ["collective and rate in a node"]
    return model, known


def one(fits, heads, tokens):
    fixed, slope = fits[heads]
    return fixed + slope * tokens


def exchange(model, heads, ranks, way):
    """Milliseconds. A message is B and M of one slot, fp32."""
    nodes = -(-ranks // PER_NODE)
    inside, between = model["rate"]
    message, far = heads * 128 * 128 * 4 * 2, int(nodes > 1)
    fold = (model["fold"][0] + (ranks - 1) * model["fold"][1]) * 1e-3
    latency = model["collective"][far] * 1e-3
    if way == "allgather":  # rings over all network cards of a node
        far_bytes = (ranks - 1) * message / (between * min(PER_NODE, ranks)) if far else 0
        return latency + max((ranks - 1) * message / inside, far_bytes) * 1e3 + fold
    if way == "transposed":  # summaries by heads, and states back
        near = 1.5 * message * (min(ranks, PER_NODE) - 1) / ranks / inside
        return 2 * latency + max(near, 1.5 * message * (ranks - min(ranks, PER_NODE)) / ranks / between) * 1e3 + fold
    near_hops, far_hops = (ranks - 1) - (nodes - 1), nodes - 1
    product = 5e-3
    return (near_hops * (model["hop"][0] * 1e-3 + message / 2 / inside * 1e3 + product) +
            far_hops * (model["hop"][1] * 1e-3 + message / 2 / between * 1e3 + product))


WAYS = ("allgather", "transposed", "chain")


def best(model, fits, heads, tokens, ranks):
    """(milliseconds, exchange) of the fastest way."""
    if ranks == 1:
        return one(fits, heads, tokens), "-"
    local = model["halves"][heads] * one(fits, heads, tokens / ranks)
    return min((local + exchange(model, heads, ranks, way), way) for way in WAYS)


def print_table(model, fits):
    for heads in HEADS:
        for tokens in (2**16, 2**20, 2**24):
            whole = one(fits, heads, tokens)
            cells = []
            for ranks in RANKS[1:]:
                ms, way = best(model, fits, heads, tokens, ranks)
                cells.append(f"{ranks}: {ms:.2f} ms {100 * whole / ranks / ms:.0f}% {way}")
            print(f"H {heads}, {tokens} tokens, one GPU {whole:.2f} ms; " + ", ".join(cells))


def draw(model, fits, known, path):
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "flashkda", "font.size": 9, "axes.spines.top": False,
                                "axes.spines.right": False})
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    tokens = [2**n for n in range(12, 25)]
    for ranks in RANKS:
        axes[0].plot(tokens, [best(model, fits, 32, t, ranks)[0] for t in tokens], label=f"{ranks}")
    axes[0].set(xscale="log", yscale="log", xlabel="tokens of one sequence", ylabel="ms", title="32 heads, by ranks")
    axes[0].legend(frameon=False, fontsize=8, ncol=2)
    for heads in HEADS:
        efficiency = [one(fits, heads, 2**20) / r / best(model, fits, heads, 2**20, r)[0] * 100 for r in RANKS]
        axes[1].plot(RANKS, efficiency, marker="o", markersize=3, label=f"{heads} heads")
    axes[1].set(xscale="log", xlabel="ranks", ylabel="efficiency, %", ylim=(0, 105), title="1M tokens")
    axes[1].set_xticks(RANKS, map(str, RANKS))
    axes[1].minorticks_off()
    axes[1].legend(frameon=False, fontsize=8)
    figure.text(0.01, 0.005, f"a model; of its parts measured: one GPU{''.join(', ' + k for k in known)}", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n")[2].removeprefix("usage: "))
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "h200")
    parser.add_argument("figure", nargs="?", type=pathlib.Path)
    options = parser.parse_args()
    fits = fit_one(json.loads((options.results / "speed.json").read_text())["results"])
    model, known = read_measured(options.results / "parallel.json")
    print("measured: one GPU" + "".join(f", {k}" for k in known) + "; all else is assumed")
    print_table(model, fits)
    if options.figure:
        draw(model, fits, known, options.figure)


if __name__ == "__main__":
    main()
