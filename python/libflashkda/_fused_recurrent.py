# SPDX-License-Identifier: MIT
"""flash-linear-attention's token recurrence (fla.ops.kda.fused_recurrent, release 0.6): decode for a few tokens of a
sequence, prefill for more."""

from __future__ import annotations

from typing import Any

from . import _C
from ._chunk_kda import REQUIRED, _beta_mode, _gate, check_tensors, rows
from ._decode import decode
from ._prefill import Array, prefill
from ._shapes import state_shape

TENSORS = (*REQUIRED, "A_log", "dt_bias", "initial_state", "cu_seqlens", "ssm_state_indices", "num_accepted_tokens", "out")


def refusal(q: Array, v: Array, beta: Array, A_log: Array | None, initial_state: Array | None, inplace_final_state: bool,
            cu_seqlens: Array | None, ssm_state_indices: Array | None, use_gate_in_kernel: bool,
            lower_bound: float | None) -> str | None:
    """Why neither decode() nor prefill() can take such a call, or None."""
    indices = ssm_state_indices
    if beta.ndim == v.ndim:
        return "libflashkda takes one beta a head, not one a channel"
    if use_gate_in_kernel and A_log is None and lower_bound is None:
        return "libflashkda needs A_log or a lower_bound with use_gate_in_kernel"
    if indices is not None and not inplace_final_state:
        return "libflashkda updates a pool of states in place"
    if indices is not None and indices.ndim == 1 and cu_seqlens is None and q.shape[1] > 1:
        return "with ssm_state_indices [N] libflashkda takes one token a sequence, as fla does"
    if _few(q, cu_seqlens, indices):
        return None
    if indices is not None:
        return f"libflashkda keeps the states after each of up to {_C.MAX_DECODE_TOKENS} tokens of a sequence"
    if inplace_final_state and str(initial_state.dtype) == "torch.float16":
        return "libflashkda's prefill writes no states in fp16"
    return None


def _few(q: Array, cu_seqlens: Array | None, ssm_state_indices: Array | None) -> bool:
    """Whether no sequence has more tokens than decode() takes, as far as the host knows."""
    most = _C.MAX_DECODE_TOKENS
    if q.shape[1] <= most:
        return True
    if cu_seqlens is None:
        return False
    if ssm_state_indices is not None:  # with [N] fla's own kernel expects one token a sequence
        return ssm_state_indices.ndim == 1 or ssm_state_indices.shape[1] <= most
    return cu_seqlens.is_cpu and bool((cu_seqlens.diff() <= most).all())


def fused_recurrent_kda_fwd(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    initial_state: Array | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = True,
    state_v_first: bool = False,
    cu_seqlens: Array | None = None,
    ssm_state_indices: Array | None = None,
    num_accepted_tokens: Array | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    out: Array | None = None,
    **_: Any,
) -> tuple[Array, Array | None]:
    """fla's function of this name. Its final states are fp32, or initial_state itself, in place."""
    import torch

    check_tensors(TENSORS, (q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, ssm_state_indices,
                            num_accepted_tokens, out))
    gate = _gate(g, use_gate_in_kernel, False, lower_bound, A_log, dt_bias)
    q, k, v, g = rows(q, "q"), rows(k, "k"), rows(v, "v"), rows(g, "g")
    writes = inplace_final_state or output_final_state
    if out is None:
        out = torch.zeros_like(v)
    call = {**gate, "beta_mode": _beta_mode(use_beta_sigmoid_in_kernel, allow_neg_eigval), "scale": scale, "out": out,
            "qk_norm": use_qk_l2norm_in_kernel, "cu_seqlens": cu_seqlens,
            "state_layout": "v_first" if state_v_first else "k_first"}
    state = initial_state
    if not _few(q, cu_seqlens, ssm_state_indices):
        if state is not None and state.dtype == torch.float16:
            state = state.float()
        if writes and not inplace_final_state:
            call["final_state"] = torch.empty(state_shape(q, v, cu_seqlens, _C.STATE_LAYOUTS[call["state_layout"]]),
                                              dtype=torch.float32, device=q.device)
        elif writes:
            call["final_state"] = state
        prefill(q, k, v, g, beta, initial_state=state, **call)
        return out, call.get("final_state")
    if state is None:
        state = torch.zeros(state_shape(q, v, cu_seqlens, _C.STATE_LAYOUTS[call["state_layout"]]), dtype=torch.float32,
                            device=q.device)
    elif writes and not inplace_final_state:
        state = state.to(torch.float32, copy=True)
    decode(q, k, v, g, beta, state, **call, state_indices=ssm_state_indices, num_accepted_tokens=num_accepted_tokens,
           keep_state=not writes)
    return out, state if writes else None
