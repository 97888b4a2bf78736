# SPDX-License-Identifier: MIT
"""flash-linear-attention's token recurrence (fla.ops.kda.fused_recurrent, release 0.6) for the few tokens of decode."""

from __future__ import annotations

from typing import Any

from . import _C
from ._chunk_kda import REQUIRED, _beta_mode, _gate, check_tensors, rows
from ._decode import decode
from ._prefill import Array
from ._shapes import state_shape

TENSORS = (*REQUIRED, "A_log", "dt_bias", "initial_state", "cu_seqlens", "ssm_state_indices", "num_accepted_tokens", "out")


def refusal(q: Array, v: Array, beta: Array, A_log: Array | None, inplace_final_state: bool, cu_seqlens: Array | None,
            ssm_state_indices: Array | None, use_gate_in_kernel: bool, lower_bound: float | None) -> str | None:
    """Why decode() cannot take such a call, or None."""
    most, indices = _C.MAX_DECODE_TOKENS, ssm_state_indices
    if beta.ndim == v.ndim:
        return "libflashkda takes one beta a head, not one a channel"
    if use_gate_in_kernel and A_log is None and lower_bound is None:
        return "libflashkda needs A_log or a lower_bound with use_gate_in_kernel"
    if indices is not None and not inplace_final_state:
        return "libflashkda updates a pool of states in place"
    # With ssm_state_indices [N] fla's own kernel expects one token a sequence.
    few = q.shape[1] <= most or (cu_seqlens is not None and indices is not None
                                 and (indices.shape[1] if indices.ndim == 2 else 1) <= most)
    if not few:
        return f"libflashkda decodes up to {most} tokens of a sequence"
    if indices is not None and indices.ndim == 1 and cu_seqlens is None and q.shape[1] > 1:
        return "with ssm_state_indices [N] libflashkda takes one token a sequence, as fla does"
    return None


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
    writes = inplace_final_state or output_final_state
    state = initial_state
    if state is None:
        layout = _C.STATE_LAYOUTS["v_first" if state_v_first else "k_first"]
        state = torch.zeros(state_shape(q, v, cu_seqlens, layout), dtype=torch.float32, device=q.device)
    elif writes and not inplace_final_state:
        state = state.to(torch.float32, copy=True)
    if out is None:
        out = torch.zeros_like(v)
    if ssm_state_indices is not None:
        ssm_state_indices = ssm_state_indices.to(torch.int32)
    if num_accepted_tokens is not None:
        num_accepted_tokens = num_accepted_tokens.to(torch.int32)
    decode(rows(q, "q"), rows(k, "k"), rows(v, "v"), rows(g, "g"), beta, state, **gate,
           beta_mode=_beta_mode(use_beta_sigmoid_in_kernel, allow_neg_eigval), qk_norm=use_qk_l2norm_in_kernel,
           scale=scale, cu_seqlens=cu_seqlens, state_layout="v_first" if state_v_first else "k_first",
           state_indices=ssm_state_indices, num_accepted_tokens=num_accepted_tokens, keep_state=not writes, out=out)
    return out, state if writes else None
