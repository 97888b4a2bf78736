# SPDX-License-Identifier: MIT
"""prefill() between convolutions and a gated norm: against the three written in torch, in fp64."""

from __future__ import annotations

import dataclasses

import libflashkda
import numpy
import pytest
import torch
from recurrence import BF16_MARGIN, assert_close, error_ratio, in_layout, make, solve

pytestmark = pytest.mark.usefixtures("no_grad")

NAMES = ("q_conv", "k_conv", "v_conv")
LENGTHS = [30, 1, 40, 3]
FRESH = [True, False, True, True]  # has_initial_state
SLOTS = [4, 0, 2, 1]


def convolve(x, weight, bias, past):
    """x [T, channels] of one sequence, in fp64, after its past [channels, 3]; and the inputs that end it."""
    inputs = torch.cat([past.double(), x.double().mT], 1)
    y = torch.nn.functional.conv1d(inputs[None], weight.double()[:, None], None if bias is None else bias.double(),
                                   groups=len(weight))[0]
    return torch.nn.functional.silu(y).mT, inputs[:, -3:]


@dataclasses.dataclass
class Step:
    """A layer's step on four packed sequences, and what is right."""

    problem: object
    convolutions: list
    norm: tuple
    expected: torch.Tensor
    states: numpy.ndarray
    pasts: list


def step_of(dtype, activation, with_bias=True):
    problem = make(lengths=LENGTHS, H=2, HV=4, K=32, V=48, dtype=dtype, initial_state=torch.float32)
    generator = torch.Generator().manual_seed(1)
    ends = problem.options["cu_seqlens"].tolist()
    problem.options["initial_state"] *= torch.tensor(FRESH)[:, None, None, None]
    outputs, convolutions, pasts = [], [], []
    for x in problem.inputs[:3]:
        channels = x.shape[2] * x.shape[3]
        weight = (torch.randn(channels, 4, generator=generator) / 2).to(dtype)
        bias = torch.randn(channels, generator=generator).to(dtype) if with_bias else None
        past = torch.randn(len(LENGTHS), channels, 3, generator=generator).to(dtype)
        parts = [convolve(x[0, ends[n]:ends[n + 1]].flatten(1), weight, bias, past[n] * FRESH[n])
                 for n in range(len(LENGTHS))]
        outputs.append(torch.cat([y for y, _ in parts]).view(x.shape))
        pasts.append(torch.stack([last for _, last in parts]).to(dtype))
        convolutions.append((weight, bias, past))
    expected, states, _ = solve(dataclasses.replace(problem, **dict(zip("qkv", outputs))))
    weight, gate = torch.rand(48, generator=generator), torch.randn(problem.v.shape, generator=generator).to(dtype)
    expected = torch.from_numpy(expected)
    expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    expected = expected * (gate.double().sigmoid() if activation == "sigmoid"
                           else torch.nn.functional.silu(gate.double()))
    return Step(problem, convolutions, (weight, gate), expected, in_layout(states, "v_first"), pasts)


def pools_of(step, device):
    """States in five slots, those of the convolutions with their channels last; NaN where nothing is to be read."""
    initial = step.problem.options["initial_state"]
    pool = torch.full((5, *initial.shape[1:]), torch.nan)
    convs = []
    for _, _, past in step.convolutions:
        conv = torch.full((5, 3, past.shape[1]), torch.nan, dtype=past.dtype)
        for n, slot in enumerate(SLOTS):
            if FRESH[n]:
                conv[slot] = past[n].mT
        convs.append(conv.to(device))
    for n, slot in enumerate(SLOTS):
        if FRESH[n]:
            pool[slot] = initial[n]
    return pool.to(device), convs


def call(step, device, pool, convs, **more):
    here = step.problem.to(device)
    options = {name: value for name, value in here.options.items() if name != "initial_state"}
    convolutions = {name: (weight.to(device), None if bias is None else bias.to(device), conv.mT)
                    for name, (weight, bias, _), conv in zip(NAMES, step.convolutions, convs)}
    weight, gate = step.norm
    return libflashkda.prefill(*here.inputs, **options, initial_state=pool, final_state=pool,
                               state_indices=torch.tensor(SLOTS, device=device), padding_slot=3,
                               has_initial_state=torch.tensor(FRESH, device=device), **convolutions,
                               norm_weight=weight.to(device), norm_gate=gate.to(device), **more)[0]


def close(x, reference, dtype, device):
    if device == "cuda":  # BF16_FUSED of tests/bench/tolerance.h
        assert error_ratio(x, reference) <= BF16_MARGIN * 6.1e-3 * 1.5
    else:
        assert_close(x, reference, "fp32")


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_fused(activation, dtype, with_bias, device):
    step = step_of(dtype, activation, with_bias)
    pool, convs = pools_of(step, device)
    out = call(step, device, pool, convs, norm_activation=activation)
    close(out, step.expected.numpy(), dtype, device)
    close(pool[SLOTS], step.states, dtype, device)
    assert pool[3].isnan().all()
    for conv, last in zip(convs, step.pasts, strict=True):
        assert torch.equal(conv[SLOTS].mT.cpu(), last) and conv[3].isnan().all()


def test_in_two_calls(device):
    """The states that one call leaves are those that the next one goes on from."""
    problem = make(T=60, H=2, K=32, V=32, dtype=torch.float32, initial_state=torch.float32).to(device)
    options = {name: value for name, value in problem.options.items() if name != "initial_state"}
    weights = [torch.randn(64, 4, device=device) / 2 for _ in NAMES]
    outs = []
    for cuts in ([0, 60], [0, 2, 31, 60]):
        state = problem.options["initial_state"].clone()
        convs = [torch.zeros(1, 64, 3, device=device) for _ in NAMES]
        outs.append(torch.cat([
            libflashkda.prefill(*(x[:, begin:end] for x in problem.inputs), **options, initial_state=state,
                                final_state=state, norm_weight=torch.ones(32, device=device),
                                **{name: (w, None, c) for name, w, c in zip(NAMES, weights, convs)})[0]
            for begin, end in zip(cuts, cuts[1:])], 1))
    assert error_ratio(outs[1], outs[0].double().cpu().numpy()) < (1e-2 if device == "cuda" else 1e-5)


def test_without_states(device):
    """From zero, and nothing is kept."""
    problem = make(T=20, H=1, K=32, V=32, dtype=torch.float32).to(device)
    weight = torch.randn(32, 4, device=device)
    expected = libflashkda.prefill(*problem.inputs, **problem.options,
                                   q_conv=(weight, None, torch.full((1, 32, 3), torch.nan, device=device)))
    assert torch.equal(libflashkda.prefill(*problem.inputs, **problem.options, q_conv=(weight, None, None)), expected)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled(backend, device):
    torch.compiler.reset()
    step = step_of(torch.float32, "silu")
    eager, recorded = pools_of(step, device), pools_of(step, device)
    expected = call(step, device, *eager, norm_activation="silu")
    out = torch.compile(lambda *pools: call(step, device, *pools, norm_activation="silu") * 1, backend=backend)(*recorded)
    assert torch.equal(out, expected) and torch.equal(eager[0].nan_to_num(), recorded[0].nan_to_num())
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(eager[1], recorded[1], strict=True))


def test_numpy():
    problem = make(T=20, H=1, K=32, V=32, dtype=torch.float32)
    conv = (torch.randn(32, 4), torch.randn(32), torch.zeros(1, 32, 3))
    norm = torch.rand(32)
    expected = libflashkda.prefill(*problem.inputs, **problem.options, k_conv=conv, norm_weight=norm)
    last = conv[2].clone()
    options = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in problem.options.items()}
    out = libflashkda.prefill(*(x.numpy() for x in problem.inputs), **options, k_conv=tuple(x.numpy() for x in conv),
                              norm_weight=norm.numpy())
    assert numpy.array_equal(out, expected.numpy()) and torch.equal(conv[2], last)


def test_describe_and_size():
    problem = make(T=20, H=1, K=32, V=32)
    weight = (torch.zeros(32, 4), None, None)
    text = libflashkda.prefill_describe(*problem.inputs, **problem.options, q_conv=weight, norm_weight=torch.ones(32))
    assert text.endswith("between convolutions and a norm")
    assert libflashkda.prefill_workspace_size(*problem.inputs, **problem.options, q_conv=weight) > (
        libflashkda.prefill_workspace_size(*problem.inputs, **problem.options))


@pytest.mark.parametrize("more, exception, sentence", [
    ({"q_conv": torch.zeros(64, 4)}, TypeError, "q_conv is of type"),
    ({"q_conv": (torch.zeros(64, 3), None, None)}, ValueError, "q_conv_weight has shape"),
    ({"k_conv": (torch.zeros(64, 4), torch.zeros(60), None)}, ValueError, "k_conv_bias has shape"),
    ({"v_conv": (torch.zeros(64, 4), None, torch.zeros(2, 64, 3))}, ValueError, "v_conv_state has shape"),
    ({"v_conv": (None, None, torch.zeros(1, 64, 3))}, ValueError, "v_conv_state is given without v_conv_weight"),
    ({"norm_gate": torch.zeros(1, 20, 2, 32)}, ValueError, "norm_gate is given without norm_weight"),
    ({"norm_weight": torch.zeros(32), "norm_activation": "relu"}, ValueError, "norm_activation is 'relu'"),
    ({"norm_weight": torch.zeros(32), "norm_eps": 0.0}, ValueError, "norm_eps is 0"),
], ids=str)
def test_errors(more, exception, sentence):
    problem = make(T=20, H=2, K=32, V=32)
    with pytest.raises(exception, match=sentence):
        libflashkda.prefill(*problem.inputs, **problem.options, **more)


def test_gradients_are_refused():
    problem = make(T=20, H=1, K=32, V=32)
    weight = torch.zeros(32, 4, requires_grad=True)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="q_conv_weight requires grad"):
        libflashkda.prefill(*problem.inputs, **problem.options, q_conv=(weight, None, None))
