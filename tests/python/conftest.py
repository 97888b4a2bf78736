# SPDX-License-Identifier: MIT
"""Which tests run here. A test for a GPU, or for a library that is not installed, is left out and said to be: it is not
run, not counted and not skipped."""

from __future__ import annotations

import importlib.util
import os

# Torch would find gradients that it compiled for an earlier version of the package: its key is the graph of the outputs.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import pytest  # noqa: E402
import torch  # noqa: E402

# jax would take most of the GPU's memory for itself at its first use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# The recurrence is made of small operations, on which threads of torch's wait for each other far longer than they work.
torch.set_num_threads(1)


def _missing(item: pytest.Item) -> str | None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        return "a GPU"
    for marker in item.iter_markers("library"):
        if not any(importlib.util.find_spec(name) for name in marker.args):
            return " or ".join(marker.args)
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "library(name, ...): needs one of these packages; left out, and said so, without")
    config.stash[_LEFT_OUT] = {}


_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = config.stash[_LEFT_OUT]
    deselected = []
    for item in items:
        reason = _missing(item)
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            deselected.append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason, count in config.stash[_LEFT_OUT].items():
        terminalreporter.write_line(f"left out: {count} tests that need {reason}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
