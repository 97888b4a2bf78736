# SPDX-License-Identifier: MIT
"""The README's sentences on speed, from what was measured. Python's standard library is enough.

usage: overview.py [--write]

Compares the text between the README's marks with the results, or writes it. plot.py draws the same cells.
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
README, SPEED = ROOT / "README.md", ROOT / "benchmarks" / "results" / "h200" / "speed.json"
BEGIN, END = "<!-- speed: written by benchmarks/overview.py -->\n", "<!-- /speed -->\n"

# Cells of the table of cuda_speed.py, and what the figure calls them.
SHAPES = {"T8192-H96-sigmoid": "8,192 tokens,\n96 heads", "T8192-H32-sigmoid": "8,192 tokens,\n32 heads",
          "T65536-H8-sigmoid": "65,536 tokens,\n8 heads"}
REGIMES = {"strong": "the past is soon forgotten", "slow": "as trained heads have them"}
PEERS = {"flashkda": "FlashKDA", "fla": "fla", "cudnn": "cuDNN"}


def times(measured, name):
    result = next(r for r in measured["results"] if r["name"] == name)
    return {"ours": result["seconds"]["median"],
            **{peer: result["peers"][peer]["seconds"]["median"] for peer in PEERS}}


def sentences(measured):
    lines = ["| one sequence, K = V = 128, bf16 | gates | libflashkda | times as fast as "
             + " | ... as ".join(PEERS.values()) + " |", "|---|---|---|" + "---|" * len(PEERS)]
    for shape, label in SHAPES.items():
        for regime in REGIMES:
            took = times(measured, f"{shape}-{regime}")
            lines.append(f"| {label.replace(chr(10), ' ')} | {regime} | {took['ours'] * 1e3:.2f} ms | "
                         + " | ".join(f"{took[peer] / took['ours']:.1f}" for peer in PEERS) + " |")
    device = measured["machine"]["device"]["name"]
    lines += ["", f"GPU time of prefill on an {device}, gate and norm included, commit {measured['commit'][:7]},"
              f" {measured['date'][:10]}; FlashKDA {measured['peers']['flashkda']}, fla {measured['peers']['fla']}, cuDNN's"
              f" frontend {measured['peers']['cudnn']}."]
    return "\n".join(lines) + "\n"


def main():
    text, new = README.read_text(), sentences(json.loads(SPEED.read_text()))
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    if "--write" in sys.argv[1:]:
        README.write_text(text[:begin] + new + text[end:])
    elif text[begin:end] != new:
        raise SystemExit("README.md says other figures than the results; benchmarks/overview.py --write puts them right")


if __name__ == "__main__":
    main()
