# SPDX-License-Identifier: MIT
"""What is installed: one binary for every Python, with nothing but its entry visible; versions; a light import; and a second
name, which is FlashKDA's where that is installed too."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import flash_kda
import libflashkda
import libflashkda._C
import pytest

BINARY = libflashkda._C.__file__


def python(*arguments: str, **environment: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True,
                          env={**os.environ, **environment}).stdout


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
    assert libflashkda.__version__ == importlib.metadata.version("libflashkda") == version


def test_types_are_shipped():
    assert (pathlib.Path(libflashkda.__file__).parent / "py.typed").exists()


def test_no_array_library_is_imported():
    loaded = python("-c", "import sys, libflashkda; print(*sys.modules)").split()
    assert not {"torch", "numpy", "jax", "cupy", "fla"} & set(loaded)


def test_torch_alone_does_not_import_the_package():
    """torch calls libflashkda_torch at the end of its import, in every process."""
    loaded = python("-c", "import sys, torch; print(*sys.modules)").split()
    assert "libflashkda_torch" in loaded and "libflashkda" not in loaded


def test_torch_that_is_kept_out():
    python("-c", "import sys; sys.modules['torch'] = None; import libflashkda")


def test_under_flashkdas_name():
    assert flash_kda.fwd is libflashkda.fwd and flash_kda.get_workspace_size is libflashkda.get_workspace_size
    assert {name: getattr(flash_kda, name) for name in libflashkda.__all__} == {
        name: getattr(libflashkda, name) for name in libflashkda.__all__}


def test_beside_flashkda(tmp_path):
    """In the folder where both are installed, FlashKDA's package comes before this module of its name."""
    shutil.copy(flash_kda.__file__, tmp_path)
    (tmp_path / "flash_kda").mkdir()
    (tmp_path / "flash_kda" / "__init__.py").write_text("whose = 'FlashKDA'")
    script = "import flash_kda, libflashkda; print(flash_kda.whose, libflashkda.fwd.__module__)"
    assert python("-c", script, PYTHONPATH=str(tmp_path)).split() == ["FlashKDA", "libflashkda._fwd"]


def test_no_file_where_flashkda_has_one():
    distribution = importlib.metadata.distribution("libflashkda")
    assert "flash_kda" not in {file.parts[0] for file in distribution.files}
    assert distribution.metadata["Name"].replace("_", "-") != "flash-kda"
