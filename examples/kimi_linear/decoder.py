# SPDX-License-Identifier: MIT
"""Greedy decode of all slots of a cache, on a GPU as one CUDA graph a step."""

from __future__ import annotations

from typing import Callable

import torch

from model import Cache, Model


def capture(call: Callable[[], None], device: torch.device, warm_up: int = 2) -> Callable[[], None]:
    """A CUDA graph of what a call enqueues, after a few calls on the side; on a CPU the call itself, after as many."""
    if device.type == "cpu":
        for _ in range(warm_up):
            call()
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Decoder:
    """tokens [B] is what goes in next, one for each slot; after step() it is what came out."""

    @torch.inference_mode()
    def __init__(self, model: Model, cache: Cache):
        self.model, self.cache = model, cache
        self.tokens = torch.zeros_like(cache.batch.position)
        self._check_room()
        # Warm-up calls find nobody in the slots, so they leave every state as it is. The latents that they write lie
        # after those that count.
        slots = cache.batch.slots.clone()
        cache.batch.slots.fill_(-1)
        self.run = capture(self._enqueue, model.device)
        cache.batch.slots.copy_(slots)
        self.tokens.zero_()

    def _check_room(self) -> None:
        for slot in self.cache.there():
            self.cache.check_room(slot, 1)

    @torch.inference_mode()
    def _enqueue(self) -> None:
        self.tokens.copy_(self.model.step(self.tokens, self.cache).argmax(-1))
        there = self.cache.batch.slots >= 0
        self.cache.batch.position += there
        self.cache.batch.lengths += there

    def step(self) -> torch.Tensor:
        self._check_room()
        self.run()
        for slot in self.cache.there():
            self.cache.filled[slot] += 1
        return self.tokens
