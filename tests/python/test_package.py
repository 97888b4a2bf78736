# SPDX-License-Identifier: MIT
"""What is installed: one binary for every Python, with nothing but its entry visible; versions; a light import."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys

import flash_kda
import flash_kda._C
import pytest

BINARY = flash_kda._C.__file__


def python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.library("abi3audit")
def test_only_the_stable_abi():
    report = json.loads(python("-m", "abi3audit", "--report", "--assume-minimum-abi3", "3.10", BINARY))
    (spec,) = report["specs"].values()
    result = spec["object"]["result"]
    assert result["non_abi3_symbols"] == [] and result["future_abi3_objects"] == {}
    assert result["is_abi3_baseline_compatible"]


def test_the_library_inside_is_hidden():
    symbols = subprocess.run(["nm", "-D", "--defined-only", BINARY], check=True, capture_output=True, text=True).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__C"]


def test_no_library_of_torch_or_cuda_is_linked():
    needed = subprocess.run(["readelf", "-d", BINARY], check=True, capture_output=True, text=True).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", needed)
    assert libraries and not [name for name in libraries if re.match(r"libtorch|libc10|libcuda|libpython", name)]


def test_version():
    header = (pathlib.Path(__file__).parents[2] / "include" / "flash_kda.h").read_text()
    version = ".".join(re.search(rf"VERSION_{part} (\d+)", header)[1] for part in ("MAJOR", "MINOR", "PATCH"))
    assert flash_kda.__version__ == importlib.metadata.version("flash-kda") == version


def test_types_are_shipped():
    assert (pathlib.Path(flash_kda.__file__).parent / "py.typed").exists()


def test_no_array_library_is_imported():
    loaded = python("-c", "import sys, flash_kda; print(*sys.modules)").split()
    assert not {"torch", "numpy", "jax", "cupy", "fla"} & set(loaded)


def test_torch_alone_does_not_import_the_package():
    """torch calls flash_kda_torch at the end of its import, in every process."""
    loaded = python("-c", "import sys, torch; print(*sys.modules)").split()
    assert "flash_kda_torch" in loaded and "flash_kda" not in loaded


def test_torch_that_is_kept_out():
    python("-c", "import sys; sys.modules['torch'] = None; import flash_kda")
