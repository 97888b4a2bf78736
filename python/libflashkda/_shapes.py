# SPDX-License-Identifier: MIT
"""Shapes of what a call writes, from what it reads."""

from __future__ import annotations

from typing import Any

from . import _C


def shape_of(array: Any, name: str) -> Any:
    try:
        return array.shape
    except AttributeError:
        raise TypeError(f"{name} is of type {type(array)}; expected an array of the library that q is from") from None
    except RuntimeError as error:  # torch's nested tensors have none
        raise ValueError(f"{name} cannot be read as an array: {error}") from error


def state_shape(q: Any, v: Any, cu_seqlens: Any, state_layout: int) -> tuple[int, ...]:
    """[N, HV, V, K] or [N, HV, K, V]. Where q or v is malformed, which the library says better, anything."""
    keys, values = shape_of(q, "q"), shape_of(v, "v")
    if len(keys) != 4 or len(values) != 4:
        return (0,)
    sequences = keys[0] if cu_seqlens is None else max(sum(shape_of(cu_seqlens, "cu_seqlens")[:1]) - 1, 0)
    head = (values[3], keys[3]) if state_layout == _C.STATE_LAYOUTS["v_first"] else (keys[3], values[3])
    return (sequences, values[2], *head)
