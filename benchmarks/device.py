# SPDX-License-Identifier: MIT
"""The GPU and the commit that something was measured on. Standard library alone."""

import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def describe_all(build):
    """What `flashkda info` says of every GPU; leaves the program with a sentence if there is none."""
    printed = subprocess.run([build / "flashkda", "info", "--json"], capture_output=True, text=True)
    if printed.returncode:
        sys.exit(f"{build}/flashkda info failed: {printed.stderr.strip()}")
    devices = json.loads(printed.stdout)["cuda_devices"]
    if not devices:
        text = subprocess.run([build / "flashkda", "info"], capture_output=True, text=True).stdout
        sys.exit("no GPU to run on: " + text.partition("no cuda: ")[2].strip())
    return devices


def describe(build):
    """The same of the first GPU alone."""
    return describe_all(build)[0]


def results(gpu):
    """Where results of this kind of GPU are kept: NVIDIA H200 is benchmarks/results/h200."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower().removeprefix("nvidia ")).strip("-")
    return ROOT / "benchmarks" / "results" / name


def commit(given=None):
    """The commit that is checked out, marked if there are changes; `given` instead; None if git cannot tell."""
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
