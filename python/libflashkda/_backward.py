# SPDX-License-Identifier: MIT
"""Backward: every member of flash_kda_backward_args."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from . import _C
from ._libraries import Library, library_of
from ._prefill import Array, _options
from ._shapes import shape_of, state_shape

#: Gradients and the inputs that they belong to.
INPUT_OF = dict(zip(_C.BACKWARD_WRITTEN, ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")))


def _wanted(names: Sequence[str] | None, tensors: dict[str, Array | None]) -> tuple[str, ...]:
    """In the library's order."""
    if names is None:
        return tuple(name for name, of in INPUT_OF.items() if tensors[of] is not None)
    for name in names:
        if name not in INPUT_OF:
            raise ValueError(f"wanted holds {name!r}; expected {' or '.join(map(repr, INPUT_OF))}")
    return tuple(name for name in INPUT_OF if name in names)


def new_gradients(library: Library, tensors: dict[str, Array | None], wanted: Sequence[str],
                  state_layout: int) -> dict[str, Array]:
    """Arrays to write to: of the shape and dtype of what each gradient belongs to."""
    q, made = tensors["q"], {}
    for name in wanted:
        given = tensors[INPUT_OF[name]]
        if given is not None:
            library.check(given, INPUT_OF[name])
            made[name] = library.empty(q, shape_of(given, INPUT_OF[name]), given.dtype)
        elif name == "d_initial_state":
            made[name] = library.empty(q, state_shape(q, tensors["v"], tensors["cu_seqlens"], state_layout),
                                       library.float32)
        else:
            raise ValueError(f"wanted holds {name!r} without {INPUT_OF[name]}; expected it to be given")
    return made


def _call(q: Array, k: Array, v: Array, g: Array, beta: Array, d_out: Array | None, d_final_state: Array | None,
          wanted: Sequence[str] | None, A_log: Array | None, dt_bias: Array | None, gate: str,
          lower_bound: float | None, beta_mode: str, qk_norm: bool, scale: float | None, cu_seqlens: Array | None,
          state_layout: str, initial_state: Array | None, checkpoints: Array | None, checkpoint_every: int,
          checkpoint_cu_starts: Array | None, batch_invariant: bool, backend: str,
          num_threads: int) -> tuple[Library, dict[str, Array | None], tuple[str, ...], dict[str, Any]]:
    """Library, tensors that are read, names of those to be written, and options of a call."""
    library = library_of(q)
    options = _options(gate, lower_bound, beta_mode, qk_norm, scale, state_layout, backend, num_threads,
                       batch_invariant, checkpoint_every)
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias,
               "cu_seqlens": cu_seqlens, "initial_state": initial_state, "checkpoints": checkpoints,
               "checkpoint_cu_starts": checkpoint_cu_starts, "d_out": d_out, "d_final_state": d_final_state}
    return library, tensors, _wanted(wanted, tensors), options


def backward(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    *,
    d_out: Array | None = None,
    d_final_state: Array | None = None,
    wanted: Sequence[str] | None = None,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    gate: str = "none",
    lower_bound: float | None = None,
    beta_mode: str = "given",
    qk_norm: bool = False,
    scale: float | None = None,
    cu_seqlens: Array | None = None,
    state_layout: str = "v_first",
    initial_state: Array | None = None,
    checkpoints: Array | None = None,
    checkpoint_every: int = 0,
    checkpoint_cu_starts: Array | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
    num_threads: int = 0,
) -> dict[str, Array]:
    """From the gradients of a prefill's results, those of its inputs.

    For array libraries without autograd; with torch, prefill() and chunk_kda() are differentiable themselves. dX is the
    gradient of X: of one number that depends on everything that the prefill returned.

    Args:
        q, k, v, g, beta, A_log, dt_bias, cu_seqlens, initial_state and options: as the prefill had them.
        d_out: float [B, T, HV, V]; None: 0.
        d_final_state: state [N, HV, V, K]; None: 0, but one of the two is needed.
        wanted: which of "dq", "dk", "dv", "dg", "dbeta", "dA_log", "d_dt_bias" and "d_initial_state" are computed; the
            others cost nothing. None: those of the inputs that are given.
        checkpoints, checkpoint_cu_starts: states that the prefill kept, checkpoint_every tokens apart, a multiple of
            32. None: they are found again.
        batch_invariant: as prefill()'s, but for dA_log and d_dt_bias, which are sums over the batch.
        backend, num_threads: as prefill()'s.

    Returns:
        The gradients by name, new arrays, each of the shape and dtype of what it belongs to; d_initial_state is fp32
        where no initial_state is given.

    Raises:
        As prefill().

    Source: include/flash_kda.h, flash_kda_backward_args.
    """
    library, tensors, names, options = _call(
        q, k, v, g, beta, d_out, d_final_state, wanted, A_log, dt_bias, gate, lower_bound, beta_mode, qk_norm, scale,
        cu_seqlens, state_layout, initial_state, checkpoints, checkpoint_every, checkpoint_cu_starts, batch_invariant,
        backend, num_threads)
    if library.traced(q):
        return library.record_backward(tensors, names, options)
    made = new_gradients(library, tensors, names, options["state_layout"])
    library.run(_C.backward, {**tensors, **made}, options, None)
    return made


_SIGNATURE = inspect.signature(backward)


def backward_describe(*arguments: Any, **keywords: Any) -> str:
    """One line on how backward() would run these arguments, which are backward()'s."""
    bound = _SIGNATURE.bind(*arguments, **keywords)
    bound.apply_defaults()
    library, tensors, names, options = _call(**bound.arguments)
    made = new_gradients(library, tensors, names, options["state_layout"])
    return library.run(_C.backward_describe, {**tensors, **made}, options, None)
