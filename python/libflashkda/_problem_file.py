# SPDX-License-Identifier: MIT
"""Reads a problem of the program flashkda (docs/file-format.md) as the arguments of prefill()."""

from __future__ import annotations

import dataclasses
from typing import Any

Array = Any  #: a numpy.ndarray

_INPUTS = ("q", "k", "v", "g", "beta")
_DEFAULT_LOWER_BOUND = -5.0
_FLAGS = {"true": True, "false": False}


@dataclasses.dataclass
class Problem:
    inputs: tuple[Array, ...]  #: q, k, v, g, beta, each [B, T, ..]
    options: dict[str, Any]  #: other arguments of prefill(), but for sequences and states
    cu_seqlens: Array | None
    initial_state: Array | None  #: [N, HV, ..]


def read(path: str) -> Problem:
    """Raises ValueError, with a sentence, where the file is not as docs/file-format.md says; OSError."""
    import ml_dtypes  # noqa: F401  numpy learns bf16
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = {name: value for name, value in (file.metadata() or {}).items() if value}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"no safetensors file: {error}") from error
    missing = [name for name in _INPUTS if name not in tensors]
    if missing:
        raise ValueError(f"has no tensor {' and no '.join(map(repr, missing))}")
    bare = tensors["q"].ndim == 3
    inputs = tuple(tensors[name][None] if bare else tensors[name] for name in _INPUTS)
    options = _options(metadata) | {name: tensors[name] for name in ("A_log", "dt_bias") if name in tensors}
    ends, state = tensors.get("cu_seqlens"), tensors.get("initial_state")
    return Problem(inputs, options, ends, state[None] if state is not None and bare and ends is None else state)


def _options(metadata: dict[str, str]) -> dict[str, Any]:
    if "gate" not in metadata:
        raise ValueError("metadata does not say the gate: none, softplus or sigmoid")
    qk_norm = metadata.get("qk_norm", "true")
    if qk_norm not in _FLAGS:
        raise ValueError(f"metadata qk_norm is {qk_norm!r}; expected true or false")
    options = {"gate": metadata["gate"], "beta_mode": metadata.get("beta", "sigmoid"), "qk_norm": _FLAGS[qk_norm],
               "state_layout": metadata.get("state_layout", "v_first")}
    if options["gate"] == "sigmoid":
        options["lower_bound"] = float(metadata.get("lower_bound", _DEFAULT_LOWER_BOUND))
    if "scale" in metadata:
        options["scale"] = float(metadata["scale"])
    return options
