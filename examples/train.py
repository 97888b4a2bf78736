# SPDX-License-Identifier: MIT
"""Trains a small language model of KDA layers on the bytes of this repository's own pages.

usage: python examples/train.py [--device cpu|cuda] [--steps N]

On a GPU it computes in bf16, by torch's autocast; parameters stay fp32.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator

import torch
from kda_layer import KDALayer
from torch import nn
from torch.nn import functional

ROOT = pathlib.Path(__file__).resolve().parent.parent
BYTES = 256


class Block(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, layer: type[KDALayer]):
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = layer(width, heads, heads, head_dim)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.before_attention(x))[0]
        return x + self.mlp(self.before_mlp(x))


class Model(nn.Module):
    """From bytes [B, T] to scores of the next byte [B, T, 256]."""

    def __init__(self, width: int, heads: int, head_dim: int, layers: int, layer: type[KDALayer] = KDALayer):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.Sequential(*(Block(width, heads, head_dim, layer) for _ in range(layers)))
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, BYTES, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(x)))


def text() -> torch.Tensor:
    pages = [ROOT / "README.md", ROOT / "include" / "flash_kda.h", *sorted((ROOT / "docs").glob("*.md"))]
    return torch.tensor(list(b"".join(page.read_bytes() for page in pages)))


def train(model: Model, steps: int, batch: int, tokens: int) -> Iterator[float]:
    """The loss of each step, in nats a byte. The same batches each time."""
    data, generator = text(), torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), eps=1e-6)
    for _ in range(steps):
        starts = torch.randint(len(data) - tokens, (batch,), generator=generator)
        rows = torch.stack([data[start:start + tokens + 1] for start in starts.tolist()]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            scores = model(rows[:, :-1])
        loss = functional.cross_entropy(scores.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Model(width=64, heads=2, head_dim=32, layers=2).to(options.device)
    losses = []
    for step, loss in enumerate(train(model, options.steps, batch=4, tokens=192), 1):
        losses.append(loss)
        if step == 1 or step % 5 == 0:
            print(f"step {step:3}: {loss:.3f} nats a byte")
    good = losses[-1] < losses[0] - 1
    print(f"on {options.device}: {'it learns' if good else 'it does NOT learn'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
