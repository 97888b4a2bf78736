# SPDX-License-Identifier: MIT
"""Engines are run by `./dev engines`, each in its own environment."""

from __future__ import annotations

import pathlib

import pytest
import tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.write(folder)
    return folder
