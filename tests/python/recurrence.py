# SPDX-License-Identifier: MIT
"""What is right: the token recurrence in fp64, and how far a result may be from it."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy
import safetensors
import safetensors.torch
import torch

DATA = pathlib.Path(__file__).parents[2] / "data"


@dataclasses.dataclass
class Problem:
    """Inputs as torch tensors, and what prefill() is told about them. Letters as there."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    options: dict = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    def to(self, device: str) -> Problem:
        options = {name: value.to(device) if isinstance(value, torch.Tensor) else value
                   for name, value in self.options.items()}
        return Problem(*(tensor.to(device) for tensor in self.inputs), options)


def make(B=1, T=70, H=2, HV=None, K=64, V=64, dtype=torch.bfloat16, lengths=None, gate="softplus",
         beta_mode="sigmoid", qk_norm=True, initial_state=None, v_first=True, seed=0, **options) -> Problem:
    """A random problem. initial_state: its dtype, or None."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    HV = HV or H
    T = sum(lengths) if lengths is not None else T
    N = len(lengths) if lengths is not None else B
    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, HV, V)
    g, beta = normal(B, T, HV, K), normal(B, T, HV)
    if not qk_norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    if gate == "none":
        g = -g.abs()
    else:
        options.update(A_log=normal(HV) / 2, dt_bias=normal(HV, K))
    if beta_mode == "given":
        beta = beta.sigmoid()
    if initial_state is not None:
        options["initial_state"] = normal(N, HV, *((V, K) if v_first else (K, V))).to(initial_state)
    if lengths is not None:
        options["cu_seqlens"] = torch.tensor([0, *numpy.cumsum(lengths, dtype=int)], dtype=torch.int64)
    return Problem(*(x.to(dtype) for x in (q, k, v, g, beta)),
                   {"gate": gate, "beta_mode": beta_mode, "qk_norm": qk_norm,
                    "state_layout": "v_first" if v_first else "k_first", **options})


def captured(gate: str) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    """Inputs from a trained model, with the output and the final state that belong to them."""
    path = DATA / f"small_{gate}.safetensors"
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["gate"] == gate
    bound = {"lower_bound": float(metadata["lower_bound"])} if gate == "sigmoid" else {}
    options = {"gate": gate, "beta_mode": "sigmoid", "qk_norm": True, **bound, "A_log": tensors["A_log"],
               "dt_bias": tensors["dt_bias"]}
    return (Problem(*(tensors[name][None] for name in ("q", "k", "v", "g", "beta")), options), tensors["o"][None],
            tensors["state"][None])


# ---- The recurrence ------------------------------------------------------------------------------


def _fp64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().double()


def log_decay(problem: Problem) -> torch.Tensor:
    g, options = _fp64(problem.g), problem.options
    if options["gate"] == "none":
        return g
    x = g + (_fp64(options["dt_bias"]) if options.get("dt_bias") is not None else 0)
    rate = 1
    if options.get("A_log") is not None:
        rate = _fp64(options["A_log"]).exp()
        rate = rate[:, None] if rate.ndim == 1 else rate  # [HV], or for tests one for each element of g
    if options["gate"] == "softplus":
        return -rate * torch.logaddexp(torch.zeros_like(x), x)
    return options["lower_bound"] * torch.sigmoid(rate * x)


def recurrence(problem: Problem, every: int = 1 << 60):
    """out [B, T, HV, V]; final states [N, HV, K, V]; for each sequence its states before tokens 0, every, 2 every ..

    In fp64, and differentiable.
    """
    options = problem.options
    q, k, v, beta, a = *map(_fp64, (problem.q, problem.k, problem.v, problem.beta)), log_decay(problem)
    if options["qk_norm"]:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if options["beta_mode"] != "given":
        beta = torch.sigmoid(beta) * (2 if options["beta_mode"] == "twice_sigmoid" else 1)
    scale = options.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(group, 2) * scale, k.repeat_interleave(group, 2)
    decay, ends = a.exp(), options.get("cu_seqlens")
    spans = [(b, 0, q.shape[1]) for b in range(q.shape[0])] if ends is None else [
        (0, *span) for span in zip(ends.tolist(), ends.tolist()[1:])]
    rows: list[list[torch.Tensor]] = [[] for _ in range(q.shape[0])]
    finals, inner = [], []
    for n, (b, start, end) in enumerate(spans):
        S = torch.zeros(v.shape[2], q.shape[3], v.shape[3], dtype=torch.float64)
        if options.get("initial_state") is not None:
            S = _fp64(options["initial_state"][n])
            S = S.mT if options.get("state_layout", "v_first") == "v_first" else S
        kept = []
        for t in range(start, end):
            if (t - start) % every == 0:
                kept.append(S)
            S = decay[b, t][..., None] * S
            u = beta[b, t][:, None] * (v[b, t] - (k[b, t][:, None] @ S)[:, 0])
            S = S + k[b, t][..., None] * u[:, None, :]
            rows[b].append((q[b, t][:, None] @ S)[:, 0])
        finals.append(S)
        inner.append(kept)
    out = torch.stack([x for row in rows for x in row]).view(v.shape) if v.shape[1] else torch.zeros_like(v)
    return out, torch.stack(finals), inner


def solve(problem: Problem, every: int = 1 << 60):
    """The same for numpy."""
    with torch.no_grad():
        out, finals, inner = recurrence(problem, every)
    return out.numpy(), finals.numpy(), [[state.numpy() for state in kept] for kept in inner]


# ---- How far a result may be from it -------------------------------------------------------------

# As in tests/bench/tolerance.h.
FP32 = 1e-5
BF16_MARGIN, BF16_ANY, BF16_FEW = 1.15, 5.1e-3, 4


def error_ratio(x, reference: numpy.ndarray) -> float:
    x = _fp64(x.detach()).numpy() if isinstance(x, torch.Tensor) else numpy.asarray(x, numpy.float64)
    assert x.shape == reference.shape, (x.shape, reference.shape)
    scale = math.sqrt(float((reference**2).mean())) if reference.size else 0.0
    error = math.sqrt(float(((x - reference) ** 2).mean())) if reference.size else 0.0
    return error / scale if scale else error


def tolerance(reference: numpy.ndarray, dtype: torch.dtype, description: str) -> float:
    """description: what prefill_describe() says of the call; it names the arithmetic."""
    if "bf16 products" in description:
        allowed = BF16_MARGIN * BF16_ANY * (1 + BF16_FEW / math.sqrt(max(math.prod(reference.shape[:-1]), 1)))
    else:
        allowed = FP32
    return allowed + error_ratio(torch.from_numpy(reference).to(dtype), reference)


def assert_close(x: torch.Tensor, reference: numpy.ndarray, description: str) -> None:
    ratio, allowed = error_ratio(x, reference), tolerance(reference, x.dtype, description)
    assert ratio <= allowed, f"error ratio {ratio:.3g}, at most {allowed:.3g} is allowed ({description})"


def in_layout(states: numpy.ndarray, layout: str) -> numpy.ndarray:
    """[.., K, V], as solve() has it, in a state_layout."""
    return states.swapaxes(-1, -2) if layout == "v_first" else states
