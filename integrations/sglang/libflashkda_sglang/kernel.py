# SPDX-License-Identifier: MIT
"""Prefill and decode over SGLang's pool of states, [slots, HV, V, K], in place. Slot -1 is padding."""

from __future__ import annotations

from typing import Any

import libflashkda
from sglang.srt.layers.attention.linear.kernels.kda_triton import TritonKDAKernel
from torch import Tensor

# What SGLang passes for states that it wants to keep besides the last.
_SNAPSHOTS = ("track_state", "track_chunk_idx")
_RING = "replayssm_d"  # of buffered decode


def _options(A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None, heads: int,
             raw_beta: bool) -> dict[str, Any]:
    if A_log is None:  # the caller has made log decays
        gate: dict[str, Any] = {"gate": "none"}
    else:
        gate = {"gate": "softplus"} if lower_bound is None else {"gate": "sigmoid", "lower_bound": lower_bound}
        gate |= {"A_log": A_log.reshape(-1), "dt_bias": None if dt_bias is None else dt_bias.reshape(heads, -1)}
    return {**gate, "qk_norm": True, "beta_mode": "sigmoid" if raw_beta else "given"}


class FlashKDAKernel(TritonKDAKernel):
    """A subclass, since SGLang asks of kernels whether they are Triton's."""

    supports_packed_decode = True
    supports_packed_decode_safe_gate = True

    def extend(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, ssm_states: Tensor,
               cache_indices: Tensor, query_start_loc: Tensor, A_log: Tensor | None = None,
               dt_bias: Tensor | None = None, lower_bound: float | None = None, beta_is_raw: bool = False,
               return_intermediate_states: bool = False, is_spec_decode: bool = False,
               **more: Any) -> tuple[Tensor, Tensor | None]:
        """Packed sequences: q and k [1, T, H, K], v [1, T, HV, V], g [1, T, HV, K], beta [1, T, HV]."""
        if return_intermediate_states or is_spec_decode or any(more.get(name) is not None for name in _SNAPSHOTS):
            return super().extend(
                q, k, v, g, beta, ssm_states=ssm_states, cache_indices=cache_indices, query_start_loc=query_start_loc,
                A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, beta_is_raw=beta_is_raw,
                return_intermediate_states=return_intermediate_states, is_spec_decode=is_spec_decode, **more)
        out, _ = libflashkda.prefill(
            q, k, v, g, beta, **_options(A_log, dt_bias, lower_bound, v.shape[2], beta_is_raw),
            cu_seqlens=query_start_loc, initial_state=ssm_states, final_state=ssm_states, state_indices=cache_indices)
        return out, None

    def decode(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, A_log: Tensor, dt_bias: Tensor,
               ssm_states: Tensor, cache_indices: Tensor, query_start_loc: Tensor, lower_bound: float | None = None,
               **_: Any) -> Tensor:
        """A token of each of B sequences: q and k [1, B, H, K], v [1, B, HV, V], a of B HV K and b of B HV elements."""
        B, HV = v.shape[1:3]
        out = v.new_empty(v.shape)
        libflashkda.decode(
            *(x.transpose(0, 1) for x in (q, k, v)), a.reshape(B, 1, HV, -1), b.reshape(B, 1, HV), ssm_states,
            **_options(A_log, dt_bias, lower_bound, HV, True), state_indices=cache_indices, out=out.transpose(0, 1))
        return out

    def packed_decode(self, mixed_qkv: Tensor, a: Tensor, b: Tensor, *, A_log: Tensor, dt_bias: Tensor, scale: float,
                      ssm_states: Tensor, cache_indices: Tensor, num_v_heads: int, head_v_dim: int,
                      lower_bound: float | None = None, **more: Any) -> Tensor:
        """The same with q, k and v side by side, [B, 2 H K + HV V]."""
        if more.get(_RING) is not None:
            return super().packed_decode(
                mixed_qkv, a, b, A_log=A_log, dt_bias=dt_bias, scale=scale, ssm_states=ssm_states,
                cache_indices=cache_indices, num_v_heads=num_v_heads, head_v_dim=head_v_dim, lower_bound=lower_bound,
                **more)
        K = ssm_states.shape[-1]
        values = num_v_heads * head_v_dim
        keys = (mixed_qkv.shape[1] - values) // 2
        q, k, v = (x.unflatten(1, (-1, dim))[None]
                   for x, dim in zip(mixed_qkv.split([keys, keys, values], 1), (K, K, head_v_dim), strict=True))
        return self.decode(q, k, v, a, b, A_log=A_log, dt_bias=dt_bias, ssm_states=ssm_states,
                           cache_indices=cache_indices, query_start_loc=None, lower_bound=lower_bound)
