# SPDX-License-Identifier: MIT
"""Single cells of the program's timings, for drivers that repeat them under some condition. Standard library alone."""

import json
import pathlib
import re
import statistics
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"

# The arguments of `flashkda`, and which of its results.
CELLS = {
    "prefill T4096 H8": (["bench", "--tokens=4096", "--heads=8"], "T4096-H8-softplus-slow"),
    "prefill T65536 H1": (["bench", "--tokens=65536", "--heads=1"], "T65536-H1-softplus-slow"),
    "prefill data/small_softplus": (["run", str(ROOT / "data" / "small_softplus.safetensors"), "--repeat=41"], None),
    "decode B4 H32 fp32": (["bench", "--decode"], "H32-B4-T1-fp32"),
    "decode B4 H32 bf16": (["bench", "--decode"], "H32-B4-T1-bf16"),
    "decode B16 H32 fp32": (["bench", "--decode"], "H32-B16-T1-fp32"),
}


def measure(binary, names, threads, copies=1):
    """Milliseconds of the cells' medians of one run, by name; threads None: the default. copies: programs side by side, of
    which it is the middle one's."""
    groups = {}
    for name in names:
        arguments, result = CELLS[name]
        groups.setdefault(tuple(arguments), {})[name] = result
    times = {}
    for arguments, wanted in groups.items():
        command = [binary, *arguments, "--json", *([f"--threads={threads}"] if threads else [])]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(copies)]
        texts = [program.communicate()[0] for program in running]
        if any(program.returncode for program in running):
            raise SystemExit(f"{' '.join(command)} failed")
        for name, result in wanted.items():
            times[name] = statistics.median(seconds_of(json.loads(text), result) for text in texts) * 1e3
    return times


def seconds_of(printed, result):
    found = {r["name"]: r for r in printed.get("results", [])}
    return (found[result] if result else printed)["seconds"]["median"]


def summary(rounds):
    """Of the medians of several rounds, in milliseconds."""
    return {"best_ms": round(min(rounds), 5), "middle_ms": round(statistics.median(rounds), 5),
            "rounds_ms": [round(t, 5) for t in rounds]}


def machine(binary):
    info = json.loads(subprocess.run([binary, "info", "--json"], check=True, capture_output=True, text=True).stdout)
    return {key: info.get(key) for key in ("cpu", "architecture", "features", "processors", "threads", "level")}


def path(machine, suffix=""):
    """Where results of this machine are kept, under its name and what they are if not the table of prefill."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['threads']} threads".lower())
    return RESULTS / f"{name}{suffix and '-' + suffix}.json"


def record(measured, suffix=""):
    """Writes what was measured to `path` and says where."""
    where = path(measured["machine"], suffix)
    write(measured, where)
    print(f"\nwrote {where}")


def write(measured, where):
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(measured, indent=2) + "\n")
