# SPDX-License-Identifier: MIT
"""decode(): against the recurrence and against prefill(), for every way to address the states and every array library."""

from __future__ import annotations

import dataclasses

import libflashkda
import hypothesis
import numpy
import pytest
import torch
from hypothesis import strategies
from recurrence import assert_close, captured, in_layout, make, solve
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.usefixtures("no_grad")

NOT_DECODES = ("initial_state", "cu_seqlens")


def options_of(problem):
    return {name: value for name, value in problem.options.items() if name not in NOT_DECODES}


def tokens(problem, first, count):
    return [x[:, first:first + count] for x in problem.inputs]


def indices(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def start(problem, slots, rows, dtype=torch.float32):
    """A pool that is NaN but for the initial states, which are in slots `rows`."""
    N, HV, K, V = problem.q.shape[0], problem.v.shape[2], problem.q.shape[3], problem.v.shape[3]
    shape = (HV, V, K) if problem.options.get("state_layout") != "k_first" else (HV, K, V)
    pool = torch.full((slots, *shape), torch.nan, dtype=dtype, device=problem.q.device)
    initial = problem.options.get("initial_state")
    pool[rows] = torch.zeros(N, *shape, dtype=dtype, device=pool.device) if initial is None else initial.to(dtype)
    return pool


@pytest.mark.parametrize("gate", ["softplus", "sigmoid"])
def test_captured(gate, device):
    problem, expected, state = captured(gate)
    problem = problem.to(device)
    pool = start(problem, 3, [1])
    out = [libflashkda.decode(*tokens(problem, t, 1), pool, **options_of(problem), state_indices=indices([1], device))
           for t in range(problem.q.shape[1])]
    assert_close(torch.cat(out, 1), expected.double().numpy(), "fp32")
    assert_close(pool[1:2], state.double().numpy(), "fp32")
    assert pool[[0, 2]].isnan().all()


DTYPES = strategies.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@strategies.composite
def problems(draw):
    heads, groups = draw(strategies.integers(1, 3)), draw(strategies.integers(1, 3))
    gate = draw(strategies.sampled_from(["none", "softplus", "sigmoid"]))
    return make(B=draw(strategies.integers(1, 4)), T=draw(strategies.integers(0, 16)), H=heads, HV=heads * groups,
                K=draw(strategies.sampled_from([1, 8, 60, 64, 128])), V=draw(strategies.sampled_from([1, 4, 50, 64, 130])),
                dtype=draw(DTYPES), gate=gate, beta_mode=draw(strategies.sampled_from(["given", "sigmoid", "twice_sigmoid"])),
                qk_norm=draw(strategies.booleans()), v_first=draw(strategies.booleans()),
                initial_state=torch.float32, scale=draw(strategies.sampled_from([None, 0.3])),
                seed=draw(strategies.integers(0, 999)),
                **({"lower_bound": draw(strategies.floats(-5, -0.1))} if gate == "sigmoid" else {}))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(problem=problems(), dtype=DTYPES, cuts=strategies.lists(strategies.integers(1, 5), max_size=4))
def test_shapes_flags_and_pieces(problem, dtype, cuts, device):
    """In one call, or in several; the state in between is rounded to its dtype."""
    here = problem.to(device)
    B, T = problem.q.shape[:2]
    rows = list(range(2 * B - 1, 0, -2))
    pool = start(here, 2 * B, rows, dtype)
    problem.options["initial_state"] = pool[rows].float().cpu()
    expected, states, _ = solve(problem)
    pieces, at = [], 0
    for count in [*(cuts if dtype == torch.float32 else []), 16]:
        count = min(count, T - at)
        pieces.append(libflashkda.decode(*tokens(here, at, count), pool, **options_of(here),
                                         state_indices=indices(rows, device)))
        at += count
    assert all(x.dtype == problem.v.dtype for x in pieces)
    assert_close(torch.cat(pieces, 1), expected, "fp32")
    assert_close(pool[rows], in_layout(states, problem.options["state_layout"]), "fp32")
    assert pool[::2].isnan().all()


def test_slots_in_the_order_of_sequences(device):
    problem = make(B=3, T=1, initial_state=torch.float32).to(device)
    state = problem.options["initial_state"].clone()
    expected, final_state = libflashkda.prefill(*problem.inputs, **problem.options, output_final_state=True)
    out = libflashkda.decode(*problem.inputs, state, **options_of(problem))
    assert_close(out, expected.double().cpu().numpy(), "bf16 products")
    assert_close(state, final_state.double().cpu().numpy(), "bf16 products")


def test_packed_sequences(device):
    lengths = [3, 0, 16, 1]
    problem = make(lengths=lengths, initial_state=torch.float32)
    expected, states, _ = solve(problem)
    here = problem.to(device)
    state = here.options["initial_state"].clone()
    out = libflashkda.decode(*here.inputs, state, **options_of(here), cu_seqlens=here.options["cu_seqlens"], max_tokens=16)
    assert_close(out, expected, "fp32")
    assert_close(state, in_layout(states, "v_first"), "fp32")


def test_padding(device):
    problem = make(B=3, T=2, initial_state=torch.float32).to(device)
    pool = start(problem, 5, [3, 0, 4])
    before = pool.clone()
    for x in problem.inputs:
        x[1] = torch.nan
    out = torch.full_like(problem.v, 7.0)
    result = libflashkda.decode(*problem.inputs, pool, **options_of(problem), state_indices=indices([3, -1, 4], device), out=out)
    assert result is out and (out[1] == 7).all() and out[[0, 2]].isfinite().all()
    assert torch.equal(pool[0], before[0]) and pool[[1, 2]].isnan().all()
    assert not torch.equal(pool[3], before[3])


@pytest.mark.parametrize("accepted", range(1, 5))
def test_verify(accepted, device):
    """A state a drafted token; the next call reads that of the last accepted one."""
    problem = make(B=2, T=8, initial_state=torch.float32)
    expected, _, inner = solve(problem, every=1)
    here = problem.to(device)
    slots = indices([[5, 2, 8, 0], [1, 7, 3, 6]], device)
    pool = start(here, 9, [8, 3])  # the third of its slots: three tokens were accepted last
    out = libflashkda.decode(*tokens(here, 0, 4), pool, **options_of(here), state_indices=slots,
                             num_accepted_tokens=indices([3, 3], device))
    assert_close(out, expected[:, :4], "fp32")
    for n in range(2):
        states = in_layout(numpy.array(inner[n][1:5]), "v_first")
        assert_close(pool[slots[n].long()], states, "fp32")
    out = libflashkda.decode(*tokens(here, accepted, 4), pool, **options_of(here), state_indices=slots,
                             num_accepted_tokens=indices([accepted] * 2, device))
    assert_close(out, expected[:, accepted:accepted + 4], "fp32")
    assert pool[4].isnan().all()


@pytest.mark.parametrize("accepted", range(5))
def test_verify_and_commit(accepted, device):
    problem = make(B=2, T=4, initial_state=torch.float32)
    expected, _, inner = solve(problem, every=1)
    here = problem.to(device)
    state = here.options["initial_state"].clone()
    out = libflashkda.decode(*here.inputs, state, **options_of(here), keep_state=True)
    assert_close(out, expected, "fp32")
    assert torch.equal(state, here.options["initial_state"])
    assert libflashkda.decode(*here.inputs, state, **options_of(here), output=False,
                              accepted=indices([accepted] * 2, device)) is None
    if accepted < 4:
        assert_close(state, in_layout(numpy.array([x[accepted] for x in inner]), "v_first"), "fp32")


# ---- A whole step ----------------------------------------------------------------------------------


def convolve(x, weight, bias, past):
    """x [B, T, heads, dim] after past [B, channels, 3]: what comes out, in fp64, and the last three inputs."""
    flat = torch.cat([past.double(), x.flatten(2).mT.double()], 2)
    y = torch.nn.functional.conv1d(flat, weight.double()[:, None], None if bias is None else bias.double(),
                                   groups=len(weight))
    return torch.nn.functional.silu(y).mT.reshape(x.shape), flat[..., -3:]


@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused(T, dtype, activation, device):
    problem = make(B=2, T=T, H=2, HV=4, K=32, V=48, dtype=dtype, initial_state=torch.float32)
    generator = torch.Generator().manual_seed(1)
    raw, convolutions, pasts = [], [], []
    for i, x in enumerate(problem.inputs[:3]):
        channels = x.shape[2] * x.shape[3]
        weight = (torch.randn(channels, 4, generator=generator) / 2).to(dtype)
        bias = torch.randn(channels, generator=generator).to(dtype) if i else None
        past = torch.randn(2, channels, 3, generator=generator).to(dtype)
        raw.append(x)
        convolutions.append((weight, bias, past))
    outputs = [convolve(x, *conv) for x, conv in zip(raw, convolutions)]
    # in fp64, so that the recurrence sees what the step does
    exact = dataclasses.replace(problem, q=outputs[0][0], k=outputs[1][0], v=outputs[2][0])
    expected, states, _ = solve(exact)
    weight, gate = torch.rand(48, generator=generator), torch.randn(2, T, 4, 48, generator=generator).to(dtype)
    expected = torch.from_numpy(expected)
    expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    expected = expected * (gate.double().sigmoid() if activation == "sigmoid"
                           else torch.nn.functional.silu(gate.double()))

    def moved(conv):
        """Three slots, the sequences in 2 and 0, channels last."""
        pool = torch.full((3, 3, len(conv[0])), torch.nan, dtype=dtype, device=device)
        pool[[2, 0]] = conv[2].mT.to(device)
        pasts.append(pool)
        return conv[0].to(device), None if conv[1] is None else conv[1].to(device), pool.mT

    here = problem.to(device)
    pool = start(here, 3, [2, 0])
    names = ("q_conv", "k_conv", "v_conv")
    out = libflashkda.decode(*(x.to(device) for x in raw), here.g, here.beta, pool, **options_of(here),
                             state_indices=indices([2, 0], device), norm_weight=weight.to(device), norm_gate=gate.to(device),
                             norm_activation=activation, **{name: moved(conv) for name, conv in zip(names, convolutions)})
    assert_close(out, expected.numpy(), "fp32")
    assert_close(pool[[2, 0]], in_layout(states, "v_first"), "fp32")
    for past, (_, last) in zip(pasts, outputs, strict=True):
        assert torch.equal(past[[2, 0]].mT.cpu(), last.to(dtype)) and past[1].isnan().all()


@pytest.mark.parametrize("more, exception, sentence", [
    ({"q_conv": torch.zeros(128, 4)}, TypeError, "q_conv is of type"),
    ({"q_conv": (torch.zeros(128, 3), None, torch.zeros(1, 128, 3))}, ValueError, "q_conv_weight has shape"),
    ({"v_conv": (torch.zeros(128, 4), None, None)}, ValueError, "v_conv_state is NULL"),
    ({"norm_gate": torch.zeros(1, 2, 2, 64)}, ValueError, "norm_gate is given without norm_weight"),
    ({"norm_weight": torch.zeros(64), "norm_activation": "relu"}, ValueError, "norm_activation is 'relu'"),
    ({"norm_weight": torch.zeros(64), "norm_eps": 0.0}, ValueError, "norm_eps is 0"),
], ids=str)
def test_errors_of_a_whole_step(more, exception, sentence):
    problem = make(T=2, initial_state=torch.float32)
    with pytest.raises(exception, match=sentence):
        libflashkda.decode(*problem.inputs, problem.options["initial_state"], **options_of(problem), **more)


def test_describe():
    problem = make(T=1, initial_state=torch.float32)
    text = libflashkda.decode_describe(*problem.inputs, problem.options["initial_state"], **options_of(problem))
    assert text.startswith("cpu: level ")


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value, exception, sentence", [
    ("state", None, ValueError, "state is NULL"),
    ("state", torch.zeros(2, 2, 64, 60), ValueError, "state has shape"),
    ("state", torch.zeros(2, 2, 64, 64, dtype=torch.float64), ValueError, "state has dtype"),
    ("state_indices", torch.tensor([0.0, 1.0]), ValueError, "state_indices has dtype float32; expected int32 or int64"),
    ("state_indices", indices([1, 1]), ValueError, "state_indices of sequence 1 holds 1, a slot that is used twice"),
    ("state_indices", indices([0, 2]), ValueError, "state_indices of sequence 1 holds 2"),
    ("num_accepted_tokens", indices([1, 1]), ValueError, "num_accepted_tokens is given without"),
    ("accepted", indices([1, 3]), ValueError, r"accepted\[1\] is 3"),
    ("max_tokens", 3, ValueError, "max_tokens is 3 without cu_seqlens"),
    ("max_tokens", 1.5, TypeError, "max_tokens is 1.5"),
    ("output", False, ValueError, "out is given with output=False"),
    ("gate", "relu", ValueError, "gate is 'relu'"),
], ids=str)
def test_errors(name, value, exception, sentence):
    problem = make(B=2, T=2, initial_state=torch.float32)
    state = problem.options["initial_state"]
    call = {**dict(zip(("q", "k", "v", "g", "beta"), problem.inputs)), **options_of(problem), "state": state,
            "out": torch.full_like(problem.v, 7.0)}
    before = state.clone()
    with pytest.raises(exception, match=sentence):
        libflashkda.decode(**{**call, name: value})
    assert torch.equal(state, before) and (call["out"] == 7).all()


def test_too_many_tokens():
    problem = make(T=17, initial_state=torch.float32)
    with pytest.raises(ValueError, match="q has T = 17 tokens; expected at most 16"):
        libflashkda.decode(*problem.inputs, problem.options["initial_state"], **options_of(problem))


def test_gradients_are_refused():
    problem = make(T=1, initial_state=torch.float32)
    problem.q.requires_grad_()
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="q requires grad"):
        libflashkda.decode(*problem.inputs, problem.options["initial_state"], **options_of(problem))


# ---- Array libraries -----------------------------------------------------------------------------


def test_numpy():
    problem = make(B=2, T=3, dtype=torch.float32, initial_state=torch.float32)
    states = [problem.options["initial_state"].clone() for _ in range(2)]
    expected = libflashkda.decode(*problem.inputs, states[0], **options_of(problem))
    options = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in options_of(problem).items()}
    out = libflashkda.decode(*(x.numpy() for x in problem.inputs), states[1].numpy(), **options)
    assert numpy.array_equal(out, expected.numpy()) and torch.equal(*states)
    frozen = states[1].numpy()
    frozen.flags.writeable = False
    if numpy.lib.NumpyVersion(numpy.__version__) >= "2.1.0":
        with pytest.raises(ValueError, match="state is read-only"):
            libflashkda.decode(*(x.numpy() for x in problem.inputs), frozen, **options)
        libflashkda.decode(*(x.numpy() for x in problem.inputs), frozen, **options, keep_state=True)


@pytest.mark.library("jax")
def test_jax():
    import jax.numpy

    problem = make(B=2, T=3, dtype=torch.float32, initial_state=torch.float32)
    state = problem.options["initial_state"]
    expected = libflashkda.decode(*problem.inputs, state, **options_of(problem), keep_state=True)
    options = {name: jax.numpy.asarray(x.numpy()) if isinstance(x, torch.Tensor) else x
               for name, x in options_of(problem).items()}
    inputs = [jax.numpy.asarray(x.numpy()) for x in (*problem.inputs, state)]
    assert numpy.array_equal(numpy.asarray(libflashkda.decode(*inputs, **options, keep_state=True)), expected.numpy())
    with pytest.raises(ValueError, match="state is given with jax arrays, which cannot be written"):
        libflashkda.decode(*inputs, **options)


def test_without_the_c_exchange(device, monkeypatch):
    from libflashkda import _torch

    problem = make(B=2, T=3, initial_state=torch.float32).to(device)
    states = [problem.options["initial_state"].clone() for _ in range(2)]
    expected = libflashkda.decode(*problem.inputs, states[0], **options_of(problem))
    monkeypatch.setattr(_torch.LIBRARY, "exchange", False)
    assert torch.equal(libflashkda.decode(*problem.inputs, states[1], **options_of(problem)), expected)
    assert torch.equal(*states)


# ---- torch.compile -------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """A layer's step on a pool."""

    options: dict

    def __call__(self, pool, slots, q, k, v, g, beta, A_log, dt_bias):
        return libflashkda.decode(q * 1, k, v, g, beta, pool, state_indices=slots, A_log=A_log, dt_bias=dt_bias,
                                  **self.options) * 2


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled(backend, device):
    torch.compiler.reset()
    problem = make(B=2, T=1, initial_state=torch.float32).to(device)
    options = options_of(problem)
    weights = options.pop("A_log"), options.pop("dt_bias")
    pools = [start(problem, 4, [3, 1]) for _ in range(2)]
    slots = indices([3, 1], device)
    expected = Step(options)(pools[0], slots, *problem.inputs, *weights)
    out = torch.compile(Step(options), fullgraph=True, backend=backend)(pools[1], slots, *problem.inputs, *weights)
    assert torch.equal(out, expected)
    assert torch.equal(*(pool[slots.long()] for pool in pools)) and pools[1][[0, 2]].isnan().all()


def test_op_is_well_formed(device):
    problem = make(B=2, T=3, initial_state=torch.float32).to(device)
    o = problem.options
    torch.library.opcheck(torch.ops.libflashkda.decode.default,
                          (*problem.inputs, o["A_log"], o["dt_bias"], torch.empty_like(problem.v), None, None,
                           o["initial_state"], indices([1, 0], device), None, *[None] * 12),
                          {"gate": 1, "lower_bound": 0.0, "beta_mode": 1, "scale": 0.0, "flags": 1, "max_tokens": 0,
                           "norm_activation": 0, "norm_eps": 1e-5})


def test_fake_and_meta_tensors():
    problem = make(B=2, T=3, V=32, initial_state=torch.bfloat16)
    meta = problem.to("meta")
    out = libflashkda.decode(*meta.inputs, meta.options["initial_state"], **options_of(meta))
    assert out.shape == problem.v.shape and out.dtype == problem.v.dtype
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in problem.options.items()}
        inputs = [mode.from_tensor(x) for x in problem.inputs]
        state = fake.pop("initial_state")
        assert libflashkda.decode(*inputs, state, **fake).shape == problem.v.shape


# ---- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_graph_with_changing_slots():
    problem = make(B=3, T=1, initial_state=torch.float32).to("cuda")
    slots, out = indices([0, 1, 2], "cuda"), torch.empty_like(problem.v)
    pool = torch.randn(8, *problem.options["initial_state"].shape[1:], device="cuda")
    graph, options = torch.cuda.CUDAGraph(), options_of(problem)
    with torch.cuda.graph(graph):
        libflashkda.decode(*problem.inputs, pool, **options, state_indices=slots, out=out)
    for row in ([7, 2, 5], [4, -1, 0]):
        expected_pool = pool.clone()
        slots.copy_(indices(row, "cuda"))
        kept = out.clone()
        expected = libflashkda.decode(*problem.inputs, expected_pool, **options, state_indices=slots, out=kept)
        graph.replay()
        assert torch.equal(out, expected) and torch.equal(pool, expected_pool)
