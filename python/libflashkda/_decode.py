# SPDX-License-Identifier: MIT
"""Decode: every member of flash_kda_decode_args."""

from __future__ import annotations

import inspect
from typing import Any

from . import _C
from ._libraries import Library, library_of
from ._prefill import (Array, Convolution, convolution_tensors, mark_padding, new_out, norm_options, refuse_written,
                       shared_options)

_STATES = ("q_conv_state", "k_conv_state", "v_conv_state")


def _call(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, A_log: Array | None,
          dt_bias: Array | None, gate: str, lower_bound: float | None, beta_mode: str, qk_norm: bool,
          scale: float | None, cu_seqlens: Array | None, max_tokens: int, accepted: Array | None, state_layout: str,
          state_indices: Array | None, num_accepted_tokens: Array | None, has_initial_state: Array | None,
          padding_slot: int | None, keep_state: bool, out: Array | None, output: bool, q_conv: Convolution | None, k_conv: Convolution | None, v_conv: Convolution | None,
          norm_weight: Array | None, norm_gate: Array | None, norm_activation: str, norm_eps: float, backend: str,
          num_threads: int) -> tuple[Library, dict[str, Array | None], dict[str, Any], Array | None]:
    """Library, tensors and options of a call, and out: the one that is given, or a new one."""
    library = library_of(q)
    flags = (_C.QK_NORM if qk_norm else 0) | (_C.KEEP_STATE if keep_state else 0)
    options = shared_options(gate, lower_bound, beta_mode, flags, scale, state_layout, backend, num_threads)
    options["max_tokens"] = max_tokens
    options.update(norm_options(norm_activation, norm_eps))
    mark_padding(options, padding_slot)
    if out is not None and not output:
        raise ValueError("out is given with output=False; expected None")
    convolutions = convolution_tensors(q_conv, k_conv, v_conv)
    if not library.writable:
        if not keep_state:
            refuse_written(state=state, **{name: convolutions[name] for name in _STATES if name in convolutions})
        refuse_written(out=out)
    if out is None and output:
        out = new_out(library, q, v)
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias, "out": out,
               "cu_seqlens": cu_seqlens, "accepted": accepted, "state": state, "state_indices": state_indices,
               "num_accepted_tokens": num_accepted_tokens, **convolutions,
               "norm_weight": norm_weight, "norm_gate": norm_gate, "has_initial_state": has_initial_state}
    return library, tensors, options, out


def decode(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    state: Array,
    *,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    gate: str = "none",
    lower_bound: float | None = None,
    beta_mode: str = "given",
    qk_norm: bool = False,
    scale: float | None = None,
    cu_seqlens: Array | None = None,
    max_tokens: int = 0,
    accepted: Array | None = None,
    state_layout: str = "v_first",
    state_indices: Array | None = None,
    num_accepted_tokens: Array | None = None,
    has_initial_state: Array | None = None,
    padding_slot: int | None = None,
    keep_state: bool = False,
    out: Array | None = None,
    output: bool = True,
    q_conv: Convolution | None = None,
    k_conv: Convolution | None = None,
    v_conv: Convolution | None = None,
    norm_weight: Array | None = None,
    norm_gate: Array | None = None,
    norm_activation: str = "sigmoid",
    norm_eps: float = 1e-5,
    backend: str = "auto",
    num_threads: int = 0,
) -> Array | None:
    """Takes every sequence's state, in a pool, through its next 0 to 16 tokens, in place.

    Letters, dtypes, gates and strides as prefill()'s; the arithmetic is fp32.

    Decode: state_indices [N]. A sequence's state is read from its slot and written back after its last token.

    Verify, for speculative decoding with a slot for each of C tokens: state_indices [N, C] and num_accepted_tokens [N].
    The state is read from slot state_indices[n, num_accepted_tokens[n] - 1], where the call before left it after the
    token that was accepted last. After token t it is written to slot state_indices[n, t].

    Verify and commit, with one slot a sequence: a call with keep_state returns out alone. Once it is known how many tokens
    are accepted, repeat the call without keep_state, with `accepted` and with output=False: it takes the states through
    the accepted tokens.

    A call can also be fused: convolutions, recurrence and gated norm, all that a KDA layer does between its projections.

    Args:
        q, k: float [B, T, H, K], 1 <= K <= 256, T <= 16; or with cu_seqlens [1, T, H, K], any T.
        v: float [B, T, HV, V].
        g: float [B, T, HV, K]: the raw gate, or with gate "none" the log decay itself, in nats a token, as prefill()'s.
        beta: float [B, T, HV].
        state: fp32, fp16 or bf16 [N, HV, V, K], or with state_indices [slots, HV, V, K]; read and written.
        A_log, dt_bias, gate, lower_bound, beta_mode, qk_norm, scale, state_layout: as prefill()'s.
        cu_seqlens: int32 or int64 [N + 1], from 0 to T, never falling: B is 1, and sequence n is tokens cu_seqlens[n] to
            cu_seqlens[n + 1] - 1, at most 16. A sequence without tokens is left alone. None: N = B sequences of T tokens.
        max_tokens: with cu_seqlens: the most tokens that any sequence has; 0: 16. On CUDA the host does not see lengths: a
            smaller number is faster, and tokens after so many are left out.
        accepted: int32 or int64 [N]: only so many tokens of each sequence are processed; rows of out after them are not written.
            None: all.
        state_indices: int32 or int64 [N] or [N, C]: slots, see above; no sequence has more than C tokens. No slot twice, except with
            keep_state. A -1 where the state would be read makes the sequence padding: it is ignored, and neither its
            states nor its rows of out are written. A -1 in another column: the state after that token is not written.
            None: slot n.
        num_accepted_tokens: int32 or int64 [N], with state_indices [N, C]: the column of the slot that the state is read
            from, counted from 1; None: 1.
        has_initial_state: bool, int8 or int32 [N]: a sequence with 0 starts from zero, and its slot of state, and of the
            convolutions' states, is not read, whatever it holds. None: all have a state.
        padding_slot: with state_indices: a slot that is as -1 in every column, and may stand there more than once. None:
            none.
        keep_state: the state is read, not written. jax arrays, which cannot be written, need it.
        out: float [B, T, HV, V], written; None: a new array of v's dtype.
        output: False: only the states go on, and nothing is returned.
        q_conv, k_conv, v_conv: weight, bias or None, and states of a short causal convolution with SiLU that q, k or v goes
            through first: float [channels, 4], [channels] and [slots, channels, 3], channels being H K or HV V. The states
            are the last inputs, the oldest first, in any strides, in slots as `state`, and written or kept as it is.
        norm_weight: float [V], V <= 1024: RMS norm of every row of out, with norm_eps.
        norm_gate: float [B, T, HV, V], with norm_weight: times "sigmoid" or "silu", norm_activation, of this.
        backend, num_threads: as prefill()'s.

    Returns:
        out, or None without output.

    Raises:
        As prefill(). Nothing has been written then, save after a RuntimeError.

    On CUDA the call is enqueued on the library's current stream, allocates nothing but out, and reads no device memory on
    the host: it can be captured in a graph and replayed with other contents of every array. Index values in device memory
    are not checked but kept within bounds; that no slot is used twice is then the caller's duty.

    Source: include/flash_kda.h, flash_kda_decode_args.
    """
    library, tensors, options, out = _call(
        q, k, v, g, beta, state, A_log, dt_bias, gate, lower_bound, beta_mode, qk_norm, scale, cu_seqlens, max_tokens,
        accepted, state_layout, state_indices, num_accepted_tokens, has_initial_state, padding_slot, keep_state, out, output,
        q_conv, k_conv, v_conv, norm_weight, norm_gate, norm_activation, norm_eps, backend, num_threads)
    run = library.record if library.traced(q) else library.run
    run(_C.decode, tensors, options, None)
    return out


_SIGNATURE = inspect.signature(decode)


def decode_describe(*arguments: Any, **keywords: Any) -> str:
    """One line on how decode() would run these arguments, which are decode()'s."""
    bound = _SIGNATURE.bind(*arguments, **keywords)
    bound.apply_defaults()
    library, tensors, options, _ = _call(**bound.arguments)
    return library.run(_C.decode_describe, tensors, options, None)
