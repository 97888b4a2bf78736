# SPDX-License-Identifier: MIT
"""Goes on from a prompt of token numbers, greedily.

usage: python examples/kimi_linear/generate.py [--checkpoint FOLDER] [--device cpu|cuda] [--count N] [TOKEN ...]

FOLDER has config.json and weights in safetensors, as published; without it a tiny model has random weights. Without
tokens the prompt is random.
"""

from __future__ import annotations

import argparse

import torch

import checkpoint
from config import TINY
from decoder import Decoder
from model import Cache, Model


@torch.inference_mode()
def generate(model: Model, prompts: list[torch.Tensor], count: int, chunk: int = 8192) -> torch.Tensor:
    """The next `count` tokens [B, count] of each prompt [T]."""
    cache = Cache(model, len(prompts), max(map(len, prompts)) + count)
    decoder = Decoder(model, cache)
    for slot, prompt in enumerate(prompts):
        cache.begin(slot)
        decoder.tokens[slot] = model.prefill(prompt, cache, slot, chunk).argmax()
    out = [decoder.tokens.clone()]
    for _ in range(count - 1):
        out.append(decoder.step().clone())
    return torch.stack(out, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", metavar="FOLDER")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=16, help="tokens to generate (16)")
    parser.add_argument("tokens", type=int, nargs="*", help="the prompt")
    options = parser.parse_args()
    if options.checkpoint:
        model = checkpoint.load(options.checkpoint, options.device)
    else:
        model = Model(TINY, options.device)
        model.randomise()
    prompt = torch.tensor(options.tokens or torch.randint(model.config.vocab_size, (32,)).tolist(), device=model.device)
    print(*generate(model, [prompt], options.count)[0].tolist())


if __name__ == "__main__":
    main()
