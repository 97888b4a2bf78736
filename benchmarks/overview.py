# SPDX-License-Identifier: MIT
"""What README and docs say of speed and errors, from what was measured. Python's standard library is enough.

usage: overview.py [--write]

Compares the text between the marks of every page with the results, or writes it; and sees that every figure is drawn from
the results that are there, which plot.py does.
"""

import json
import pathlib
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = 120
BEGIN, END = "<!-- speed: written by benchmarks/overview.py -->\n", "<!-- /speed -->\n"

# Cells of the table of cuda_speed.py, and what the figure calls them.
SHAPES = {"T8192-H96-sigmoid": "8,192 tokens,\n96 heads", "T8192-H32-sigmoid": "8,192 tokens,\n32 heads",
          "T65536-H8-sigmoid": "65,536 tokens,\n8 heads"}
REGIMES = {"strong": "the past is soon forgotten", "slow": "as trained heads have them"}
PEERS = {"flashkda": "FlashKDA", "fla": "fla", "cudnn": "cuDNN"}

# The README's CPU, and its cells of cpu_ggml.py: prefill, then decode.
CPU = "cpu/amd-epyc-2-threads-ggml.json"
CPU_CELLS = ({"T4096-H8": "4,096 tokens,\n8 heads", "T4096-H32": "4,096 tokens,\n32 heads",
              "T65536-H1": "65,536 tokens,\n1 head"},
             {"decode B1-H32": "1 sequence,\n32 heads", "decode B16-H32": "16 sequences,\n32 heads"})

# Figures and what they are drawn from.
FIGURES = {"overview.svg": ["h200/speed.json", CPU], "h200/speed.svg": ["h200/speed.json"],
           "cpu/speed.svg": ["cpu/amd-epyc-2-threads.json"]}

# Cells of the pages for users of one peer: large and small, few heads and many, and what has no other cell.
PREFILL = ["T8192-H96-sigmoid-strong", "T8192-H96-sigmoid-slow", "N6-T8192-H96-sigmoid-slow", "B8-T1024-H96-sigmoid-slow",
           "T8192-H32-sigmoid-strong", "T8192-H32-sigmoid-slow", "T8192-H8-sigmoid-strong", "T8192-H8-sigmoid-slow",
           "T131072-H1-sigmoid-slow", "T1024-H4-sigmoid-slow", "B64-T64-H32-sigmoid-slow",
           "T8192-H32-sigmoid-slow-bf16state", "T8192-H32-softplus-slow", "T8192-H32-K64-V64-sigmoid-slow",
           "T8192-H8-HV32-sigmoid-slow", "T8192-H32-sigmoid-slow-every64"]
DECODE = ["H32-B1-T1-fp32", "H32-B1-T1-bf16", "H32-B16-T1-fp32", "H32-B16-T1-bf16", "H32-B256-T1-fp32",
          "H32-B256-T1-bf16", "H96-B256-T1-fp32", "H96-B256-T1-bf16", "H32-B64-T4-fp32", "H32-B64-T4-bf16",
          "H32-B64-T4-fp32, state each"]


def read(name):
    return json.loads((RESULTS / name).read_text())


def median(measured):
    return measured["seconds"]["median"]


def table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def measured_on(measured, what, how, *peers):
    """The line under a table: what was measured, where, how, when and beside which releases."""
    device = measured.get("device") or measured["machine"]["device"]
    when = f", {measured['date'][:10]}" if "date" in measured else ""
    beside = ", ".join(f"{PEERS[peer]}{chr(39) + 's frontend' if peer == 'cudnn' else ''} {measured['peers'][peer]}"
                       for peer in peers)
    return f"{what} on an {device['name']}, {how}, commit {measured['commit'][:7]}{when}; {beside}."


# ---- README ---------------------------------------------------------------------------------------

def times(measured, name):
    result = next(r for r in measured["results"] if r["name"] == name)
    return {"ours": median(result), **{peer: median(result["peers"][peer]) for peer in PEERS}}


def cpu_times(measured, name):
    """Milliseconds of a cell, by what ran it."""
    cell = next(c for c in measured["cells"] if c["name"] == name)
    return {"ours": cell["ours_bf16_ms"]["middle_ms"], "fp32": cell["ours_fp32_ms"]["middle_ms"],
            "ggml": cell["ggml_ms"]["middle_ms"]}


def faster_than_ggml(cells, *sides):
    """From how many to how many times as fast these cells are."""
    measured = read(CPU)
    times = [took["ggml"] / took[side] for took in (cpu_times(measured, name) for name in cells) for side in sides]
    return f"{min(times):.1f} to {max(times):.1f}"


def readme():
    speed, rows = read("h200/speed.json"), []
    first, *others = PEERS.values()
    for shape, label in SHAPES.items():
        for regime in REGIMES:
            took = times(speed, f"{shape}-{regime}")
            rows.append([label.replace("\n", " "), regime, f"{took['ours'] * 1e3:.2f} ms",
                         *(f"{took[peer] / took['ours']:.1f}" for peer in PEERS)])
    head = ["one sequence, K = V = 128, bf16", "gates", "libflashkda", f"times as fast as {first}",
            *(f"... as {other}" for other in others)]
    prefill, decode = CPU_CELLS
    return [*table(head, rows), "", measured_on(speed, "GPU time of prefill", "gate and norm included", *PEERS), "",
            f"On a CPU, prefill is {faster_than_ggml(prefill, 'ours')} times as fast as ggml's op, which llama.cpp runs in"
            f" fp32, and {faster_than_ggml(prefill, 'fp32')} times in fp32 itself; decode is"
            f" {faster_than_ggml(decode, 'ours', 'fp32')} times as fast."]


# ---- The page of all speeds -----------------------------------------------------------------------

def speed_on_cpu():
    measured, rows = read(CPU), []
    for cells, what in zip(CPU_CELLS, ("prefill", "decode")):
        for name, label in cells.items():
            took = cpu_times(measured, name)
            rows.append([f"{what}, {label}".replace("\n", " "), *(f"{took[side]:.3g} ms" for side in ("ggml", "fp32", "ours")),
                         *(f"{took['ggml'] / took[side]:.1f}" for side in ("fp32", "ours"))])
    machine, ggml = measured["machine"], measured["ggml"]
    head = ["K = V = 128", "ggml, fp32", "libflashkda, fp32", "libflashkda, bf16", "times as fast in fp32", "... in bf16"]
    return [*table(head, rows), "",
            f"Medians of {len(measured['cells'][0]['ggml_ms']['rounds_ms'])} rounds on {machine['threads']} threads of an {machine['cpu']} with level {machine['level']}, commit"
            f" {measured['commit'][:7]}, {measured['date'][:10]}; ggml {ggml['version']} ({ggml['commit'][:7]})."]


# ---- The pages for users of one peer --------------------------------------------------------------

def case_name(case):
    """What a cell has that one sequence of sigmoid gates with K = V = 128 and fp32 states has not."""
    packed = len(case["lengths"].split(",")) if case["lengths"] else 0
    sequences = f"{packed} sequences, together " if packed else f"{case['batch']} x " if case["batch"] > 1 else ""
    words = [f"{sequences}{case['tokens']:,} tokens", f"{case['heads']} head{'s' if case['heads'] > 1 else ''}"]
    if case["value_heads"] != case["heads"]:
        words.append(f"{case['value_heads']} value heads")
    if case["key_dim"] != 128:
        words.append(f"K = V = {case['key_dim']}")
    if case["gate"] != "sigmoid":
        words.append(f"{case['gate']} gate")
    if case["state_dtype"] != "fp32":
        words.append(f"states in {case['state_dtype']}")
    if case["checkpoint_every"]:
        words.append(f"a state every {case['checkpoint_every']} tokens")
    return ", ".join(words)


def timed_beside(results, peer):
    return [r for r in results if (r.get("peers") or {}).get(peer) and r["peers"][peer]["seconds"]]


def prefill_beside(peer):
    speed, name = read("h200/speed.json"), PEERS[peer]
    results = timed_beside(speed["results"], peer)
    rows = [[case_name(r["case"]), r["case"]["regime"], f"{median(r) * 1e3:.3f} ms",
             f"{median(r['peers'][peer]) * 1e3:.3f} ms", f"{median(r['peers'][peer]) / median(r):.1f}",
             f"{median(r['peers'][peer]) / median(r['portable']):.2f}"]
            for wanted in PREFILL for r in results if r["name"] == wanted]
    faster = sorted(median(r["peers"][peer]) / median(r) for r in results)
    portable = [median(r["peers"][peer]) / median(r["portable"]) for r in results]
    return [*table(["prefill", "gates", "libflashkda", name, "times as fast", "level `sm80`: times as fast"], rows), "",
            measured_on(speed, "GPU time of prefill", "gate and norm included", peer),
            f"In all {len(faster)} cells that were measured libflashkda is {faster[0]:.1f} to {faster[-1]:.0f} times as"
            f" fast as {name}.",
            f"Level `sm80`, for every GPU but Hopper, was measured on the same H200. It is {min(portable):.2f} to"
            f" {max(portable):.2f} times as fast, and slower in {sum(x < 1 for x in portable)} of these cells.", ""]


def errors_beside(peer):
    accuracy, name = read("h200/accuracy.json"), PEERS[peer]
    rows = [[entry["input"], *(f"{entry['errors'][who][key]:.1e}" for who in ("ours", peer)
                               for key in ("output_error", "state_error"))]
            for entry in accuracy["errors"] if entry["errors"][peer]]
    return [*table(["error ratio", "libflashkda, output", "state", f"{name}, output", "state"], rows), "",
            measured_on(accuracy, "Errors against fp64", "bf16 inputs", peer), ""]


def decode_beside_fla():
    decode = read("h200/decode.json")
    rows = []
    for r in (r for wanted in DECODE for r in decode["results"] if r["name"] == wanted):
        case, warm = r["case"], r.get("warm_seconds")
        words = f"{case['batch']} x {case['tokens']} token{'s' if case['tokens'] > 1 else ''}, {case['heads']} heads"
        rows.append([words + (", a state a token" if r["decode"] == "state each" else ""), case["state_dtype"],
                     f"{median(r) * 1e6:.1f} us", f"{median(r['fla']) * 1e6:.1f} us",
                     f"{median(r['fla']) / median(r):.2f}",
                     f"{r['fla']['warm_seconds']['median'] / warm['median']:.2f}" if warm else ""])
    cold = sorted(median(r["fla"]) / median(r) for r in decode["results"])
    return [*table(["decode", "states", "libflashkda", "fla", "times as fast", "warm: times as fast"], rows), "",
            measured_on(decode, "GPU time of decode", "[cold](decode.md#what-it-costs)", "fla"),
            f"In all {len(cold)} cells libflashkda is {cold[0]:.2f} to {cold[-1]:.2f} times as fast as fla.", ""]


# ---- Writing --------------------------------------------------------------------------------------

PAGES = {"README.md": readme,
         "docs/speed.md": speed_on_cpu,
         "docs/from-flashkda.md": lambda: [*prefill_beside("flashkda"), *errors_beside("flashkda")],
         "docs/from-fla.md": lambda: [*prefill_beside("fla"), *decode_beside_fla(), *errors_beside("fla")]}


def wrapped(line):
    """Within the columns that a page has, if it is no row of a table."""
    return line if line.startswith("|") else textwrap.fill(line, COLUMNS, break_long_words=False, break_on_hyphens=False)


def main():
    for name, lines in PAGES.items():
        page, new = ROOT / name, "\n".join(map(wrapped, lines())).rstrip("\n") + "\n"
        text = page.read_text()
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        if "--write" in sys.argv[1:]:
            page.write_text(text[:begin] + new + text[end:])
        elif text[begin:end] != new:
            raise SystemExit(f"{name} says other figures than the results; benchmarks/overview.py --write puts them right")
    for name, sources in FIGURES.items():
        figure = (RESULTS / name).read_text()
        for source in sources:
            if f"commit {read(source)['commit']}" not in figure:
                raise SystemExit(f"{name} is not drawn from what {source} has; benchmarks/plot.py draws it")


if __name__ == "__main__":
    main()
