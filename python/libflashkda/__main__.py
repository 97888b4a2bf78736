# SPDX-License-Identifier: MIT
"""python -m libflashkda: what this build and this machine can do, as `flashkda info` prints it."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

from . import _C, prefill_describe

_LIBRARIES = ("torch", "numpy", "cupy", "jax", "fla")
_TYPICAL = (1, 4096, 8, 128)  # q to g of the call whose plan is shown


def _versions() -> dict[str, str | None]:
    """Versions of the array libraries and fla; None where one is not installed. Imports nothing."""
    distributions = importlib.metadata.packages_distributions()
    return {name: importlib.metadata.version(distributions[name][0]) if name in distributions else None
            for name in _LIBRARIES}


def _plan(rows: Any) -> str:
    try:
        return prefill_describe(rows, rows, rows, rows, rows[..., 0])
    except (NotImplementedError, RuntimeError) as error:
        return str(error)


def _on_torch() -> Iterator[str]:
    import torch

    def plan(device: str) -> str:
        return f"{device} in bf16: {_plan(torch.empty(_TYPICAL, dtype=torch.bfloat16, device=device))}"

    yield plan("cpu")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        yield f"cuda:{i} {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
        yield plan(f"cuda:{i}")


def _on_numpy() -> Iterator[str]:
    import numpy

    yield f"cpu in fp32: {_plan(numpy.empty(_TYPICAL, 'float32'))}"


def _devices(versions: dict[str, str | None]) -> Callable[[], Iterator[str]]:
    """Lines on each device that a library found here can show."""
    if versions["torch"]:
        return _on_torch
    return _on_numpy if versions["numpy"] else lambda: iter(["torch or numpy is needed to show what a call runs on"])


def main() -> None:
    argparse.ArgumentParser(prog="python -m libflashkda", description=__doc__.partition(": ")[2]).parse_args()
    try:
        level = _C.cpu_level()
    except NotImplementedError as error:
        sys.exit(f"libflashkda: {error}")
    versions = _versions()
    print(f"version    {_C.VERSION}, Python {platform.python_version()}")
    print(f"levels     {' '.join(_C.cpu_levels())}; chosen: {level}")
    print("backends   " + ", ".join(name if _C.backend_available(value) else f"{name} (not available)"
                                    for name, value in _C.BACKENDS.items() if name != "auto"))
    print("libraries  " + ", ".join(f"{name} {version or '(not found)'}" for name, version in versions.items()))
    _, T, H, K = _TYPICAL
    print(f"devices    for T {T}, H {H}, K = V = {K}")
    for line in _devices(versions)():
        print(f"           {line}")


if __name__ == "__main__":
    main()
