# SPDX-License-Identifier: MIT
"""FlashKDA's interface (https://github.com/MoonshotAI/FlashKDA): names, order and in-place outputs are its."""

from __future__ import annotations

from . import _C
from ._libraries import library_of
from ._prefill import Array, number_or, refuse_written, scale_value

# FlashKDA takes 0, a gate that forgets nothing; this bound differs from it by less than fp32 can hold.
_NO_DECAY = -1e-38


def fwd(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: float,
    out: Array,
    A_log: Array | None,
    dt_bias: Array | None,
    lower_bound: float | None,
    initial_state: Array | None = None,
    final_state: Array | None = None,
    cu_seqlens: Array | None = None,
) -> None:
    """Kimi Delta Attention over whole sequences, FlashKDA's way: writes out and final_state, returns nothing.

    q and k are L2-normalised inside, beta are logits, the gate is lower_bound sigmoid(exp(A_log) (g + dt_bias)).

    Args:
        q, k: [B, T, H, K], bf16; here also fp16 and fp32, each array by itself, and any K up to 256.
        v: [B, T, H, V], bf16; here also with HV heads, a multiple of H, which g, beta, A_log, dt_bias, out and the
            states then have too.
        g: [B, T, H, K], the gate before its activation.
        beta: [B, T, H], before its sigmoid.
        scale: factor of the scores.
        out: [B, T, H, V], written.
        A_log: fp32 [H]; here also None: exp(A_log) is 1.
        dt_bias: fp32 [H, K]; here also None: 0.
        lower_bound: in [-5, 0], nats a token; here also None: the gate is -exp(A_log) softplus(g + dt_bias).
        initial_state: bf16 or fp32 [N, H, V, K]; None: 0.
        final_state: of the same shape, written; here also of another dtype, or initial_state itself.
        cu_seqlens: int64 [N + 1], here also int32: B is 1. None: N is B.

    Here also: strides (the last dimension must be contiguous), tensors on the CPU, numpy and cupy arrays. Errors are
    those of prefill().
    """
    library = library_of(q)
    if not library.writable:
        refuse_written(out=out, final_state=final_state)
    if lower_bound is None:
        gate, bound = _SOFTPLUS, 0.0
    else:
        gate, bound = _SIGMOID, number_or(lower_bound, _NO_DECAY, "lower_bound")
    run = library.record if library.traced(q) else library.run
    run(_C.prefill,
        {"q": q, "k": k, "v": v, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias, "out": out,
         "cu_seqlens": cu_seqlens, "initial_state": initial_state, "final_state": final_state},
        {"gate": gate, "lower_bound": bound, "beta_mode": _BETA_SIGMOID, "scale": scale_value(scale),
         "flags": _C.QK_NORM}, None)


_SOFTPLUS, _SIGMOID = _C.GATES["softplus"], _C.GATES["sigmoid"]
_BETA_SIGMOID = _C.BETA_MODES["sigmoid"]


def get_workspace_size(T_total: int, H: int, N: int = 1) -> int:
    """Bytes of scratch memory of a fwd() call with T_total tokens, H heads, N sequences, K = V = 128 in bf16, on the
    GPU where this build can use one and on the CPU elsewhere. fwd() brings them itself."""
    return _C.fwd_workspace_size(T_total, H, N)
