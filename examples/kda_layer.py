# SPDX-License-Identifier: MIT
"""A layer of Kimi Linear on libflashkda: runs a prompt, then what follows from the prompt's state, and compares with one
run over everything.

usage: python examples/kda_layer.py [--device cpu|cuda]

Parameters have the names and shapes of flash-linear-attention's KimiDeltaAttention, whose weights it can load. train.py
trains it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import libflashkda
import torch
from torch import nn
from torch.nn import functional


@dataclasses.dataclass
class Cache:
    """What a layer remembers of a sequence; its size does not grow."""

    q: torch.Tensor  # [B, 3, H * K]: the last inputs of each short convolution
    k: torch.Tensor
    v: torch.Tensor  # [B, 3, HV * V]
    state: torch.Tensor  # [B, HV, V, K], fp32


class ShortConvolution(nn.Conv1d):
    """Each channel's last `size` tokens, weighted; then SiLU."""

    def __init__(self, channels: int, size: int = 4):
        super().__init__(channels, channels, size, groups=channels, bias=False)

    def forward(self, x: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, T, channels] and the inputs before it; None: zeros."""
        past = self.kernel_size[0] - 1
        if before is None:
            before = x.new_zeros(len(x), past, x.shape[2])
        x = torch.cat([before, x], 1)
        return functional.silu(super().forward(x.mT).mT).contiguous(), x[:, -past:]


class GatedNorm(nn.Module):
    """RMS norm of each head, times a sigmoid gate."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        normed = functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-5)
        return (normed * gate.float().sigmoid()).to(x.dtype)


class KDALayer(nn.Module):
    def __init__(self, hidden_size: int, heads: int, value_heads: int, head_dim: int = 128):
        super().__init__()
        keys, values = heads * head_dim, value_heads * head_dim
        self.heads, self.value_heads = heads, value_heads
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.q_conv1d = ShortConvolution(keys)
        self.k_conv1d = ShortConvolution(keys)
        self.v_conv1d = ShortConvolution(values)
        self.f_proj = nn.Sequential(nn.Linear(hidden_size, head_dim, bias=False),
                                    nn.Linear(head_dim, values, bias=False))
        self.b_proj = nn.Linear(hidden_size, value_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(value_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.empty(values).uniform_(-7, -2))  # softplus: 0.001 to 0.1 nats a token
        self.g_proj = nn.Sequential(nn.Linear(hidden_size, head_dim, bias=False), nn.Linear(head_dim, values))
        self.o_norm = GatedNorm(head_dim)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
               state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """KDA itself: outputs [B, T, HV, V] and the state that they leave."""
        return libflashkda.prefill(q, k, v, g, beta, gate="softplus", A_log=self.A_log,
                                   dt_bias=self.dt_bias.view(self.value_heads, -1), beta_mode="sigmoid", qk_norm=True,
                                   initial_state=state, output_final_state=True)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """x [B, T, hidden_size], which follows what the cache has seen."""
        q, q_past = self.q_conv1d(self.q_proj(x), cache and cache.q)
        k, k_past = self.k_conv1d(self.k_proj(x), cache and cache.k)
        v, v_past = self.v_conv1d(self.v_proj(x), cache and cache.v)
        o, state = self.attend(
            q.unflatten(2, (self.heads, -1)), k.unflatten(2, (self.heads, -1)), v.unflatten(2, (self.value_heads, -1)),
            self.f_proj(x).unflatten(2, (self.value_heads, -1)), self.b_proj(x), cache and cache.state)
        o = self.o_norm(o, self.g_proj(x).view_as(o))
        return self.o_proj(o.flatten(2)), Cache(q_past, k_past, v_past, state)


# What two ways through the same tokens may differ by in bf16: each rounds on its own.
TOLERANCE = 1e-2


def error_ratio(x: torch.Tensor, reference: torch.Tensor) -> float:
    x, reference = x.double(), reference.double()
    return ((x - reference).square().mean() / reference.square().mean()).sqrt().item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    layer = KDALayer(hidden_size=512, heads=2, value_heads=4).to(device, torch.bfloat16)
    x = torch.randn(2, 300, 512, device=device, dtype=torch.bfloat16)
    whole, cache_of_whole = layer(x)
    cache, parts = None, []
    for part in x.split([200, 1, 1, 98], 1):  # a prompt, two tokens, and many more
        y, cache = layer(part, cache)
        parts.append(y)
    good = True
    for name, y, expected in zip(["prompt", "token 200", "token 201", "the rest"], parts,
                                 whole.split([y.shape[1] for y in parts], 1)):
        good &= (error := error_ratio(y, expected)) <= TOLERANCE
        print(f"{name:10} error ratio {error:.1e}, at most {TOLERANCE:.0e}")
    good &= (error := error_ratio(cache.state, cache_of_whole.state)) <= TOLERANCE
    print(f"{'state':10} error ratio {error:.1e}, at most {TOLERANCE:.0e}")
    print(f"on {device}: {'the same in parts as in one go' if good else 'NOT the same'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
