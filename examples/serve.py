# SPDX-License-Identifier: MIT
"""A tiny serving loop on libflashkda: prompts are prefilled into a pool of states, their sequences go on by decode, several
drafted tokens at a time, and leave when they are done. Every sequence is then compared with one prefill over all of it.

usage: python examples/serve.py [--device cpu|cuda]

There is no model here: what a layer's projections would yield for a token is random, but always the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys

import libflashkda
import torch

HEADS, VALUE_HEADS, DIM = 2, 4, 64
BATCH = 4  # rows of every decode call, so that one CUDA graph could serve them all; rows without a sequence are padding
DRAFTS = 3  # tokens of a sequence in a call, and slots that it has: one for the state after each
SLOTS = 2 + BATCH * DRAFTS  # slot numbers mean nothing, so a few more do no harm

# What two ways through the same tokens may differ by: on CUDA and some CPUs prefill multiplies in bf16.
TOLERANCE = 1e-2


@dataclasses.dataclass
class Request:
    seed: int
    prompt: int  # tokens
    length: int  # with what is generated
    position: int = 0  # tokens that the state has seen
    slots: list[int] = dataclasses.field(default_factory=list)
    accepted: int = 1  # of the last drafts: the state is in slots[accepted - 1]
    out: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def tokens(self, first: int, count: int) -> list[torch.Tensor]:
        """q, k, v, g and beta of tokens first .. first + count - 1, [count, heads, dim] each."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (HEADS, DIM), (HEADS, DIM), (VALUE_HEADS, DIM), (VALUE_HEADS, DIM), (VALUE_HEADS,)
        return [torch.randn(self.length + DRAFTS, *shape, generator=generator)[first:first + count] for shape in shapes]


class Server:
    def __init__(self, device: str):
        self.device = device
        self.pool = torch.zeros(SLOTS, VALUE_HEADS, DIM, DIM, device=device)
        self.free = list(range(SLOTS))
        self.running: list[Request] = []
        self.layer = {"A_log": torch.zeros(VALUE_HEADS, device=device), "gate": "softplus", "beta_mode": "sigmoid",
                      "qk_norm": True}

    def indices(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def inputs(self, parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """Tokens of several sequences, one after another, [1, T, heads, dim]."""
        return [torch.cat(x)[None].to(self.device, torch.bfloat16) for x in zip(*parts, strict=True)]

    def admit(self, requests: list[Request]) -> None:
        """Prefills prompts, packed, into the first slot of each."""
        ends = [0]
        for request in requests:
            request.slots = [self.free.pop() for _ in range(DRAFTS)]
            ends.append(ends[-1] + request.prompt)
        prompts = [request.tokens(0, request.prompt) for request in requests]
        out, _ = libflashkda.prefill(*self.inputs(prompts), **self.layer,
                                     cu_seqlens=self.indices(ends), final_state=self.pool,
                                     state_indices=self.indices([request.slots[0] for request in requests]))
        for request, start, end in zip(requests, ends, ends[1:]):
            request.position = request.prompt
            request.out.append(out[0, start:end])
        self.running += requests

    def step(self) -> None:
        """Verifies drafts of every sequence. The state after each lands in a slot of its own, so that what is rejected
        needs no undoing: the next call reads the slot of the last accepted one."""
        rows: list[Request | None] = [*self.running, *[None] * (BATCH - len(self.running))]
        empty = [torch.zeros(DRAFTS, *shape) for shape in ((HEADS, DIM), (HEADS, DIM), (VALUE_HEADS, DIM),
                                                           (VALUE_HEADS, DIM), (VALUE_HEADS,))]
        inputs = self.inputs([row.tokens(row.position, DRAFTS) if row else empty for row in rows])
        out = libflashkda.decode(*(x.unflatten(1, (BATCH, DRAFTS))[0] for x in inputs), self.pool, **self.layer,
                                 state_indices=self.indices([row.slots if row else [-1] * DRAFTS for row in rows]),
                                 num_accepted_tokens=self.indices([row.accepted if row else 1 for row in rows]))
        for n, request in enumerate(self.running):
            left = request.length - request.position
            request.accepted = random.randint(1, min(DRAFTS, left))  # a model would compare its tokens with the drafts
            request.out.append(out[n, :request.accepted])
            request.position += request.accepted

    def release(self) -> list[Request]:
        done = [request for request in self.running if request.position == request.length]
        for request in done:
            self.running.remove(request)
            self.free += request.slots
        return done


def error_ratio(x: torch.Tensor, reference: torch.Tensor) -> float:
    x, reference = x.double(), reference.double()
    return ((x - reference).square().mean() / reference.square().mean()).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    random.seed(0)
    prompts = [random.randint(1, 200) for _ in range(10)]
    waiting = [Request(seed, prompt, prompt + random.randint(1, 40)) for seed, prompt in enumerate(prompts)]
    server, steps, good = Server(device), 0, True
    while waiting or server.running:
        if waiting and len(server.running) < BATCH:
            room = BATCH - len(server.running)
            server.admit(waiting[:room])
            del waiting[:room]
        server.step()
        steps += 1
        for request in server.release():
            whole = libflashkda.prefill(*server.inputs([request.tokens(0, request.length)]), **server.layer)
            good &= (error := error_ratio(torch.cat(request.out), whole[0])) <= TOLERANCE
            print(f"step {steps:2}: request {request.seed} of {request.prompt:3} + {request.length - request.prompt:2} tokens "
                  f"is done, error ratio {error:.1e}, at most {TOLERANCE:.0e}")
    print(f"on {device}: {'every sequence is what one prefill makes of it' if good else 'NOT the same as prefill'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
