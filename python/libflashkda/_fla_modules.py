# SPDX-License-Identifier: MIT
"""What fla's KDA layer and model run beside attention, by fla's names, on torch's own operations.

fla (release 0.6) has these in Triton alone, which does not run on a CPU. As in fla's kernels, the arithmetic is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _activated(y: Tensor, activation: str | None) -> Tensor:
    return functional.silu(y) if activation in ("silu", "swish") else y


def _convolved(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sequences of T inputs [N, T, D] after the W before them [N, D, W]: fp32 outputs, and the last W inputs."""
    W = weight.shape[1]
    inputs = torch.cat([past.mT.to(x.dtype), x], 1)
    taps = weight.float()
    y = inputs[:, W:] * taps[:, -1]
    for i in range(1, W):
        y = y.addcmul_(inputs[:, i:inputs.shape[1] - W + i], taps[:, i - 1])
    return y if bias is None else y.add_(bias.float()), inputs[:, -W:].mT.contiguous()


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                      initial_state: Tensor | None = None, output_final_state: bool = False,
                      activation: str | None = None, cu_seqlens: Tensor | None = None,
                      **_: Any) -> tuple[Tensor, Tensor | None]:
    """x [B, T, D] or [B, T, .., ..], weight [D, W], states [N, D, W]: the convolution's last W inputs."""
    D, W = weight.shape
    rows = x.reshape(*x.shape[:2], D)
    N = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    past = x.new_zeros(N, D, W) if initial_state is None else initial_state
    if cu_seqlens is None:
        y, final_state = _convolved(rows, past, weight, bias)
    else:
        sequences = rows.split(cu_seqlens.diff().tolist(), 1)
        parts = [_convolved(part, past[n:n + 1], weight, bias) for n, part in enumerate(sequences)]
        y, final_state = torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])
    y = _activated(y, activation)
    if residual is not None:
        y = y + residual.reshape_as(y)
    return y.to(x.dtype).view(x.shape), final_state if output_final_state else None


def causal_conv1d_update(x: Tensor, cache: Tensor, residual: Tensor | None = None, weight: Tensor | None = None,
                         bias: Tensor | None = None, activation: str | None = None) -> tuple[Tensor, Tensor]:
    """One input of every sequence, x of N D elements in any shape; cache [N, D, W], in place."""
    rows = x.reshape(-1, 1, weight.shape[0])
    y, inputs = _convolved(rows, cache, weight, bias)
    cache.copy_(inputs)
    y = _activated(y, activation)
    if residual is not None:
        y = y + residual.reshape_as(y)
    return y.to(x.dtype).view(x.shape), cache


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None,
                residual_dtype: torch.dtype | None, is_rms_norm: bool,
                num_groups: int = 1) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Rows x [T, D], of which num_groups after each other have their own parts of weight and bias [num_groups D].

    Gives fp32 rows, mean and reciprocal of the deviation [T], and what was normalised: x, or its sum with residual.
    """
    rows = x.float() if residual is None else x.float() + residual.float()
    kept_dtype = residual.dtype if residual is not None else residual_dtype or x.dtype
    kept = x if residual is None and kept_dtype == x.dtype else rows.to(kept_dtype)
    mean = None if is_rms_norm else rows.mean(-1)
    y = rows if is_rms_norm else rows - mean[:, None]
    rstd = (y.square().mean(-1) + eps).rsqrt()
    y = (y * rstd[:, None]).view(-1, num_groups * x.shape[1])
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.view_as(x), mean, rstd, kept


def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5,
                   residual: Tensor | None = None, out_dtype: torch.dtype | None = None,
                   residual_dtype: torch.dtype | None = None, is_rms_norm: bool = False,
                   num_groups: int = 1) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    y, *rest = _normalised(x, weight, bias, eps, residual, residual_dtype, is_rms_norm, num_groups)
    return y.to(out_dtype or x.dtype), *rest


def layer_norm_gated_fwd(x: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str = "swish",
                         eps: float = 1e-5, residual: Tensor | None = None, out_dtype: torch.dtype | None = None,
                         residual_dtype: torch.dtype | None = None,
                         is_rms_norm: bool = False) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    y, *rest = _normalised(x, weight, bias, eps, residual, residual_dtype, is_rms_norm)
    y = y * (g.float().sigmoid() if activation == "sigmoid" else functional.silu(g.float()))
    return y.to(out_dtype or x.dtype), *rest


def swiglu_fwd(x: Tensor, y: Tensor, output_contiguous: bool = False) -> Tensor:
    return (functional.silu(x.float()) * y.float()).to(x.dtype)
