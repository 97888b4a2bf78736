# SPDX-License-Identifier: MIT
"""prefill(): against the recurrence, for every argument and array library."""

from __future__ import annotations

import libflashkda
import hypothesis
import numpy
import pytest
import torch
from hypothesis import strategies
from recurrence import assert_close, captured, error_ratio, in_layout, make, solve

pytestmark = pytest.mark.usefixtures("no_grad")


def check(problem, device, **more):
    """Runs a problem and compares what comes back. more: arguments that change no result."""
    here = problem.to(device)
    expected, states, _ = solve(problem)
    out, final_state = libflashkda.prefill(*here.inputs, **here.options, **more, output_final_state=True)
    description = libflashkda.prefill_describe(*here.inputs, **here.options)
    assert out.dtype == problem.v.dtype and out.device == here.q.device
    assert_close(out, expected, description)
    assert_close(final_state, in_layout(states, problem.options["state_layout"]), description)


@pytest.mark.parametrize("gate", ["softplus", "sigmoid"])
def test_captured(gate, device):
    problem, expected, state = captured(gate)
    problem = problem.to(device)
    out, final_state = libflashkda.prefill(*problem.inputs, **problem.options, output_final_state=True)
    description = libflashkda.prefill_describe(*problem.inputs, **problem.options)
    assert_close(out, expected.double().numpy(), description)
    assert_close(final_state, state.double().numpy(), description)


DTYPES = strategies.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@strategies.composite
def problems(draw):
    heads, groups = draw(strategies.integers(1, 3)), draw(strategies.integers(1, 3))
    lengths = draw(strategies.none() | strategies.lists(strategies.integers(0, 40), min_size=1, max_size=4))
    gate = draw(strategies.sampled_from(["none", "softplus", "sigmoid"]))
    return make(B=1 if lengths is not None else draw(strategies.integers(1, 2)), T=draw(strategies.integers(0, 70)),
                lengths=lengths, H=heads, HV=heads * groups, K=draw(strategies.sampled_from([8, 60, 64, 128])),
                V=draw(strategies.sampled_from([4, 50, 64, 128])), dtype=draw(DTYPES), gate=gate,
                beta_mode=draw(strategies.sampled_from(["given", "sigmoid", "twice_sigmoid"])),
                qk_norm=draw(strategies.booleans()), v_first=draw(strategies.booleans()),
                initial_state=draw(strategies.sampled_from([None, torch.float32, torch.bfloat16])),
                scale=draw(strategies.sampled_from([None, 0.3])), seed=draw(strategies.integers(0, 999)),
                **({"lower_bound": draw(strategies.floats(-5, -0.1))} if gate == "sigmoid" else {}))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(problem=problems())
def test_shapes_and_flags(problem, device):
    check(problem, device)


def test_num_threads_and_batch_invariance():
    problem = make(T=300, lengths=[100, 200])
    runs = [libflashkda.prefill(*problem.inputs, **problem.options, batch_invariant=True, num_threads=n) for n in (1, 2)]
    assert torch.equal(*runs)
    first = make(T=300, lengths=[100, 200])
    alone = libflashkda.prefill(*(x[:, :100] for x in first.inputs), batch_invariant=True,
                                **{**first.options, "cu_seqlens": torch.tensor([0, 100])})
    assert torch.equal(alone, runs[0][:, :100])


def test_reference_backend_is_the_recurrence():
    problem = make(dtype=torch.float32)
    out = libflashkda.prefill(*problem.inputs, **problem.options, backend="reference")
    assert error_ratio(out, solve(problem)[0]) < 2e-7


# ---- Memory --------------------------------------------------------------------------------------


def test_slices_of_a_fused_projection(device):
    problem = make(B=2, T=50, H=2, K=32, V=32).to(device)
    expected = libflashkda.prefill(*problem.inputs, **problem.options)
    fused = torch.cat([x.flatten(2) for x in problem.inputs], -1)
    slices = fused.split([64, 64, 64, 64, 2], -1)
    views = [x.unflatten(-1, (2, -1)) for x in slices[:4]] + [slices[4]]
    assert not any(view.is_contiguous() for view in views)
    assert torch.equal(libflashkda.prefill(*views, **problem.options), expected)


def test_head_first_inputs_and_output(device):
    problem = make(T=50).to(device)
    expected = libflashkda.prefill(*problem.inputs, **problem.options)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in problem.inputs]
    out = torch.full((1, 2, 50, 70), 7.0, dtype=torch.bfloat16, device=device)
    view = out[..., :64].transpose(1, 2)
    assert libflashkda.prefill(*views, **problem.options, out=view) is view
    assert torch.equal(view, expected)
    assert (out[..., 64:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_dtypes(dtype, device):
    problem = make(lengths=[10, 0, 33, 27])
    problem.options["cu_seqlens"] = problem.options["cu_seqlens"].to(dtype)
    check(problem, device)


def test_a_dtype_for_each_array(device):
    problem = make()
    dtypes = torch.bfloat16, torch.float16, torch.float32, torch.float32, torch.float16
    for name, dtype in zip(("q", "k", "v", "g", "beta"), dtypes):
        setattr(problem, name, getattr(problem, name).to(dtype))
    check(problem, device)


def test_fp32_out_of_bf16_inputs():
    problem = make(T=200, K=128, V=128)
    out = torch.empty_like(problem.v, dtype=torch.float32)
    libflashkda.prefill(*problem.inputs, **problem.options, out=out)
    assert error_ratio(out, solve(problem)[0]) < 1e-5


def test_workspace_of_the_caller(device):
    problem = make().to(device)
    expected = libflashkda.prefill(*problem.inputs, **problem.options)
    size = libflashkda.prefill_workspace_size(*problem.inputs, **problem.options)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    assert torch.equal(libflashkda.prefill(*problem.inputs, **problem.options, workspace=workspace), expected)


# ---- States --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_in_place(dtype, device):
    problem = make(T=40, initial_state=dtype).to(device)
    out, expected = libflashkda.prefill(*problem.inputs, **problem.options, output_final_state=True)
    assert expected.dtype == dtype
    state = problem.options["initial_state"]
    again, same = libflashkda.prefill(*problem.inputs, **problem.options, final_state=state)
    assert same is state
    assert torch.equal(again, out) and torch.equal(state, expected)


def test_two_halves_make_a_whole(device):
    problem = make(T=80, dtype=torch.float32).to(device)
    whole, expected = libflashkda.prefill(*problem.inputs, **problem.options, output_final_state=True)
    first, state = libflashkda.prefill(*(x[:, :37] for x in problem.inputs), **problem.options, output_final_state=True)
    second, state = libflashkda.prefill(*(x[:, 37:] for x in problem.inputs), **problem.options, initial_state=state,
                                        final_state=state)
    description = libflashkda.prefill_describe(*problem.inputs, **problem.options)
    assert_close(torch.cat([first, second], 1), whole.double().cpu().numpy(), description)
    assert_close(state, expected.double().cpu().numpy(), description)


def test_pool(device):
    problem = make(lengths=[20, 0, 30, 25], initial_state=torch.float32).to(device)
    expected, states = libflashkda.prefill(*problem.inputs, **problem.options, output_final_state=True)
    pool = torch.full((6, 2, 64, 64), 7.0, device=device)
    slots = [4, 1, -1, 0]
    used = [slot for slot in slots if slot >= 0]
    initial = problem.options.pop("initial_state")
    pool[used] = initial[[0, 1, 3]]
    out = torch.full_like(problem.v, 7)
    indices = torch.tensor(slots, dtype=torch.int32, device=device)
    libflashkda.prefill(*problem.inputs, **problem.options, initial_state=pool, final_state=pool, state_indices=indices,
                        out=out)
    assert torch.equal(pool[used], states[[0, 1, 3]])
    assert (pool[[2, 3, 5]] == 7).all()
    assert (out[:, 20:50] == 7).all()
    assert torch.equal(out[:, :20], expected[:, :20]) and torch.equal(out[:, 50:], expected[:, 50:])


# ---- Checkpoints ---------------------------------------------------------------------------------


def prefixes(problem, device, positions):
    """Final states of a dense problem cut off after so many tokens, [B, len(positions), ..]."""
    states = []
    for position in positions:
        cut = [x[:, :position] for x in problem.to(device).inputs]
        states.append(libflashkda.prefill(*cut, **problem.to(device).options, output_final_state=True)[1])
    return torch.stack(states, 1)


@pytest.mark.parametrize("v_first", [True, False])
def test_checkpoints_every(v_first, device):
    problem = make(B=2, T=70, K=64, V=32, dtype=torch.float32, v_first=v_first)
    here = problem.to(device)
    head = (32, 64) if v_first else (64, 32)
    checkpoints = torch.empty(2, 3, 2, *head, device=device)
    libflashkda.prefill(*here.inputs, **here.options, checkpoints=checkpoints, checkpoint_every=32)
    description = libflashkda.prefill_describe(*here.inputs, **here.options)
    assert_close(checkpoints, prefixes(problem, device, [32, 64, 70]).double().cpu().numpy(), description)


def test_checkpoints_at_offsets(device):
    problem = make(B=2, T=70, dtype=torch.float32)
    here = problem.to(device)
    checkpoints = torch.full((2, 3, 2, 64, 64), 7.0, device=device)
    offsets = torch.tensor([[5, 70, -1], [5, 70, -1]], dtype=torch.int32, device=device)
    libflashkda.prefill(*here.inputs, **here.options, checkpoints=checkpoints, checkpoint_offsets=offsets)
    description = libflashkda.prefill_describe(*here.inputs, **here.options)
    assert_close(checkpoints[:, :2], prefixes(problem, device, [5, 70]).double().cpu().numpy(), description)
    assert (checkpoints[:, 2] == 7).all()


def test_checkpoints_of_packed_sequences_by_index(device):
    problem = make(lengths=[40, 0, 20], dtype=torch.float32)
    here = problem.to(device)
    checkpoints = torch.full((5, 2, 64, 64), 7.0, device=device)
    starts = torch.tensor([0, 3, 3, 5], device=device)
    indices = torch.tensor([4, -1, 0, 2, 1], dtype=torch.int32, device=device)
    libflashkda.prefill(*here.inputs, **here.options, checkpoints=checkpoints, checkpoint_every=16,
                        checkpoint_cu_starts=starts, checkpoint_indices=indices)
    description = libflashkda.prefill_describe(*here.inputs, **here.options)
    _, _, inner = solve(problem, every=16)
    finals = in_layout(solve(problem)[1], "v_first")
    expected = numpy.stack([finals[0], finals[2], in_layout(inner[2][1], "v_first"), in_layout(inner[0][1], "v_first")])
    assert_close(checkpoints[[0, 1, 2, 4]], expected, description)
    assert (checkpoints[3] == 7).all()


# ---- Array libraries -----------------------------------------------------------------------------


def as_numpy(x):
    import ml_dtypes

    if x is None or not isinstance(x, torch.Tensor):
        return x
    x = x.contiguous()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def other_library(problem, convert):
    inputs = [convert(x) for x in problem.inputs]
    options = {name: convert(value) for name, value in problem.options.items()}
    out, state = libflashkda.prefill(*inputs, **options, output_final_state=True)
    assert isinstance(out, type(inputs[0])) and isinstance(state, type(inputs[0]))
    assert out.dtype == inputs[2].dtype
    return out, state


def assert_same_bits(x, expected):
    x, expected = numpy.asarray(x), as_numpy(expected)
    assert x.dtype == expected.dtype and x.shape == expected.shape and x.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("library", ["numpy", pytest.param("jax", marks=pytest.mark.library("jax"))])
def test_same_bits_as_torch(library, dtype):
    def convert(x):
        x = as_numpy(x)
        if library == "jax" and isinstance(x, numpy.ndarray):
            import jax

            return jax.device_put(x, jax.devices("cpu")[0])
        return x

    problem = make(lengths=[20, 33], dtype=dtype, initial_state=torch.float32)
    problem.options["cu_seqlens"] = problem.options["cu_seqlens"].int()
    expected = libflashkda.prefill(*problem.inputs, **problem.options, output_final_state=True)
    for x, y in zip(other_library(problem, convert), expected, strict=True):
        assert_same_bits(x, y)


@pytest.mark.cuda
@pytest.mark.library("jax_cuda12_plugin", "jax_cuda13_plugin")
def test_jax_on_cuda():
    import jax

    problem = make(lengths=[20, 33], initial_state=torch.float32)
    problem.options["cu_seqlens"] = problem.options["cu_seqlens"].int()
    device = problem.to("cuda")
    expected = libflashkda.prefill(*device.inputs, **device.options, output_final_state=True)
    results = other_library(problem, lambda x: jax.device_put(as_numpy(x)) if isinstance(x, torch.Tensor) else x)
    for x, y in zip(results, expected, strict=True):
        assert_same_bits(x, y.cpu())


@pytest.mark.cuda
@pytest.mark.library("cupy")
def test_cupy():
    import cupy

    problem = make(lengths=[20, 33], initial_state=torch.float32, dtype=torch.float32)
    device = problem.to("cuda")
    expected = libflashkda.prefill(*device.inputs, **device.options, output_final_state=True)
    with cupy.cuda.Stream(non_blocking=True):
        results = other_library(problem, lambda x: cupy.asarray(as_numpy(x)) if isinstance(x, torch.Tensor) else x)
        for x, y in zip(results, expected, strict=True):
            assert_same_bits(x.get(), y.cpu())


def test_without_the_c_exchange(device, monkeypatch):
    """torch before 2.10 lends its tensors by capsules."""
    from libflashkda import _torch

    problem = make(lengths=[20, 33]).to(device)
    expected = libflashkda.prefill(*problem.inputs, **problem.options)
    monkeypatch.setattr(_torch.LIBRARY, "exchange", False)
    assert torch.equal(libflashkda.prefill(*problem.inputs, **problem.options), expected)


def test_numpy_without_tokens():
    """numpy's arrays without elements may have strides of 0."""
    problem = make(T=0, initial_state=torch.float32, dtype=torch.float32)
    inputs = [x.numpy() for x in problem.inputs]
    assert 0 in inputs[0].strides
    options = {name: as_numpy(value) for name, value in problem.options.items()}
    out, state = libflashkda.prefill(*inputs, **options, output_final_state=True)
    assert out.shape == (1, 0, 2, 64)
    assert_same_bits(state, problem.options["initial_state"])


def test_numpy_in_place():
    problem = make(initial_state=torch.float32)
    inputs = [as_numpy(x) for x in problem.inputs]
    options = {name: as_numpy(value) for name, value in problem.options.items()}
    out, state = numpy.empty_like(inputs[2]), options["initial_state"]
    expected = libflashkda.prefill(*problem.inputs, **problem.options, output_final_state=True)
    options["initial_state"] = state = state.copy()
    result = libflashkda.prefill(*inputs, **options, out=out, final_state=state)
    assert result[0] is out and result[1] is state
    assert_same_bits(out, expected[0])
    assert_same_bits(state, expected[1])
